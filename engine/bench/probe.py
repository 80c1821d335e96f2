"""The machine's limits, measured beside a benchmark: memory bandwidth, and arithmetic by type of number."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from .. import _native
from ..doctor import memory_bytes
from ..errors import PagelensError

READ_BYTES = 2 << 30
KINDS = ("float32", "bfloat16", "int8")


@dataclass(slots=True)
class Limits:
    """Samples in bytes and operations a second; `bandwidth` and `arithmetic` are their medians."""

    isa: str
    threads: int
    bandwidth_samples: list[float] = field(default_factory=list)
    arithmetic_samples: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    @property
    def bandwidth(self) -> float:
        return statistics.median(self.bandwidth_samples)

    def arithmetic(self, kind: str) -> float:
        return statistics.median(self.arithmetic_samples[kind])

    def probe(self) -> None:
        """Take some more samples: once before and once after what is measured, for both can change by the minute."""
        # A quarter of a small machine's memory must do.
        num_bytes = max(1 << 24, min(READ_BYTES, (memory_bytes() or READ_BYTES) // 4))
        pool = _native.ThreadPool(self.threads)
        try:
            self.bandwidth_samples += _native.probe_bandwidth(pool, num_bytes, 3)
            for kind in KINDS:
                self.arithmetic_samples[kind] += _native.probe_flops(pool, kind, 0.1, 3)
        finally:
            pool.close()

    def to_json(self) -> dict[str, object]:
        return {
            "isa": self.isa,
            "bandwidth_bytes_per_s": self.bandwidth_samples,
            "operations_per_s": self.arithmetic_samples,
        }

    def describe(self) -> str:
        """One line for people."""
        low, high = min(self.bandwidth_samples), max(self.bandwidth_samples)
        rates = ", ".join(f"{kind} {self.arithmetic(kind) / 1e9:.0f}" for kind in KINDS)
        return (
            f"probed limits ({self.isa}, {self.threads} threads): reading {self.bandwidth / 1e9:.1f} GB/s "
            f"({low / 1e9:.1f} to {high / 1e9:.1f}), GFLOP/s {rates}"
        )


def new_limits(threads: int) -> Limits:
    """Raises PagelensError if PAGELENS_CPU_ISA is wrong."""
    try:
        return Limits(_native.isa(), threads)
    except ValueError as error:
        raise PagelensError(str(error)) from None
