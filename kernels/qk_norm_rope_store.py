"""qk_norm_rope_store: RMSNorm and rotary embedding of q and k heads, keys and values into the paged cache, at once.

    q, k: x / sqrt(mean(x^2) + eps) * weight (if there is a weight), then pairs (i, i + D/2) turned by the angle of the
    token's position: x_i cos_i - x_{i+D/2} sin_i and x_{i+D/2} cos_i + x_i sin_i, in float32, rounded once
    qkv [N, (H+2K)*D] laid out q | k | v -> out [N, H, D]; keys, values [blocks, size, K, D] at slots[n]

A row whose position is outside the table or whose slot is outside the cache is left out: nothing is written for it.

Tiling. A program has BLOCK_H heads of one token, all queries, all keys or all values; both halves of a head lie in one
tile. Bytes: (H + 2K) D elements of a token, read and written once. No product: bound by memory, in a decode by latency.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, start
from .tuning import choose

DEFAULT = Config.make(num_warps=2, num_stages=1, BLOCK_H=8)


@triton.jit
def turn_heads(low, high, NORM, cos, sin, eps, half, half_ok, D: tl.constexpr):
    """Both halves [heads, D/2] of the heads, normalised if NORM is given, and turned."""
    if NORM is not None:
        mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D
        factor = tl.rsqrt(mean + eps)[:, None]
        low = low * factor * tl.load(NORM + half, mask=half_ok, other=0.0).to(tl.float32)[None, :]
        high = high * factor * tl.load(NORM + D // 2 + half, mask=half_ok, other=0.0).to(tl.float32)[None, :]
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def qk_norm_rope_store_kernel(
    QKV,
    POSITIONS,
    SLOTS,
    COS,
    SIN,
    KEYS,
    VALUES,
    Q_NORM,
    K_NORM,
    OUT,
    num_positions,
    num_slots,
    stride_qkv,
    stride_out,
    eps,
    H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    Q_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    K_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    position, slot = tl.load(POSITIONS + token), tl.load(SLOTS + token).to(tl.int64)
    if (position < 0) | (position >= num_positions) | (slot < 0) | (slot >= num_slots):
        return
    half = tl.arange(0, HALF_PAD)
    half_ok = half < D // 2
    h = tl.arange(0, BLOCK_H)
    cos = tl.load(COS + position * (D // 2) + half, mask=half_ok, other=0.0)[None, :]
    sin = tl.load(SIN + position * (D // 2) + half, mask=half_ok, other=0.0)[None, :]
    row = QKV + token * stride_qkv
    if block < Q_BLOCKS:
        head = block * BLOCK_H + h
        at = head[:, None] * D + half[None, :]
        mask = (head < H)[:, None] & half_ok[None, :]
        low = tl.load(row + at, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(row + at + D // 2, mask=mask, other=0.0).to(tl.float32)
        low, high = turn_heads(low, high, Q_NORM, cos, sin, eps, half, half_ok, D)
        out = OUT + token * stride_out + at
        tl.store(out, low.to(OUT.dtype.element_ty), mask=mask)
        tl.store(out + D // 2, high.to(OUT.dtype.element_ty), mask=mask)
    else:
        is_key = block < Q_BLOCKS + K_BLOCKS
        head = (block - Q_BLOCKS) % K_BLOCKS * BLOCK_H + h
        at = head[:, None] * D + half[None, :]
        mask = (head < KV_HEADS)[:, None] & half_ok[None, :]
        place = slot * (KV_HEADS * D) + at
        if is_key:
            low = tl.load(row + H * D + at, mask=mask, other=0.0).to(tl.float32)
            high = tl.load(row + H * D + at + D // 2, mask=mask, other=0.0).to(tl.float32)
            low, high = turn_heads(low, high, K_NORM, cos, sin, eps, half, half_ok, D)
            tl.store(KEYS + place, low.to(KEYS.dtype.element_ty), mask=mask)
            tl.store(KEYS + place + D // 2, high.to(KEYS.dtype.element_ty), mask=mask)
        else:
            source = row + (H + KV_HEADS) * D + at
            tl.store(VALUES + place, tl.load(source, mask=mask), mask=mask)
            tl.store(VALUES + place + D // 2, tl.load(source + D // 2, mask=mask), mask=mask)


def qk_norm_rope_store(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> Tensor:
    """See the module. positions, slots [N] int32; cos, sin [P, D/2] float32; the cache contiguous; norms [D]."""
    num_blocks, block_size, num_kv_heads, head_dim = keys.shape
    tokens = qkv.shape[0]
    if out is None:
        out = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    config = choose("qk_norm_rope_store", qkv.device, DEFAULT, rows=tokens, head_dim=head_dim)
    block_h = config.sizes["BLOCK_H"]
    tensors = (qkv, positions, slots, cos, sin, keys, values, q_norm, k_norm, out)
    limits = cos.shape[0], num_blocks * block_size
    start(
        qk_norm_rope_store_kernel,
        (tokens, -(-num_heads // block_h) + 2 * -(-num_kv_heads // block_h)),
        (*tensors, *limits, qkv.stride(0), out.stride(0), eps),
        {"H": num_heads, "KV_HEADS": num_kv_heads, "D": head_dim, "HALF_PAD": triton.next_power_of_2(head_dim // 2)},
        config,
    )
    return out
