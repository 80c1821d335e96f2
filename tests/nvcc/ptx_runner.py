"""Runs the launches of the CUDA kernels as the PTX that nvcc emits for sm_80, in the interpreter of tests/gpu/ptx.

The launches are those of the kernels' own host code (gpu_static.cuda_launch). Their arguments hold addresses of the
host; the storages that these point into are copied to the interpreter's memory and back, and the addresses replaced.
"""

from __future__ import annotations

import ctypes
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from cuda.kernel_cases import table
from gpu.ptx.decode import Program
from gpu.ptx.launch import Report, compile_ptx, launch
from gpu.ptx.memory import GlobalMemory
from gpu_static.cuda_launch import CudaLaunch, Kernels
from gpu_static.nvcc import Unit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Change = Callable[[str], str]


def kernel_of(name: str) -> str:
    """The kernel's own name in a mangled one: behind the file's name, 8 digits of a hash, and its length."""
    found = re.search(r"_cu_[0-9a-f]{8}(\d+)(.*)", name)
    if found is None:
        raise ValueError(f"{name} is no kernel of csrc/cuda")
    return found[2][: int(found[1])]


class Storages(TorchDispatchMode):
    """Every storage of the CPU that an operation of torch reads or makes while this is on; all stay alive with it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, torch.UntypedStorage] = {}  # by address

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor) and value.device.type == "cpu":
                storage = value.untyped_storage()
                if storage.nbytes():
                    self.kept[storage.data_ptr()] = storage
        return result

    def holding(self, address: int) -> int | None:
        """The address of the storage in which `address` lies."""
        starts = sorted(self.kept)
        at = bisect_right(starts, address) - 1
        if at < 0 or address >= starts[at] + self.kept[starts[at]].nbytes():
            return None
        return starts[at]


class PtxRunner:
    """change: edits the PTX of the kernels called `only` before it runs, for mutants."""

    programs: dict[str, Program] = {}  # noqa: RUF012  (shared on purpose: decoding is the same for all runs)

    def __init__(self, kernels: Kernels, units: Sequence[Unit], change: Change | None = None, only: str = "") -> None:
        self.kernels, self.change, self.only = kernels, change, only
        self.texts = {unit.source.stem: unit.ptx.read_text(encoding="utf-8") for unit in units}
        self.reports: list[tuple[str, Report]] = []
        self.storages = Storages()

    def __call__(self, work: Callable[[Any], Any], ops: Callable[[ModuleType], Any] = table) -> Any:
        """work(ops(module)), by default of a table of all ops, with the launches run from PTX. Raises PtxError."""
        with self.kernels.handled_by(self.launch) as module, self.storages:
            return work(ops(module))

    def program(self, name: str) -> Program:
        text = next(text for stem, text in self.texts.items() if f"{stem}_cu" in name)
        key = name
        if self.change is not None and self.only == kernel_of(name):
            start = text.index(f".entry {name}(")
            end = text.find(".entry ", start + 1)
            end = len(text) if end < 0 else text.rindex("\n", 0, end)
            text = text[:start] + self.change(text[start:end]) + text[end:]
            key = text
        if key not in self.programs:
            self.programs[key] = compile_ptx(text, name)
        return self.programs[key]

    def launch(self, job: CudaLaunch) -> None:
        program = self.program(job.name)
        memory, homes = GlobalMemory(), {}
        arguments = []
        for at, parameter in enumerate(program.kernel.parameters):
            data = bytearray(job.argument(at, parameter.bytes))
            for start in range(0, len(data) - 7, 8):  # pointers lie at multiples of 8
                address = int.from_bytes(data[start : start + 8], "little")
                storage = self.storages.holding(address)
                if storage is None:
                    continue
                if storage not in homes:
                    homes[storage] = memory.add(self._bytes(storage))
                data[start : start + 8] = (homes[storage] + address - storage).to_bytes(8, "little")
            arguments.append(bytes(data))
        report = launch(program, memory, job.grid, job.block, arguments, job.shared)
        for storage, copy in homes.items():
            self._bytes(storage)[:] = memory.get(copy)
        self.reports.append((job.name, report))

    def _bytes(self, storage: int) -> np.ndarray:
        """The storage's bytes themselves."""
        size = self.storages.kept[storage].nbytes()
        return np.frombuffer((ctypes.c_uint8 * size).from_address(storage), np.uint8)
