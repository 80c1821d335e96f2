"""docs/gpu-resources.md is what Triton's compilers say; no chosen configuration spills or misses its tensor cores.

The part of the CUDA kernels is compared in tests/nvcc/test_compile.py.
"""

from __future__ import annotations

import gpu_resources
import pytest
from gpu_static import table


@pytest.fixture(scope="module")
def rows() -> list[table.Row]:
    return table.collect()


def test_the_table_is_up_to_date(rows: list[table.Row]) -> None:
    written = gpu_resources.TABLE.read_text(encoding="utf-8")
    assert table.render(rows) == table.split(written)[0], "run: python tools/gpu_resources.py --write"


def test_chosen_configurations(rows: list[table.Row]) -> None:
    assert table.problems(rows) == []


def test_every_target_has_every_workload(rows: list[table.Row]) -> None:
    assert {(row.workload.name, row.target) for row in rows} == {
        (workload.name, target) for workload in table.WORKLOADS for target in table.TARGETS
    }
