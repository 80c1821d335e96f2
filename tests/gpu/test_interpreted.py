"""Starts the tests of tests/gpu/interpreter in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: there are wheels for Linux only")
def test_the_interpreted_kernels() -> None:
    """All of them pass, and there are some. The case list and the rest run at the same time, one core each."""
    folder = Path("tests/gpu/interpreter")
    names = sorted(path.name for path in (ROOT / folder).glob("test_*.py"))
    one_thread = {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

    def run(part: list[str]) -> subprocess.CompletedProcess[str]:
        files = [str(folder / name) for name in part]
        command = [sys.executable, "-m", "pytest", *files, "-q", "--durations=5"]
        environment = {**os.environ, **one_thread}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)

    parts = [["test_kernels.py"], [name for name in names if name != "test_kernels.py"]]
    with ThreadPoolExecutor(len(parts)) as pool:
        for result in pool.map(run, parts):
            print(result.stdout[-4000:])
            assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
            assert " passed" in result.stdout
