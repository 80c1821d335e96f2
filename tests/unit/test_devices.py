"""Asking for a GPU: one clear line where there is none, and which backend goes with which device and dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
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

READER = str(Path(__file__).resolve().parents[2] / "engine" / "assets" / "reader")


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


def test_the_ladder_goes_on_above_its_end() -> None:
    """Every count of its own would be recorded otherwise."""
    builder = BatchBuilder(512, 300, 4, 8, device=torch.device("meta"))
    assert [builder.build(schedule(n)).token_ids.shape[0] for n in (256, 257, 270, 300)] == [256, 300, 300, 300]
    builder = BatchBuilder(512, 500, 4, 8, device=torch.device("meta"))
    assert [builder.build(schedule(n)).token_ids.shape[0] for n in (257, 320, 321)] == [320, 320, 384]


class FakeEvent:
    def __init__(self, builder: list[BatchBuilder], seen: list[Any]) -> None:
        self.builder, self.seen = builder, seen

    def record(self) -> None:
        self.seen.append(("record", int(self.builder[0]._np_token_ids[0])))

    def synchronize(self) -> None:
        self.seen.append(("wait", int(self.builder[0]._np_token_ids[0])))


def test_the_next_batch_waits_for_the_copy_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a byte of the host's buffer changes, whether tokens were read back between or not."""
    from pagelens.runtime import batch

    seen: list[Any] = []
    holder: list[BatchBuilder] = []
    monkeypatch.setattr(batch, "new_event", lambda device: FakeEvent(holder, seen))
    holder.append(BatchBuilder(64, 8, 4, 8, device=torch.device("meta")))
    holder[0].build(schedule(1))  # token 19
    holder[0].build(schedule(1, tokens=2))  # token 18 first
    holder[0].build(schedule(1))
    assert seen == [("record", 19), ("wait", 19), ("record", 18), ("wait", 18), ("record", 19)]


def test_only_the_buffer_of_a_gpu_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU, an engine on the CPU must not start CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not BatchBuilder(64, 8, 4, 8)._host.is_pinned()


# ---- cards ---------------------------------------------------------------------------------------------------------
def test_a_card_that_is_too_old_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(UnsupportedError, match=r"Tesla T4 has compute capability 7\.5.*8\.0.*device='cpu'"):
        devices.find_device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert devices.find_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert devices.find_device("cuda") == torch.device("cuda", 1)


def test_the_current_gpu_of_a_thread_is_set() -> None:
    context: Any = devices.on_device(torch.device("cuda", 1))
    assert context.idx == 1
    with devices.on_device(torch.device("cpu")):
        pass


def test_a_model_without_room_on_the_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from pagelens import core

    def allocate(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")

    monkeypatch.setattr(core, "allocate", allocate)
    with pytest.raises(ConfigError, match=r"do not fit.*2\.00 GiB.*weights='int8'") as caught:
        LLM(READER, backend="reference")
    assert "\n" not in str(caught.value)


# ---- graphs --------------------------------------------------------------------------------------------------------
def test_graphs_of_two_models_share_neither_memory_nor_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """And another thread's work does not break a capture."""
    from pagelens.ops import triton_graphs
    from pagelens.ops.triton_graphs import GraphMemory, GraphProgram

    captured: list[dict[str, Any]] = []

    class Capture:
        def __init__(self, graph: Any, **options: Any) -> None:
            captured.append(options)

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    cuda = triton_graphs.torch.cuda
    for name, fake in (("CUDAGraph", object), ("graph_pool_handle", object), ("Stream", object), ("graph", Capture)):
        monkeypatch.setattr(cuda, name, fake)
    first, second = GraphMemory(), GraphMemory()
    for memory in (first, first, second):
        program = GraphProgram(memory)
        program.begin()
        program.end()
    a, b, c = captured
    assert a["pool"] is b["pool"]
    assert a["stream"] is b["stream"]
    assert a["pool"] is not c["pool"]
    assert a["stream"] is not c["stream"]
    assert {one["capture_error_mode"] for one in captured} == {"thread_local"}


def test_buffers_on_a_device_move_seldom() -> None:
    from pagelens.models.workspace import Workspace

    scratch = Workspace("meta")
    for rows in range(1, 2049):
        scratch.take("x", (rows, 64), torch.bfloat16)
    assert scratch.generation <= 12
    assert scratch.take("x", (0, 64), torch.bfloat16).shape == (0, 64)
