"""Named scratch buffers that live as long as a model, so that a decode step allocates nothing."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Workspace:
    """Hands out views of buffers that grow when a larger shape is asked for and never shrink.

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
            buffer = torch.empty(count, dtype=dtype, device=self._device)
            self._buffers[key] = buffer
            self.generation += 1
        view = buffer[:count].view(shape)
        self._views[key] = view
        return view

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())
