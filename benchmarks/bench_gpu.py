"""Times every workload of the GPU kernels on the card at hand, beside what the same card copies and multiplies.

    python benchmarks/bench_gpu.py [--dry-run] [--repeats N]        (make bench-gpu)

CUDA events around each call, second cache overwritten before it, medians. The answer is proved by `make test-gpu`, not
here. The last line is JSON. --dry-run needs no card: tensors without data, launches counted, times made up and marked.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch

from pagelens import __version__
from pagelens.errors import PagelensError
from pagelens.kernels.workloads import WORKLOADS, Workload
from pagelens.tune import CudaTimer, DryTimer, Timer

PROBE_BYTES = 512 << 20
PROBE_SIDE = 8192


def probes(timer: Timer, repeats: int) -> tuple[float, float]:
    """GB/s of a copy (read and written bytes both count) and TFLOP/s of torch's bfloat16 product on this card."""
    source = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    seconds = timer.seconds(lambda: target.copy_(source), repeats)
    side = torch.zeros((PROBE_SIDE, PROBE_SIDE), dtype=torch.bfloat16, device=timer.device)
    product = timer.seconds(lambda: side @ side, repeats)
    return 2 * PROBE_BYTES / seconds / 1e9, 2 * PROBE_SIDE**3 / product / 1e12


def torch_call(workload: Workload, device: torch.device) -> Callable[[], Any] | None:
    """The same work by torch, where it is one call of a library: 16-bit products and attention."""
    parts = workload.name.split()
    if workload.key == "linear":
        rows, inner, outs = (int(v) for v in parts[1].split("x"))
        x = torch.zeros((rows, inner), dtype=torch.bfloat16, device=device)
        weight = torch.zeros((outs, inner), dtype=torch.bfloat16, device=device)
        return lambda: torch.nn.functional.linear(x, weight)
    if workload.key == "attention":
        tokens, heads, head_dim = (int(v) for v in parts[1].split("x"))
        q, k, v = torch.zeros((3, 1, heads, tokens, head_dim), dtype=torch.bfloat16, device=device)
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return None


def measure(timer: Timer, repeats: int) -> dict[str, Any]:
    with timer.trying():
        copy, rate = probes(timer, repeats)
        rows = []
        for workload in WORKLOADS:
            seconds = timer.seconds(workload.make(timer.device), repeats)
            other = torch_call(workload, timer.device)
            theirs = timer.seconds(other, repeats) if other else None
            rows.append(
                {
                    "workload": workload.name,
                    "us": 1e6 * seconds,
                    "percent_of_copy": 100 * workload.bytes / seconds / 1e9 / copy,
                    "percent_of_product": 100 * workload.flops / seconds / 1e12 / rate,
                    "torch_us": None if theirs is None else 1e6 * theirs,
                }
            )
    real = timer.device.type == "cuda"
    return {
        "measured": real,
        "card": torch.cuda.get_device_name(timer.device) if real else "none: dry run, times are made up",
        "target": timer.target,
        "copy_gb_s": copy,
        "product_tflop_s": rate,
        "repeats": repeats,
        "versions": {"pagelens": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "rows": rows,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="no card: exercise the code, print made-up times")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    try:
        timer = DryTimer() if options.dry_run else CudaTimer()
    except PagelensError as error:
        print(f"bench_gpu: {error}; --dry-run runs through it without a card", file=sys.stderr)
        return 1
    found = measure(timer, options.repeats)
    print(f"{found['card']}; copy {found['copy_gb_s']:.0f} GB/s, product {found['product_tflop_s']:.0f} TFLOP/s")
    print(f"{'workload':48} {'us':>9} {'% copy':>7} {'% product':>9} {'torch us':>9}")
    for row in found["rows"]:
        theirs = "-" if row["torch_us"] is None else f"{row['torch_us']:.1f}"
        shares = f"{row['percent_of_copy']:7.1f} {row['percent_of_product']:9.1f}"
        print(f"{row['workload']:48} {row['us']:9.1f} {shares} {theirs:>9}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
