"""Parts of a model to and from a packed folder: which parts can be written packed, and whether a packed one fits.

A layout from a file reaches a kernel only if it has the sizes that the model's weight map says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..loading.packed import Form, PackedEntry, PackedSource, packed_names
from ..ops import Ops
from .weight_map import FusedLinear, Part

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
Sizes = tuple[int, int]


def write_part(part: Part, packed: Any, ops: Ops, add: Callable[[str, Tensor], None]) -> list[PackedEntry] | None:
    """Hand the packed tensors of a part to `add`; None if it is not of a kind that has packed memory."""
    pieces = packed.packed if isinstance(packed, FusedLinear) else (packed,)
    entries = []
    for i, piece in enumerate(pieces):
        found = ops.packed_memory(piece)
        if found is None:
            return None
        entry, tensors = found
        entries.append(entry)
        for name, tensor in zip(packed_names(part.spec.target, i, entry), tensors, strict=True):
            add(name, tensor.clone())  # the packed object goes before its shard is written
    return entries


def map_part(part: Part, ops: Ops, source: PackedSource) -> Any:
    """What part.pack would give, over the folder's bytes: mapped, or copied if the source says so."""
    target = part.spec.target
    entries = source.folder.parts[target]
    pieces = []
    for i, entry in enumerate(entries):
        tensors = [source.packed_tensor(name) for name in packed_names(target, i, entry)]
        pieces.append(ops.map_packed(entry, tensors, copied=not source.use_mmap))
    if not source.use_mmap:
        source.release_packed(target)
    if not part.fused:
        return pieces[0]
    ends = [sum(entry.layouts[0][0] for entry in entries[: i + 1]) for i in range(len(entries))]
    columns = [slice(end - entry.layouts[0][0], end) for end, entry in zip(ends, entries)]
    return FusedLinear(tuple(pieces), tuple(columns))


def check_part(part: Part, entries: Sequence[PackedEntry], dtype: torch.dtype) -> None:
    """Raises WeightsError if a packed part of a file does not fit the model."""
    fault = find_fault(part, entries, DTYPE_CODES[dtype])
    if fault:
        raise WeightsError(f"packed part {part.spec.target} does not fit the model: {fault}; write the folder again")


def find_fault(part: Part, entries: Sequence[PackedEntry], dtype_code: int) -> str | None:
    """None if the sizes of all layouts are those of the weight map, else a sentence."""
    shapes = dict(zip(part.spec.sources, part.spec.shapes))
    matrices: list[Sizes] = [(s[0], s[1]) for name, s in shapes.items() if name in part.spec.linear]
    layouts = [layout for entry in entries for layout in (*entry.layouts, *entry.shared)]
    if any(layout[2] != dtype_code for layout in layouts):
        return "it was packed for another dtype"
    form = form_of(part)
    if any(entry.form != form for entry in entries) or (len(entries) > 1 and not part.fused):
        return f"{len(entries)} entries of form {entries[0].form} instead of {form or 'tensors that are not packed'}"
    has_bias = len(shapes) > len(matrices)
    if any(layout[3] != has_bias for layout in layouts):
        return "it has a bias that the model has not, or none"
    found = [(layout[0], layout[1]) for layout in layouts]
    if form == "linear":
        wanted = (sum(n for n, _ in matrices), matrices[0][1])
        total = (sum(n for n, _ in found), found[0][1])
        return None if total == wanted and all(k == wanted[1] for _, k in found) else f"{total} instead of {wanted}"
    experts = 0
    expected = swiglu_sizes(matrices)
    if form == "moe":
        experts = matrices[0][0]
        expected = swiglu_sizes(matrices[1:4])
        if len(matrices) > 1 + 3 * experts:
            expected = expected + swiglu_sizes(matrices[-3:])
    if entries[0].count != experts or found != expected:
        return f"{entries[0].count} experts of {found} instead of {experts} of {expected}"
    return None


def form_of(part: Part) -> Form | None:
    """How a part is packed, by its matrices: one, or several that are fused; gate, up and down; a router and experts.

    None if it is not. Stacked experts are packed too, but a packed folder holds no stacked ones.
    """
    count = len(part.spec.linear)
    if count == 0 or any(len(shape) == 3 for shape in part.spec.shapes):
        return None
    if count == 1 or part.fused:
        return "linear"
    return "swiglu" if count == 3 else "moe"


def swiglu_sizes(matrices: Sequence[Sizes]) -> list[Sizes]:
    """(n, k) of the packed gate_up and down of gate [I, C], up, down [C, I]."""
    inner, width = matrices[0]
    return [(-(-inner // 16) * 32, width), matrices[2]]
