"""What the threads of a warp or CTA do together, and control flow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .bits import Array
from .decode import Decoder, Run, opcode
from .errors import PtxError
from .machine import WARP, Machine, Mask
from .syntax import TYPE_BITS, Pair, Symbol

LANE = np.arange(WARP)


def warp_sync(d: Decoder, index: int) -> None:
    """Operand `index` is the member mask: its lanes must come together."""
    d.scope = "warp"
    mask_of = d.source(index, 32)

    def members(m: Machine, mask: Array) -> Array:
        wanted = np.where(mask, m.wide(mask_of(m)), np.uint32(0)).reshape(-1, WARP)
        everyone = np.bitwise_or.reduce(wanted, 1)
        needed = (everyone[:, None] >> LANE.astype(np.uint32) & np.uint32(1)).astype(bool).reshape(-1)
        if (mask & ~needed).any():
            raise PtxError(f"a lane is not in its own member mask: {d.instruction.text}")
        return needed

    d.members = members


def by_warp(m: Machine, value: Array) -> Array:
    return m.wide(value).reshape(-1, WARP)


def executing(m: Machine, mask: Mask) -> Array:
    """[warps, 32] bool."""
    return np.ones((m.lanes // WARP, WARP), bool) if mask is None else mask.reshape(-1, WARP)


@opcode("shfl")
def shuffle(d: Decoder) -> Run:
    d.type("b32")
    d.need("sync")
    mode = d.need("up", "down", "bfly", "idx")
    d.count(5)
    target = d.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    sink, inside_sink = d.sink_of(first, 32), d.sink_of(second, 1)
    value, lane_operand, clamp = d.source(1, 32), d.source(2, 32), d.source(3, 32)
    warp_sync(d, 4)

    def run(m: Machine, mask: Mask) -> None:
        by = by_warp(m, lane_operand(m)).astype(np.int64) & 31
        c = by_warp(m, clamp(m)).astype(np.int64)
        segment, limit = c >> 8 & 31, c & 31
        highest = (LANE & segment) | (limit & ~segment)
        lowest = LANE & segment
        if mode == "up":
            source = LANE - by
            inside = source >= highest
        else:
            source = {"down": LANE + by, "bfly": LANE ^ by, "idx": lowest | (by & ~segment & 31)}[mode]
            inside = source <= highest
        source = np.where(inside, source, LANE)
        values = by_warp(m, value(m))
        found = np.take_along_axis(values, source, 1)
        there = np.take_along_axis(executing(m, mask), source, 1)
        sink(m, np.where(there, found, np.uint32(0xFFFFFFFF)).reshape(-1), mask)  # an absent lane's value is poison
        inside_sink(m, inside.reshape(-1), mask)

    return run


def ballot(holds: Array) -> Array:
    """[warps, 32] bool -> [warps] uint32, bit i from lane i."""
    return (holds.astype(np.uint64) << LANE.astype(np.uint64)).sum(1).astype(np.uint32)


@opcode("vote")
def vote(d: Decoder) -> Run:
    kind = d.type("b32", "pred")
    d.need("sync")
    mode = d.need("ballot") if kind == "b32" else d.need("all", "any", "uni")
    d.count(3)
    sink, predicate = d.sink(0, TYPE_BITS[kind]), d.predicate(1)
    warp_sync(d, 2)

    def run(m: Machine, mask: Mask) -> None:
        here = executing(m, mask)
        holds = by_warp(m, predicate(m))
        if mode == "ballot":
            sink(m, np.repeat(ballot(holds & here), WARP), mask)
            return
        every, some = (holds | ~here).all(1), (holds & here).any(1)
        result = {"all": every, "any": some, "uni": every | ~some}[mode]
        sink(m, np.repeat(result, WARP), mask)

    return run


@opcode("match")
def match_lanes(d: Decoder) -> Run:
    bits = TYPE_BITS[d.type("b32", "b64")]
    mode = d.need("any", "all")
    d.need("sync")
    d.count(3)
    target = d.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    if second is not None and mode == "any":
        raise d.unknown("a predicate of match.any")
    sink, agree = d.sink_of(first, 32), d.sink_of(second, 1)
    value = d.source(1, bits)
    warp_sync(d, 2)

    def run(m: Machine, mask: Mask) -> None:
        here, values = executing(m, mask), by_warp(m, value(m))
        equal = (values[:, :, None] == values[:, None, :]) & here[:, None, :]
        found = (equal.astype(np.uint64) << LANE.astype(np.uint64)).sum(2).astype(np.uint32)
        if mode == "all":
            every = found == ballot(here)[:, None]
            agree(m, every.reshape(-1), mask)
            found = np.where(every, found, np.uint32(0))
        sink(m, found.reshape(-1), mask)

    return run


@opcode("redux")
def reduce_warp(d: Decoder) -> Run:
    kind = d.type("b32", "u32", "s32")
    d.need("sync")
    name = d.need("and", "or", "xor") if kind == "b32" else d.need("add", "min", "max")
    d.count(3)
    sink, value = d.sink(0, 32), d.source(1, 32)
    warp_sync(d, 2)
    view = np.dtype(np.int32 if kind == "s32" else np.uint32)
    info = np.iinfo(view)
    functions: dict[str, tuple[Callable[..., Array], int]] = {
        "and": (np.bitwise_and.reduce, info.max),
        "or": (np.bitwise_or.reduce, 0),
        "xor": (np.bitwise_xor.reduce, 0),
        "add": (np.add.reduce, 0),
        "min": (np.minimum.reduce, info.max),
        "max": (np.maximum.reduce, info.min),
    }
    function, neutral = functions[name]

    def run(m: Machine, mask: Mask) -> None:
        values = np.where(executing(m, mask), by_warp(m, value(m)).view(view), view.type(neutral))
        result = function(values, axis=1).astype(view).view(np.uint32)
        sink(m, np.repeat(result, WARP), mask)

    return run


@opcode("activemask")
def active_mask(d: Decoder) -> Run:
    d.type("b32")
    d.count(1)
    sink = d.sink(0, 32)
    return lambda m, mask: sink(m, np.repeat(ballot(executing(m, mask)), WARP), mask)


@opcode("bar", "barrier")
def barrier(d: Decoder) -> Run:
    """bar.sync of a whole CTA (all threads arrive at the same instruction) and bar.warp.sync."""
    if d.name == "bar" and d.flag("warp"):
        d.need("sync")
        d.count(1)
        warp_sync(d, 0)
        return lambda m, mask: m.shared.warp_barrier(m.active(mask))
    d.flag("cta")
    d.need("sync")
    d.flag("aligned")
    d.scope = "cta"
    if not 0 <= d.immediate(0) < 16:
        raise d.unknown("a barrier number")
    expected = d.immediate(1) if d.count(1, 2) == 2 else None

    def run(m: Machine, mask: Mask) -> None:
        if expected not in (None, m.threads):
            raise d.unknown(f"a barrier of {expected} of {m.threads} threads")
        m.shared.barrier(m.active(mask))

    return run


# ---- control flow: the machine acts on these itself ----------------------------------------------------------------
def nothing(m: Machine, mask: Mask) -> None:
    return None


@opcode("bra")
def branch(d: Decoder) -> Run:
    d.flag("uni")
    d.count(1)
    target = d.operands[0]
    if not isinstance(target, Symbol) or target.name not in d.program.kernel.labels:
        raise d.unknown("a branch target")
    d.control, d.target = True, d.program.kernel.labels[target.name]
    return nothing


@opcode("ret", "exit")
def leave(d: Decoder) -> Run:
    d.count(0)
    d.control = True
    return nothing


@opcode("trap")
def trap(d: Decoder) -> Run:
    d.count(0)

    def run(m: Machine, mask: Mask) -> None:
        raise PtxError("the kernel executed trap")

    return run
