"""Whether one row's products read memory and multiply at the same time: `python benchmarks/bench_overlap.py`, a minute.

The same product, its weights in the second cache, in the third and in memory, beside a plain read of the same weights
there, all as recorded programs. Matrices have the inputs of a real layer and so many outputs that a thread's share is
one of SHARES; of the times of the smaller and the larger call, GB/s are what the difference gives, and "call" is what
is left: microseconds of a call without a weight (rounding the inputs, waking threads, waiting for the last), of the
product and of the read. Medians; what lies in memory is read and multiplied in turns.

If reading and multiplying took turns, a product from memory would take what it takes from the second cache and what the
plain read from memory takes, added up ("turns"); if one hid behind the other, the longer of the two ("hidden").
"overlap" is where it stands between them: 0 turns, 1 hidden; below 0 it is slower than in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from bench_decode import record
from ops.case import BF16, noise
from ops.quantized_cases import OWN_INT4, OWN_INT8

from pagelens import _native
from pagelens.ops.native import NativeOps

SHARES = (256 << 10, 768 << 10)  # bytes of a thread in a call
PLACES = {"L2": 0, "L3": 6 << 20, "memory": 192 << 20}  # bytes that calls go round in; 0: one matrix
REPLAY_BYTES = 32 << 20  # a program in a cache reads this much
ROUNDS = 9
BITS = {"bf16": 16.0, "int8": 8.0, "int4": 4.5}
INPUTS = {
    "qwen3-0.6b qkv, gate/up, head": 1024,
    "qwen3-0.6b o": 2048,
    "qwen3-0.6b down": 3072,
    "deepseek-ocr gate/up": 1280,
    "deepseek-ocr down": 896,
}


@dataclass(frozen=True)
class Cost:
    """Seconds of a byte, and of a call without any."""

    byte: float
    call: float

    @classmethod
    def of(cls, calls: list[tuple[int, float]]) -> Cost:
        """From (bytes, seconds) of a small and a large call."""
        (few, short), (many, long) = calls
        byte = (long - short) / (many - few)
        return cls(byte, short - few * byte)


def matrices(ops: NativeOps, weights: str, inputs: int, share: int, total: int) -> list[Any]:
    """Packed matrices of `total` bytes together, one at least; their numbers are alike."""
    outs = max(round(8 * share / BITS[weights] / inputs / 32), 1) * 32 * ops.num_threads
    g = torch.Generator().manual_seed(0)
    if weights == "bf16":
        weight: Any = noise(g, (outs, inputs), BF16, inputs**-0.5)
    else:
        weight = (OWN_INT8 if weights == "int8" else OWN_INT4).weight(g, outs, inputs, BF16)
    first = ops.pack_linear(weight)
    return [first, *(ops.pack_linear(weight) for _ in range(total // first.handle.num_bytes - 1))]


def seconds_of(program: _native.Program) -> float:
    begin = time.perf_counter()
    program.replay()
    return time.perf_counter() - begin


def measure(ops: NativeOps, weights: str, inputs: int, total: int) -> tuple[Cost, Cost]:
    """Of a product and of a read, with weights of `total` bytes in turn."""
    x = noise(torch.Generator().manual_seed(1), (1, inputs), BF16)
    made: list[tuple[int, int, list[_native.Program], Any]] = []
    for share in SHARES:
        packs = matrices(ops, weights, inputs, share, total)
        each = packs[0].handle.num_bytes
        turns = packs * max(REPLAY_BYTES // (each * len(packs)), 1)
        out = torch.empty(1, packs[0].out_features, dtype=BF16)
        product = record([partial(ops.linear, x, p, out=out) for p in turns], ops)
        read = record([partial(_native.read_weights, ops._pool, p.handle) for p in turns], ops)
        made.append((each, len(turns), [product, read], (packs, out)))  # a program does not keep what it calls alive
    seconds = [[[seconds_of(program) for program in programs] for _, _, programs, _ in made] for _ in range(ROUNDS)]

    def cost(kind: int) -> Cost:
        return Cost.of(
            [
                (each, statistics.median(one[i][kind] for one in seconds) / calls)
                for i, (each, calls, _, _) in enumerate(made)
            ]
        )

    return cost(0), cost(1)


def show(threads: int, weights: str, name: str, costs: dict[str, tuple[Cost, Cost]]) -> None:
    multiply, (both, read) = costs["L2"][0].byte, (cost.byte for cost in costs["memory"])
    overlap = (multiply + read - both) / min(multiply, read)
    figures = "  ".join(f"{1e-9 / costs[place][0].byte:6.1f} {1e-9 / costs[place][1].byte:6.1f}" for place in PLACES)
    calls = " ".join(f"{1e6 * cost.call:5.1f}" for cost in costs["memory"])
    models = f"{1e-9 / (multiply + read):6.1f} {1e-9 / max(multiply, read):6.1f}  {read / both:5.2f} {overlap:7.2f}"
    print(f"{threads:7}  {weights:7}  {name:29}  {figures}  {calls}  {models}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2", help="numbers of threads (%(default)s)")
    parser.add_argument("--weights", default=",".join(BITS), help="of %(default)s")
    args = parser.parse_args()
    if unknown := set(args.weights.split(",")) - set(BITS):
        parser.error(f"there are no weights {min(unknown)!r}; known: {', '.join(BITS)}")
    if not all(count.isdigit() and int(count) > 0 for count in args.threads.split(",")):
        parser.error(f"--threads {args.threads}: numbers from 1 on, with commas between them")
    places = "  ".join(f"{place:>6} {'read':>6}" for place in PLACES)
    heads = f"{'call':>5} {'read':>5}  {'turns':>6} {'hidden':>6}  share overlap"
    print(f"{'threads':7}  {'weights':7}  {'inputs of':29}  {places}  {heads}")
    for threads in map(int, args.threads.split(",")):
        ops = NativeOps(threads)
        for weights in args.weights.split(","):
            for name, inputs in INPUTS.items():
                costs = {place: measure(ops, weights, inputs, total) for place, total in PLACES.items()}
                show(threads, weights, name, costs)
        ops.close()


if __name__ == "__main__":
    main()
