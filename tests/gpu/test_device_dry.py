"""`make test-gpu DRY=1` runs to its end without a card, in a process of its own; the copies to and from a device."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gpu.device.on_device import OnDevice

from pagelens.ops.reference import ReferenceOps

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: there are wheels for Linux only")
def test_the_dry_run() -> None:
    command = [sys.executable, "-m", "pytest", "tests/gpu/device", "-q"]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        command, cwd=ROOT, env={**kept, "PAGELENS_TEST_GPU": "dry"}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_what_an_op_writes_in_place_comes_back() -> None:
    """Through copies, as on a card: views of one cache, an aliased residual, strided rows."""
    ops = OnDevice(ReferenceOps(), torch.device("cpu"))
    weight = ops.pack_linear(torch.eye(4))
    residual = torch.ones(2, 4)
    wide = torch.arange(12.0).view(2, 6)
    result = ops.linear(wide[:, :4], weight, residual=residual, out=residual)
    assert torch.equal(residual, wide[:, :4] + 1)
    assert torch.equal(result, residual)
