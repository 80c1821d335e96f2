"""Packed weights as bytes: out of the kernels' memory into a file, and from a mapped file back without a copy."""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _native
from ..errors import WeightsError
from ..loading.packed import PackedEntry
from .packing import DTYPES, Layout, PackedLinear, PackedMoe, PackedSwiglu

_DTYPE_OF = {code: dtype for dtype, code in DTYPES.items()}


def memory_of(handle: _native.Linear | _native.Swiglu | _native.Moe) -> Tensor:
    """The packed bytes as a view: valid while the handle lives, and not to be written."""
    if handle.num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    buffer = (ctypes.c_uint8 * handle.num_bytes).from_address(handle.address)
    return torch.frombuffer(buffer, dtype=torch.uint8)


class _Bytes(Protocol):
    """Packed bytes that live as long as this object."""

    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class _Mapped:
    """A tensor of a mapped file."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.address, self.num_bytes = tensor.data_ptr(), tensor.numel()


class NativeMapping:
    """The functions of the contract that go with a packed folder."""

    _pool: _native.ThreadPool

    def packed_memory(self, packed: Any) -> tuple[PackedEntry, list[Tensor]] | None:
        if isinstance(packed, PackedLinear):
            return PackedEntry("linear", (packed.layout,)), [memory_of(packed.handle)]
        if isinstance(packed, PackedSwiglu):
            return PackedEntry("swiglu", (packed.gate_up, packed.down)), [memory_of(packed.handle)]
        if isinstance(packed, PackedMoe):
            shared = () if packed.shared is None else (packed.shared.gate_up, packed.shared.down)
            tensors = [memory_of(packed.handle)]
            if packed.shared is not None:
                tensors.append(memory_of(packed.shared.handle))
            return PackedEntry("moe", (packed.gate_up, packed.down), packed.num_experts, shared), tensors
        return None

    def map_packed(self, entry: PackedEntry, tensors: list[Tensor], copied: bool = False) -> Any:
        """Raises WeightsError if a tensor has not exactly the bytes of its layout."""
        first, last = Layout(*entry.layouts[0]), Layout(*entry.layouts[-1])
        dtype = _DTYPE_OF.get(first.dtype, torch.float32)
        kept = [self._copy(tensor) if copied else _Mapped(tensor) for tensor in tensors]
        address, size = kept[0].address, kept[0].num_bytes
        try:
            if entry.form == "linear":
                return PackedLinear(_native.map_linear(first, address, size), first, dtype, kept)
            if entry.form == "swiglu":
                return PackedSwiglu(_native.map_swiglu(first, last, address, size), first, last, dtype, kept)
            shared = self._map_shared(entry, kept[-1], dtype) if entry.shared else None
            shared_handle = None if shared is None else shared.handle
            handle = _native.map_moe(entry.count, first, last, shared_handle, address, size)
            return PackedMoe(handle, entry.count, first, last, shared, dtype, kept)
        except ValueError as error:
            raise WeightsError(f"a packed {entry.form} does not fit its layout: {error}") from None

    def _copy(self, tensor: Tensor) -> _native.CopiedWeights:
        return _native.copy_weights(self._pool, tensor.data_ptr(), tensor.numel())

    @staticmethod
    def _map_shared(entry: PackedEntry, kept: _Bytes, dtype: torch.dtype) -> PackedSwiglu:
        first, last = Layout(*entry.shared[0]), Layout(*entry.shared[1])
        return PackedSwiglu(_native.map_swiglu(first, last, kept.address, kept.num_bytes), first, last, dtype, kept)
