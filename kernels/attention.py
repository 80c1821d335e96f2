"""attention: bidirectional attention of CLIP.

    out = softmax(q k^T / sqrt(D)) v;  qkv [B, T, 3C] laid out q | k | v -> [B, T, C]

The weights of the softmax are rounded to qkv's dtype before they meet v (their sum is not).

Tiling. A program has BLOCK_M queries of one view and head and walks over the keys in steps of BLOCK_N, with a running
maximum and sum. Bytes: 4 B T C elements, keys again for each block of queries, from L2. FLOPs: 4 B T^2 C; T = 257 gives
about 130 a byte, below what an A100 (156) or an H100 (295) can do with a byte: bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, start
from .tuning import choose

DEFAULT = Config.make(num_warps=4, num_stages=2, BLOCK_M=64, BLOCK_N=64)


@triton.jit
def attention_kernel(
    QKV,
    OUT,
    scale,
    T,
    C,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, view = tl.program_id(1), tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    base = QKV + (view * T).to(tl.int64) * (3 * C) + head * D
    q = tl.load(base + m[:, None] * (3 * C) + d[None, :], mask=(m[:, None] < T) & (d[None, :] < D), other=0.0)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for first in range(0, T, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        at = base + n * (3 * C)
        keys = tl.load(at[None, :] + C + d[:, None], mask=(n[None, :] < T) & (d[:, None] < D), other=0.0)
        scores = tl.dot(q, keys, input_precision="ieee") * (scale * 1.4426950408889634)
        scores = tl.where(n[None, :] < T, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        weight = weight * fade + tl.sum(p, 1)
        values = tl.load(at[:, None] + 2 * C + d[None, :], mask=(n[:, None] < T) & (d[None, :] < D), other=0.0)
        acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        top = new_top
    acc = acc / weight[:, None]
    at_out = (view * T + m).to(tl.int64) * C + head * D
    mask = (m[:, None] < T) & (d[None, :] < D)
    tl.store(OUT + at_out[:, None] + d[None, :], acc.to(OUT.dtype.element_ty), mask=mask)


def attention(qkv: Tensor, num_heads: int, out: Tensor | None = None) -> Tensor:
    """See the module. qkv and out contiguous."""
    batch, tokens, width = qkv.shape
    channels = width // 3
    head_dim = channels // num_heads
    if out is None:
        out = torch.empty((batch, tokens, channels), dtype=qkv.dtype, device=qkv.device)
    config = choose("attention", qkv.device, DEFAULT, tokens=tokens, head_dim=head_dim)
    start(
        attention_kernel,
        (-(-tokens // config.sizes["BLOCK_M"]), num_heads, batch),
        (qkv, out, head_dim**-0.5, tokens, channels),
        {"D": head_dim, "D_PAD": max(16, triton.next_power_of_2(head_dim))},
        config,
    )
    return out
