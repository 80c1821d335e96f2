"""layer_norm: out = (h - mean) / sqrt(var + eps) * weight + bias, with h = x, or h = x + residual, which is then kept.

    x [N, C], weight, bias [C]; biased variance about the mean, in float32, rounded once. With `residual` [N, C] the sum
    h is written to `residual`, in its dtype, and normed as it was before that rounding.

Tiling. A program has BLOCK_M rows, all of them in registers: x is read once, and the variance is of the differences,
not of squares. Bytes: 2 N C elements (4 N C with a residual). Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, start
from .tuning import choose

DEFAULT = Config.make(num_warps=4, num_stages=1, BLOCK_M=1)


@triton.jit
def layer_norm_kernel(
    X,
    RESIDUAL,
    WEIGHT,
    BIAS,
    OUT,
    M,
    C,
    stride_x,
    stride_residual,
    stride_out,
    eps,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    c = tl.arange(0, BLOCK)
    cols = c[None, :]
    mask = (rows < M) & (cols < C)
    x = tl.load(X + rows * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL is not None:
        at = RESIDUAL + rows * stride_residual + cols
        x += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, x.to(RESIDUAL.dtype.element_ty), mask=mask)
    mean = tl.sum(x, 1) / C
    centred = tl.where(cols < C, x - mean[:, None], 0.0)
    scale = tl.math.rsqrt(tl.sum(centred * centred, 1) / C + eps)[:, None]
    weight = tl.load(WEIGHT + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(BIAS + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(OUT + rows * stride_out + cols, (centred * scale * weight + bias).to(OUT.dtype.element_ty), mask=mask)


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
    config = choose("layer_norm", x.device, DEFAULT, rows=rows, inner=width)
    strides = x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0)
    start(
        layer_norm_kernel,
        (-(-rows // config.sizes["BLOCK_M"]),),
        (x, residual, weight, bias, out, rows, width, *strides, eps),
        {"BLOCK": triton.next_power_of_2(width)},
        config,
    )
    return out
