"""A written cost model: what a workload takes on a device at least, from what is known without running it.

It ranks configurations of one workload; its times are no predictions. Of one call with its launches:

    memory   bytes that must move, at the bandwidth that the programs in flight can ask for (Little's law): each
             multiprocessor has its programs' pipelined shared memory under way, LATENCY seconds long, and takes at
             most 64 bytes a clock
    l2       bytes that blocks of rows and columns read again, at an assumed bandwidth of the second cache
    compute  FLOPs of whole tiles at the matrix rate, times the multiprocessors that wait for the last wave, times the
             share of issue slots that the hot loop leaves to matrix instructions (mma.sync only: one of m16n8k16 takes
             8 clocks of a quarter multiprocessor on sm_80; other targets count as full)
    time     the largest of the three, LATENCY for each wave, and LAUNCH for each launch
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pagelens.kernels.launch import Launch
from pagelens.kernels.workloads import Workload

from .assembly import TENSOR, Resources
from .occupancy import DEVICES, occupancy

LATENCY = 0.8e-6  # seconds of a read of the device's memory under load
LAUNCH = 2.0e-6  # seconds between dependent launches of a replayed graph
BYTES_PER_CLOCK = 64  # from the second cache to a multiprocessor
CLOCKS_OF_MMA = 8


@dataclass(frozen=True)
class Estimate:
    """Seconds."""

    total: float
    memory: float
    l2: float
    compute: float

    @property
    def bound(self) -> str:
        parts = {"memory": self.memory, "second cache": self.l2, "tensor cores": self.compute}
        return max(parts, key=lambda name: parts[name])


def floor_seconds(target: str, workload: Workload) -> tuple[float, str]:
    """The roofline: bytes at the full bandwidth or FLOPs at the full rate, and which of the two."""
    device = DEVICES[target]
    memory, compute = workload.bytes / (device.bandwidth * 1e9), workload.flops / (device.tflops * 1e12)
    return max(memory, compute), "FLOPs" if compute > memory else "bytes"


def estimate(target: str, workload: Workload, launches: Sequence[tuple[Launch, Resources]]) -> Estimate:
    """Of a call of which one launch does the work (others round inputs, join parts or combine terms)."""
    device = DEVICES[target]
    launch, resources = main_launch(launches)
    programs = math.prod(launch.grid)
    fit = max(occupancy(target, resources).programs, 1)
    here = min(fit, math.ceil(programs / device.multiprocessors))
    active = min(programs, device.multiprocessors)
    waves = math.ceil(programs / (fit * device.multiprocessors))
    stages = launch.options.get("num_stages", 1)
    under_way = resources.shared * (stages - 1) / stages if stages > 1 else 0
    under_way = max(under_way, 32 * resources.warps * 32)  # two loads of 16 bytes a thread
    rate = active * min(here * under_way / LATENCY, BYTES_PER_CLOCK * device.clock_ghz * 1e9)
    memory = workload.bytes / min(device.bandwidth * 1e9, rate)
    sizes = launch.constants
    rows = math.ceil(workload.rows / sizes["BLOCK_M"]) if workload.rows else 0
    cols = math.ceil(workload.cols / sizes["BLOCK_N"]) if workload.cols else 0
    l2 = (rows * workload.row_operand + cols * workload.col_operand) / min(device.l2 * 1e9, rate)
    padded = workload.flops * (rows * sizes["BLOCK_M"] / workload.rows if workload.rows else 1)
    padded *= cols * sizes["BLOCK_N"] / workload.cols if workload.cols else 1
    full = programs / (math.ceil(programs / device.multiprocessors) * device.multiprocessors)
    compute = padded / (device.tflops * 1e12) / full / issue_share(target, resources)
    total = max(memory, l2, compute) + waves * LATENCY + len(launches) * LAUNCH
    return Estimate(total, memory, l2, compute)


def main_launch(launches: Sequence[tuple[Launch, Resources]]) -> tuple[Launch, Resources]:
    """The first with matrix instructions, or the first."""
    return next((pair for pair in launches if pair[1].tensor), launches[0])


def issue_share(target: str, resources: Resources) -> float:
    """How much of the matrix rate the other instructions of the hot loop leave."""
    count = sum(resources.loop.get(name, 0) for name in TENSOR)
    if target not in ("sm_80", "sm_89", "sm_120") or not count:
        return 1.0
    return min(1.0, CLOCKS_OF_MMA * count / resources.loop_length)
