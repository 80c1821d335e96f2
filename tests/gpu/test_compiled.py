"""Starts the tests of tests/gpu/compiled in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: there are wheels for Linux only")
def test_the_compiled_kernels() -> None:
    """All of them pass, and there are some."""
    command = [sys.executable, "-m", "pytest", "tests/gpu/compiled", "-q", "--durations=5"]
    chosen = {"PAGELENS_TEST_COMPILED": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, cwd=ROOT, env={**kept, **chosen}, capture_output=True, text=True, timeout=900)
    print(result.stdout[-4000:])
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
