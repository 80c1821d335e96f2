"""What a token's step reads of packed weights, in bytes: the floor of a decode step's time, over the bandwidth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..ops import Ops

_ACTIVATION, _INT8 = 5, 1  # where a layout says how inputs are rounded, and the number of int8: ops.packing.Layout


def token_bytes(ops: Ops, parts: Iterable[Any], top_k: int) -> int | None:
    """Bytes of packed linear layers, feed-forwards and of top_k experts; None if the backend does not tell."""
    total = 0
    for part in parts:
        found = ops.packed_memory(part)
        if found is None:
            return None
        entry, tensors = found
        size = sum(tensor.numel() for tensor in tensors)
        if entry.form == "moe":
            router = 4 * -(-entry.count // 32) * 32 * entry.layouts[0][1]  # float32, rows in panels of 32
            experts = tensors[0].numel() - router
            size -= experts * (entry.count - top_k) // entry.count
        total += size
    return total


def rounds_inputs(ops: Ops, parts: Iterable[Any]) -> bool:
    """Whether the layers multiply 8-bit integers."""
    entries = [found[0] for found in map(ops.packed_memory, parts) if found is not None]
    return bool(entries) and all(entry.layouts[0][_ACTIVATION] == _INT8 for entry in entries)
