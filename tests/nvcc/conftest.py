"""What nvcc makes of the CUDA kernels, once for all tests of a run. Without nvcc they are skipped, and say so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
if TYPE_CHECKING:
    from gpu_static.cuda_launch import Kernels
    from gpu_static.nvcc import Unit


@pytest.fixture(scope="session")
def units() -> list[Unit]:
    """All files of csrc/cuda, compiled alone for every target; fails if one spills or uses local memory."""
    from gpu_static import nvcc

    if nvcc.find() is None:
        pytest.skip("wants nvcc (CUDA 12.8 or newer) on the PATH, or NVCC=/path/to/nvcc")
    return nvcc.compile_all()


@pytest.fixture(scope="session")
def launches(units: list[Unit]) -> Kernels:
    from gpu_static import cuda_launch

    return cuda_launch.load(units)
