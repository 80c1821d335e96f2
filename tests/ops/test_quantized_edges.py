"""Quantised products and the quantisers at the ends of the number range: NaN, infinity, subnormal numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pagelens.ops.native import NativeOps
from pagelens.ops.reference import ReferenceOps
from pagelens.quantization import QuantizedWeight, quantize

F32, BF16 = torch.float32, torch.bfloat16
ROWS = (1, 4, 5)  # both ways through the kernels


def ones(activation: str | None = None, dtype: torch.dtype = F32, scale: float = 1.0) -> QuantizedWeight:
    values, scales = torch.ones(4, 8, dtype=torch.int8), torch.full((4, 1), scale, dtype=torch.float16)
    return QuantizedWeight("int8", values, scales, 8, activation=activation, dtype=dtype)


def products(x: Tensor, weight: QuantizedWeight, ops: NativeOps) -> list[Tensor]:
    """x times the weight by the reference, and natively with several numbers of rows; x has one row."""
    reference = ReferenceOps()
    packed = ops.pack_linear(weight)
    found = [reference.linear(x, reference.pack_linear(weight))]
    return found + [ops.linear(x.expand(rows, -1).contiguous(), packed) for rows in ROWS]


@pytest.mark.parametrize("activation", ["int8", "fp8"])
def test_a_row_of_the_smallest_numbers_is_no_nan(activation: str, isa: str, native: NativeOps) -> None:
    x = torch.zeros(1, 8)
    x[0, 3] = 1e-44  # 7 times the smallest number: a 127th of it is 0
    for result in products(x, ones(activation), native):
        assert result.isfinite().all()
        assert result.abs().max() <= 1e-44


@pytest.mark.parametrize("activation", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFF0000, 0x7FFFFFFF, -1])
def test_a_nan_is_never_rounded_away(
    activation: str | None, dtype: torch.dtype, bits: int, isa: str, native: NativeOps
) -> None:
    integer = torch.int32 if dtype == F32 else torch.int16
    x = torch.ones(1, 8, dtype=dtype)
    x.view(integer)[0, 3] = bits if dtype == F32 else bits >> 16
    assert x[0, 3].isnan()
    for result in products(x, ones(activation, dtype), native):
        assert result.isnan().all()


def test_an_infinite_scale_is_infinite_for_any_number_of_rows(isa: str, native: NativeOps) -> None:
    for result in products(torch.ones(1, 8, dtype=BF16), ones(dtype=BF16, scale=torch.inf), native):
        assert result.isinf().all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 2.117e-38, 2.291e-38, 1e-37, 4e-37, 1.0, 3.4e38])
def test_both_quantisers_round_rows_of_any_size_alike(kind: str, largest: float, isa: str, native: NativeOps) -> None:
    weight = torch.linspace(-1, 1, 33)[None, :32] * largest  # holds a 0
    by_torch, by_kernel = quantize(weight, kind), native.quantize(weight, kind)
    assert torch.equal(by_torch.values, by_kernel.values)
    assert torch.equal(by_torch.scales, by_kernel.scales)
    # What is too small to be divided by its scale is rounded to 0, never to the largest of its row.
    assert by_kernel.float().abs().max() <= 1.1 * weight.abs().max()
    smaller = weight.abs() < 0.4 * weight.abs().max() / 127
    assert (by_kernel.values[smaller] == 0).all()
