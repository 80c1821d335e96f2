"""rms_norm: out = h / sqrt(mean(h^2) + eps) * weight, with h = x, or h = x + residual, which is then kept.

    x [N, C], weight [C]; sums in float32, rounded once. With `residual` [N, C] the sum h is written to `residual`, in
    its dtype, and normed as it was before that rounding.

Tiling. A program has a row, all of it in registers: x is read once. Bytes: 2 N C elements (4 N C with a residual).
Bound by memory; one row of a decode by latency.
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
def rms_norm_kernel(X, RESIDUAL, WEIGHT, OUT, C, stride_x, stride_residual, stride_out, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < C
    x = tl.load(X + row * stride_x + c, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL is not None:
        at = RESIDUAL + row * stride_residual + c
        x += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, x.to(RESIDUAL.dtype.element_ty), mask=mask)
    scale = tl.math.rsqrt(tl.sum(x * x, 0) / C + eps)
    y = x * scale * tl.load(WEIGHT + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + row * stride_out + c, y.to(OUT.dtype.element_ty), mask=mask)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """See the module. Rows contiguous; `out` may be `x`."""
    rows, width = x.shape
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    start(
        rms_norm_kernel,
        (rows,),
        (
            x,
            residual,
            weight,
            out,
            width,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            eps,
        ),
        {"BLOCK": triton.next_power_of_2(width)},
        choose("rms_norm", x.device, DEFAULT, inner=width),
    )
    return out
