"""Whole models through the interpreted Triton backend generate the reference's tokens, by the engine's own loop."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from gpu.model_runs import QWEN3_MOE, ROUNDING, Answer, differences, generate, tokens_of

from pagelens import LLM, Reader, SamplingParams

SAMPLES = Path(__file__).resolve().parents[3] / "engine" / "assets" / "samples"
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


def answers(folder: Path, sampling: SamplingParams, **options: Any) -> list[Answer]:
    """Three prompts together, one of them in chunks beside decodes."""
    sizes = {"max_num_seqs": 3, "max_batch_tokens": 24, "block_size": 4, "dtype": "float32"}
    return generate(folder, PROMPTS, sampling, **sizes, **options)


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_moe")
    (folder / "config.json").write_text(json.dumps(QWEN3_MOE), encoding="utf-8")
    return folder


GREEDY = SamplingParams(max_tokens=8)
DRAWN = SamplingParams(max_tokens=8, temperature=0.8, top_k=20, top_p=0.9, seed=1)
STEPS_OF_INPUTS = 0.2  # of logits of about 1, where an input is rounded to the other side of a step; seen: 0.06


@pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning")
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_tiny_qwen3_moe(sampling: SamplingParams, qwen3_moe: Path) -> None:
    """8 tokens each, all the same."""
    found, expected = (answers(qwen3_moe, sampling, backend=name) for name in ("triton", "reference"))
    assert tokens_of(found) == tokens_of(expected)
    assert max(differences(found, expected)) < ROUNDING


@pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning")
@pytest.mark.parametrize(("weights", "sampling"), [("int8", DRAWN), ("int4", GREEDY)])
def test_a_quantised_tiny_qwen3_moe(weights: str, sampling: SamplingParams, qwen3_moe: Path) -> None:
    """8 tokens each, the same but for near-ties; see differences().

    Inputs are rounded to whole numbers: where one is 35.49999 by one order of adding and 35.50002 by another, a step of
    it goes through all that follows (docs/log.md; once here, in the longest prompt). Most logits must still agree to
    float32's rounding, and all within what such a step comes to.
    """
    found, expected = (answers(qwen3_moe, sampling, backend=b, weights=weights) for b in ("triton", "reference"))
    assert [steps[0].token for steps in found] == [steps[0].token for steps in expected]
    seen = differences(found, expected)
    assert len(seen) > 16
    assert median(seen) < ROUNDING
    assert max(seen) < STEPS_OF_INPUTS


@pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning")
def test_the_environment_can_name_the_backend(qwen3_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGELENS_BACKEND", "triton")
    with LLM(qwen3_moe, random_weights=3, dtype="float32") as llm:
        assert llm.config.backend == "triton"
    monkeypatch.setenv("PAGELENS_BACKEND", "reference")
    with LLM(qwen3_moe, random_weights=3, backend="triton", dtype="float16") as llm:
        assert llm.config.backend == "triton"
