"""Whole models through the interpreted Triton backend generate the reference's tokens, by the engine's own loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pagelens import LLM, Reader, SamplingParams

SAMPLES = Path(__file__).resolve().parents[3] / "engine" / "assets" / "samples"
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
PROMPTS = [[5, 17, 3, 80, 41, 9, 2], [11, 12], list(range(20, 50))]


def read(backend: str, dtype: str, tokens: int) -> tuple[str, int]:
    with Reader(backend=backend, dtype=dtype, max_model_len=256, max_num_seqs=1, num_threads=1) as reader:
        page = reader.read(SAMPLES / "notice.png", sampling=SamplingParams(max_tokens=tokens))
    return page.raw_text, page.usage.text_tokens


@pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning")
@pytest.mark.parametrize(("dtype", "tokens"), [("bfloat16", 8), ("float16", 2)])
def test_the_builtin_reader(dtype: str, tokens: int) -> None:
    """One view, from pixels to text. float16 is compared with float32: the reader's choices are clear."""
    expected = read("reference", "float32" if dtype == "float16" else dtype, tokens)
    assert read("triton", dtype, tokens) == expected
    assert expected[1] == tokens
    assert expected[0].strip()


def answer(folder: Path, sampling: SamplingParams, **options: Any) -> list[list[int]]:
    with LLM(folder, random_weights=3, max_num_seqs=3, max_batch_tokens=24, block_size=4, **options) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, sampling)]


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_moe")
    (folder / "config.json").write_text(json.dumps(QWEN3_MOE), encoding="utf-8")
    return folder


GREEDY = SamplingParams(max_tokens=6)
FIRST = SamplingParams(max_tokens=1)
DRAWN = SamplingParams(max_tokens=6, temperature=0.8, top_k=20, top_p=0.9, seed=1)


@pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning")
@pytest.mark.parametrize(("weights", "sampling"), [("auto", GREEDY), ("auto", DRAWN), ("int8", FIRST), ("int4", FIRST)])
def test_a_tiny_qwen3_moe(weights: str, sampling: SamplingParams, qwen3_moe: Path) -> None:
    """Three prompts together, one of them in chunks beside decodes.

    Of quantised weights the first token only: where two sums fall on different sides of a step of the rounded inputs,
    all that follows shifts by it, and on a random model's flat distribution that can decide (a drawn second token did).
    """
    options: dict[str, Any] = {"weights": weights, "dtype": "float32"}
    assert answer(qwen3_moe, sampling, backend="triton", **options) == answer(
        qwen3_moe, sampling, backend="reference", **options
    )


@pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning")
def test_the_environment_can_name_the_backend(qwen3_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGELENS_BACKEND", "triton")
    with LLM(qwen3_moe, random_weights=3, dtype="float32") as llm:
        assert llm.config.backend == "triton"
    monkeypatch.setenv("PAGELENS_BACKEND", "reference")
    with LLM(qwen3_moe, random_weights=3, backend="triton", dtype="float16") as llm:
        assert llm.config.backend == "triton"
