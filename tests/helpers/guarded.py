"""Tensors between two pages that nobody may touch: a read or write of one byte beyond ends the process."""

from __future__ import annotations

import ctypes
import math
import mmap
from typing import Any

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
OPS = (
    "linear",
    "swiglu_ffn",
    "moe_ffn",
    "paged_attention",
    "attention",
    "window_attention",
    "patch_embed",
    "conv_downsample",
    "rms_norm",
    "layer_norm",
    "embedding",
)


class Guards:
    """Makes guarded copies; `free` gives their memory back, after which they must not be used."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def copy(self, x: Tensor, at_end: bool) -> Tensor:
        """The same values with the same strides. The last byte (not at_end: the first) borders on a guard."""
        if not x.numel():
            return x
        extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1
        used = extent * x.element_size()
        whole = -(-used // PAGE) * PAGE
        memory = mmap.mmap(-1, whole + 2 * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._maps.append(memory)
        for guard in (base, base + PAGE + whole):
            if _libc.mprotect(ctypes.c_void_p(guard), PAGE, PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        first = PAGE + (whole - used if at_end else 0)
        flat = torch.frombuffer(memory, dtype=x.dtype, count=extent, offset=first)
        if x.is_floating_point():
            flat.fill_(math.nan)  # what lies between rows
        copied = flat.as_strided(x.shape, x.stride())
        return copied.copy_(x)

    def free(self) -> None:
        self._maps.clear()


class GuardedOps:
    """A backend whose ops are called with guarded copies of their tensors, `out` among them."""

    def __init__(self, ops: Any, guards: Guards, at_end: bool) -> None:
        self._ops, self._guards, self._at_end, self.name = ops, guards, at_end, ops.name

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ops, name)
        if name not in OPS:
            return found

        def call(*arguments: Any, **named: Any) -> Tensor:
            copies: dict[int, Tensor] = {}  # one copy of a tensor that comes twice

            def guarded(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                if id(value) not in copies:
                    copies[id(value)] = self._guards.copy(value, self._at_end)
                return copies[id(value)]

            result: Tensor = found(*map(guarded, arguments), **{key: guarded(value) for key, value in named.items()})
            return result.clone()

        return call
