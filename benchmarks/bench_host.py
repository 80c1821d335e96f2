"""Launches and host time of a decode step on a device that does nothing: `python benchmarks/bench_host.py`.

Counts what the engine and its adapters cost the host. Not counted: Triton's own launcher (eager), the driver's launch
of a graph, copies. Nothing here is a speed of a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.null_device import DEEPSEEK_OCR, QWEN3_06B, measure


def main() -> None:
    print(f"{'decoder':14} {'sequences':>9} {'mode':6} {'launches':>8} {'least us':>9} {'median us':>9}")
    for name, config in (("qwen3-0.6b", QWEN3_06B), ("deepseek-ocr", DEEPSEEK_OCR)):
        for sequences in (1, 8):
            for use_graphs in (False, True):
                cost = measure(config, use_graphs, sequences, steps=100)
                mode, count = "graph" if use_graphs else "eager", sum(cost.launches.values())
                print(f"{name:14} {sequences:9} {mode:6} {count:8} {cost.least_us:9.0f} {cost.median_us:9.0f}")


if __name__ == "__main__":
    main()
