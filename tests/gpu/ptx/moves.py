"""Moves, packing and unpacking of registers, conversions between types and between address spaces."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .bits import FLOAT, SIGNED, UNSIGNED, Array, flush, join_halves, to_bits
from .decode import SHARED_WINDOW, Decoder, Run, elementwise, opcode
from .integer import BITS, INTEGERS
from .machine import Machine, Mask
from .syntax import TYPE_BITS, Symbol, Vector

FLOATS = ("f16", "bf16", "f32", "f64")
SMALL = ("u8", "s8")


@opcode("mov")
def move(d: Decoder) -> Run:
    kind = d.type(*BITS, *INTEGERS, "f32", "f64", "b128", "pred")
    d.count(2)
    target, origin = d.operands
    if kind == "pred":
        return elementwise(d.sink(0, 1), lambda a: a, d.predicate(1))
    bits = TYPE_BITS[kind]
    if isinstance(target, Vector):
        return unpack(d, bits, target)
    if isinstance(origin, Vector):
        return pack(d, bits, origin)
    if isinstance(origin, Symbol):
        start, whole = d.symbol(origin, "any"), UNSIGNED[bits]
        return elementwise(d.sink(0, bits), lambda a: a.astype(whole), start)
    return elementwise(d.sink(0, bits), lambda a: a, d.source(1, bits))


def unpack(d: Decoder, bits: int, target: Vector) -> Run:
    part = bits // len(target.items)
    sinks = [d.sink_of(item, part) for item in target.items]
    origin, kind = d.source(1, bits), UNSIGNED[part]

    def run(m: Machine, mask: Mask) -> None:
        value = origin(m)
        for at, sink in enumerate(sinks):
            sink(m, (value >> value.dtype.type(part * at)).astype(kind), mask)

    return run


def pack(d: Decoder, bits: int, origin: Vector) -> Run:
    part = bits // len(origin.items)
    sources = [d.source_of(item, part) for item in origin.items]
    sink, kind = d.sink(0, bits), UNSIGNED[bits]

    def run(m: Machine, mask: Mask) -> None:
        value = sources[0](m).astype(kind)
        for at, source in enumerate(sources[1:], 1):
            value = value | source(m).astype(kind) << kind(part * at)
        sink(m, value, mask)

    return run


ROUND: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode("cvt")
def convert(d: Decoder) -> Run:
    if d.modifiers[-2] in ("f16x2", "bf16x2"):
        return convert_pair(d)
    source = d.type(*INTEGERS, *FLOATS, *SMALL)
    target = d.type(*INTEGERS, *FLOATS, *SMALL, "tf32")
    d.count(2)
    if target in FLOATS or target == "tf32":
        return to_float(d, source, target)
    bits = TYPE_BITS[target]
    sink = d.sink(0, bits, signed=target[0] == "s", wider=True)
    unsigned = UNSIGNED[bits]
    if source in FLOATS:
        rounded = ROUND[d.need(*ROUND)]
        ftz = d.flag("ftz")
        value = d.value(1, source)

        def float_to_integer(a: Array) -> Array:
            return saturated(rounded(flush(a) if ftz and source == "f32" else a), target)

        return elementwise(sink, float_to_integer, value)
    saturate = d.flag("sat")
    origin = d.signed(1, source, wider=True)
    if saturate:
        low, high = limits(target)
        return elementwise(sink, lambda a: clip_integer(a, low, high).astype(unsigned), origin)
    whole = (SIGNED if source[0] == "s" else UNSIGNED)[bits]
    return elementwise(sink, lambda a: a.astype(whole).view(unsigned), origin)


def limits(kind: str) -> tuple[int, int]:
    bits = TYPE_BITS[kind]
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def clip_integer(a: Array, low: int, high: int) -> Array:
    info = np.iinfo(a.dtype)
    return np.clip(a, a.dtype.type(max(low, int(info.min))), a.dtype.type(min(high, int(info.max))))


def saturated(values: Array, kind: str) -> Array:
    """Whole floats -> raw bits of an integer type: out of range to the nearest value, NaN to 0."""
    low, high = limits(kind)
    bits = TYPE_BITS[kind]
    inside = (values >= float(low)) & (values < float(high) + 1.0)
    number = (SIGNED if kind[0] == "s" else UNSIGNED)[bits]
    safe = np.where(inside, values, 0).astype(np.float64).astype(number)
    edge = np.where(values > 0, number(high), number(low))
    return np.where(inside, safe, np.where(np.isnan(values), number(0), edge)).view(UNSIGNED[bits])


def to_float(d: Decoder, source: str, target: str) -> Run:
    if source not in FLOATS:
        d.need("rn")
        kind = FLOAT[64] if TYPE_BITS[source] == 32 else None  # exact, so that one rounding follows
        sink = d.float_sink(0, target)
        origin = d.signed(1, source, wider=True)
        if target == "bf16" or (TYPE_BITS[source] == 64 and target == "f16"):
            raise d.unknown(f"conversion from .{source} to .{target}")
        return elementwise(sink, lambda a: a.astype(kind) if kind else a.astype(FLOAT[TYPE_BITS[target]]), origin)
    if target == "tf32":
        d.need("rna")
        return elementwise(d.sink(0, 32), round_tf32, d.source(1, 32))
    to_whole = d.take(*ROUND) if source == target else None
    if to_whole is None and TYPE_BITS[target] < TYPE_BITS[source]:
        d.need("rn")
    ftz = d.flag("ftz")
    saturate = d.flag("sat")
    value = d.value(1, source)

    def function(a: Array) -> Array:
        if ftz and source == "f32":
            a = flush(a)
        a = ROUND[to_whole](a) if to_whole else a
        return np.where(np.isnan(a), 0, np.clip(a, 0, 1)) if saturate else a

    return elementwise(d.float_sink(0, target), function, value)


def round_tf32(raw: Array) -> Array:
    """Nearest, ties away from zero; the low 13 bits become zero."""
    rounded = (raw + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(raw.view(np.float32)), np.uint32(0x7FFFE000), rounded)


def convert_pair(d: Decoder) -> Run:
    """d = {low: second operand, high: first operand}."""
    d.type("f32")
    kind = d.type("f16x2", "bf16x2")[:-2]
    d.need("rn")
    relu = d.flag("relu")
    d.count(3)

    def function(high: Array, low: Array) -> Array:
        both = np.stack(np.broadcast_arrays(low, high), -1)
        return join_halves(to_bits(np.where(both < 0, 0, both) if relu else both, kind))

    return elementwise(d.sink(0, 32), function, d.value(1, "f32"), d.value(2, "f32"))


@opcode("cvta")
def convert_address(d: Decoder) -> Run:
    d.type("u64")
    back = d.flag("to")
    space = d.need("global", "shared", "const")
    d.count(2)
    origin = d.operands[1]
    source = d.symbol(origin, space) if isinstance(origin, Symbol) else d.source(1, 64)
    window = np.uint64(SHARED_WINDOW if space == "shared" else 0)
    return elementwise(d.sink(0, 64), lambda a: a - window if back else a + window, source)
