"""The kernels as their compilers emit them. A process compiles kernels or interprets them, never both: these tests have
one of their own, which tests/gpu/test_compiled.py starts with PAGELENS_TEST_COMPILED=1; elsewhere none is collected.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if os.environ.get("PAGELENS_TEST_COMPILED") != "1":
    collect_ignore_glob = ["test_*.py"]
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
