"""Kernels with one line changed: each must be found by the check that is there for it."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from cuda.kernel_cases import compare, load, run_tests_with, table
from helpers.simt_build import ROOT, build_extension
from ops.cache_cases import AttentionCase, Paged, RopeCase
from ops.case import Case
from ops.cases import MoeCase
from ops.vision_cases import ConvDownsampleCase, WindowAttentionCase

BF16 = torch.bfloat16
ATTENTION = AttentionCase(batch=Paged(((1, 600), (3, 90))), heads=4, kv_heads=2, head_dim=64, dtype=BF16)
MOE = MoeCase(rows=40, width=192, inner=96, shared=0, dtype=BF16)
CONV = ConvDownsampleCase(batch=1, grid=6, dtype=BF16)
# Rows of 16 keys: of sizes that are no multiple of 8 reads of the terms meet in banks, too.
WINDOWS = WindowAttentionCase(grid=20, window=16, heads=1, head_dim=64, dtype=BF16)
ROPE = RopeCase(batch=Paged(((3, 19), (1, 20))), heads=4, kv_heads=2, head_dim=64, norm=True, dtype=BF16)


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    case: Case
    found_by: str  # race, stop, wrong, banks


MUTANTS = (
    Mutant(
        "a barrier removed before the tile is read",
        "conv_downsample.cu",
        "    __syncthreads();\n    multiply<",
        "    multiply<",
        CONV,
        "race",
    ),
    Mutant("a missing border", "conv_downsample.cu", "&& yy >= 0 && yy", "&& yy", CONV, "wrong"),
    Mutant(
        "a barrier removed between the stages",
        "window_attention.cu",
        "__syncthreads();  // before the next loads overwrite the stage",
        "",
        WINDOWS,
        "race",
    ),
    Mutant(
        "the padding's row forgotten",
        "window_attention.cu",
        "const bf16* row = inside ? w.base + ",
        "const bf16* row = true ? w.base + ",
        WINDOWS,
        "wrong",
    ),
    Mutant(
        "a removed barrier",
        "grouped_gemm.cu",
        "__syncthreads();  // before the next loads overwrite the stage",
        "",
        MOE,
        "race",
    ),
    Mutant(
        "a wait for too few groups",
        "grouped_gemm.cu",
        "simt::cp_async_wait<1>()",
        "simt::cp_async_wait<2>()",
        MOE,
        "race",
    ),
    Mutant("a dropped mask", "paged_attention.cu", "key <= last_key[e >> 1] ?", "true ?", ATTENTION, "wrong"),
    Mutant(
        "a barrier of a warp removed",
        "paged_attention.cu",
        "__syncwarp();  // the other lanes' copies",
        "",
        ATTENTION,
        "race",
    ),
    Mutant(
        "a lost swizzle",
        "paged_attention.cu",
        "const int mask = kChunks % 8 == 0 ? r & 7",
        "const int mask = kChunks % 8 == 0 ? 0",
        ATTENTION,
        "banks",
    ),
    Mutant(
        "blocks that write one place",
        "paged_attention.cu",
        "kv_head) * splits + split) * kRecord",
        "kv_head) * splits) * kRecord",
        ATTENTION,
        "race",
    ),
    Mutant(
        "a diverged shuffle",
        "moe_routing.cu",
        "const Best best = choose<kRounds>(score, a.experts);",
        "const Best best = lane < 16 ? choose<kRounds>(score, a.experts) : choose<kRounds>(score, a.experts);\n"
        "      if (lane == 3) __syncwarp();",
        MOE,
        "stop",
    ),
    Mutant(
        "a wrong stride",
        "qk_norm_rope_store.cu",
        "(static_cast<int64_t>(token) * a.heads + head) * d",
        "(token * a.kv_heads + head) * static_cast<int64_t>(d)",
        ROPE,
        "race",
    ),
    Mutant("a missing sum of lanes", "qk_norm_rope_store.cu", "sum_of_warp(squares) /", "squares /", ROPE, "wrong"),
    Mutant(
        "a barrier removed before the warps' counts are added up",
        "moe_routing.cu",
        "= chosen[r];\n  __syncthreads();",
        "= chosen[r];",
        MOE,
        "race",
    ),
    Mutant(
        "a strip without padding",
        "window_attention.cu",
        "kStripStride = kStrip + 8",
        "kStripStride = kStrip",
        WINDOWS,
        "banks",
    ),
    Mutant(
        "a barrier of a warp removed between two strips",
        "window_attention.cu",
        "__syncwarp();  // before the next products overwrite the strip",
        "",
        WindowAttentionCase(grid=20, window=20, heads=1, head_dim=64, dtype=BF16),
        "race",
    ),
)


def test_every_kernel_has_a_mutant() -> None:
    files = {path.name for path in (ROOT / "csrc/cuda").glob("*.cu") if "simt::launch" in path.read_text()}
    assert {mutant.file for mutant in MUTANTS} == files


def what_finds(kernels: ModuleType, case: Case) -> set[str]:
    kernels.set_options("forward", 7, True)
    found: set[str] = set()
    try:
        if compare(case, table(kernels)):
            found.add("wrong")
    except RuntimeError:
        found.add("stop")
    findings = kernels.take_findings()
    if findings["races"]:
        found.add("race")
    if any(extra for _, extra in findings["banks"].values()):
        found.add("banks")
    return found


@pytest.mark.parametrize("case", [ATTENTION, CONV, MOE, ROPE, WINDOWS], ids=lambda case: case.op)
def test_the_kernels_as_they_are(case: Case) -> None:
    assert what_finds(load(build_extension("race")), case) == set()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_found(mutant: Mutant) -> None:
    extension = build_extension("race", {mutant.file: (mutant.old, mutant.new)})
    assert mutant.found_by in what_finds(load(extension), mutant.case)


def test_a_dropped_row_predicate_is_found_by_asan() -> None:
    mutant = {"grouped_gemm.cu": ("if (r >= work.rows || c >= a.width) return;", "if (c >= a.width) return;")}
    extension = build_extension("asan", mutant)
    result = run_tests_with(extension, "tests/cuda/test_cuda_sim.py::test_grouped_gemm[random-3-136-72-bfloat16]")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stdout + result.stderr
