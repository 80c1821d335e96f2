"""pagelens._cuda where it is built (PAGELENS_CUDA=1) and there is no GPU: it says so, and launches raise."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda.kernel_cases import REFERENCE, shared_cases, table

from pagelens.config import CUDA_OPS
from pagelens.ops.cuda import CudaOps


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    module = pytest.importorskip("pagelens._cuda", reason="PAGELENS_CUDA=1 pip install . builds it, with nvcc")
    if module.devices()[0]:
        pytest.skip("there is a GPU, on which these calls would work or destroy their context")
    return module


def test_it_imports_without_a_driver_and_says_so(kernels: ModuleType) -> None:
    assert kernels.devices()[0] == 0
    assert kernels.devices()[1].startswith("no GPU: ")
    code = "import pagelens._cuda as c; print(c.devices()[1])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("no GPU: ")


@pytest.mark.parametrize("op", [*CUDA_OPS, "moe_routing"])
def test_a_launch_is_an_exception(op: str, kernels: ModuleType) -> None:
    """The adapter on host memory, which is never read: the launch is refused before."""
    ops = CudaOps(kernels, "cuda", REFERENCE, torch.device("cpu"))
    call: Any
    if op == "moe_routing":
        call = lambda: ops.moe_routing(torch.zeros(3, 8), 2, True, 1.0)  # noqa: E731
    else:
        call = next(case for case in shared_cases(ops) if case.op == op and case.flops()).bind(table(kernels))
    for _ in range(2):  # an error does not stay behind for the next call to trip over, nor is it forgotten
        with pytest.raises(RuntimeError, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice"):
            call()
