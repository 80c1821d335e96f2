"""linear: out = activation(x W^T + bias) + residual, for weights of 16 or 32 bits, W8A16, W4A16 and FP8.

    x [M, K] -> [M, N], sums in float32, rounded once. "swiglu": N rows of W are gate and up in turns, the result is
    silu(gate) * up [M, N/2].

Tiling. A program makes a tile BLOCK_M x BLOCK_N of the result over the whole of K, or over one of SPLIT_K parts of it;
parts are summed in their order by a second kernel, which then does the rest. Programs walk in columns of 8 row blocks,
so that a wave shares rows of x and of W in the L2 cache. One row runs as a tile of 16 rows, 15 of which are copies of
the last: the time is that of reading W.

Bytes: N K weights (2, 1 or 1/2 bytes, plus scales), M (K + N) activations. FLOPs: 2 M N K. On an A100 (2.0 TB/s,
312 TFLOP/s in 16 bits) weights of 16 bits are bound by memory below M = 156 rows, on an H100 (3.35 TB/s, 989 TFLOP/s)
below 295.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, start
from .matrix import Matrix
from .round_rows import round_rows
from .tiles import activate, dense_tile, quantized_tile, swiglu
from .tuning import choose

DEFAULT = Config.make(num_warps=4, num_stages=3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, SPLIT_K=1)
GROUP_OF_ROWS = 8


@triton.jit
def linear_kernel(
    X,
    X_SCALES,
    W,
    SCALES,
    ZEROS,
    ORDER,
    BIAS,
    RESIDUAL,
    OUT,
    M,
    N,
    K,
    stride_x,
    stride_xs,
    stride_residual,
    stride_out,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    W_GROUPED: tl.constexpr,
    X_GROUPED: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """BLOCKS: blocks of K in all. With SPLIT_K > 1, OUT is [SPLIT_K, M, N] float32 and gets plain sums."""
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    place, part = tl.program_id(0), tl.program_id(1)
    column = place // (ROW_GROUP * blocks_n)
    first_m = column * ROW_GROUP
    height = tl.minimum(blocks_m - first_m, ROW_GROUP)
    block_m = first_m + (place % (ROW_GROUP * blocks_n)) % height
    block_n = (place % (ROW_GROUP * blocks_n)) // height
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the edge the last row and column are computed again, so that loads need no mask.
    x_rows = X + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_x
    w_cols = tl.minimum(cols, N - 1)
    per_part: tl.constexpr = (BLOCKS + SPLIT_K - 1) // SPLIT_K
    first = part * per_part
    last = tl.minimum(first + per_part, BLOCKS)
    if FORMAT == "dense":
        acc = dense_tile(x_rows, W, w_cols, first, last, K, EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        x_scales = None
        if X_SCALES is not None:
            x_scales = X_SCALES + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_xs
        acc = quantized_tile(
            x_rows, x_scales, W, SCALES, ZEROS, ORDER, w_cols, first, last, N, K,
            FORMAT, GROUP, W_GROUPED, X_GROUPED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if SPLIT_K > 1:
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(OUT + (part * M + rows).to(tl.int64)[:, None] * N + cols[None, :], acc, mask=mask)
    else:
        finish_tile(
            acc, BIAS, RESIDUAL, OUT, rows, cols, block_n, M, N, stride_residual, stride_out,
            ACTIVATION, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def finish_tile(
    acc,
    BIAS,
    RESIDUAL,
    OUT,
    rows,
    cols,
    block_n,
    M,
    N,
    stride_residual,
    stride_out,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Bias, activation and residual, one rounding, and the store."""
    if BIAS is not None:
        acc += tl.load(BIAS + cols, mask=cols < N, other=0.0)[None, :]
    if ACTIVATION == "swiglu":
        acc = swiglu(acc, BLOCK_M, BLOCK_N)
        cols = block_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        N = N // 2
    else:
        acc = activate(acc, ACTIVATION)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    wide = rows.to(tl.int64)[:, None]
    if RESIDUAL is not None:
        acc += tl.load(RESIDUAL + wide * stride_residual + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + wide * stride_out + cols[None, :], acc.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def linear_reduce_kernel(
    PARTS,
    BIAS,
    RESIDUAL,
    OUT,
    M,
    N,
    stride_residual,
    stride_out,
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums the parts [SPLIT_K, M, N] in their order and finishes."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    block_n = tl.program_id(1)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(SPLIT_K):
        acc += tl.load(PARTS + (part * M + rows).to(tl.int64)[:, None] * N + cols[None, :], mask=mask, other=0.0)
    finish_tile(
        acc, BIAS, RESIDUAL, OUT, rows, cols, block_n, M, N, stride_residual, stride_out, ACTIVATION, BLOCK_M, BLOCK_N
    )


REDUCE = Config.make(num_warps=4, num_stages=1, BLOCK_M=1, BLOCK_N=256)


def block_constants(weight: Matrix, config: Config) -> tuple[dict[str, Any], Config]:
    """The constants of a weight's format, and the configuration with a BLOCK_K that fits it."""
    block_k = config.sizes["BLOCK_K"]
    group = max(weight.group, 1)
    if weight.format == "int4":
        block_k = 32
    elif weight.format != "dense":
        block_k = min(block_k, max(16, triton.next_power_of_2(group)))
    blocks = -(-weight.k // block_k) if weight.format == "dense" else -(-weight.k // group) * -(-group // block_k)
    constants = {
        "FORMAT": weight.format,
        "GROUP": group,
        "W_GROUPED": weight.scales is not None and weight.scales.shape[1] > 1,
        "X_GROUPED": weight.rounded_in_groups,
        "BLOCKS": blocks,
        "EVEN": weight.k % block_k == 0,
    }
    return constants, Config({**config.sizes, "BLOCK_K": block_k}, config.options)


def linear(
    x: Tensor,
    weight: Matrix,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See the module. x [M, K] with contiguous rows, in weight.dtype; `out` may be `residual`; weight.experts is 1."""
    (m, k), n = x.shape, weight.n
    width = n // 2 if activation == "swiglu" else n
    if out is None:
        out = torch.empty((m, width), dtype=out_dtype or x.dtype, device=x.device)
    kernel = "linear" if weight.format == "dense" else f"linear_{weight.format}"
    constants, config = block_constants(weight, choose(kernel, x.device, DEFAULT, rows=m, out=n, inner=k))
    inputs, x_scales = round_rows(x, weight)
    split = config.sizes["SPLIT_K"]
    parts = torch.empty((split, m, n), dtype=torch.float32, device=x.device) if split > 1 else None
    target = out if parts is None else parts
    stride_residual = 0 if residual is None else residual.stride(0)
    strides = inputs.stride(0), 0 if x_scales is None else x_scales.stride(0), stride_residual, out.stride(0)
    tensors = (inputs, x_scales, weight.values, weight.scales, weight.zeros, weight.order, weight.bias, residual)
    tiles = -(-m // config.sizes["BLOCK_M"]) * -(-n // config.sizes["BLOCK_N"])
    start(
        linear_kernel,
        (tiles, split),
        (*tensors, target, m, n, k, *strides),
        {**constants, "ACTIVATION": activation, "ROW_GROUP": GROUP_OF_ROWS},
        config,
    )
    if parts is not None:
        config = choose("linear_reduce", x.device, REDUCE, rows=m, out=n)
        start(
            linear_reduce_kernel,
            (-(-m // config.sizes["BLOCK_M"]), -(-n // config.sizes["BLOCK_N"])),
            (parts, weight.bias, residual, out, m, n, stride_residual, out.stride(0)),
            {"ACTIVATION": activation, "SPLIT_K": split},
            config,
        )
    return out
