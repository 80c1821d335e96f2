"""The Triton kernels as the sm_80 code that they compile to, on small cases of the shared list against the reference.

The mutants edit the PTX of a case that passes, and must be found out: by a memory check, as a hazard, or by the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from gpu.gpu_cases import GPU_SMALL
from gpu.ptx.errors import PtxError
from ops.cases import Case, difference

# What each op's cases have to show: several CTAs, edges in every axis, more than one block of the summed axis.
CHOSEN = [
    "linear[1x1x1-bf16]",
    "linear[2x193x31-bf16]",
    "linear[29x66x65-bias-bf16]",
    "linear[37x193x77-gelu-bias-bf16]",
    "linear[200x1281x70-residual-strided-bf16]",
    "linear[5x192x384-silu-f32out-bf16]",
    "linear[3x5x7-f32]",
    "qk_norm_rope_store[11x6of6x32-norm-bf16]",
    "qk_norm_rope_store[11x4of2x22-bf16]",
    "qk_norm_rope_store[1x4of2x22-norm-f32]",
    "paged_attention[1of100-block16-6of6x32-sharp1-bf16]",
    "paged_attention[70of70-block5-4of2x22-sharp1-bf16]",
    "paged_attention[33of64+1of33+2of2-block16-4of2x22-sharp1-bf16]",
    "paged_attention[1of300+2of129+0of0-block32-4of2x128-sharp1-bf16]",
    "attention[2x10-3x6-sharp1-bf16]",
    "attention[2x131-1x64-sharp1-bf16]",
    "attention[1x70-2x16-sharp6-bf16]",
    "window_attention[1x9-window4-3x6-sharp1-bf16]",
    "window_attention[1x10-window7-2x16-sharp1-bf16]",
    "window_attention[1x20-window14-1x64-sharp1-bf16]",
    "window_attention[2x9-window0-1x16-sharp1-bf16]",
    "conv_downsample[2x8x48-32-40-64-bf16]",
    "conv_downsample[1x6x13-7-5-9-bf16]",
    "moe_ffn[1x192x96-8top2-shared192-bf16]",
    "moe_ffn[37x192x96-8top2-shared192-bf16]",
    "moe_ffn[19x77x33-5top5-shared0-renorm-bf16]",
]
BY_ID = {case.id: case for case in GPU_SMALL}


def run(case: Case, change: Callable[[str], str] | None = None, only: str | None = None) -> Any:
    """The result of the case and the runner that has seen its launches."""
    from gpu.compiled.ptx_runner import TARGET, PtxRunner, ptx_ops

    from pagelens.kernels.launch import replaced_runner
    from pagelens.kernels.tuning import forced_target

    runner = PtxRunner(change, only)
    with replaced_runner(runner), forced_target(TARGET):
        return case.bind(ptx_ops())(), runner


@pytest.mark.parametrize("name", CHOSEN)
def test_compiled_kernels(name: str) -> None:
    from pagelens.ops.reference import ReferenceOps

    case = BY_ID[name]
    result, runner = run(case)
    assert runner.reports
    assert difference(result, case.bind(ReferenceOps())(), case) is None


# ---- mutants -------------------------------------------------------------------------------------------------------
def replaced(pattern: str, new: str | Callable[[re.Match[str]], str], text: str, count: int = 0) -> str:
    changed, found = re.subn(pattern, new, text, count=count, flags=re.M)
    assert found, f"nothing matches {pattern}"
    return changed


def later_wait(text: str) -> str:
    """Every wait leaves one more group of copies in flight."""
    return replaced(r"cp\.async\.wait_group\s+(\d+)", lambda m: f"cp.async.wait_group {int(m[1]) + 1}", text)


def no_barrier(text: str) -> str:
    return replaced(r"^\s*bar\.sync\s+0;", "", text)


def no_store_mask(text: str) -> str:
    """Stores of lanes outside the result too."""
    return replaced(r"@!?%p\d+ (st\.global)", r"\1", text)


def no_load_mask(text: str) -> str:
    return replaced(r"@!?%p\d+ (ld\.global)", r"\1", text)


def wrong_matrix_row(text: str) -> str:
    """ldmatrix reads 16 bytes further on."""
    return replaced(r"(ldmatrix[^\[]*\[%r\d+)\]", r"\1+16]", text)


def swapped_fragments(text: str) -> str:
    """Upper and lower rows of the left factor change places."""
    return replaced(r"(mma\.sync\S+ \{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2", text)


def wrong_lane(text: str) -> str:
    """A reduction over the lanes leaves out one step."""
    return replaced(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )1,", r"\g<1>2,", text)


ROWS, EDGES = "linear[200x1281x70-residual-strided-bf16]", "linear[29x66x65-bias-bf16]"
PAGED = "paged_attention[70of70-block5-4of2x22-sharp1-bf16]"
MIXED, ODD = "moe_ffn[37x192x96-8top2-shared192-bf16]", "moe_ffn[19x77x33-5top5-shared0-renorm-bf16]"
MUTANTS = [
    ("linear[5x192x384-silu-f32out-bf16]", "linear_kernel", later_wait),
    (ROWS, "linear_kernel", no_barrier),
    (EDGES, "linear_kernel", no_store_mask),
    (EDGES, "linear_kernel", swapped_fragments),
    (EDGES, "linear_kernel", wrong_matrix_row),
    ("qk_norm_rope_store[11x6of6x32-norm-bf16]", "qk_norm_rope_store_kernel", wrong_lane),
    ("qk_norm_rope_store[11x4of2x22-bf16]", "qk_norm_rope_store_kernel", no_store_mask),
    (PAGED, "paged_attention_kernel", no_barrier),
    (PAGED, "paged_attention_kernel", wrong_lane),
    ("attention[2x131-1x64-sharp1-bf16]", "attention_kernel", later_wait),
    ("attention[2x131-1x64-sharp1-bf16]", "attention_kernel", swapped_fragments),
    ("attention[2x10-3x6-sharp1-bf16]", "attention_kernel", no_store_mask),
    ("window_attention[1x10-window7-2x16-sharp1-bf16]", "window_attention_kernel", no_barrier),
    ("window_attention[1x10-window7-2x16-sharp1-bf16]", "window_attention_kernel", wrong_matrix_row),
    ("window_attention[1x9-window4-3x6-sharp1-bf16]", "window_attention_kernel", no_load_mask),
    ("conv_downsample[2x8x48-32-40-64-bf16]", "conv_kernel", later_wait),
    ("conv_downsample[2x8x48-32-40-64-bf16]", "conv_kernel", wrong_matrix_row),
    ("conv_downsample[1x6x13-7-5-9-bf16]", "conv_kernel", no_store_mask),
    (MIXED, "moe_routing_kernel", wrong_lane),
    (MIXED, "moe_permute_kernel", no_barrier),
    (MIXED, "grouped_gemm_kernel", later_wait),
    (ODD, "grouped_gemm_kernel", no_store_mask),
    (ODD, "combine_kernel", no_store_mask),
]


@pytest.mark.parametrize(("name", "kernel", "change"), MUTANTS)
def test_mutants_are_caught(name: str, kernel: str, change: Callable[[str], str]) -> None:
    from pagelens.ops.reference import ReferenceOps

    case = BY_ID[name]
    expected = case.bind(ReferenceOps())()
    try:
        result, runner = run(case, change, kernel)
    except PtxError:
        return
    assert kernel in [name for name, _ in runner.reports]
    assert difference(result, expected, case) is not None
