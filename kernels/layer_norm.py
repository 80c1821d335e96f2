"""layer_norm: out = (h - mean) / sqrt(var + eps) * weight + bias, with h = x, or h = x + residual, which is then kept.

    x [N, C], weight, bias [C]; biased variance about the mean, in float32, rounded once. With `residual` [N, C] the sum
    h is written to `residual`, in its dtype, and normed as it was before that rounding.

Tiling. A program has a row, all of it in registers: x is read once, and the variance is of the differences, not of
squares. Bytes: 2 N C elements (4 N C with a residual). Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, start
from .tuning import choose

DEFAULT = Config.make(num_warps=4, num_stages=1)


@triton.jit
def layer_norm_kernel(
    X, RESIDUAL, WEIGHT, BIAS, OUT, C, stride_x, stride_residual, stride_out, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < C
    x = tl.load(X + row * stride_x + c, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL is not None:
        at = RESIDUAL + row * stride_residual + c
        x += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, x.to(RESIDUAL.dtype.element_ty), mask=mask)
    centred = tl.where(mask, x - tl.sum(x, 0) / C, 0.0)
    scale = tl.math.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    weight = tl.load(WEIGHT + c, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + row * stride_out + c, (centred * scale * weight + bias).to(OUT.dtype.element_ty), mask=mask)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See the module. Rows contiguous; `out` may be `x`."""
    rows, width = x.shape
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    strides = x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0)
    start(
        layer_norm_kernel,
        (rows,),
        (x, residual, weight, bias, out, width, *strides, eps),
        {"BLOCK": triton.next_power_of_2(width)},
        choose("layer_norm", x.device, DEFAULT, inner=width),
    )
    return out
