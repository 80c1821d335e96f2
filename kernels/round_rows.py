"""round_rows: activations onto the grid of int8 or float8_e4m3fn, before a weight whose format asks for it.

    scale = max|x| / 127 (or 448) over a row, or over each group of it; value = round(x / scale), ties to even

x [M, K] -> values [M, K] in x's dtype, exact there (whole numbers up to 127, or numbers of float8), and scales [M, G]
float32, 1 where the quotient would be subnormal (the numbers then count as 0).
Tiling: a program a row and group. Bytes: 2 M K in x's dtype, read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, start
from .matrix import Matrix
from .tiles import round_to_e4m3, round_to_even


@triton.jit
def round_rows_kernel(
    X, OUT, SCALES, K, stride_x, stride_out, groups, GROUP: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, BLOCK)
    k = group * GROUP + place
    inside = (place < GROUP) & (k < K)
    x = tl.load(X + row * stride_x + k, mask=inside, other=0.0).to(tl.float32)
    if KIND == "int8":
        most = 127.0
    else:
        most = 448.0
    magnitude = tl.abs(x)
    broken = tl.sum((x != x).to(tl.int32), 0) > 0  # a maximum leaves NaN out
    scale = tl.math.div_rn(tl.where(broken, float("nan"), tl.max(magnitude, 0)), most)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
    value = tl.math.div_rn(x, tl.broadcast_to(scale, (BLOCK,)))
    value = tl.where(value != value, value, tl.minimum(tl.maximum(value, -most), most))
    if KIND == "int8":
        value = round_to_even(value)
    else:
        value = round_to_e4m3(value)
    tl.store(OUT + row * stride_out + k, value.to(OUT.dtype.element_ty), mask=inside)
    tl.store(SCALES + row * groups + group, scale)


def round_rows(x: Tensor, weight: Matrix) -> tuple[Tensor, Tensor | None]:
    """x as `weight` wants its inputs, and their scales; x itself and None if it wants them as they are."""
    if weight.rounding is None:
        return x, None
    m, k = x.shape
    group = weight.group if weight.rounded_in_groups else max(k, 1)
    groups = -(-k // group)
    values = torch.empty((m, k), dtype=x.dtype, device=x.device)
    scales = torch.empty((m, groups), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(group)
    start(
        round_rows_kernel,
        (m, groups),
        (x, values, scales, k, x.stride(0), values.stride(0), groups),
        {"GROUP": group, "KIND": weight.rounding, "BLOCK": block},
        Config.make(num_warps=1 if block <= 256 else 4, num_stages=1),
    )
    return values, scales
