"""The pool behind the native kernels: lazy, idle when idle, usable from several threads, clear after close and fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pagelens import _native
from pagelens.errors import EngineClosedError
from pagelens.ops import threads
from pagelens.ops.native import NativeOps


def native_threads() -> int:
    """Threads of this process, those that Python does not know included."""
    return len(list(Path("/proc/self/task").iterdir()))


def busy_call(ops: NativeOps) -> torch.Tensor:
    """Two chunks of rows for the pool, but too little for torch: its own threads would not survive a fork."""
    return ops.rms_norm(torch.ones(400, 64), torch.ones(64), 0.0)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")


@needs_proc
def test_threads_start_with_the_first_job_and_end_with_close() -> None:
    before = native_threads()
    ops = NativeOps(4)
    assert native_threads() == before
    busy_call(ops)
    assert native_threads() == before + 3
    ops.close()
    assert native_threads() == before


def test_an_idle_pool_uses_no_processor_time() -> None:
    ops = NativeOps(3)
    busy_call(ops)
    time.sleep(0.05)  # the workers spin for 0.5 ms, then sleep
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.03
    busy_call(ops)
    ops.close()


@pytest.mark.parametrize("count", [0, -1, 257])
def test_a_wrong_number_of_threads_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_threads={count} must be between 1 and 256"):
        NativeOps(count)


def test_many_threads_may_share_one_pool() -> None:
    """Calls take turns; every result is right, and the GIL is not held while waiting."""
    ops = NativeOps(3)
    wrong: list[int] = []

    def work(value: int) -> None:
        weight = ops.pack_linear(torch.full((640, 64), float(value)))
        for _ in range(50):
            if not bool((ops.linear(torch.ones(3, 64), weight) == 64.0 * value).all()):
                wrong.append(value)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong
    ops.close()


def test_close_while_another_thread_works() -> None:
    """close() waits for the call that runs; calls after it raise. No crash, no hang."""
    for _ in range(20):
        ops = NativeOps(3)
        seen: list[str] = []

        def work(ops: NativeOps = ops, seen: list[str] = seen) -> None:
            try:
                for _ in range(1000):
                    busy_call(ops)
            except EngineClosedError as error:
                seen.append(str(error))

        worker = threading.Thread(target=work)
        worker.start()
        time.sleep(0.002)
        ops.close()
        worker.join(timeout=30)
        assert not worker.is_alive()
        assert seen
        assert "closed" in seen[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_after_a_fork_there_is_a_clear_error_and_no_hang() -> None:
    code = """
import os, sys, torch
from pagelens.errors import EngineClosedError
from pagelens.ops.native import NativeOps
ops = NativeOps(3)
ops.rms_norm(torch.ones(400, 64), torch.ones(64), 0.0)
child = os.fork()
if child == 0:
    status = 3
    try:
        ops.rms_norm(torch.ones(2, 64), torch.ones(64), 0.0)
    except EngineClosedError as error:
        status = 0 if "fork" in str(error) else 4
    ops.close()
    fresh = NativeOps(2)
    good = bool((fresh.rms_norm(torch.ones(400, 64), torch.ones(64), 0.0) == 1).all())
    fresh.close()
    del ops, fresh
    os._exit(status if good else 5)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert bool((ops.rms_norm(torch.ones(400, 64), torch.ones(64), 0.0) == 1).all())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_pool_that_is_never_closed_does_not_stop_the_interpreter_from_ending() -> None:
    code = (
        "import torch; from pagelens.ops.native import NativeOps\n"
        "ops = NativeOps(4); ops.rms_norm(torch.ones(400, 64), torch.ones(64), 0.0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_chunk_runs_exactly_once() -> None:
    """Ten thousand short jobs of every size: a lost chunk leaves its rows untouched, a lost wake-up hangs."""
    ops = NativeOps(4)
    table = torch.arange(64.0)[:, None].repeat(1, 256)
    for i in range(10_000):
        rows = 1 + i * 37 % 700
        ids = torch.arange(rows, dtype=torch.int32) % 64
        if i % 50:  # most jobs back to back, some checked
            ops.embedding(ids, table)
            continue
        out = torch.full((rows, 256), -1.0)
        ops.embedding(ids, table, out=out)
        assert torch.equal(out[:, 0], ids.float())
        assert torch.equal(out[:, 255], ids.float())
    ops.close()


# ---- how many threads, if nobody says ------------------------------------------------------------------------------
def fake_machine(root: Path, siblings: dict[int, str], quota: str | None) -> None:
    for cpu, text in siblings.items():
        folder = root / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    if quota is not None:
        (root / "cpu.max").write_text(quota)


@pytest.mark.parametrize(
    ("siblings", "quota", "count"),
    [
        ({0: "0", 1: "1"}, None, 2),
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, "max 100000", 2),  # hyperthreads share a core
        ({0: "0", 1: "1", 2: "2", 3: "3"}, "250000 100000", 2),  # a quota of 2.5 processors
        ({0: "0"}, "10000 100000", 1),
        ({}, "nonsense", 4),  # no topology: every processor counts
    ],
)
def test_default_number_of_threads(
    siblings: dict[int, str], quota: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine(tmp_path, siblings, quota)
    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(siblings) or {0, 1, 2, 3}, raising=False)
    assert threads.default_num_threads() == count


def test_the_pool_has_the_size_that_was_asked_for() -> None:
    assert _native.ThreadPool(7).num_threads == 7
