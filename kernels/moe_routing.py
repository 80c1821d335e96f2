"""moe_routing: which experts a token goes to, with which weights, and the tokens of each expert in order.

    scores = softmax(logits [N, E]); the top_k largest, lowest id first among equals, renormalised if asked, times scale
    -> expert_ids, weights [N, k]; offsets [E+1]; permutation [N*k]: flat indices n*k + j sorted by expert, stable

Tiling. A program has a tile [BLOCK_T, E] of scores in registers; it takes the largest k times, and keeps which experts
each token has as a mask of the tile. A token has an expert at most once, so that its place among the expert's tokens is
a sum of that mask over the tokens before it. Up to BLOCK_T tokens (decode) are one program and one launch; more are
two: the first leaves each tile's counts, in the second every tile adds up the counts of the tiles before it.

Bytes: 4 N E logits read, 12 N k written; (tiles)^2 E counts from L2. No product: bound by latency.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, start
from .tuning import choose

DEFAULT = Config.make(num_warps=4, num_stages=1, BLOCK_T=16)


@triton.jit
def place_tokens(
    chosen, order, before, counts, OFFSETS, PERMUTATION, t, N, E, first_tile, TOP_K: tl.constexpr, E_PAD: tl.constexpr
):
    """Write the offsets (the first tile does) and this tile's part of the permutation.

    chosen, order  [BLOCK_T, E_PAD] int32: whether a token has an expert, and as which of its choices
    before         [E_PAD]: tokens of each expert in the tiles before; counts [E_PAD]: in all
    """
    e = tl.arange(0, E_PAD)
    ends = tl.cumsum(counts, 0)
    if first_tile:
        tl.store(OFFSETS + e + 1, ends, mask=e < E)
        tl.store(OFFSETS + e, tl.zeros_like(e), mask=e == 0)
    rank = tl.cumsum(chosen, 0) - chosen
    place = (ends - counts + before)[None, :] + rank
    flat = t[:, None] * TOP_K + order
    tl.store(PERMUTATION + place, flat, mask=(chosen > 0) & (t[:, None] < N))


@triton.jit
def moe_routing_kernel(
    LOGITS,
    IDS,
    WEIGHTS,
    COUNTS,
    OFFSETS,
    PERMUTATION,
    N,
    E,
    stride_logits,
    scale,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SINGLE: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """SINGLE: the only tile, which does the second kernel's work too. COUNTS [tiles, E] otherwise."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, E_PAD)
    mask = (t[:, None] < N) & (e[None, :] < E)
    at = LOGITS + t.to(tl.int64)[:, None] * stride_logits + e[None, :]
    x = tl.load(at, mask=mask, other=-float("inf"))
    broken = tl.sum((x != x).to(tl.int32), 1) > 0
    x = tl.exp(x - tl.max(x, 1)[:, None])
    scores = tl.math.div_rn(x, tl.broadcast_to(tl.sum(x, 1)[:, None], (BLOCK_T, E_PAD)))
    scores = tl.where(broken[:, None], float("nan"), scores)
    # NaN counts as the largest: experts 0 .. k-1 then, all different.
    keys = tl.where(scores != scores, float("inf"), scores)
    keys = tl.where(e[None, :] < E, keys, -float("inf"))
    chosen = tl.zeros((BLOCK_T, E_PAD), tl.int32)
    order = tl.zeros((BLOCK_T, E_PAD), tl.int32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for j in tl.static_range(TOP_K):
        best = tl.max(keys, 1)
        expert = tl.min(tl.where(keys == best[:, None], e[None, :], E_PAD), 1)
        here = e[None, :] == expert[:, None]
        total += tl.sum(tl.where(here, scores, 0.0), 1)
        chosen = tl.where(here & (t[:, None] < N), 1, chosen)
        order = tl.where(here, j, order)
        keys = tl.where(here, -float("inf"), keys)
        tl.store(IDS + t * TOP_K + j, expert, mask=t < N)
    if RENORMALIZE:
        scores = tl.math.div_rn(scores, tl.broadcast_to(total[:, None], (BLOCK_T, E_PAD)))
    tl.store(WEIGHTS + t[:, None] * TOP_K + order, scores * scale, mask=chosen > 0)
    counts = tl.sum(chosen, 0)
    if SINGLE:
        place_tokens(
            chosen, order, tl.zeros((E_PAD,), tl.int32), counts, OFFSETS, PERMUTATION, t, N, E, True, TOP_K, E_PAD
        )
    else:
        tl.store(COUNTS + tl.program_id(0) * E + e, counts, mask=e < E)


@triton.jit
def moe_permute_kernel(
    IDS,
    COUNTS,
    OFFSETS,
    PERMUTATION,
    N,
    E,
    tiles,
    TOP_K: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tile = tl.program_id(0)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, E_PAD)
    before = tl.zeros((E_PAD,), tl.int32)
    counts = tl.zeros((E_PAD,), tl.int32)
    for other in range(tiles):
        count = tl.load(COUNTS + other * E + e, mask=e < E, other=0)
        counts += count
        before += tl.where(other < tile, count, 0)
    chosen = tl.zeros((BLOCK_T, E_PAD), tl.int32)
    order = tl.zeros((BLOCK_T, E_PAD), tl.int32)
    for j in tl.static_range(TOP_K):
        here = e[None, :] == tl.load(IDS + t * TOP_K + j, mask=t < N, other=-1)[:, None]
        chosen = tl.where(here, 1, chosen)
        order = tl.where(here, j, order)
    place_tokens(chosen, order, before, counts, OFFSETS, PERMUTATION, t, N, E, tile == 0, TOP_K, E_PAD)


def moe_routing(logits: Tensor, top_k: int, renormalize: bool, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the module. logits [N, E] float32 -> expert_ids, weights, offsets, permutation."""
    tokens, experts = logits.shape

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    ids, weights = empty(tokens, top_k), empty(tokens, top_k, dtype=torch.float32)
    offsets, permutation = empty(experts + 1), empty(tokens * top_k)
    config = choose("moe_routing", logits.device, DEFAULT, tokens=tokens, experts=experts)
    # No token at all is a tile too: the offsets are wanted.
    tiles = max(1, -(-tokens // config.sizes["BLOCK_T"]))
    counts = empty(tiles, experts) if tiles > 1 else None
    e_pad = triton.next_power_of_2(experts)
    start(
        moe_routing_kernel,
        (tiles,),
        (logits, ids, weights, counts, offsets, permutation, tokens, experts, logits.stride(0), scale),
        {"TOP_K": top_k, "RENORMALIZE": renormalize, "SINGLE": tiles == 1, "E_PAD": e_pad},
        config,
    )
    if tiles > 1:
        start(
            moe_permute_kernel,
            (tiles,),
            (ids, counts, offsets, permutation, tokens, experts, tiles),
            {"TOP_K": top_k, "E_PAD": e_pad},
            config,
        )
    return ids, weights, offsets, permutation
