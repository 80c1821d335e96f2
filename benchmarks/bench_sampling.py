"""Time to choose a token from a row of Qwen3's vocabulary, reference (numpy) and native in turns.

    python benchmarks/bench_sampling.py [--vocabulary 151936] [--rows 1] [--threads 1]

The whole of Sampler.sample: rules applied in place, the choice, its result. Medians of 15 rounds, microseconds a row;
rows are normal numbers times 3 (flatter than a trained model's, which is the harder case). The answers are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from pagelens.ops import Ops
from pagelens.ops.native import NativeOps
from pagelens.ops.reference import ReferenceOps
from pagelens.runtime.sampler import Sampler, SequenceSampler
from pagelens.types import NgramGuard, SamplingParams

KINDS = {
    "greedy": {},
    "greedy, n-gram guard, repetition penalty": {"ngram_guard": NgramGuard(), "repetition_penalty": 1.1},
    "top_k 20, top_p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "the same with presence penalty": {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "presence_penalty": 1.5},
    "top_p 0.95": {"temperature": 0.7, "top_p": 0.95},
    "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "temperature": {"temperature": 1.0},
}
ROUNDS = 15


def samplers(params: SamplingParams, count: int) -> list[SequenceSampler]:
    made = [SequenceSampler(params, list(range(1000)), frozenset({1})) for _ in range(count)]
    for sampler in made:
        for token in range(300):
            sampler.observe(token * 37 % 5000)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(0)
    logits = torch.randn(args.rows, args.vocabulary) * 3
    native = NativeOps(args.threads)
    backends: dict[str, Ops] = {"reference": ReferenceOps(), "native": native}  # type: ignore[dict-item]
    print(f"{args.rows} x {args.vocabulary}, {args.threads} threads, {native.isa}: us a row, reference and native")
    for name, kind in KINDS.items():
        params = SamplingParams(seed=7, **kind)  # type: ignore[arg-type]
        times: dict[str, list[float]] = {backend: [] for backend in backends}
        tokens: dict[str, list[int]] = {backend: [] for backend in backends}
        chains = {backend: samplers(params, args.rows) for backend in backends}
        for _ in range(ROUNDS):
            for backend, ops in backends.items():
                rows = logits.clone()
                start = time.perf_counter()
                chosen = Sampler(None, ops).sample(rows, chains[backend])
                times[backend].append((time.perf_counter() - start) / args.rows * 1e6)
                tokens[backend] += [sampled.token for sampled in chosen]
        same = "the same tokens" if tokens["reference"] == tokens["native"] else "OTHER TOKENS"
        before, after = (statistics.median(times[backend]) for backend in ("reference", "native"))
        print(f"{name:42} {before:9.1f} {after:9.1f}  {before / after:6.1f}x  {same}")
    native.close()


if __name__ == "__main__":
    main()
