"""Runs launches of the Triton kernels as the PTX that they compile to for sm_80, in the interpreter of tests/gpu/ptx.

`ptx_ops()` is the Triton backend on CPU tensors, whose launches must then go to a `PtxRunner`:
    with replaced_runner(PtxRunner()), forced_target("sm_80"): ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu.ptx.decode import Program
from gpu.ptx.launch import Report, compile_ptx, launch
from gpu.ptx.memory import GlobalMemory
from gpu_static import compiled
from torch import Tensor

from pagelens.kernels.launch import Launch

TARGET = "sm_80"
Change = Callable[[str], str]
_texts: dict[str, tuple[str, int, int]] = {}  # PTX, warps and shared bytes by fingerprint
_programs: dict[str, Program] = {}  # by text


def ptx_ops() -> Any:
    """The Triton backend in a process that compiles its kernels, with its weights on the CPU."""
    compiled.setup()
    from pagelens.ops.triton import TritonOps

    ops = TritonOps("cuda")
    ops.device = torch.device("cpu")
    return ops


class PtxRunner:
    """change: edits the PTX of the kernels called `only` (of all if None) before it runs, for mutants."""

    def __init__(self, change: Change | None = None, only: str | None = None) -> None:
        self.change, self.only = change, only
        self.reports: list[tuple[str, Report]] = []

    def __call__(self, job: Launch) -> None:
        key = compiled.fingerprint(job, TARGET)
        if key not in _texts:
            found = compiled.compile_launch(job, TARGET)
            if found.scratch:
                raise NotImplementedError(f"{job.name} wants global scratch memory")
            _texts[key] = (found.asm["ptx"], found.num_warps, found.shared)
        text, warps, shared = _texts[key]
        if self.change is not None and self.only in (None, job.name):
            text = self.change(text)
        program = _programs.get(text)
        if program is None:
            program = _programs[text] = compile_ptx(text)
        memory = GlobalMemory()
        homes: dict[int, tuple[int, Tensor]] = {}  # address on the device and bytes of each storage
        arguments = [place(value, memory, homes) for value in compiled.bind(job, TARGET)[2].values()]
        arguments += [0, 0]  # Triton's own scratch pointers, unused
        report = launch(program, memory, job.grid, (32 * warps,), arguments, shared)
        for address, host in homes.values():
            host.numpy()[:] = memory.get(address)
        self.reports.append((job.name, report))


def place(value: Any, memory: GlobalMemory, homes: dict[int, tuple[int, Tensor]]) -> int | float:
    """An argument of the kernel; tensors are copied to the device's memory, storage by storage."""
    if not isinstance(value, Tensor):
        return float(value) if isinstance(value, float) else int(value)
    storage = value.untyped_storage()
    host = storage.data_ptr()
    if host not in homes:
        data = torch.empty(0, dtype=torch.uint8).set_(storage)
        homes[host] = memory.add(data.numpy() if data.numel() else np.zeros(0, np.uint8)), data
    return homes[host][0] + value.data_ptr() - host
