"""Whole models on a device without memory: every tensor that an op gets lies there, and nothing is read back unasked.

A CPU cannot show a tensor on the wrong side, as there is one side only. Tensors of torch's meta device can: an op with
a tensor of the host among them is refused, and reading from one raises. Only the token ids that a pass may read back
have a stand-in.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed: there are wheels for Linux only", allow_module_level=True)

from helpers.null_device import NULL, QWEN3_06B, TOKEN, null_engine, null_model
from helpers.tiny_models import TINY, make_plan, make_views

from pagelens.inputs import Request
from pagelens.models.deepseek_ocr import DeepseekOcr
from pagelens.types import NgramGuard, SamplingParams


def request(length: int, sampling: SamplingParams, **more: Any) -> Request:
    prompt = [2 + i % 50 for i in range(length)]
    return Request(f"{length}", None, prompt, (), replace(sampling, detect_repetition=False), **more)


def answers(length: int, sampling: SamplingParams, **options: Any) -> list[int]:
    with null_engine(QWEN3_06B, use_graphs=True, sequences=2, **options) as (engine, _):
        state = engine.add_request(request(length, sampling))
        while engine.has_work:
            engine.step()
    assert state.error is None
    return list(state.answers[0].output().token_ids)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=3),
        SamplingParams(max_tokens=3, temperature=0.8, top_k=20, top_p=0.9, min_p=0.1, seed=1),
        SamplingParams(max_tokens=3, ngram_guard=NgramGuard(size=2, window=20)),
    ],
    ids=["greedy", "drawn", "guarded"],
)
def test_tokens_are_chosen_on_the_device(sampling: SamplingParams) -> None:
    """No row of logits is read back: a meta tensor would raise."""
    assert answers(5, sampling) == [TOKEN] * 3


def test_a_prompt_in_chunks_reads_nothing_back_before_its_end() -> None:
    """70 tokens in passes of 16: four of five passes choose no token."""
    assert answers(70, SamplingParams(max_tokens=2), max_batch_tokens=16) == [TOKEN] * 2


@pytest.mark.parametrize("tiles", [0, 64, 128])
def test_a_page_is_encoded_on_the_device(tiles: int) -> None:
    """Without tiles, with tiles of another size than the page, and of the same size."""
    plan = make_plan(128, tiles, 2, 2) if tiles else make_plan(128)
    with null_model(DeepseekOcr, TINY) as (model, counter):
        rows = model.encode_image(make_views(plan), plan)
    assert rows.device == NULL
    assert rows.shape == (plan.num_image_tokens, TINY.decoder.hidden_size)
    assert rows.dtype == torch.bfloat16
    assert {"patch_embed_kernel", "window_attention_kernel", "conv_kernel", "attention_kernel"} <= set(counter.names)


def test_tensors_of_the_host_are_refused() -> None:
    """The result of an op too: a kernel would write to an address that the device does not have."""
    from helpers.null_device import NullOps

    from pagelens.errors import ShapeError

    ops: Any = NullOps(None)
    x, weight, here = torch.zeros(2, 8, device=NULL), torch.zeros(8, device=NULL), torch.zeros(2, 8)
    qkv, grid = torch.zeros(1, 4, 24, device=NULL), torch.zeros(1, 2, 2, 24, device=NULL)
    pad, table = torch.zeros(24, device=NULL), torch.zeros(3, 8, device=NULL)
    calls = [
        lambda: ops.rms_norm(x, weight, 1e-6, out=here),
        lambda: ops.layer_norm(x, weight, weight, 1e-6, out=here),
        lambda: ops.rms_norm(here, weight, 1e-6),
        lambda: ops.linear(x, ops.pack_linear(torch.zeros(8, 8)), out=here),
        lambda: ops.attention(qkv, 1, out=torch.zeros(1, 4, 8)),
        lambda: ops.window_attention(grid, pad, table, table, 1, 0, out=torch.zeros(1, 2, 2, 8)),
    ]
    for call in calls:
        with pytest.raises(ShapeError):
            call()


def test_a_step_makes_the_models_gpu_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread begins with GPU 0, wherever the model is."""
    from contextlib import nullcontext

    from pagelens import core

    asked: list[torch.device] = []

    def record(device: torch.device) -> Any:
        asked.append(device)
        return nullcontext()

    monkeypatch.setattr(core, "on_device", record)
    assert answers(5, SamplingParams(max_tokens=3)) == [TOKEN] * 3
    assert asked == [NULL] * 3
