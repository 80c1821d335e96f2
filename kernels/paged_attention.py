"""paged_attention: causal attention over the paged cache, prefill chunks and decodes in one call, grouped heads.

    out[r] = softmax(scale q[r] . k[p], p <= position of r) v[p];  q [N, H, D], keys and values [blocks, size, K, D]

Row t of sequence s (of n_s rows) stands at position context_lens[s] - n_s + t; its keys are found through
block_tables[s]. The weights of the softmax are rounded to q's dtype before they meet v (their sum is not).

Tiling. A program has BLOCK_M rows of a tile: BLOCK_M // (H/K) query rows of one sequence, each with all the H/K heads
of one key head, so that keys and values are read once for a group of heads; it walks over keys in steps of BLOCK_N.
Programs find their sequence by bisection in query_starts, which stays on the device: there are N // rows + S of them
at most, and those without rows end at once. With few rows (decode) the keys are split in SPLITS parts of equal length;
each leaves its unnormalised sum, maximum and weight, and a second kernel joins them in order.

Bytes of a decode: 2 * context * K * D elements of the cache, read once; FLOPs 4 * context * H * D, far below a card's
ratio: it is bound by memory. Prefill of n rows: 2 n^2 H D FLOPs, bound by the tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, start
from .tuning import choose

DEFAULT = Config.make(num_warps=4, num_stages=2, BLOCK_M=64, BLOCK_N=64, SPLITS=1)
DEFAULT_DECODE = Config.make(num_warps=4, num_stages=3, BLOCK_M=16, BLOCK_N=64, SPLITS=8)
REDUCE = Config.make(num_warps=4, num_stages=1)


@triton.jit
def find_sequence(QUERY_STARTS, tile, S, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """The sequence of a tile of rows: sequence s begins at tile query_starts[s] // ROWS + s."""
    low = 0
    high = S
    for _ in range(STEPS):
        middle = (low + high) // 2
        begins = tl.load(QUERY_STARTS + tl.minimum(middle, S)) // ROWS + middle
        ahead = (begins <= tile) & (middle < high)
        low = tl.where(ahead, middle + 1, low)
        high = tl.where(ahead, high, middle)
    return low - 1


@triton.jit
def paged_attention_kernel(
    Q,
    KEYS,
    VALUES,
    BLOCK_TABLES,
    QUERY_STARTS,
    CONTEXT_LENS,
    OUT,
    PART_OUT,
    PART_MAX,
    PART_SUM,
    scale,
    S,
    H,
    stride_q,
    stride_out,
    stride_table,
    stride_block,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Rows of a tile are (query row, head of the group). PART_*: [N, H, SPLITS, D] and [N, H, SPLITS] float32."""
    ROWS: tl.constexpr = BLOCK_M // GROUP
    tile, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    s = find_sequence(QUERY_STARTS, tile, S, ROWS, STEPS)
    first_row = tl.load(QUERY_STARTS + s)
    num_rows = tl.load(QUERY_STARTS + s + 1) - first_row
    context = tl.load(CONTEXT_LENS + s)
    first = (tile - (first_row // ROWS + s)) * ROWS
    if first >= num_rows:
        return
    place = tl.arange(0, BLOCK_M)
    row = first + place // GROUP
    head = kv_head * GROUP + place % GROUP
    row_ok = (place < ROWS * GROUP) & (row < num_rows)
    position = context - num_rows + row
    d = tl.arange(0, D_PAD)
    q_place = (first_row + row).to(tl.int64) * stride_q + head * D
    q = tl.load(Q + q_place[:, None] + d[None, :], mask=row_ok[:, None] & (d[None, :] < D), other=0.0)
    # Keys that the last row of the tile sees, and this part of them.
    end = tl.minimum(context, context - num_rows + first + ROWS)
    per_part = tl.cdiv(tl.cdiv(end, SPLITS), BLOCK_N) * BLOCK_N
    start_key = part * per_part
    end_key = tl.minimum(end, start_key + per_part)
    table = BLOCK_TABLES + s.to(tl.int64) * stride_table
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for first_key in range(start_key, end_key, BLOCK_N):
        key = first_key + tl.arange(0, BLOCK_N)
        key_ok = key < end_key
        block = tl.load(table + key // BLOCK_SIZE, mask=key_ok, other=0).to(tl.int64)
        at = block * stride_block + (key % BLOCK_SIZE) * (KV_HEADS * D) + kv_head * D
        keys = tl.load(KEYS + at[None, :] + d[:, None], mask=key_ok[None, :] & (d[:, None] < D), other=0.0)
        scores = tl.dot(q, keys, input_precision="ieee") * (scale * 1.4426950408889634)
        seen = (key[None, :] <= position[:, None]) & key_ok[None, :]
        scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen nothing yet
        p = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        weight = weight * fade + tl.sum(p, 1)
        values = tl.load(VALUES + at[:, None] + d[None, :], mask=key_ok[:, None] & (d[None, :] < D), other=0.0)
        acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        top = new_top
    if SPLITS == 1:
        acc = acc / weight[:, None]
        place_out = (first_row + row).to(tl.int64) * stride_out + head * D
        mask = row_ok[:, None] & (d[None, :] < D)
        tl.store(OUT + place_out[:, None] + d[None, :], acc.to(OUT.dtype.element_ty), mask=mask)
    else:
        at_part = ((first_row + row).to(tl.int64) * H + head) * SPLITS + part
        tl.store(PART_OUT + at_part[:, None] * D + d[None, :], acc, mask=row_ok[:, None] & (d[None, :] < D))
        tl.store(PART_MAX + at_part, top, mask=row_ok)
        tl.store(PART_SUM + at_part, weight, mask=row_ok)


@triton.jit
def paged_attention_reduce_kernel(
    PART_OUT, PART_MAX, PART_SUM, OUT, H, stride_out, D: tl.constexpr, D_PAD: tl.constexpr, SPLITS: tl.constexpr
):
    """Joins the parts of one row and head, in their order."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, D_PAD)
    first = (row * H + head) * SPLITS
    top = tl.load(PART_MAX + first)
    for part in range(1, SPLITS):
        top = tl.maximum(top, tl.load(PART_MAX + first + part))
    weight = 0.0
    acc = tl.zeros([D_PAD], tl.float32)
    for part in range(SPLITS):
        factor = tl.exp2(tl.load(PART_MAX + first + part) - top)
        weight += factor * tl.load(PART_SUM + first + part)
        acc += factor * tl.load(PART_OUT + (first + part) * D + d, mask=d < D, other=0.0)
    acc = acc / weight
    tl.store(OUT + row * stride_out + head * D + d, acc.to(OUT.dtype.element_ty), mask=d < D)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """See the module. q and out [N, H, D] with the heads of a row together; the cache contiguous; indices int32."""
    tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = keys.shape[1:3]
    sequences = context_lens.shape[0]
    if out is None:
        out = torch.empty((tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    group = num_heads // num_kv_heads
    decodes = tokens == sequences
    kernel, default = ("paged_attention_decode", DEFAULT_DECODE) if decodes else ("paged_attention", DEFAULT)
    config = choose(kernel, q.device, default, rows=tokens, head_dim=head_dim, group=group)
    block_m = max(config.sizes["BLOCK_M"], triton.next_power_of_2(group))
    config = Config({**config.sizes, "BLOCK_M": block_m}, config.options)
    splits = config.sizes["SPLITS"]
    parts: tuple[Tensor | None, ...] = (None, None, None)
    if splits > 1:
        shape = (tokens, num_heads, splits)
        sums = torch.empty((2, *shape), dtype=torch.float32, device=q.device)
        parts = (torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device), sums[0], sums[1])
    tiles = tokens // (block_m // group) + sequences
    indices = (block_tables, query_starts, context_lens)
    strides = q.stride(0), out.stride(0), block_tables.stride(0), keys.stride(0)
    padded = max(16, triton.next_power_of_2(head_dim))
    start(
        paged_attention_kernel,
        (tiles, num_kv_heads, splits),
        (q, keys, values, *indices, out, *parts, scale, sequences, num_heads, *strides),
        {
            "BLOCK_SIZE": block_size,
            "KV_HEADS": num_kv_heads,
            "GROUP": group,
            "D": head_dim,
            "D_PAD": padded,
            "STEPS": (sequences + 1).bit_length(),
        },
        config,
    )
    if splits > 1:
        start(
            paged_attention_reduce_kernel,
            (tokens, num_heads),
            (*parts, out, num_heads, out.stride(0)),
            {"D": head_dim, "D_PAD": padded, "SPLITS": splits},
            choose("paged_attention_reduce", q.device, REDUCE, head_dim=head_dim),
        )
    return out
