"""Where packed weights lie: small ones side by side in huge pages, which are given back when the last goes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pagelens.ops.native import NativeOps

HUGE_PAGE, LINE = 2 << 20, 64
STATUS = Path("/proc/self/statm")


@pytest.fixture
def native() -> Iterator[NativeOps]:
    ops = NativeOps(2)
    yield ops
    ops.close()


def resident_bytes() -> int:
    return int(STATUS.read_text().split()[1]) * 4096


def test_small_matrices_lie_side_by_side_and_keep_their_contents(native: NativeOps) -> None:
    weights = [torch.randn(rows, 200) for rows in (1, 33, 64, 700, 2000)]
    packed = [native.pack_linear(weight) for weight in weights]
    for before, after in itertools.pairwise(p.handle for p in packed):
        end = before.address + -(-before.num_bytes // LINE) * LINE
        assert after.address == end or after.address % HUGE_PAGE == 0  # the first of another block
    x = torch.randn(3, 200)
    del packed[1::2], weights[1::2]
    packed.append(native.pack_linear(torch.randn(500, 200)))
    for p, weight in zip(packed, weights):
        torch.testing.assert_close(native.linear(x, p), x @ weight.T, rtol=1e-4, atol=1e-4)


def test_large_matrices_start_on_a_huge_page(native: NativeOps) -> None:
    packed = native.pack_linear(torch.zeros(4096, 1024))
    assert packed.handle.num_bytes == 16 << 20
    assert packed.handle.address % HUGE_PAGE == 0


@pytest.mark.skipif(not STATUS.exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize("rows", [1024, 8192], ids=["shared blocks", "own blocks"])
def test_memory_goes_back_to_the_system_with_the_last_matrix(rows: int, native: NativeOps) -> None:
    weight = torch.zeros(rows, 1024)  # 4 and 32 MiB
    native.linear(torch.zeros(1, 1024), native.pack_linear(weight))  # threads and scratch memory are there
    before = resident_bytes()
    packed = [native.pack_linear(weight) for _ in range(192 * 1024 // rows // 4)]
    total = sum(p.handle.num_bytes for p in packed)
    assert resident_bytes() - before > 0.9 * total
    del packed
    assert resident_bytes() - before < 0.1 * total
