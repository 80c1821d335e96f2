"""The case list on the card, small and real sizes, against the reference; see conftest.py for the dry mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from gpu.device.conftest import MODE
from gpu.device.on_device import OnDevice
from gpu.gpu_cases import GPU_SMALL, NO_INT8_CACHE, as_gpu_case
from ops.cases import REAL, Case, difference
from ops.vision_cases import REAL_VISION

from pagelens.ops.reference import ReferenceOps

REAL_SIZES = [as_gpu_case(case) for case in [*REAL, *REAL_VISION] if not isinstance(case, NO_INT8_CACHE)]
CASES = [*GPU_SMALL, *REAL_SIZES]
DRY = MODE == "dry"


@pytest.fixture(scope="module")
def device_ops() -> Iterator[Any]:
    """The backend on the card; dry: on host tensors, launches only counted."""
    from pagelens.kernels.launch import LaunchCounter, replaced_runner
    from pagelens.ops.devices import find_device
    from pagelens.ops.triton import TritonOps

    with ExitStack() as stack:
        ops = TritonOps("cuda")
        if DRY:
            ops.device = torch.device("cpu")
            stack.enter_context(replaced_runner(LaunchCounter()))
        else:
            ops.device = find_device("cuda")
        yield OnDevice(ops, ops.device)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_the_reference(case: Case, device_ops: Any) -> None:
    result = case.bind(device_ops)()
    if DRY:
        difference(result, result.clone(), case)
        return
    problem = difference(result, case.bind(ReferenceOps())(), case)
    assert problem is None, problem
