"""sample: the next token of every row, greedy or drawn, and the n-gram mask before it; logits never leave the device.

    greedy: the lowest id among the largest logits. Drawn: softmax(logits / temperature) cut to top_k, then min_p (of
    the largest probability), then top_p (the fewest that reach it, of what the other cuts left), ties by the lowest
    id; from those, in falling order of probability, the one where the cumulative sum passes `uniform` of the whole
    logits [R, V] float32 -> ids [R] int32; -1 if the largest logit is not finite or there is a NaN

Nothing is sorted. A cut, and the draw itself, is the largest logit such that those at or above it are enough (in number
or in weight): its 32 bits are found four at a time, by comparing each logit with 15 candidates, in 8 passes over a row.
Equal logits share a weight, so that which of them counts is arithmetic, and finding the j-th of them one more pass.

Tiling. A program a row, in tiles of BLOCK logits; the passes after the first come from L2. Bytes: 4 V a row and pass:
2 passes (greedy), about 28 (drawn). Bound by the one multiprocessor that has the row: a guess of 0.1 to 0.3 ms for
V = 150,000, not measured; greedy rows end after the first passes.

`mask_ngrams` forbids (sets to minus infinity) every token that would repeat an n-gram of the tokens it is given.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, start
from .tuning import choose

DEFAULT = Config.make(num_warps=8, num_stages=1, BLOCK=1024)
MASK = Config.make(num_warps=4, num_stages=1, BLOCK=256)


@triton.jit
def order_of(x):
    """uint32 in the order of the float32 numbers; both zeros are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def number_of(order):
    """The float32 number of an order."""
    bits = order.to(tl.int32, bitcast=True) ^ -2147483648
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weight_at(x, top, inverse):
    return tl.exp((x - top) * inverse)


@triton.jit
def highest_cut(ROW, V, needed, top, inverse, floor, extra, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest order such that the logits at or above it, none below `floor`, are at least `needed`.

    COUNT  their number is meant, else their weight. `extra` [weight] is left out of those at `floor` itself (which the
    top_k cut takes only in part).
    """
    found = tl.zeros((1,), tl.uint32)
    sixteen = tl.arange(0, 16)
    for step in tl.static_range(8):
        candidates = found | (sixteen.to(tl.uint32) << (28 - 4 * step))
        totals = tl.zeros((16,), tl.float32)
        for first in range(0, V, BLOCK):
            place = first + tl.arange(0, BLOCK)
            x = tl.load(ROW + place, mask=place < V, other=-float("inf"))
            order = order_of(x)
            if COUNT:
                value = tl.where(place < V, 1.0, 0.0)
            else:
                value = tl.where((place < V) & (order >= floor), weight_at(x, top, inverse), 0.0)
            above = order[:, None] >= candidates[None, :]
            totals += tl.sum(tl.where(above, value[:, None], 0.0), 0)
        totals = tl.where(candidates <= floor, totals - extra, totals)
        best = tl.max(tl.where(totals >= needed, sixteen, 0), 0)
        found = found | (best.to(tl.uint32) << (28 - 4 * step))
    return tl.max(found, 0)


@triton.jit
def above_and_at(ROW, V, order_cut, top, inverse, BLOCK: tl.constexpr):
    """Number and weight of the logits above a cut, and the number of those at it."""
    count_above = tl.zeros((BLOCK,), tl.float32)
    weight_above = tl.zeros((BLOCK,), tl.float32)
    count_at = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        place = first + tl.arange(0, BLOCK)
        x = tl.load(ROW + place, mask=place < V, other=-float("inf"))
        order = order_of(x)
        above = (place < V) & (order > order_cut)
        count_above += tl.where(above, 1.0, 0.0)
        weight_above += tl.where(above, weight_at(x, top, inverse), 0.0)
        count_at += tl.where((place < V) & (order == order_cut), 1.0, 0.0)
    return tl.sum(count_above, 0), tl.sum(weight_above, 0), tl.sum(count_at, 0)


@triton.jit
def sample_kernel(LOGITS, TEMPERATURE, TOP_K, TOP_P, MIN_P, UNIFORM, OUT, V, stride_logits, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    ROW = LOGITS + row.to(tl.int64) * stride_logits
    top = tl.full((1,), -float("inf"), tl.float32)
    best = tl.zeros((1,), tl.int32)
    broken = tl.zeros((1,), tl.int32)
    for first in range(0, V, BLOCK):
        place = first + tl.arange(0, BLOCK)
        x = tl.load(ROW + place, mask=place < V, other=-float("inf"))
        broken += tl.sum((x != x).to(tl.int32), 0)
        block_top = tl.max(x, 0)
        block_best = tl.min(tl.where(x == block_top, place, V), 0)
        best = tl.where(block_top > top, block_best, best)
        top = tl.maximum(top, block_top)
    broken = (broken > 0) | (top == float("inf")) | (top == -float("inf"))
    token = tl.max(tl.where(broken, -1, best), 0)
    top = tl.max(top, 0)
    temperature = tl.load(TEMPERATURE + row)
    if (token < 0) | (temperature == 0.0):
        tl.store(OUT + row, token)
        return
    inverse = 1.0 / temperature
    # top_k: the cut, and how many of the logits that are equal to it stay.
    top_k = tl.load(TOP_K + row)
    floor = tl.full((1,), 0, tl.uint32)
    extra = 0.0
    if (top_k > 0) & (top_k < V):
        needed = top_k.to(tl.float32)
        cut = highest_cut(ROW, V, needed, top, inverse, floor, 0.0, True, BLOCK)
        above, _, at = above_and_at(ROW, V, cut, top, inverse, BLOCK)
        floor = floor + cut
        extra = (at - (needed - above)) * weight_at(number_of(cut), top, inverse)
    # min_p: logits whose weight is below it; none of the equal ones then stays or all do.
    min_p = tl.load(MIN_P + row)
    if min_p > 0.0:
        lowest = order_of(top + tl.log(min_p) * temperature)
        extra = tl.where(tl.max((lowest > floor).to(tl.int32), 0) > 0, 0.0, extra)
        floor = tl.maximum(floor, lowest)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        place = first + tl.arange(0, BLOCK)
        x = tl.load(ROW + place, mask=place < V, other=-float("inf"))
        total += tl.where((place < V) & (order_of(x) >= floor), weight_at(x, top, inverse), 0.0)
    mass = tl.sum(total, 0) - extra
    top_p = tl.load(TOP_P + row)
    if top_p < 1.0:
        cut = highest_cut(ROW, V, top_p * mass, top, inverse, floor, extra, False, BLOCK)
        _, above, _ = above_and_at(ROW, V, cut, top, inverse, BLOCK)
        each = weight_at(number_of(cut), top, inverse)
        mass = above + tl.maximum(tl.ceil((top_p * mass - above) / each), 1.0) * each
    target = tl.load(UNIFORM + row) * mass
    cut = highest_cut(ROW, V, tl.maximum(target, 1e-30), top, inverse, floor, extra, False, BLOCK)
    _, above, at = above_and_at(ROW, V, cut, top, inverse, BLOCK)
    each = weight_at(number_of(cut), top, inverse)
    wanted = tl.minimum(tl.maximum(tl.floor((target - above) / each), 0.0), at - 1.0).to(tl.int32)
    # The wanted-th of the logits at the cut, by id.
    seen = tl.zeros((1,), tl.int32)
    for first in range(0, V, BLOCK):
        place = first + tl.arange(0, BLOCK)
        x = tl.load(ROW + place, mask=place < V, other=-float("inf"))
        here = ((place < V) & (order_of(x) == cut)).to(tl.int32)
        rank = tl.cumsum(here, 0) - here + seen
        token = tl.maximum(token, tl.max(tl.where((here > 0) & (rank == wanted), place + V, -1), 0))
        seen += tl.sum(here, 0)
    tl.store(OUT + row, tl.where(token >= V, token - V, token))


@triton.jit
def mask_ngrams_kernel(
    LOGITS,
    HISTORY,
    LENGTHS,
    SIZES,
    ALLOWED,
    V,
    stride_logits,
    stride_history,
    num_allowed,
    BLOCK: tl.constexpr,
):
    """HISTORY [R, L]: the window of each row, which ends at LENGTHS[r]; SIZES[r] 0: nothing is forbidden."""
    row = tl.program_id(0).to(tl.int64)
    length, size = tl.load(LENGTHS + row), tl.load(SIZES + row)
    history = HISTORY + row * stride_history
    if size == 0:
        return
    for first in range(0, length - size + 1, BLOCK):
        begin = first + tl.arange(0, BLOCK)
        match = begin + size <= length
        for j in range(0, size - 1):
            token = tl.load(history + begin + j, mask=match, other=-1)
            match = match & (token == tl.load(history + length - size + 1 + j))
        token = tl.load(history + begin + size - 1, mask=match, other=-1)
        for j in range(0, num_allowed):
            match = match & (token != tl.load(ALLOWED + row * num_allowed + j))
        match = match & (token >= 0) & (token < V)
        tl.store(LOGITS + row * stride_logits + token, tl.full((BLOCK,), -float("inf"), tl.float32), mask=match)


def mask_ngrams(logits: Tensor, history: Tensor, lengths: Tensor, sizes: Tensor, allowed: Tensor) -> None:
    """In place. history [R, L], lengths, sizes [R], int32; see the module and its kernel.

    allowed  [R, A] int32: tokens that are never forbidden, padded with -1
    """
    strides = logits.stride(0), history.stride(0)
    start(
        mask_ngrams_kernel,
        (logits.shape[0],),
        (logits, history, lengths, sizes, allowed, logits.shape[1], *strides, allowed.shape[1]),
        {},
        choose("mask_ngrams", logits.device, MASK),
    )


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    num_tokens: int | None = None,
) -> Tensor:
    """See the module. All [R] float32 but top_k int32 (0 or below: off); temperature 0: greedy.

    num_tokens  ids from here on are padding and never chosen
    """
    rows, width = logits.shape
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    vocab = width if num_tokens is None else min(num_tokens, width)
    start(
        sample_kernel,
        (rows,),
        (logits, temperature, top_k, top_p, min_p, uniform, out, vocab, logits.stride(0)),
        {},
        choose("sample", logits.device, DEFAULT, vocab=vocab),
    )
    return out
