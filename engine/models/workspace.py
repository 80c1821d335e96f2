"""Named scratch buffers that live as long as a model, so that a decode step allocates nothing."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

# From this size on a buffer has pages of its own, huge ones if possible: they go back to the system with it. (What is
# freed to malloc may stay with the process, page after page.)
OWN_PAGES_BYTES = 4 << 20


def new_buffer(count: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised [count] tensor."""
    num_bytes = count * dtype.itemsize
    if num_bytes < OWN_PAGES_BYTES or torch.device(device).type != "cpu":
        return torch.empty(count, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count)


class Workspace:
    """Hands out views of buffers that grow when a larger shape is asked for and do not shrink before `clear`.

    A view is valid until the same name is taken again. One workspace serves one forward pass at a time.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype], Tensor] = {}
        self.generation = 0  # changes whenever a buffer moved: addresses taken before are no longer good

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor of `shape`. The same name and shape give the same memory."""
        key = (name, dtype)
        view = self._views.get(key)
        if view is not None and view.shape == shape:
            return view
        count = prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < count:
            self._views.pop(key, None)
            self._buffers.pop(key, None)  # first: not both at once
            del buffer, view
            buffer = new_buffer(count, dtype, self._device)
            self._buffers[key] = buffer
            self.generation += 1
        view = buffer[:count].view(shape)
        self._views[key] = view
        return view

    def clear(self) -> None:
        """Free all buffers, but for views that somebody still holds."""
        self._buffers.clear()
        self._views.clear()
        self.generation += 1

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())
