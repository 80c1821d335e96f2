"""Loads, stores, asynchronous copies, atomics and fences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .bits import Array, to_bits, to_values
from .decode import SHARED_WINDOW, Decoder, Run, opcode
from .errors import MemoryFault
from .integer import raw
from .machine import Machine, Mask
from .memory import Copy
from .syntax import TYPE_BITS, Address, Symbol, Vector

DATA = tuple(k for k in TYPE_BITS if k not in ("pred", "b128", "tf32", "f16x2", "bf16x2", "f16", "bf16"))
SPACES = ("global", "shared", "shared::cta", "param", "const")
ORDER = ("weak", "volatile", "relaxed", "acquire", "release", "acq_rel")
SCOPES = ("cta", "gpu", "sys")
CACHE = (
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt"),
    *(f"L1::{what}" for what in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")),
    *(f"L2::{what}" for what in ("64B", "128B", "256B")),
)


def common(d: Decoder) -> tuple[str, int, bool]:
    """Reads the modifiers of ld and st: space, elements of the vector, and whether a cache policy follows."""
    order = d.take(*ORDER)
    if order in ("relaxed", "acquire", "release"):
        d.need(*SCOPES)
    space = (d.take(*SPACES) or "generic").removesuffix("::cta")
    d.flag("nc")
    while d.take(*CACHE):
        pass
    policy = d.flag("L2::cache_hint")
    while d.take(*CACHE):
        pass
    count = int((d.take("v2", "v4") or "v1")[1:])
    return space, count, policy


def note_granule(d: Decoder, space: str, size: int) -> None:
    if space in ("shared", "generic"):
        d.program.granule = min(d.program.granule, size)


@opcode("ld")
def load(d: Decoder) -> Run:
    kind = d.type(*DATA)
    bits, signed = TYPE_BITS[kind], kind[0] == "s"
    space, count, policy = common(d)
    d.count(3 if policy else 2)
    target = d.operands[0]
    items = target.items if isinstance(target, Vector) else (target,)
    if len(items) != count:
        raise d.unknown(f"{len(items)} destinations of .v{count}")
    sinks = [d.sink_of(item, bits, signed, wider=True) for item in items]
    note_granule(d, space, bits // 8 * count)
    if space == "param":
        return load_parameter(d, bits, sinks)
    address = d.address(1, "shared" if space == "shared" else "global")

    def run(m: Machine, mask: Mask) -> None:
        lanes = m.active(mask)
        found = fetch(m, space, lanes, m.of(address(m), lanes), bits, count)
        for at, sink in enumerate(sinks):
            if mask is None:
                sink(m, found[:, at], None)
            else:
                full = np.zeros(m.lanes, found.dtype)
                full[lanes] = found[:, at]
                sink(m, full, mask)

    return run


def fetch(m: Machine, space: str, lanes: Array, addresses: Array, bits: int, count: int) -> Array:
    space, addresses = resolve(space, addresses)
    if space == "shared":
        return m.shared.load(lanes, addresses, bits, count)
    return m.memory.load(addresses, bits, count)


def resolve(space: str, addresses: Array) -> tuple[str, Array]:
    """A generic access is one to shared memory where its addresses lie in the window of it."""
    if space != "generic":
        return space, addresses
    inside = addresses >= SHARED_WINDOW
    if inside.any() and not inside.all():
        raise MemoryFault("one generic access to both global and shared memory")
    return ("shared", addresses - SHARED_WINDOW) if inside.any() else ("global", addresses)


def load_parameter(d: Decoder, bits: int, sinks: list) -> Run:
    operand = d.operands[1]
    if not isinstance(operand, Address) or not isinstance(operand.base, Symbol):
        raise d.unknown("expected [parameter]")
    start = parameter_offsets(d).get(operand.base.name)
    if start is None:
        raise d.unknown(f"parameter {operand.base.name}")
    start += operand.offset
    size = bits // 8

    def run(m: Machine, mask: Mask) -> None:
        for at, sink in enumerate(sinks):
            piece = m.launch.parameters[start + at * size : start + (at + 1) * size]
            sink(m, piece.copy().view(f"u{size}"), mask)

    return run


def parameter_offsets(d: Decoder) -> dict[str, int]:
    offsets, end = {}, 0
    for parameter in d.program.kernel.parameters:
        start = -(-end // parameter.align) * parameter.align
        offsets[parameter.name], end = start, start + parameter.bytes
    return offsets


@opcode("st")
def store(d: Decoder) -> Run:
    kind = d.type(*DATA)
    bits = TYPE_BITS[kind]
    space, count, policy = common(d)
    if space in ("param", "const"):
        raise d.unknown(f"store to .{space}")
    d.count(3 if policy else 2)
    origin = d.operands[1]
    items = origin.items if isinstance(origin, Vector) else (origin,)
    if len(items) != count:
        raise d.unknown(f"{len(items)} sources of .v{count}")
    sources = [d.source_of(item, bits, wider=True) for item in items]
    address = d.address(0, "shared" if space == "shared" else "global")
    note_granule(d, space, bits // 8 * count)

    def run(m: Machine, mask: Mask) -> None:
        lanes = m.active(mask)
        values = np.stack([m.of(source(m), lanes) for source in sources], 1)
        where, addresses = resolve(space, m.of(address(m), lanes))
        if where == "shared":
            m.shared.store(lanes, addresses, values)
        else:
            m.memory.store(addresses, values)

    return run


# ---- asynchronous copies -------------------------------------------------------------------------------------------
@opcode("cp")
def copy(d: Decoder) -> Run:
    d.need("async")
    if d.flag("commit_group"):
        return commit
    if d.flag("wait_all"):
        return lambda m, mask: m.wait_copies(mask, None)
    if d.flag("wait_group"):
        keep = d.immediate(0)
        return lambda m, mask: m.wait_copies(mask, keep)
    cache = d.need("ca", "cg")
    d.need("shared", "shared::cta")
    d.need("global")
    policy = d.flag("L2::cache_hint")
    d.take("L2::64B", "L2::128B", "L2::256B")
    size = d.immediate(2)
    if size not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise d.unknown(f"a copy of {size} bytes")
    operands = d.count(3, 4, 5) - policy
    note_granule(d, "shared", size)
    target, origin = d.address(0, "shared"), d.address(1, "global")
    wanted = d.source(3, 32) if operands == 4 else None

    def run(m: Machine, mask: Mask) -> None:
        lanes = m.active(mask)
        to, source = m.of(target(m), lanes), m.of(origin(m), lanes)
        amount = np.full(lanes.size, size) if wanted is None else m.of(wanted(m), lanes).astype(np.int64)
        if (amount > size).any():
            raise MemoryFault(f"cp.async of {int(amount.max())} bytes into a target of {size}")
        whole = amount == size
        if whole.any():
            m.memory.check(source[whole], size, "cp.async")
        for row in np.flatnonzero((amount > 0) & ~whole):
            ends = source[row] + np.array([0, amount[row] - 1])
            m.memory.check(ends, 1, "cp.async")
        m.shared.begin_copy(lanes, to, size)
        m.copies.append(Copy(lanes, to, source, size, amount, m.groups_committed[lanes]))

    return run


def commit(m: Machine, mask: Mask) -> None:
    m.groups_committed[m.active(mask)] += 1


# ---- atomics -------------------------------------------------------------------------------------------------------
UPDATES: dict[str, Callable[[Array, Array], Array]] = {
    "add": lambda old, new: old + new,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "inc": lambda old, new: np.where(old >= new, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, new: np.where((old == 0) | (old > new), new, old - old.dtype.type(1)),
}


@opcode("atom", "red")
def atomic(d: Decoder) -> Run:
    """Lanes that hit one address take turns, the lowest first."""
    kind = d.type("b32", "b64", "u32", "u64", "s32", "s64", "f32", "f64", "f16", "bf16")
    space = "generic"
    for _ in range(3):  # order, scope and space stand in different orders in what compilers write
        d.take("relaxed", "acquire", "release", "acq_rel") or d.take(*SCOPES)
        space = d.take("global", "shared", "shared::cta") or space
    space = space.removesuffix("::cta")
    what = d.need(*UPDATES, "cas")
    d.flag("noftz")
    bits, first = TYPE_BITS[kind], 1 if d.name == "atom" else 0
    d.count(first + (3 if what == "cas" else 2))
    sink = d.sink(0, bits) if d.name == "atom" else None
    address = d.address(first, "shared" if space == "shared" else "global")
    sources = [d.source(at, bits) for at in range(first + 1, len(d.operands))]
    note_granule(d, space, bits // 8)

    def update(old: Array, values: list[Array]) -> Array:
        if what == "cas":
            return np.where(old == values[0], values[1], old)
        if kind[0] in "fb" and kind not in ("b32", "b64"):
            return to_bits(UPDATES[what](to_values(old, kind), to_values(values[0], kind)), kind)
        view = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")
        return raw(UPDATES[what](old.view(view), values[0].view(view)).astype(view))

    def run(m: Machine, mask: Mask) -> None:
        lanes = m.active(mask)
        values = [m.of(source(m), lanes) for source in sources]
        old = np.zeros(lanes.size, values[0].dtype)
        where, addresses = resolve(space, m.of(address(m), lanes))
        owner = m.lane_cta[lanes] if where == "shared" else np.zeros(lanes.size, np.int64)
        for rows in turns(owner, addresses):
            present = fetch_atomic(m, where, lanes[rows], addresses[rows], bits)
            old[rows] = present
            changed = update(present, [value[rows] for value in values])
            if where == "shared":
                m.shared.put(lanes[rows], addresses[rows], changed[:, None])
            else:
                m.memory.store(addresses[rows], changed[:, None])
        if sink is not None:
            full = np.zeros(m.lanes, old.dtype)
            full[lanes] = old
            sink(m, full, mask)

    return run


def turns(owner: Array, addresses: Array) -> list[Array]:
    """Rows in groups in which no address comes twice, in the order of the rows."""
    order = np.lexsort((np.arange(addresses.size), addresses, owner))
    same = np.zeros(addresses.size, bool)
    same[1:] = (addresses[order][1:] == addresses[order][:-1]) & (owner[order][1:] == owner[order][:-1])
    starts = np.maximum.accumulate(np.where(same, 0, np.arange(addresses.size)))
    rank = np.empty(addresses.size, np.int64)
    rank[order] = np.arange(addresses.size) - starts
    return [np.flatnonzero(rank == turn) for turn in range(int(rank.max()) + 1)]


def fetch_atomic(m: Machine, space: str, lanes: Array, addresses: Array, bits: int) -> Array:
    if space == "shared":
        return m.shared.load_atomic(lanes, addresses, bits)
    return m.memory.load(addresses, bits, 1)[:, 0]


@opcode("fence", "membar")
def fence(d: Decoder) -> Run:
    """Nothing to do: the machine's memory is sequentially consistent."""
    if d.name == "membar":
        d.need("cta", "gl", "sys")
    else:
        d.need("acq_rel", "sc")
        d.need(*SCOPES)
    d.count(0)
    return lambda m, mask: None
