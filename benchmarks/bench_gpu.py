"""Times every workload of the GPU kernels on the card at hand, beside what the same card copies and multiplies, and
beside torch, and flash-attn, vLLM and SGLang's kernels where they are installed (gpu_peers.py).

    python benchmarks/bench_gpu.py [--dry-run] [--repeats N]        (make bench-gpu)

CUDA events around each call, second cache overwritten before it, medians. The answer is proved by `make test-gpu`, not
here. The last line is JSON. --dry-run needs no card: tensors without data, launches counted, times made up and marked.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_peers import PEERS

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


def peer_times(workload: Workload, timer: Timer, repeats: int) -> dict[str, float | str]:
    """Microseconds of each installed peer that does this work, or why it failed."""
    found: dict[str, float | str] = {}
    for peer in PEERS:
        make = peer.calls.get(workload.key)
        if make is None or peer.version is None:
            continue
        try:
            found[peer.name] = 1e6 * timer.seconds(make(workload.sizes, timer.device), repeats)
        except Exception as error:  # another version's interface, a card that it does not run on
            reason = (str(error).strip().splitlines() or [""])[0]
            found[peer.name] = f"failed: {type(error).__name__}: {reason[:100]}"
    return found


def measure(timer: Timer, repeats: int) -> dict[str, Any]:
    with timer.trying():
        copy, rate = probes(timer, repeats)
        rows = []
        for workload in WORKLOADS:
            seconds = timer.seconds(workload.make(timer.device), repeats)
            rows.append(
                {
                    "workload": workload.name,
                    "us": 1e6 * seconds,
                    "percent_of_copy": 100 * workload.bytes / seconds / 1e9 / copy,
                    "percent_of_product": 100 * workload.flops / seconds / 1e12 / rate,
                    "peers_us": peer_times(workload, timer, repeats),
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
        "versions": {"pagelens": __version__, "python": platform.python_version()},
        "peers": {peer.name: peer.version for peer in PEERS},
        "rows": rows,
    }


def describe(peers: dict[str, float | str]) -> str:
    return ", ".join(f"{name} {us if isinstance(us, str) else f'{us:.1f}'}" for name, us in peers.items()) or "-"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times the GPU kernels beside their peers.")
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
    peers = [f"{name} {version or 'not installed'}" for name, version in found["peers"].items()]
    print("peers: " + ", ".join(peers))
    print(f"{'workload':48} {'us':>9} {'% copy':>7} {'% product':>9} peers, us")
    for row in found["rows"]:
        shares = f"{row['percent_of_copy']:7.1f} {row['percent_of_product']:9.1f}"
        print(f"{row['workload']:48} {row['us']:9.1f} {shares} {describe(row['peers_us'])}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
