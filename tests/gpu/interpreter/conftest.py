"""Triton's kernels interpreted on the CPU. A process compiles kernels or interprets them, never both: these tests have
one of their own, which tests/gpu/test_interpreted.py starts with TRITON_INTERPRET=1; elsewhere they are not collected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

IS_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if not IS_INTERPRETING:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def triton_ops() -> object:
    from pagelens.ops.triton import TritonOps

    with pytest.warns(RuntimeWarning, match="interpreter"):
        return TritonOps("cpu")
