"""grouped_gemm: SwiGLU experts on the tokens that were routed to them, from one token to a whole prompt.

    y[n] = sum_j weights[n, j] down_e(silu(gate_e(x[n])) * up_e(x[n])),  e = ids[n, j];  x [N, C] -> [N, C] float32

Tiling. Two products. Tokens stand in the order of `permutation`, those of an expert together; a program has BLOCK_M of
one expert's tokens and BLOCK_N rows of its weight. There are at most min(N k, E) + N k // BLOCK_M such tiles; a program
finds its own from the offsets [E+1], which stay on the device, and ends if there is none. The first product gathers
rows of x and ends in SwiGLU (gate and up rows lie in turns); the second multiplies by the routing weight and writes
each term to its own place n*slots + j. `combine` adds a token's terms in the order of j, so that a result does not
depend on other tokens, and nothing is added by atomic operations.

Bytes: 3 C I weights of each expert that has a token (one token of k = 8: 8 of 128 experts), 6 k N (C + I) or so of
activations. FLOPs: 6 N k C I. Below about 150 tokens an expert bound by reading weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, start
from .linear import block_constants
from .matrix import Matrix
from .round_rows import round_rows
from .tiles import dense_tile, quantized_tile, swiglu
from .tuning import choose

DEFAULT = Config.make(num_warps=4, num_stages=3, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64)
DEFAULT_MANY = Config.make(num_warps=4, num_stages=3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)
COMBINE = Config.make(num_warps=4, num_stages=1, BLOCK=1024)
MANY = 32  # tokens an expert has on average, from which on tiles are higher


class Experts(NamedTuple):
    """gate_up: E matrices [2I, C], rows of gate and up in turns; down: E matrices [C, I]. No biases."""

    gate_up: Matrix
    down: Matrix


@triton.jit
def find_tile(OFFSETS, tile, E, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert of a tile (E if there is none), its first place in the permutation, and the end of the expert's places."""
    e = tl.arange(0, E_PAD)
    starts = tl.load(OFFSETS + e, mask=e < E, other=0)
    ends = tl.load(OFFSETS + e + 1, mask=e < E, other=0)
    tiles = tl.cdiv(ends - starts, BLOCK_M)
    after = tl.cumsum(tiles, 0)
    expert = tl.sum(((after <= tile) & (e < E)).to(tl.int32), 0)
    own = e == expert
    before = tl.sum(tl.where(own, after - tiles, 0), 0)
    first = tl.sum(tl.where(own, starts, 0), 0) + (tile - before) * BLOCK_M
    return expert, first, tl.sum(tl.where(own, ends, 0), 0)


@triton.jit
def grouped_gemm_kernel(
    X,
    X_SCALES,
    W,
    SCALES,
    ZEROS,
    ORDER,
    OFFSETS,
    PERMUTATION,
    ROUTING_WEIGHTS,
    OUT,
    E,
    N,
    K,
    stride_x,
    stride_xs,
    stride_w,
    stride_scales,
    slots,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    W_GROUPED: tl.constexpr,
    X_GROUPED: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """GATHER: rows of X are tokens, OUT [N*k, N/2] gets SwiGLU in the order of the permutation. Otherwise rows of X are
    in that order, and OUT [tokens, slots, N] float32 gets weighted terms.
    """
    expert, first, end = find_tile(OFFSETS, tl.program_id(0), E, E_PAD, BLOCK_M)
    if expert >= E:
        return
    place = first + tl.arange(0, BLOCK_M)
    row_ok = place < end
    place = tl.minimum(place, end - 1)
    flat = tl.load(PERMUTATION + place)
    block_n = tl.program_id(1)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    w_cols = tl.minimum(cols, N - 1)
    if GATHER:
        rows = flat // TOP_K
    else:
        rows = place
    x_rows = X + rows.to(tl.int64)[:, None] * stride_x
    matrix = W + expert.to(tl.int64) * stride_w
    if FORMAT == "dense":
        acc = dense_tile(x_rows, matrix, w_cols, 0, BLOCKS, K, EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        x_scales = None
        if X_SCALES is not None:
            x_scales = X_SCALES + rows.to(tl.int64)[:, None] * stride_xs
        zeros = None
        if ZEROS is not None:
            zeros = ZEROS + expert.to(tl.int64) * stride_scales
        order = None
        if ORDER is not None:
            order = ORDER + expert.to(tl.int64) * K
        acc = quantized_tile(
            x_rows, x_scales, matrix, SCALES + expert.to(tl.int64) * stride_scales, zeros, order, w_cols, 0, BLOCKS,
            N, K, FORMAT, GROUP, W_GROUPED, X_GROUPED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if GATHER:
        acc = swiglu(acc, BLOCK_M, BLOCK_N)
        out_cols = block_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        at = OUT + place.to(tl.int64)[:, None] * (N // 2) + out_cols[None, :]
        tl.store(at, acc.to(OUT.dtype.element_ty), mask=row_ok[:, None] & (out_cols[None, :] < N // 2))
    else:
        acc = acc * tl.load(ROUTING_WEIGHTS + flat)[:, None]
        slot = (flat // TOP_K).to(tl.int64) * slots + flat % TOP_K
        tl.store(OUT + slot[:, None] * N + cols[None, :], acc, mask=row_ok[:, None] & (cols[None, :] < N))


@triton.jit
def combine_kernel(TERMS, RESIDUAL, OUT, C, stride_residual, stride_out, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """OUT[n] = sum of TERMS[n, slot] in their order + RESIDUAL[n]."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        acc += tl.load(TERMS + (row * SLOTS + slot) * C + c, mask=c < C, other=0.0)
    if RESIDUAL is not None:
        acc += tl.load(RESIDUAL + row * stride_residual + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(OUT + row * stride_out + c, acc.to(OUT.dtype.element_ty), mask=c < C)


def multiply(
    x: Tensor, matrix: Matrix, offsets: Tensor, permutation: Tensor, weights: Tensor | None, out: Tensor, top_k: int
) -> None:
    """One of the two products: without `weights` the first."""
    count, n, k = matrix.experts, matrix.n, matrix.k
    pairs = permutation.shape[0]
    many = pairs >= MANY * count
    kernel = "grouped_gemm" if matrix.format == "dense" else f"grouped_gemm_{matrix.format}"
    chosen = choose(kernel, x.device, DEFAULT_MANY if many else DEFAULT, rows=-(-pairs // count), out=n, inner=k)
    constants, config = block_constants(matrix, chosen)
    inputs, x_scales = round_rows(x, matrix)
    tensors = (inputs, x_scales, matrix.values, matrix.scales, matrix.zeros, matrix.order, offsets, permutation)
    strides = (
        inputs.stride(0),
        0 if x_scales is None else x_scales.stride(0),
        matrix.values.stride(0),
        0 if matrix.scales is None else matrix.scales.stride(0),
    )
    start(
        grouped_gemm_kernel,
        (min(pairs, count) + pairs // config.sizes["BLOCK_M"] if pairs else 0, -(-n // config.sizes["BLOCK_N"])),
        (*tensors, weights, out, count, n, k, *strides, out.shape[1]),
        {**constants, "TOP_K": top_k, "GATHER": weights is None, "E_PAD": triton.next_power_of_2(count)},
        config,
    )


def expert_terms(
    x: Tensor, experts: Experts, weights: Tensor, offsets: Tensor, permutation: Tensor, extra: int = 0
) -> Tensor:
    """Weighted terms [N, k + extra, C] float32 of every token; the extra slots are left to the caller."""
    tokens, top_k = weights.shape
    inner = experts.down.k
    product = torch.empty((tokens * top_k, inner), dtype=x.dtype, device=x.device)
    multiply(x, experts.gate_up, offsets, permutation, None, product, top_k)
    terms = torch.empty((tokens, top_k + extra, experts.down.n), dtype=torch.float32, device=x.device)
    multiply(product, experts.down, offsets, permutation, weights, terms, top_k)
    return terms


def combine(terms: Tensor, residual: Tensor | None, out: Tensor) -> Tensor:
    """out [N, C] = sum over the slots of terms [N, slots, C], in order, + residual; rounded once."""
    tokens, slots, width = terms.shape
    config = choose("combine", terms.device, COMBINE, out=width)
    start(
        combine_kernel,
        (tokens, -(-width // config.sizes["BLOCK"])),
        (terms, residual, out, width, 0 if residual is None else residual.stride(0), out.stride(0)),
        {"SLOTS": slots},
        config,
    )
    return out


def grouped_gemm(x: Tensor, experts: Experts, weights: Tensor, offsets: Tensor, permutation: Tensor) -> Tensor:
    """See the module."""
    terms = expert_terms(x, experts, weights, offsets, permutation)
    return combine(terms, None, torch.empty((x.shape[0], experts.down.n), dtype=torch.float32, device=x.device))
