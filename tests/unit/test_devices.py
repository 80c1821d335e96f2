"""Asking for a GPU: one clear line where there is none, and which backend goes with which device and dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pagelens import LLM
from pagelens.config import EngineConfig
from pagelens.errors import ConfigError, UnsupportedError
from pagelens.ops import devices
from pagelens.ops.registry import resolve_ops
from pagelens.runtime.batch import LADDER, BatchBuilder
from pagelens.runtime.sequence import Chunk, Sequence


def test_without_a_gpu_the_error_is_one_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError) as caught:
        LLM("qwen3-0.6b", random_weights=True, device="cuda", kv_cache_bytes=1 << 24)
    message = str(caught.value)
    assert "\n" not in message
    assert "no GPU" in message
    assert torch.__version__ in message
    assert "device='cpu'" in message


def test_the_remedy_depends_on_the_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "install a build of torch" in str(devices.describe_missing_gpu())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "for CUDA 13.0" in str(devices.describe_missing_gpu())
    assert "driver" in str(devices.describe_missing_gpu())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.describe_missing_gpu() is None


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({}, "auto"),
        ({"device": "cuda"}, "auto"),
        ({"device": "cuda", "backend": "triton", "dtype": "float16"}, "triton"),
        ({"device": "cuda", "dtype": "float16"}, "auto"),
        ({"backend": "native"}, "native"),
    ],
    ids=str,
)
def test_the_backend_that_goes_with_a_device(options: dict[str, Any], backend: str) -> None:
    assert EngineConfig("m", **options).resolve().backend == backend


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cuda", "backend": "native"}, "runs on the CPU"),
        ({"device": "cuda:1"}, "cpu, cuda"),
        ({"dtype": "float16"}, "backend='triton'"),
        ({"backend": "gpu"}, "triton"),
    ],
    ids=str,
)
def test_what_does_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig("m", **options).resolve()


def test_the_variable_stands_in_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig("m")
    monkeypatch.setenv("PAGELENS_BACKEND", "reference")
    assert config.resolve().backend == "reference"
    assert replace(config, backend="native").resolve().backend == "native"
    monkeypatch.setenv("PAGELENS_BACKEND", "gpu")
    with pytest.raises(ConfigError, match="PAGELENS_BACKEND='gpu'"):
        config.resolve()
    monkeypatch.setenv("PAGELENS_BACKEND", "native")
    with pytest.raises(ConfigError, match="runs on the CPU"):
        replace(config, device="cuda").resolve()


def test_not_every_backend_takes_a_device() -> None:
    with pytest.raises(ConfigError, match="'triton' and 'cuda' run on 'cuda'"):
        resolve_ops("native", device="cuda")


# ---- batches on a device -------------------------------------------------------------------------------------------
def schedule(count: int, tokens: int = 1) -> list[Chunk]:
    chunks = []
    for i in range(count):
        sequence = Sequence(f"{i}", list(range(20)), 20 - tokens, 5)
        sequence.block_table = [3 + i, 9, 1]
        chunks.append(Chunk(sequence, 20 - tokens, tokens))
    return chunks


def test_decodes_on_a_device_are_filled_up_with_rows_that_store_nothing() -> None:
    builder = BatchBuilder(64, 8, 4, 8, device=torch.device("meta"))
    batch = builder.build(schedule(5))
    assert {t.device.type for t in (batch.token_ids, batch.slots, batch.block_tables, batch.logit_rows)} == {"meta"}
    assert batch.token_ids.shape == batch.context_lens.shape == (8,)
    assert batch.query_starts.shape == (9,)
    assert batch.logit_rows.shape == (5,)
    host = builder._np_slots, builder._np_context_lens, builder._np_query_starts
    assert host[0][:8].tolist() == [*(1 * 8 + 3 for _ in range(5)), -1, -1, -1]
    assert host[1][:8].tolist() == [20] * 5 + [1] * 3
    assert host[2][:9].tolist() == list(range(9))
    # Not beyond what the buffers hold, and no prompts.
    assert builder.build(schedule(8)).token_ids.shape == (8,)
    assert builder.build(schedule(3, tokens=2)).token_ids.shape == (6,)
    assert BatchBuilder(64, 5, 4, 8, device=torch.device("meta")).build(schedule(5)).token_ids.shape == (5,)


def test_on_the_cpu_nothing_is_filled_up_or_copied() -> None:
    batch = BatchBuilder(64, 8, 4, 8).build(schedule(5))
    assert batch.token_ids.shape == (5,)
    assert batch.slots.tolist() == [11] * 5


def test_the_ladder_rises() -> None:
    assert sorted(set(LADDER)) == list(LADDER)
    assert LADDER[0] == 1
