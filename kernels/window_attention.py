"""window_attention: SAM attention with decomposed relative positions, in windows or over the whole grid.

    logits[m, n] = q.k / sqrt(D) + q.rel_h[i_m - i_n + w - 1] + q.rel_w[j_m - j_n + w - 1];  out = softmax(logits) v
    qkv [B, G, G, 3C] laid out q | k | v, tables [2w-1, D] float32 -> [B, G, G, C]

The grid is padded at bottom and right to whole windows; a padded position has q|k|v = pad [3C] and takes part. The
weights of the softmax are rounded to qkv's dtype before they meet v (their sum is not).

Tiling. A program has BLOCK_M queries of one window and head. It multiplies them with both tables once (of 16-bit
activations in two halves, so that the float32 tables keep 16 bits) and shifts each row of the products to its own
query: bias_h [BLOCK_M, w] and bias_w [BLOCK_M, w] stay on the chip, the bias [w*w, w*w] is never made. Keys come in
whole rows of the window, BLOCK_N // w' rows of w' = w rounded up to a power of two: a tile of scores is [queries, rows,
columns], to which bias_h is added along rows and bias_w along columns.

Bytes: 4 B G^2 C elements (qkv once, the result once; keys are read again by each of the w^2 / BLOCK_M programs of a
window and head, from L2). FLOPs: 4 B G^2 w^2 C. A window of 14 has 196 keys: about 100 FLOPs a byte, below what an A100
(156) or an H100 (295) can do with a byte: bound by memory; the whole grid of 64: 2,048, bound by the tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, start
from .tiles import dot_exact
from .tuning import choose, fitted

DEFAULT = Config.make(num_warps=4, num_stages=2, BLOCK_M=64, BLOCK_N=64)


@triton.jit
def relative_bias(q, TABLE, query, W: tl.constexpr, W_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """bias[m, n] = q[m] . TABLE[query[m] - n + W - 1] times log2(e): [M, W_PAD]; 0 <= query < W."""
    R_PAD: tl.constexpr = 2 * W_PAD if W_PAD > 8 else 16
    d = tl.arange(0, D_PAD)
    r = tl.arange(0, R_PAD)
    table = tl.load(TABLE + r[None, :] * D + d[:, None], mask=(r[None, :] < 2 * W - 1) & (d[:, None] < D), other=0.0)
    products = dot_exact(q, table, tl.zeros((q.shape[0], R_PAD), tl.float32))
    shift = query[:, None] - tl.arange(0, W_PAD)[None, :] + (W - 1)
    return tl.gather(products, tl.maximum(shift, 0), 1) * 1.4426950408889634


@triton.jit
def load_window(
    BASE, PAD, gy, gx, ok, d, G, row_stride, HAS_PAD: tl.constexpr, D: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """A part of qkv at grid positions (gy, gx): [positions, D], or [D, positions]. 0 where not ok."""
    inside = ok & (gy < G) & (gx < G)
    at = (gy * G + gx).to(tl.int64) * row_stride
    if TRANSPOSED:
        x = tl.load(BASE + at[None, :] + d[:, None], mask=inside[None, :] & (d[:, None] < D), other=0.0)
        if HAS_PAD:
            pad = tl.load(PAD + d, mask=d < D, other=0.0)
            x = tl.where((ok & (inside == 0))[None, :], pad[:, None], x)
    else:
        x = tl.load(BASE + at[:, None] + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0)
        if HAS_PAD:
            pad = tl.load(PAD + d, mask=d < D, other=0.0)
            x = tl.where((ok & (inside == 0))[:, None], pad[None, :], x)
    return x


@triton.jit
def window_attention_kernel(
    QKV,
    PAD,
    REL_H,
    REL_W,
    OUT,
    scale,
    G,
    across,
    C,
    W: tl.constexpr,
    W_PAD: tl.constexpr,
    HAS_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_N // W_PAD
    head, window = tl.program_id(1), tl.program_id(2)
    view = window // (across * across)
    top_y = (window // across) % across * W
    left_x = window % across * W
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < W * W
    # Queries behind the window's last are copies of it: their rows are never stored.
    query_y, query_x = tl.minimum(m // W, W - 1), m % W
    d = tl.arange(0, D_PAD)
    base = QKV + (view * G * G).to(tl.int64) * (3 * C) + head * D
    pad = PAD + head * D
    q = load_window(base, pad, top_y + query_y, left_x + query_x, m_ok, d, G, 3 * C, HAS_PAD, D, False)
    bias_h = relative_bias(q, REL_H, query_y, W, W_PAD, D, D_PAD)
    bias_w = relative_bias(q, REL_W, query_x, W, W_PAD, D, D_PAD)
    n = tl.arange(0, BLOCK_N)
    key_x = n % W_PAD
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for first in range(0, W, ROWS):
        key_y = first + n // W_PAD
        key_ok = (key_y < W) & (key_x < W)
        keys = load_window(base + C, pad + C, top_y + key_y, left_x + key_x, key_ok, d, G, 3 * C, HAS_PAD, D, True)
        scores = tl.dot(q, keys, input_precision="ieee") * (scale * 1.4426950408889634)
        rows = tl.minimum(first + tl.arange(0, ROWS), W_PAD - 1)
        row_bias = tl.gather(bias_h, tl.broadcast_to(rows[None, :], (BLOCK_M, ROWS)), 1)
        cube = tl.reshape(scores, (BLOCK_M, ROWS, W_PAD)) + row_bias[:, :, None] + bias_w[:, None, :]
        scores = tl.where(key_ok[None, :], tl.reshape(cube, (BLOCK_M, BLOCK_N)), -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        weight = weight * fade + tl.sum(p, 1)
        values = load_window(
            base + 2 * C, pad + 2 * C, top_y + key_y, left_x + key_x, key_ok, d, G, 3 * C, HAS_PAD, D, False
        )
        acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        top = new_top
    acc = acc / weight[:, None]
    out_y, out_x = top_y + query_y, left_x + query_x
    mask = (m_ok & (out_y < G) & (out_x < G))[:, None] & (d[None, :] < D)
    at = ((view * G + out_y) * G + out_x).to(tl.int64) * C + head * D
    tl.store(OUT + at[:, None] + d[None, :], acc.to(OUT.dtype.element_ty), mask=mask)


def window_attention(
    qkv: Tensor,
    pad_qkv: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    num_heads: int,
    window: int,
    out: Tensor | None = None,
) -> Tensor:
    """See the module. All tensors contiguous; window 0 is the whole grid."""
    batch, grid, _, width = qkv.shape
    channels = width // 3
    head_dim, size = channels // num_heads, window or grid
    if out is None:
        out = torch.empty((batch, grid, grid, channels), dtype=qkv.dtype, device=qkv.device)
    across = -(-grid // size) if size else 0
    config = choose("window_attention", qkv.device, DEFAULT, window=size, head_dim=head_dim)
    w_pad, padded = triton.next_power_of_2(size), max(16, triton.next_power_of_2(head_dim))
    # A whole row of a window is at least as long as w_pad: the queries give way.
    wide = padded * qkv.element_size() // (64 * 2) * max(1, w_pad // 64)
    config = fitted(config, qkv.device, "BLOCK_M", wide)
    if w_pad > 64:  # the tables of both axes fill most of the shared memory already
        config = Config(config.sizes, {**config.options, "num_stages": 1})
    block_n = max(config.sizes["BLOCK_N"], w_pad, 16)
    start(
        window_attention_kernel,
        (-(-size * size // config.sizes["BLOCK_M"]), num_heads, batch * across * across),
        (qkv, pad_qkv, rel_h, rel_w, out, head_dim**-0.5, grid, across, channels),
        {
            "W": size,
            "W_PAD": w_pad,
            "HAS_PAD": grid % size != 0,
            "D": head_dim,
            "D_PAD": padded,
        },
        Config({**config.sizes, "BLOCK_N": block_n}, config.options),
    )
    return out
