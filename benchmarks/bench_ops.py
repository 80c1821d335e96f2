"""Speed of the ops on the cases of tests/ops/cases.py: first the answer is checked, then it is timed.

    python -m pytest benchmarks/bench_ops.py --benchmark-enable --benchmark-only

Besides pytest-benchmark's table (which can be stored and compared) a second one is printed with bytes and operations a
second. GB/s counts what must be read and written once. "torch" is torch's own op on the same inputs and threads where
there is one, measured in turns with ours; medians of both. Nothing is done against other load on the machine.
"of peak" is GFLOP/s as a share of what the instruction that the kernels multiply with reaches in registers, on as many
threads just after ours (probe_flops); rows of few operations are bound by memory and have a small one.
Quantised weights are read from memory (copies take turns) and stand beside "of read": their GB/s as a share of what
the C library's memchr reads with as many threads, in turns with ours. It is a yardstick, not a limit.
"""

from __future__ import annotations

import ctypes
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.cases import BF16, LARGE, REAL, AttentionCase, Case, LinearCase, MoeCase, NormCase, difference
from ops.quantized_cases import REAL_QUANTIZED
from ops.vision_cases import (
    LARGE_VISION,
    ConvDownsampleCase,
    PatchEmbedCase,
    SequenceAttentionCase,
    WindowAttentionCase,
)
from torch.nn import functional

from pagelens import _native
from pagelens.ops.native import NativeOps
from pagelens.ops.reference import ReferenceOps

# The tiny built-in reader decodes with hidden 192, 6 heads of 32, 8 experts of 96 top-2, vocabulary 384.
DEMO = [LinearCase(rows=1, width=192, out=384, dtype=BF16), MoeCase(rows=1, dtype=BF16, seed=1), NormCase(dtype=BF16)]
CASES = [*DEMO, *(case for case in REAL if case.dtype == BF16), *LARGE, *LARGE_VISION]
ROUNDS, BUDGET_S = 15, 1.0
COLD_BYTES = 96 << 20  # more than the caches hold
PROBE_BYTES = 64 << 20  # a thread


@pytest.fixture(scope="module")
def native() -> Iterator[NativeOps]:
    ops = NativeOps()
    before = torch.get_num_threads()
    torch.set_num_threads(ops.num_threads)
    yield ops
    torch.set_num_threads(before)
    ops.close()


@pytest.fixture(scope="module")
def report(native: NativeOps, request: pytest.FixtureRequest) -> Iterator[list[tuple[str, ...]]]:
    rows: list[tuple[str, ...]] = [("op", "median us", "GB/s", "GFLOP/s", "of peak", "torch us", "speedup", "of read")]
    yield rows
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{cpu_name()}, {native.num_threads} threads, {native.isa}, torch {torch.__version__}")
        for first, *rest in rows:
            numbers = [text.rjust(width) for text, width in zip(rest, widths[1:])]
            print("  ".join([first.ljust(widths[0]), *numbers]))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def torch_call(case: Case) -> Callable[[], Any] | None:
    """torch's own op for the same work, if it has one that does no more and no less."""
    if isinstance(case, LinearCase) and case.activation is None and not case.residual and not case.bias:
        x, weight, _, _ = case.tensors()
        return lambda: functional.linear(x, weight)
    if isinstance(case, AttentionCase) and len(case.batch.sequences) == 1 and case.heads == case.kv_heads:
        (new, context), shape = case.batch.sequences[0], (1, case.heads, -1, case.head_dim)
        if new not in (1, context):
            return None
        g = case.generator()
        q, k, v = (
            torch.randn(case.heads * n * case.head_dim, generator=g).to(case.dtype) for n in (new, context, context)
        )
        q, k, v = q.view(shape), k.view(shape), v.view(shape)
        return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=new > 1)
    return torch_vision_call(case)


def torch_vision_call(case: Case) -> Callable[[], Any] | None:
    """torch in the inputs' dtype, the way other engines run it. It gets windows cut and their bias ready made; a whole
    grid has no bias (400 MB at 64 x 64). In both it does less than we do.
    """
    g = case.generator()

    def like(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(case.dtype)

    if isinstance(case, WindowAttentionCase):
        across, tokens = -(-case.grid // case.size), case.size**2
        q, k, v = (like(case.batch * across**2, case.heads, tokens, case.head_dim) for _ in range(3))
        bias = like(*q.shape[:2], tokens, tokens) if case.window else None
        return lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if isinstance(case, SequenceAttentionCase):
        q, k, v = (like(case.batch, case.heads, case.tokens, case.head_dim) for _ in range(3))
        return lambda: functional.scaled_dot_product_attention(q, k, v)
    if isinstance(case, PatchEmbedCase):
        pixels, weight = like(case.batch, 3, case.side, case.side), like(case.width, 3, case.patch, case.patch)
        return lambda: functional.conv2d(pixels, weight, stride=case.patch)
    if isinstance(case, ConvDownsampleCase):
        f, (f2, f3) = case.neck, case.down
        x = like(case.batch, case.width, case.grid, case.grid).to(memory_format=torch.channels_last)
        one, two = like(f, case.width, 1, 1), like(f, f, 3, 3)
        three, four, norm = like(f2, f, 3, 3), like(f3, f2, 3, 3), like(f)

        def normed(y: torch.Tensor) -> torch.Tensor:
            return functional.layer_norm(y.permute(0, 2, 3, 1), (f,), norm, norm).permute(0, 3, 1, 2)

        def run() -> torch.Tensor:
            y = normed(functional.conv2d(normed(functional.conv2d(x, one)), two, padding=1))
            return functional.conv2d(functional.conv2d(y, three, stride=2, padding=1), four, stride=2, padding=1)

        return run
    return None


def cold(case: Case, ops: NativeOps) -> list[Callable[[], Any]]:
    """Calls of copies of a case, so many that each finds its weights in memory and not in a cache."""
    return [case.timed(ops) for _ in range(min(64, -(-COLD_BYTES // case.bytes())))]


@pytest.fixture(scope="module")
def read_probe(native: NativeOps) -> Iterator[Callable[[], Any]]:
    """Reads PROBE_BYTES with each of the threads: memchr for a byte that is not there."""
    library = ctypes.CDLL(None)
    library.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    buffers = [torch.ones(PROBE_BYTES, dtype=torch.uint8) for _ in range(native.num_threads)]

    def read(buffer: torch.Tensor) -> None:
        library.memchr(buffer.data_ptr(), 7, PROBE_BYTES)

    with ThreadPoolExecutor(native.num_threads) as pool:
        yield lambda: list(pool.map(read, buffers))


def peak_flops(case: Case, native: NativeOps) -> Callable[[], float]:
    """Operations a second of the instruction that the case is multiplied with, as a call of a few milliseconds."""
    kind = "float32" if case.dtype == torch.float32 else "bfloat16"
    recipe = getattr(case, "recipe", None)
    if recipe is not None and recipe.activation == "int8":
        kind = "int8"
    return lambda: _native.probe_flops(native._pool, kind, 0.003, 1)[0]


def of_peak(case: Case, native: NativeOps, seconds: float) -> str:
    return f"{case.flops() / seconds / statistics.median(peak_flops(case, native)() for _ in range(5)):.0%}"


def in_turns(*calls: Callable[[], Any]) -> list[float]:
    """Median seconds of each call; they take turns, so that a slow moment of the machine meets all of them."""
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(times[0]) < ROUNDS or (time.perf_counter() - start < BUDGET_S and len(times[0]) < 2000):
        for call, seconds in zip(calls, times):
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
    return [statistics.median(seconds) for seconds in times]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_speed(case: Case, native: NativeOps, benchmark: Any, report: list[tuple[str, ...]]) -> None:
    problem = difference(case.bind(native)().clone(), case.bind(ReferenceOps())(), case)
    assert problem is None, problem

    run = case.timed(native)
    other = torch_call(case)
    ours, *theirs = in_turns(run, other) if other else in_turns(run)
    benchmark.group = case.op
    benchmark.extra_info.update(gb_s=case.bytes() / ours / 1e9, gflop_s=case.flops() / ours / 1e9, isa=native.isa)
    benchmark(run)
    report.append(
        (
            case.id,
            f"{ours * 1e6:.1f}",
            f"{case.bytes() / ours / 1e9:.1f}",
            f"{case.flops() / ours / 1e9:.1f}",
            of_peak(case, native, ours),
            f"{theirs[0] * 1e6:.1f}" if theirs else "",
            f"{theirs[0] / ours:.2f}" if theirs else "",
            "",
        )
    )


@pytest.mark.parametrize("case", REAL_QUANTIZED, ids=lambda case: case.id)
def test_speed_of_quantised_weights(
    case: Case,
    native: NativeOps,
    benchmark: Any,
    report: list[tuple[str, ...]],
    read_probe: Callable[[], Any],
) -> None:
    problem = difference(case.bind(native)().clone(), case.bind(ReferenceOps())(), case)
    assert problem is None, problem

    runs = cold(case, native)
    # All copies in one go: after a probe the kernels' threads sleep, and the first call would have to wake them.
    every, reading = in_turns(lambda: [run() for run in runs], read_probe)
    ours = every / len(runs)
    rate, of_read = case.bytes() / ours / 1e9, PROBE_BYTES * native.num_threads / reading / 1e9
    benchmark.group = f"{case.op}, quantised"
    benchmark.extra_info.update(gb_s=rate, read_gb_s=of_read, gflop_s=case.flops() / ours / 1e9, isa=native.isa)
    turns = itertools.cycle(runs)
    benchmark(lambda: next(turns)())
    report.append(
        (
            case.id,
            f"{ours * 1e6:.1f}",
            f"{rate:.1f}",
            f"{case.flops() / ours / 1e9:.1f}",
            of_peak(case, native, ours),
            "",
            "",
            f"{rate / of_read:.0%} of {of_read:.1f}",
        )
    )
