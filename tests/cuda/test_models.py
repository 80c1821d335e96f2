"""Whole models on the backend cuda-sim generate the reference's tokens, every kernel having been called."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cuda.kernel_cases import load
from helpers.simt_build import build_extension

from pagelens import LLM, Reader, SamplingParams

SAMPLES = Path(__file__).resolve().parents[2] / "engine" / "assets" / "samples"
DECODER_KERNELS = {"qk_norm_rope_store", "paged_attention", "moe_routing", "grouped_gemm"}
VISION_KERNELS = {"window_attention", "conv_downsample"}
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
PROMPTS = [[5, 17, 3, 80, 41, 9, 2], [11, 12], list(range(20, 50))]


class CountingKernels:
    """The module, its calls counted by name."""

    def __init__(self, kernels: Any) -> None:
        self.kernels, self.calls = kernels, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self.kernels, name)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> CountingKernels:
    counting = CountingKernels(load(build_extension("plain")))
    monkeypatch.setitem(sys.modules, "pagelens._cuda_sim", counting)  # type: ignore[arg-type]
    return counting


def read(backend: str) -> tuple[str, int]:
    with Reader(backend=backend, dtype="bfloat16", max_model_len=256, max_num_seqs=1, num_threads=1) as reader:
        page = reader.read(SAMPLES / "notice.png", sampling=SamplingParams(max_tokens=8))
    return page.raw_text, page.usage.text_tokens


def test_the_builtin_reader(kernels: CountingKernels) -> None:
    """One view, from pixels to its first 8 tokens."""
    expected = read("reference")
    assert not kernels.calls
    assert read("cuda-sim") == expected
    assert expected[1] == 8
    assert expected[0].strip()
    assert {name for name, count in kernels.calls.items() if count} >= DECODER_KERNELS | VISION_KERNELS


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_a_tiny_qwen3_moe(weights: str, kernels: CountingKernels, tmp_path: Path) -> None:
    """128 experts, 8 a token; three prompts together, one of them in chunks beside decodes.

    Weights that the engine itself rounds to int8 have activations rounded too, which the kernels do not do: then the
    experts run on the reference, and the rest on the kernels.
    """
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_MOE), encoding="utf-8")
    answers = {}
    for backend in ("reference", "cuda-sim"):
        options: dict[str, Any] = {"random_weights": 3, "weights": weights, "backend": backend}
        with LLM(tmp_path, max_num_seqs=3, max_batch_tokens=24, block_size=4, **options) as llm:
            outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=6 if weights == "auto" else 1))
        answers[backend] = [output.outputs[0].token_ids for output in outputs]
    assert answers["cuda-sim"] == answers["reference"]
    used = DECODER_KERNELS if weights == "auto" else {"qk_norm_rope_store", "paged_attention"}
    assert DECODER_KERNELS & set(kernels.calls) == used
