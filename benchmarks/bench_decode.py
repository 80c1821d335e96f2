"""Products of a decode step at the sizes of real models, weights cold in memory, beside what memory gives.

    python -m pytest benchmarks/bench_decode.py --benchmark-enable --benchmark-only [-k "qwen3 and int4"]

First an answer is checked against the reference. Then copies of the weights (for experts: of the inputs), so many that
each call finds its weights in memory and not in a cache, run as one recorded program, as in a decode step. The program
and a read of memory on the same threads (`probe_bandwidth`) take turns; "share" is the median of GB/s through the mean
of the reads before and after. GB/s counts weights, scales, inputs and outputs once. The read is a yardstick, not a
limit: it may lose a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from ops.cases import BF16, Case, LinearCase, MoeCase, SwigluCase, difference, noise
from ops.quantized_cases import OWN_INT4, OWN_INT8, QuantizedLinearCase, QuantizedMoeCase, QuantizedSwigluCase, Recipe
from torch import Tensor

from pagelens import _native
from pagelens.ops.native import NativeOps
from pagelens.ops.reference import ReferenceOps

COLD_BYTES = 256 << 20  # of weights that a program reads: 5 ms and more
PROBE_BYTES = 128 << 20
ROUNDS, BUDGET_S = 9, 1.5
WEIGHTS: dict[str, Recipe | None] = {"bf16": None, "int8": OWN_INT8, "int4": OWN_INT4}


@dataclass(frozen=True)
class Shape:
    """An op of a model: linear [out, width], a SwiGLU of `inner`, or `experts` of them with top_k and a shared one."""

    name: str
    width: int
    out: int = 0
    inner: int = 0
    experts: int = 0
    top_k: int = 0
    shared: int = 0

    def case(self, rows: int, weights: str) -> Case:
        recipe = WEIGHTS[weights]
        sizes: dict[str, Any] = {"rows": rows, "width": self.width, "dtype": BF16, "kind": f"{self.name}-{weights}"}
        if self.out:
            sizes["out"] = self.out
            return QuantizedLinearCase(recipe=recipe, **sizes) if recipe else LinearCase(**sizes)
        sizes["inner"] = self.inner
        if not self.experts:
            return QuantizedSwigluCase(recipe=recipe, **sizes) if recipe else SwigluCase(**sizes)
        sizes |= {"experts": self.experts, "top_k": self.top_k, "shared": 0 if recipe else self.shared}
        return QuantizedMoeCase(recipe=recipe, **sizes) if recipe else MoeCase(**sizes)


QWEN3 = [
    Shape("qwen3-0.6b-qkv", 1024, 4096),
    Shape("qwen3-0.6b-o", 2048, 1024),
    Shape("qwen3-0.6b-ffn", 1024, inner=3072),
    Shape("qwen3-0.6b-head", 1024, 151936),
]
OCR = [
    Shape("deepseek-ocr-qkv", 1280, 3840),
    Shape("deepseek-ocr-o", 1280, 1280),
    Shape("deepseek-ocr-moe", 1280, inner=896, experts=64, top_k=6, shared=1792),
]
A3B = [
    Shape("qwen3-30b-a3b-qkv", 2048, 5120),
    Shape("qwen3-30b-a3b-o", 4096, 2048),
    Shape("qwen3-30b-a3b-moe", 2048, inner=768, experts=128, top_k=8),
]
CASES = [
    *(shape.case(rows, weights) for shape in QWEN3 for weights in WEIGHTS for rows in (1, 4, 16)),
    *(shape.case(rows, weights) for shape in OCR for weights in WEIGHTS for rows in (1, 4)),
    *(shape.case(rows, "int4") for shape in A3B for rows in (1, 4)),
]


@pytest.fixture(scope="module")
def native() -> Iterator[NativeOps]:
    ops = NativeOps()
    yield ops
    ops.close()


@pytest.fixture(scope="module")
def report(native: NativeOps, request: pytest.FixtureRequest) -> Iterator[list[tuple[str, ...]]]:
    rows: list[tuple[str, ...]] = [("op", "rows", "us", "GB/s", "read GB/s", "share")]
    yield rows
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{native.num_threads} threads, {native.isa}")
        for first, *rest in rows:
            print("  ".join([first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(rest, widths[1:]))]))


def cold_calls(case: Any, ops: NativeOps) -> tuple[list[Callable[[], Tensor]], int]:
    """Calls that read COLD_BYTES or more, none the weights of the call before; and the bytes they read and write."""
    g = case.generator()
    if isinstance(case, MoeCase):
        return moe_calls(case, ops, g)
    count = max(2, -(-COLD_BYTES // case.bytes()))
    if isinstance(case, LinearCase):
        x, weight, _, _ = case.tensors()
        out = torch.empty(case.rows, case.out, dtype=BF16)
        packs = [ops.pack_linear(weight) for _ in range(count)]
        return [partial(ops.linear, x, packed, out=out) for packed in packs], count * case.bytes()
    x = noise(g, (case.rows, case.width), BF16)
    weights = case.weights(g) if isinstance(case, QuantizedSwigluCase) else swiglu(case.width, case.inner, g)
    ffns = [ops.pack_swiglu(*weights) for _ in range(count)]
    return [partial(ops.swiglu_ffn, x, ffn, out=torch.empty_like(x)) for ffn in ffns], count * case.bytes()


def moe_calls(case: Any, ops: NativeOps, g: torch.Generator) -> tuple[list[Callable[[], Tensor]], int]:
    """One layer; each call has other tokens, which choose other experts."""
    router, experts = case.weights(g)
    shared = ops.pack_swiglu(*swiglu(case.width, case.shared, g)) if case.shared else None
    layer = ops.pack_moe(router, experts, shared)
    expert = (layer.handle.num_bytes - 4 * router.numel()) // case.experts
    each = 4 * router.numel() + (0 if shared is None else shared.handle.num_bytes)
    calls: list[Callable[[], Tensor]] = []
    total = 0
    while total < COLD_BYTES:
        x = noise(g, (case.rows, case.width), BF16)
        used = (x.float() @ router.float().T).topk(case.top_k).indices.unique().numel()
        total += each + used * expert + 4 * x.numel()
        calls.append(partial(ops.moe_ffn, x, layer, case.top_k, case.renormalize, case.scale, out=torch.empty_like(x)))
    return calls, total


def swiglu(width: int, inner: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = (noise(g, (inner, width), BF16, width**-0.5) for _ in range(2))
    return gate, up, noise(g, (width, inner), BF16, inner**-0.5)


def record(calls: list[Callable[[], Tensor]], ops: NativeOps) -> _native.Program:
    program = ops.new_program()
    program.begin()
    try:
        for call in calls:
            call()
    finally:
        program.end()
    return program


def read_rate(ops: NativeOps) -> float:
    return _native.probe_bandwidth(ops._pool, PROBE_BYTES, 1)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.rows}")
def test_decode_speed(case: Any, native: NativeOps, benchmark: Any, report: list[tuple[str, ...]]) -> None:
    problem = difference(case.bind(native)().clone(), case.bind(ReferenceOps())(), case)
    assert problem is None, problem

    calls, bytes_read = cold_calls(case, native)
    program = record(calls, native)
    seconds, shares, reads = [], [], [read_rate(native)]
    start = time.perf_counter()
    while len(seconds) < ROUNDS or time.perf_counter() - start < BUDGET_S:
        begin = time.perf_counter()
        program.replay()
        seconds.append(time.perf_counter() - begin)
        reads.append(read_rate(native))
        shares.append(bytes_read / seconds[-1] / statistics.mean(reads[-2:]))
    took, read, share = statistics.median(seconds), statistics.median(reads), statistics.median(shares)
    benchmark.group = case.kind
    benchmark.extra_info.update(
        gb_s=bytes_read / took / 1e9, read_gb_s=read / 1e9, share=share, calls=len(calls), isa=native.isa
    )
    benchmark.pedantic(program.replay, rounds=5)
    row = (f"{1e6 * took / len(calls):.1f}", f"{bytes_read / took / 1e9:.1f}", f"{read / 1e9:.1f}", f"{share:.2f}")
    report.append((case.kind, str(case.rows), *row))
