"""What the CUDA kernels are run on: the small cases of the shared list, and cases of what only they have."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from helpers.simt_build import ROOT
from ops.cache_cases import Int8AttentionCase, Int8RopeCase
from ops.case import Case, difference
from ops.cases import SMALL
from ops.vision_cases import SMALL_VISION

from pagelens.ops import OP_NAMES
from pagelens.ops.cuda import CudaOps
from pagelens.ops.reference import ReferenceOps
from pagelens.ops.registry import OpsTable

REFERENCE = ReferenceOps()
NO_INT8_CACHE = (Int8AttentionCase, Int8RopeCase)  # which the kernels do not have
CASES = [case for case in (*SMALL, *SMALL_VISION) if not isinstance(case, NO_INT8_CACHE)]
BUILT = "PAGELENS_TEST_CUDA_SIM"  # the variable that names an extension to test


def load(path: Path) -> ModuleType:
    """The extension at `path`. pybind11 keeps a module by its name, so each file gets one of its own."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._cuda_sim", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuda_ops(kernels: ModuleType) -> CudaOps:
    return CudaOps(kernels, "cuda-sim", REFERENCE, torch.device("cpu"))


def table(kernels: ModuleType) -> OpsTable:
    """Every op that has a CUDA kernel by it, the others by the reference."""
    ops = cuda_ops(kernels)
    backends: dict[str, Any] = {op: ops if op in ops.IMPLEMENTED else REFERENCE for op in OP_NAMES}
    return OpsTable(backends, [], [])


def conflicts(extension: Path, banks: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Places (file:line) with bank conflicts in shared memory -> cycles that they cost."""
    found: dict[str, int] = {}
    for place, (_, extra) in banks.items():
        if not extra:
            continue
        address = re.fullmatch(r".*\+(0x[0-9a-f]+)", place)
        if address:  # of a plain access only the code's address is known
            command = ["addr2line", "-e", str(extension), address[1]]
            place = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
        name = place.rpartition("/")[2]
        found[name] = found.get(name, 0) + extra
    return found


def shared_cases(ops: CudaOps) -> Iterator[Case]:
    """The small cases that the kernels take. What they refuse is listed by a test of its own."""
    for case in CASES:
        if case.op in ops.IMPLEMENTED and ops.supports(case.op_case()) is None:
            yield case


def compare(case: Case, ops: Any) -> str | None:
    result, expected = case.bind(ops)(), case.bind(REFERENCE)()
    pairs = zip(result, expected) if isinstance(expected, tuple) else [(result, expected)]
    return next((found for pair in pairs if (found := difference(*pair, case))), None)


def run_tests_with(extension: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own on another build of the kernels; one built with ASan needs its library first."""
    environment = {**os.environ, BUILT: str(extension), "ASAN_OPTIONS": "detect_leaks=0"}
    if "asan" in extension.parent.name:
        # Python loads the C++ library late: without it ASan would not find what to call for a thrown exception.
        libraries = [
            subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
            for name in ("libasan.so", "libstdc++.so")
        ]
        environment["LD_PRELOAD"] = " ".join(library.strip() for library in libraries)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
