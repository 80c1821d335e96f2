"""The C++ vision kernels against the reference backend, under every instruction set, and their batch invariance."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from ops.cases import BF16, F32, Case, difference, noise
from ops.vision_cases import (
    LARGE_VISION,
    REAL_VISION,
    SMALL_VISION,
    ConvDownsampleCase,
    PatchEmbedCase,
    SequenceAttentionCase,
    WindowAttentionCase,
)
from torch import Tensor

from pagelens.errors import ShapeError
from pagelens.ops.native import NativeOps
from pagelens.ops.reference import ReferenceOps


@cache
def expected(case: Case) -> Tensor:
    return case.bind(ReferenceOps())()


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


@pytest.mark.parametrize("case", [*SMALL_VISION, *REAL_VISION], ids=lambda case: case.id)
def test_equals_the_reference(case: Case, isa: str, native: NativeOps) -> None:
    run = case.bind(native)
    result = run()
    problem = difference(result, expected(case), case)
    assert problem is None, problem
    assert same_bits(run(), result), "a second run gives other bits"


@pytest.mark.parametrize("case", LARGE_VISION, ids=lambda case: case.id)
def test_large_sizes_equal_the_reference(case: Case, native: NativeOps) -> None:
    problem = difference(case.bind(native)(), case.bind(ReferenceOps())(), case)
    assert problem is None, problem


# ---- a view's bits are its own -------------------------------------------------------------------------------------
VIEWS: list[Any] = [
    SequenceAttentionCase(batch=3, tokens=140, heads=3, head_dim=32),
    WindowAttentionCase(batch=3, grid=10, window=7, heads=2, head_dim=32),
    WindowAttentionCase(batch=3, grid=22, heads=2, head_dim=16),  # more queries than one task holds
    PatchEmbedCase(batch=3, side=80, width=70),
    ConvDownsampleCase(batch=3, grid=16),
]


def view_call(case: Any, ops: NativeOps) -> tuple[Tensor, Any]:
    """The views of a case and a function from views to a result."""
    if isinstance(case, WindowAttentionCase):
        qkv, *others = case.tensors()
        return qkv, lambda views: ops.window_attention(views, *others, case.heads, case.window)
    if isinstance(case, SequenceAttentionCase):
        return case.tensors()[0], lambda views: ops.attention(views, case.heads)
    return case.call(ops)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", VIEWS, ids=lambda case: case.id)
def test_a_view_has_the_same_bits_alone_in_a_batch_and_with_other_threads(
    case: Any, dtype: torch.dtype, isa: str, native: NativeOps
) -> None:
    views, call = view_call(replace(case, dtype=dtype), native)
    together = call(views)
    for i in range(views.shape[0]):
        assert same_bits(call(views[i : i + 1]), together[i : i + 1]), f"view {i} alone"
    for threads in (1, 5):
        ops = NativeOps(threads)
        other, again = view_call(replace(case, dtype=dtype), ops)
        assert same_bits(again(other), together), f"{threads} threads"
        ops.close()


# ---- numbers at the edges ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_scores_far_apart_neither_overflow_nor_vanish(dtype: torch.dtype, isa: str, native: NativeOps) -> None:
    """Keys whose scores rise to 2,000, fall to -2,000, or are all very low: a shifted softmax is the same softmax."""
    tokens, dim = 50, 16
    ramp = torch.linspace(-1, 1, tokens)
    for steps in (ramp, -ramp, ramp - 1, -1 - 0 * ramp):
        qkv = noise(torch.Generator().manual_seed(1), (1, tokens, 3 * dim), F32)
        qkv[..., :dim] = 20.0
        qkv[0, :, dim : 2 * dim] = 25.0 * steps[:, None]
        qkv = qkv.to(dtype)
        case = SequenceAttentionCase(tokens=tokens, heads=1, head_dim=dim, sharp=25.0, dtype=dtype)
        problem = difference(native.attention(qkv, 1), ReferenceOps().attention(qkv, 1), case)
        assert problem is None, problem


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_nan_reaches_its_own_window_and_head_only(dtype: torch.dtype, isa: str, native: NativeOps) -> None:
    case = WindowAttentionCase(grid=8, window=4, heads=2, head_dim=8, dtype=dtype)
    qkv, *others = case.tensors()
    clean = native.window_attention(qkv, *others, 2, 4)
    qkv[0, 5, 1, 16] = torch.nan  # a key of head 0 in the lower left window
    result = native.window_attention(qkv, *others, 2, 4)
    assert result[0, 4:, :4, :8].isnan().all()
    result[0, 4:, :4, :8] = clean[0, 4:, :4, :8]
    assert same_bits(result, clean)


def test_padding_takes_part(isa: str, native: NativeOps) -> None:
    """What a padded position holds changes the windows that have one, and no other."""
    case = WindowAttentionCase(grid=6, window=4, heads=1, head_dim=8)
    qkv, pad, *tables = case.tensors()
    first, second = (native.window_attention(qkv, p, *tables, 1, 4) for p in (pad, pad + 1))
    assert same_bits(first[:, :4, :4], second[:, :4, :4])
    assert (first[:, 4:] != second[:, 4:]).any(-1).all()
    assert (first[:, :, 4:] != second[:, :, 4:]).any(-1).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_attention_into_memory_that_is_given(backend: str, native: NativeOps) -> None:
    ops: Any = native if backend == "native" else ReferenceOps()
    windows, sequence = WindowAttentionCase(batch=2, grid=6, window=4, heads=2, head_dim=8), SequenceAttentionCase()
    qkv, *others = windows.tensors()
    out = torch.full((2, 6, 6, 16), torch.nan)
    assert ops.window_attention(qkv, *others, 2, 4, out=out) is out
    assert same_bits(out, ops.window_attention(qkv, *others, 2, 4))
    rows = sequence.tensors()[0]
    out = torch.full((*rows.shape[:2], rows.shape[2] // 3), torch.nan, dtype=rows.dtype)
    assert ops.attention(rows, sequence.heads, out=out) is out
    assert same_bits(out, ops.attention(rows, sequence.heads))
    for wrong in (out[:, :-1], out.double(), out[0]):
        with pytest.raises(ShapeError, match="out"):
            ops.attention(rows, sequence.heads, out=wrong)


# ---- errors --------------------------------------------------------------------------------------------------------
def test_wrong_shapes_and_dtypes_are_refused(native: NativeOps) -> None:
    qkv, pad, table = torch.zeros(1, 6, 6, 24), torch.zeros(24), torch.zeros(7, 4)
    whole, sequence = torch.zeros(11, 4), torch.zeros(1, 5, 24)
    patches = native.pack_patch_embed(torch.zeros(8, 3, 4, 4), torch.zeros(8))
    shapes = {"conv1": (4, 8, 1, 1), "conv2": (4, 4, 3, 3), "down1": (6, 4, 3, 3), "down2": (5, 6, 3, 3)}
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    weights.update({f"norm{i}_{name}": torch.zeros(4) for i in (1, 2) for name in ("weight", "bias")})
    neck = native.pack_conv_downsample(weights)
    native.window_attention(qkv, pad, table, table, 2, 4)
    native.window_attention(qkv, pad, whole, whole, 2, 0)
    native.attention(sequence, 2)
    native.patch_embed(torch.zeros(1, 3, 8, 8), patches, 4)
    native.conv_downsample(torch.zeros(1, 4, 4, 8), neck, 1e-6)
    calls = {
        "axes": lambda: native.window_attention(qkv[0], pad, table, table, 2, 4),
        "not square": lambda: native.window_attention(qkv[:, :5].contiguous(), pad, table, table, 2, 4),
        "strided": lambda: native.window_attention(qkv[:, :5, :5], pad, table, table, 2, 4),
        "heads": lambda: native.window_attention(qkv, pad, table, table, 3, 4),
        "no heads": lambda: native.window_attention(qkv, pad, table, table, 0, 4),
        "window": lambda: native.window_attention(qkv, pad, table, table, 2, -1),
        "table": lambda: native.window_attention(qkv, pad, table, table, 2, 0),
        "table's dtype": lambda: native.window_attention(qkv, pad, table, table.bfloat16(), 2, 4),
        "pad": lambda: native.window_attention(qkv, pad[1:], table, table, 2, 4),
        "pad's dtype": lambda: native.window_attention(qkv, pad.bfloat16(), table, table, 2, 4),
        "half": lambda: native.attention(sequence.half(), 2),
        "sequence": lambda: native.attention(qkv, 2),
        "patch size": lambda: native.patch_embed(torch.zeros(1, 3, 8, 8), patches, 2),
        "pixels": lambda: native.patch_embed(torch.zeros(1, 3, 8, 6), patches, 4),
        "channels": lambda: native.patch_embed(torch.zeros(1, 1, 8, 8), patches, 4),
        "pixels' dtype": lambda: native.patch_embed(torch.zeros(1, 3, 8, 8).bfloat16(), patches, 4),
        "channels last": lambda: native.patch_embed(torch.zeros(1, 8, 8, 3).permute(0, 3, 1, 2), patches, 4),
        "width": lambda: native.conv_downsample(torch.zeros(1, 4, 4, 7), neck, 1e-6),
        "x's dtype": lambda: native.conv_downsample(torch.zeros(1, 4, 4, 8).bfloat16(), neck, 1e-6),
        "bias": lambda: native.pack_patch_embed(torch.zeros(8, 3, 4, 4), torch.zeros(7)),
        "kernel": lambda: native.pack_conv_downsample({**weights, "conv2": torch.zeros(4, 4, 1, 1)}),
        "chain": lambda: native.pack_conv_downsample({**weights, "down2": torch.zeros(5, 7, 3, 3)}),
        "norm": lambda: native.pack_conv_downsample({**weights, "norm2_bias": torch.zeros(5)}),
    }
    accepted = []
    for name, call in calls.items():
        try:
            call()
        except ShapeError:
            continue
        accepted.append(name)
    assert not accepted
