"""Devices as their makers describe them, and how many programs fit on one multiprocessor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .assembly import Resources


@dataclass(frozen=True)
class Device:
    """One card of a target. Sizes in bytes, bandwidth in GB/s, 16-bit matrix rate in TFLOP/s (dense, float32 sums).

    Sources: NVIDIA's data sheets and the table of compute capabilities in the CUDA C++ Programming Guide; AMD's data
    sheet of the MI300X and its CDNA 3 documents. l2 is an assumption (no maker states it): see cost.py.
    """

    name: str
    multiprocessors: int
    shared: int
    shared_of_program: int
    warps: int
    programs: int
    bandwidth: float
    tflops: float
    l2: float
    clock_ghz: float


KIB = 1024
DEVICES = {
    "sm_80": Device("A100 80 GB", 108, 164 * KIB, 163 * KIB, 64, 32, 2039, 312, 5000, 1.41),
    "sm_89": Device("L40S", 142, 100 * KIB, 99 * KIB, 48, 24, 864, 362, 4000, 2.52),
    "sm_90": Device("H100 SXM", 132, 228 * KIB, 227 * KIB, 64, 32, 3350, 989, 7000, 1.83),
    "sm_100": Device("B200", 148, 228 * KIB, 227 * KIB, 64, 32, 8000, 2250, 16000, 1.85),
    "sm_120": Device("RTX 5090", 170, 100 * KIB, 99 * KIB, 48, 24, 1792, 209, 6000, 2.41),
    "gfx942": Device("MI300X", 304, 64 * KIB, 64 * KIB, 32, 32, 5300, 1307, 12000, 2.1),
}
REGISTERS = 65536  # of 32 bits in an NVIDIA multiprocessor, in four parts
RESERVED = 1024  # bytes of shared memory that the system takes from each program (compute capability 8.0 and later)


@dataclass(frozen=True)
class Occupancy:
    """Programs of a kernel that run at once on one multiprocessor, their share of its warps, and what limits them."""

    programs: int
    share: float
    limiter: str


def occupancy(target: str, resources: Resources) -> Occupancy:
    device = DEVICES[target]
    warps = resources.warps
    if target.startswith("gfx"):
        # 4 SIMDs with 512 vector registers a lane and at most 8 wavefronts each; registers come in eights.
        per_wave = max(8, math.ceil(resources.registers / 8) * 8)
        by_registers = min(8, 512 // per_wave) * 4 // warps
        by_shared = device.shared // resources.shared if resources.shared else device.programs
    else:
        per_warp = math.ceil(resources.registers * 32 / 256) * 256
        by_registers = REGISTERS // 4 // per_warp * 4 // warps
        block = math.ceil((resources.shared + RESERVED) / 128) * 128
        by_shared = device.shared // block if resources.shared <= device.shared_of_program else 0
    limits = {
        "warps": device.warps // warps,
        "programs": device.programs,
        "registers": by_registers,
        "shared": by_shared,
    }
    limiter = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limiter], limits[limiter] * warps / device.warps, limiter)
