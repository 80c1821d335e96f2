"""Worker: what the machine gives at this moment, by the native probes; the kernels' limits in the same seconds."""

from __future__ import annotations

import statistics
from typing import Any

from pagelens import _native

from .protocol import serve

READ_BYTES = 512 << 20
REPEATS = 3
FLOPS_S = 0.03
KINDS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


class Probe:
    def __init__(self, spec: dict[str, Any]) -> None:
        self._pool = _native.ThreadPool(spec["threads"])

    def describe(self) -> dict[str, Any]:
        return {"isa": _native.isa(), "threads": self._pool.num_threads}

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"kinds": of "fp32", "bf16", "int8"} -> GB/s of reading, and G operations/s of each kind; medians."""
        read = statistics.median(_native.probe_bandwidth(self._pool, READ_BYTES, REPEATS))
        rates = {
            kind: statistics.median(_native.probe_flops(self._pool, KINDS[kind], FLOPS_S, REPEATS)) / 1e9
            for kind in request["kinds"]
        }
        return {"read": read / 1e9, **rates}


if __name__ == "__main__":
    serve(Probe)
