"""Checks of interpreted kernels: every address lies in a tensor of the launch, and programs do not race.

Programs of a grid run in any order and at once. So within a launch no program may write what another one writes or
reads. The interpreter runs them one after another and notices nothing; `checked()` does, at every load and store.
Atomic operations are checked for their bounds only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter as stock

from . import repair

NOBODY, SEVERAL = -1, -2


class KernelCheckError(RuntimeError):
    """A kernel read or wrote out of bounds, or two programs raced."""


@dataclass(slots=True)
class Region:
    """Memory that a tensor of the launch spans; who wrote and read each of its elements, once somebody has."""

    start: int
    end: int
    size: int
    writers: np.ndarray | None = None
    readers: np.ndarray | None = None


@dataclass(slots=True)
class Checks:
    kernel: str = ""
    regions: list[Region] = field(default_factory=list)
    launches: int = 0

    def begin(self, kernel: str, tensors: list[torch.Tensor]) -> None:
        """A launch: only the memory between the first and the last element of each tensor may be touched.

        Tensors that overlap (a result that is an argument too) are one region.
        """
        self.kernel, self.launches = kernel, self.launches + 1
        spans = []
        for tensor in tensors:
            if tensor.numel():
                last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
                size = tensor.element_size()
                spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * size, size))
        self.regions = []
        for start, end, size in sorted(spans):
            if self.regions and start < self.regions[-1].end:
                self.regions[-1].end = max(end, self.regions[-1].end)
                self.regions[-1].size = min(size, self.regions[-1].size)
            else:
                self.regions.append(Region(start, end, size))

    def touch(self, what: str, pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data).astype(np.uint64).astype(np.int64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
        addresses = addresses.ravel()
        if not addresses.size:
            return
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        left = addresses.size
        for region in self.regions:
            inside = addresses[(addresses >= region.start) & (addresses + width <= region.end)]
            left -= inside.size
            if inside.size and what != "atomic":
                self._note(what, region, (inside - region.start) // region.size)
        if left:
            raise KernelCheckError(f"{self.kernel}: {what} out of bounds by {left} lanes in {self._program()}")

    def _note(self, what: str, region: Region, places: np.ndarray) -> None:
        own = self._number()
        count = -(-(region.end - region.start) // region.size)
        if region.readers is None or region.writers is None:
            region.readers, region.writers = (np.full(count, NOBODY, np.int32) for _ in range(2))
        written = region.writers[places]
        if ((written != NOBODY) & (written != own)).any():
            other = int(written[(written != NOBODY) & (written != own)][0])
            raise KernelCheckError(f"{self.kernel}: race: {what} by {self._program()} of what program {other} wrote")
        read = region.readers[places]
        if what == "load":
            region.readers[places] = np.where((read == NOBODY) | (read == own), own, SEVERAL)
            return
        if ((read != NOBODY) & (read != own)).any():
            raise KernelCheckError(f"{self.kernel}: race: store by {self._program()} of what another program reads")
        region.writers[places] = own

    @staticmethod
    def _number() -> int:
        return int(np.ravel_multi_index(stock.interpreter_builder.grid_idx, stock.interpreter_builder.grid_dim))

    @staticmethod
    def _program() -> str:
        return f"program {Checks._number()} at {tuple(map(int, stock.interpreter_builder.grid_idx))}"


@contextmanager
def checked() -> Iterator[Checks]:
    """Kernels that run meanwhile raise KernelCheckError (inside triton's InterpreterError or as it is)."""
    checks, builder = Checks(), stock.InterpreterBuilder
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        checks.touch("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        checks.touch("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def checked_atomic(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        checks.touch("atomic", pointers, mask)
        return atomic(self, op, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_rmw = checked_atomic
    repair.launch_hooks.append(checks.begin)
    try:
        yield checks
    finally:
        repair.launch_hooks.remove(checks.begin)
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_rmw = atomic
