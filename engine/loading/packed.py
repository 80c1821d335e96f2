"""Folders that `pagelens quantize` writes: weights in the layout of the native kernels, mapped and not converted.

config.json says under "pagelens" what each packed tensor is. All of it is taken as hostile: a layout must be the one
that the model asks for, and have exactly the bytes that its tensor has, before a kernel sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError, WeightsError
from .checkpoint import Checkpoint
from .strict_json import shown

KEY = "pagelens"
VERSION = 1
PREFIX = "packed."  # of the tensors; the rest of the name is the model's own name of the part
Form = Literal["linear", "swiglu", "moe"]
FORMS: dict[str, int] = {"linear": 1, "swiglu": 2, "moe": 2}  # layouts each has
LAYOUT_TYPES = (int, int, int, bool, int, int, int, int, bool, bool, int)
MAX_NUMBER = 2**31 - 1  # of a layout


@dataclass(frozen=True, slots=True)
class PackedEntry:
    """One packed tensor: its form, and the layouts of its matrices (ops.packing.Layout) as plain tuples.

    count   experts of a "moe"
    shared  layouts of a "moe"'s shared expert, whose tensor is called NAME.shared; () if there is none
    """

    form: Form
    layouts: tuple[tuple[Any, ...], ...]
    count: int = 0
    shared: tuple[tuple[Any, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"form": self.form, "layouts": self.layouts, "count": self.count, "shared": self.shared}


def packed_names(target: str, index: int, entry: PackedEntry) -> list[str]:
    """The names in the file of one entry's tensors."""
    name = f"{PREFIX}{target}.{index}"
    return [name, f"{name}.shared"] if entry.shared else [name]


@dataclass(frozen=True, slots=True)
class PackedFolder:
    """What config.json says of a packed folder.

    dtype    "float32" or "bfloat16": of the activations that the weights were packed for
    weights  "auto", "int8" or "int4": how they were quantised
    parts    by the model's name of a part: the entry of each of its packed tensors, PREFIX + name + "." + number
    """

    dtype: str
    weights: str
    parts: dict[str, tuple[PackedEntry, ...]]


def read_packed(config: Mapping[str, Any]) -> PackedFolder | None:
    """The checked object under "pagelens", None if there is none. Raises ConfigError."""
    raw = config.get(KEY)
    if raw is None:
        return None

    def fail(reason: str) -> NoReturn:
        raise ConfigError(f'config.json: "{KEY}": {reason}; write the folder again with `pagelens quantize`')

    if not isinstance(raw, Mapping) or not isinstance(raw.get("parts"), Mapping):
        fail("must be an object with the key parts")
    if raw.get("version") != VERSION:
        fail(f"version {shown(raw.get('version'))} is not the one that is read, {VERSION}")
    if raw.get("dtype") not in ("float32", "bfloat16") or raw.get("weights") not in ("auto", "int8", "int4"):
        fail(f"dtype {shown(raw.get('dtype'))} or weights {shown(raw.get('weights'))} is unknown")
    parts = {}
    for name, entries in raw["parts"].items():
        if not isinstance(entries, list) or not 1 <= len(entries) <= 16:
            fail(f"part {name!r} must be a list of 1 to 16 entries")
        parts[name] = tuple(_read_entry(name, entry, fail) for entry in entries)
    return PackedFolder(raw["dtype"], raw["weights"], parts)


def _read_entry(name: str, raw: object, fail: Callable[[str], NoReturn]) -> PackedEntry:
    if not isinstance(raw, Mapping) or raw.get("form") not in tuple(FORMS):
        fail(f"an entry of part {name!r} is not one of {', '.join(FORMS)}")
    form: Form = raw["form"]
    count = raw.get("count", 0)
    layouts, shared = _read_layouts(raw.get("layouts")), _read_layouts(raw.get("shared", []))
    if layouts is None or shared is None or len(layouts) != FORMS[form] or len(shared) not in (0, 2):
        fail(f"the layouts of part {name!r} are damaged")
    if type(count) is not int or not 0 <= count <= 65536 or (form != "moe" and (count or shared)):
        fail(f"part {name!r} cannot have {count!r} experts")
    return PackedEntry(form, layouts, count, shared)


def _read_layouts(raw: object) -> tuple[tuple[Any, ...], ...] | None:
    if not isinstance(raw, list):
        return None
    layouts = []
    for layout in raw:
        if not isinstance(layout, list) or len(layout) != len(LAYOUT_TYPES):
            return None
        for value, kind in zip(layout, LAYOUT_TYPES):
            if not isinstance(value, int) or not 0 <= value <= MAX_NUMBER or type(value) is not kind:
                return None
        layouts.append(tuple(layout))
    return tuple(layouts)


class PackedSource:
    """A TensorSource of what lies unpacked in a packed folder; the packed tensors are asked for by `packed_tensor`.

    use_mmap  True: its tensors are to be used where they are mapped; False: they are to be copied
    """

    def __init__(self, checkpoint: Checkpoint, folder: PackedFolder, use_mmap: bool = True) -> None:
        self.folder = folder
        self.use_mmap = use_mmap
        self._checkpoint = checkpoint
        self._names = [name for name in checkpoint.names() if not name.startswith(PREFIX)]

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def dtype(self, name: str) -> str:
        return self._checkpoint.dtype(name)

    def tensor(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name)

    def release(self, name: str) -> None:
        self._checkpoint.release(name)

    def release_packed(self, target: str) -> None:
        """Give back the pages of a part's packed tensors: they were copied, or are not needed for now."""
        for i, entry in enumerate(self.folder.parts.get(target, ())):
            for name in packed_names(target, i, entry):
                self._checkpoint.release(name)

    def packed_tensor(self, name: str) -> Tensor:
        """Bytes [n] uint8, a view of the mapped file. Raises WeightsError."""
        tensor = self._checkpoint.tensor(name)
        if tensor.ndim != 1 or tensor.dtype != torch.uint8:
            raise WeightsError(f"packed tensor {shown(name)} is {list(tensor.shape)} {tensor.dtype}, not bytes")
        return tensor
