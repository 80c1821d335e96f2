"""patch_embed: patches that do not overlap, times a weight, plus a bias.

    pixels [B, 3, S, S], W [C, 3*p*p] (channel, row, column) -> [B, S/p, S/p, C]; sums in float32, rounded once

Tiling. An implicit product: a program has BLOCK_M patches and BLOCK_N channels and walks over the 3 p^2 pixels of a
patch, reading them where they lie (runs of p pixels). Bytes: B 3 S^2 pixels, 3 p^2 C weights, B (S/p)^2 C results.
FLOPs: 2 B (S/p)^2 3 p^2 C: 4.8 G for a page of 1024 pixels and C = 768, over 14 MB: bound by the tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, start
from .matrix import Matrix
from .tuning import choose

DEFAULT = Config.make(num_warps=4, num_stages=3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)


@triton.jit
def patch_embed_kernel(
    PIXELS,
    W,
    BIAS,
    OUT,
    M,
    N,
    K,
    SIDE,
    GRID,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    patch = tl.minimum(m, M - 1)
    view = (patch // (GRID * GRID)).to(tl.int64)
    corner = (patch // GRID % GRID * SIDE + patch % GRID) * PATCH
    x_rows = PIXELS + view[:, None] * (CHANNELS * SIDE * SIDE) + corner[:, None]
    w_rows = W + tl.minimum(n, N - 1)[:, None] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        place = (k // (PATCH * PATCH) * SIDE + k // PATCH % PATCH) * SIDE + k % PATCH
        x = tl.load(x_rows + place[None, :], mask=k[None, :] < K, other=0.0)
        w = tl.load(w_rows + k[None, :], mask=k[None, :] < K, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    acc += tl.load(BIAS + n, mask=n < N, other=0.0)[None, :]
    at = OUT + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, acc.to(OUT.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def patch_embed(pixels: Tensor, weight: Matrix, patch_size: int) -> Tensor:
    """See the module. pixels contiguous; weight a dense matrix [C, 3*p*p] with a bias."""
    batch, channels, side, _ = pixels.shape
    grid = side // patch_size
    out = torch.empty((batch, grid, grid, weight.n), dtype=pixels.dtype, device=pixels.device)
    rows = batch * grid * grid
    config = choose("patch_embed", pixels.device, DEFAULT, rows=rows, out=weight.n, inner=weight.k)
    start(
        patch_embed_kernel,
        (-(-rows // config.sizes["BLOCK_M"]), -(-weight.n // config.sizes["BLOCK_N"])),
        (pixels, weight.values, weight.bias, out, rows, weight.n, weight.k, side, grid),
        {"CHANNELS": channels, "PATCH": patch_size},
        config,
    )
    return out
