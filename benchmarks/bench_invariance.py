"""What batch invariance costs on the native backend: kernels whose sums have one fixed order, as they are always built,
beside the same kernels in free order (csrc/free_order), on Qwen3-0.6B's decoder.

    python benchmarks/bench_invariance.py [--weights bf16,int8,int8-cache] [--ops] [--isa avx512_bf16] [--threads 2]

The first call compiles the kernels in free order (half a minute a set) into a module of its own in build/free_order,
which holds the others, too: both run in one process, on the same weights and cache. First the answers of both are
compared with the reference on the tests' cases, and the logits of one decoding sequence alone with those of the same
sequence among 16: in fixed order they must be the same bits, in free order some must differ, or nothing was free. Then
the engine decodes and prefills; the two orders take turns, one step (one prompt) each, and which comes first changes.
A cost is the median over the pairs of (seconds in fixed order / seconds in free order) - 1; beside it stands the range
that holds the true median with 95 %. Weights are random. --ops times single ops instead, their weights cold in memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "free_order"
SPECS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"weights": "int8"},
    "int8-cache": {"weights": "int8", "kv_cache_dtype": "int8"},
}
STEPS = 52  # after one start; the engine has room for a few more
TOGETHER, PROMPT = 16, 70  # sequences and their tokens where bits are compared
LIMIT = 5.0  # per cent: invariance that costs more would have to be asked for

Kernels = tuple[str, str]  # names for `set_isa`: in fixed order, in free order
Pair = tuple[float, float]  # seconds in fixed order, in free order


@dataclass(frozen=True)
class Workload:
    """Decode steps of `batch` sequences behind `depth` tokens, or (prefill) whole prompts of `depth` tokens."""

    depth: int
    batch: int = 1
    prefill: bool = False
    pairs: int = 104

    @property
    def name(self) -> str:
        if self.prefill:
            return f"prefill of {self.depth}"
        return f"decode at depth {self.depth}" + (f", {self.batch} sequences" if self.batch > 1 else "")


WORKLOADS = (
    Workload(0),
    Workload(512),
    Workload(4096),
    Workload(128, batch=4),
    Workload(128, batch=16),
    Workload(512, prefill=True, pairs=7),
)


# ---- the module -----------------------------------------------------------------------------------------------------
def chosen_isa() -> str:
    """The set that pagelens chooses here, asked in another process: one process holds one native module."""
    code = "from pagelens import _native; print(_native.isa())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def build(isa: str) -> Path:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(BUILD)]
    started = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "PAGELENS_FREE_ORDER": isa}, capture_output=True)
    if result.returncode != 0:
        raise SystemExit(f"bench_invariance: the build failed:\n{result.stderr.decode()[-4000:]}")
    print(f"{isa}_free is built ({time.monotonic() - started:.0f} s)", flush=True)
    return next((BUILD / "pagelens").glob("_native*"))


def load_native(path: Path) -> ModuleType:
    """Makes the module at `path` pagelens._native. Only before pagelens loads its own."""
    if "pagelens._native" in sys.modules:
        raise RuntimeError("pagelens._native is loaded already")
    spec = importlib.util.spec_from_file_location("pagelens._native", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["pagelens._native"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- answers --------------------------------------------------------------------------------------------------------
def check_ops(kernels: Kernels) -> int:
    """Compares both with the reference on the tests' cases of what free order changes; returns their number."""
    from ops.case import difference
    from ops.cases import SMALL
    from ops.quantized_cases import SMALL_QUANTIZED

    from pagelens import _native
    from pagelens.ops.native import NativeOps
    from pagelens.ops.reference import ReferenceOps

    native, reference = NativeOps(2), ReferenceOps()
    cases = [c for c in (*SMALL, *SMALL_QUANTIZED) if c.op in ("linear", "swiglu_ffn", "moe_ffn", "paged_attention")]
    for case in cases:
        expected = case.bind(reference)()
        for name in kernels:
            _native.set_isa(name)
            problem = difference(case.bind(native)().clone(), expected, case)
            if problem is not None:
                raise SystemExit(f"bench_invariance: {name}: {problem}")
    native.close()
    return len(cases)


def bits_that_differ(engine: Any, kernels: Kernels) -> tuple[int, int]:
    """Logits of a decoding sequence that are other bits alone than among TOGETHER, by either order. Writes into the
    first blocks of the cache: for an engine that is idle and has nothing in its prefix cache."""
    import torch
    from helpers.tiny_models import make_batch

    from pagelens import _native

    model, kv = engine.runner.model, engine.runner.kv
    generator = torch.Generator().manual_seed(3)
    shape = (TOGETHER, PROMPT + 1)
    ids = torch.randint(engine.inputs.vocab_size, shape, generator=generator).tolist()
    blocks = -(-shape[1] // kv.block_size)
    tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(TOGETHER)]
    differ = []
    with torch.inference_mode():
        for name in kernels:
            _native.set_isa(name)
            model.forward(make_batch([(row[:-1], 0) for row in ids], tables, kv.block_size), kv)
            last = [(row[-1:], PROMPT) for row in ids]
            alone = model.forward(make_batch(last[:1], tables[:1], kv.block_size), kv)[0].clone()
            among = model.forward(make_batch(last, tables, kv.block_size), kv)[0]
            differ.append(int((alone != among).sum()))
    return differ[0], differ[1]


# ---- times ----------------------------------------------------------------------------------------------------------
def in_turns(call: Callable[[], object], kernels: Kernels, pairs: int, set_isa: Callable[[str], None]) -> list[Pair]:
    """Seconds of `pairs` pairs of calls. Which order comes first changes, so that growth of the work cancels."""
    result = []
    for i in range(pairs):
        seconds = {}
        for name in kernels if i % 2 == 0 else kernels[::-1]:
            set_isa(name)
            begin = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - begin
        result.append((seconds[kernels[0]], seconds[kernels[1]]))
    return result


def measure(worker: Any, workload: Workload, kernels: Kernels, set_isa: Callable[[str], None]) -> list[Pair]:
    """Pairs of a workload. worker: benchmarks/peers/ours.py"""
    if workload.prefill:

        def prefill() -> None:
            worker.handle({"op": "prefill", "tokens": workload.depth})

        in_turns(prefill, kernels, 1, set_isa)
        return in_turns(prefill, kernels, workload.pairs, set_isa)
    pairs: list[Pair] = []
    while len(pairs) < workload.pairs:
        with worker.running(workload.depth, workload.batch) as step:
            in_turns(step, kernels, 1, set_isa)
            pairs += in_turns(step, kernels, min(STEPS // 2, workload.pairs - len(pairs)), set_isa)
    return pairs


# ---- the table ------------------------------------------------------------------------------------------------------
def median_range(ordered: Sequence[float]) -> tuple[float, float]:
    """Between which of the ordered samples the median of what they were drawn from lies, with 95 % or a little more:
    as many lie below it as heads fall in that many throws."""
    n, tail, rank = len(ordered), 0.5 ** len(ordered), 0  # tail: the chance of at most `rank` heads
    while rank + 1 < n / 2 and tail + math.comb(n, rank + 1) * 0.5**n <= 0.025:
        rank += 1
        tail += math.comb(n, rank) * 0.5**n
    return ordered[rank], ordered[n - 1 - rank]


def row(weights: str, name: str, pairs: Sequence[Pair]) -> tuple[str, ...]:
    fixed, free = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    costs = sorted(100 * (a / b - 1) for a, b in pairs)
    middle, low, high = statistics.median(costs), *median_range(costs)
    return (
        weights,
        name,
        f"{1e3 * fixed:.2f} ms",
        f"{1e3 * free:.2f} ms",
        f"{middle:+.1f} %" + (" *" if middle > LIMIT else ""),
        f"{low:+.1f} to {high:+.1f}",
    )


HEAD = ("weights", "workload", "fixed order", "free order", "cost", "95 % range")


def table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = [HEAD, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    texts = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    texts.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    over = [f"{line[0]} {line[1]}" for line in rows if line[4].endswith("*")]
    texts.append(f"* over {LIMIT:g} %: {', '.join(over)}" if over else f"no cost is over {LIMIT:g} %")
    return "\n".join(texts)


# ---- runs -----------------------------------------------------------------------------------------------------------
def run_engine(
    weights: str, spec: dict[str, Any], workloads: Sequence[Workload], kernels: Kernels
) -> list[tuple[str, ...]]:
    """Rows of one engine, none if nothing is free. SystemExit if the fixed order is not fixed."""
    from benchmarks.peers.ours import Ours
    from pagelens import _native

    deepest = max(w.depth for w in workloads)
    worker = Ours({**spec, **SPECS[weights], "max_depth": deepest, "batch": TOGETHER})
    fixed, free = bits_that_differ(worker.engine, kernels)
    print(f"{weights}: logits of a sequence alone and among {TOGETHER}: {fixed} differ in fixed, {free} in free order")
    if fixed:
        raise SystemExit(f"bench_invariance: {kernels[0]} is not batch invariant")
    if not free:  # whole numbers have no order, and not every set has a kernel that a free order makes faster
        print(f"{weights}: not timed, as {kernels[1]} gives the same bits: nothing is free in it")
        worker.engine.close()
        return []
    rows = [row(weights, w.name, measure(worker, w, kernels, _native.set_isa)) for w in workloads]
    worker.engine.close()
    return rows


def run_ops(kernels: Kernels, threads: int, wanted: str) -> list[tuple[str, ...]]:
    """Rows of single ops whose names hold `wanted`: of Qwen3-0.6B, and one product whose weights stay in the cache."""
    from bench_decode import COLD_BYTES, QWEN3, cold_calls, record
    from ops.cache_cases import AttentionCase, Int8AttentionCase, Paged
    from ops.case import BF16
    from ops.cases import LinearCase

    from pagelens import _native
    from pagelens.ops.native import NativeOps

    ops, rows = NativeOps(threads), []

    def time_calls(weights: str, name: str, make: Callable[[], list[Callable[[], Any]]], pairs: int) -> None:
        if wanted not in name:
            return
        calls = make()
        program = record(calls, ops)  # which knows addresses; `calls` hold what lies there
        rows.append(row(weights, name, in_turns(program.replay, kernels, pairs, _native.set_isa)))

    for shape in QWEN3:
        for weights in ("bf16", "int8"):
            for count in (1, 3, 4, 6, 16):
                name = f"{shape.name.removeprefix('qwen3-0.6b-')}, rows: {count}"
                case = shape.case(count, weights)
                time_calls(weights, name, lambda case=case: cold_calls(case, ops)[0], 32)  # type: ignore[misc]
    for count in (1, 2, 3, 4, 6):
        cached = LinearCase(rows=count, width=512, out=512, dtype=BF16)
        time_calls("bf16", f"512x512 in the cache, rows: {count}", lambda case=cached: 50 * [case.bind(ops)], 100)  # type: ignore[misc]
    for cache in (AttentionCase, Int8AttentionCase):
        for sequences in (((1, 512),), ((1, 4096),), ((1, 144),) * 16, ((512, 512),)):
            case = cache(batch=Paged(sequences), heads=16, kv_heads=8, head_dim=128, dtype=BF16)
            copies = 1 if case.batch.new > 100 else max(2, min(-(-COLD_BYTES // case.bytes()), 128))
            new, context = sequences[0]
            name = f"attention, {len(sequences)} of {new} behind {context - new}"
            weights = "int8-cache" if cache is Int8AttentionCase else "bf16"
            make = lambda case=case, copies=copies: [case.bind(ops) for _ in range(copies)]  # type: ignore[misc] # noqa: E731
            time_calls(weights, name, make, 100)
        case = cache(batch=Paged(((1, 2048),)), heads=16, kv_heads=8, head_dim=128, dtype=BF16)
        name = "attention in the cache, 1 of 1 behind 2047"
        time_calls(weights, name, lambda case=case: 8 * [case.bind(ops)], 100)  # type: ignore[misc]
    ops.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="bf16,int8", help=f"of {', '.join(SPECS)} (default: bf16,int8)")
    parser.add_argument("--workloads", default="", help="only those whose name holds this")
    parser.add_argument("--ops", action="store_true", help="single ops instead of the engine")
    parser.add_argument("--isa", default="", help="an instruction set of this machine (default: the one in use)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--build", action="store_true", help="only build")
    args = parser.parse_args()
    if unknown := sorted(set(args.weights.split(",")) - set(SPECS)):
        parser.error(f"there are no weights {unknown[0]!r}; known: {', '.join(SPECS)}")
    workloads = [w for w in WORKLOADS if args.workloads in w.name]
    if not workloads and not args.ops:
        parser.error(f"no workload's name holds {args.workloads!r}; they are {', '.join(w.name for w in WORKLOADS)}")
    if args.threads < 1:
        parser.error(f"--threads {args.threads}: at least 1")
    isa = args.isa or chosen_isa()
    path = build(isa)
    if args.build:
        return
    load_native(path)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from benchmarks.peers.protocol import raise_priority

    top = raise_priority()
    kernels = (isa, f"{isa}_free")
    print(f"{check_ops(kernels)} cases of single ops agree with the reference in both orders", flush=True)
    rows = run_ops(kernels, args.threads, args.workloads) if args.ops else []
    for weights in [] if args.ops else args.weights.split(","):
        spec = {"model": "qwen3-0.6b", "random_weights": True, "threads": args.threads}
        rows += run_engine(weights, spec, workloads, kernels)
    if not rows:
        raise SystemExit("bench_invariance: nothing to time")
    print(f"\n{isa}, {args.threads} threads{', top priority' if top else ''}\n{table(rows)}")


if __name__ == "__main__":
    main()
