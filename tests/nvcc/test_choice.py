"""On a card an op runs on its CUDA kernel exactly where the table of docs/gpu-kernels.md has a reason for it."""

from __future__ import annotations

import re
from pathlib import Path

from pagelens.config import CUDA_OPS
from pagelens.ops.cuda_choice import BY_DEFAULT

TABLE = Path(__file__).parents[2] / "docs" / "gpu-kernels.md"


def test_the_table_has_a_reason_for_each_choice() -> None:
    text = TABLE.read_text(encoding="utf-8").partition("## CUDA or Triton, op by op")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| (cuda|triton) \| (.+) \|$", text, re.M)
    assert {op for op, _, _ in rows} == set(CUDA_OPS)
    assert tuple(op for op, taken, _ in rows if taken == "cuda") == BY_DEFAULT
    assert all(len(reason) > 40 for _, _, reason in rows)
