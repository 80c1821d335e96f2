"""Integer arithmetic, bit fields and shifts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import floating
from .bits import SIGNED, UNSIGNED, Array
from .decode import Decoder, Run, elementwise, opcode
from .machine import Machine, Mask
from .syntax import TYPE_BITS

INTEGERS = tuple(f"{kind}{bits}" for kind in "su" for bits in (16, 32, 64))
BITS = ("b16", "b32", "b64")


def raw(values: Array) -> Array:
    return values.view(UNSIGNED[values.dtype.itemsize * 8])


def divide(a: Array, b: Array) -> Array:
    """Towards zero; all ones for a zero divisor, as the hardware gives."""
    if a.dtype.kind == "u":
        return np.where(b == 0, ~np.zeros(1, a.dtype), a // np.maximum(b, 1))
    unsigned = UNSIGNED[a.dtype.itemsize * 8]
    size_a, size_b = (np.where(v < 0, -v, v).view(unsigned) for v in (a, b))
    quotient = (size_a // np.maximum(size_b, 1)).view(a.dtype)
    return np.where(b == 0, np.array(-1, a.dtype), np.where((a < 0) != (b < 0), -quotient, quotient))


def remainder(a: Array, b: Array) -> Array:
    return a - divide(a, b) * b


PLAIN: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "min": np.minimum,
    "max": np.maximum,
    "div": divide,
    "rem": remainder,
}


@opcode("add", "sub", "min", "max", "div", "rem")
def plain(d: Decoder) -> Run:
    if d.modifiers[-1] not in INTEGERS:
        return floating.arithmetic(d)
    kind = d.type(*INTEGERS)
    d.count(3)
    sink, function = d.sink(0, TYPE_BITS[kind]), PLAIN[d.name]
    return elementwise(sink, lambda a, b: raw(function(a, b)), d.signed(1, kind), d.signed(2, kind))


def high(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * bits]
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    x0, x1, y0, y1 = x & mask, x >> half, y & mask, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    low_carry = (middle & mask) + x0 * y1
    result = x1 * y1 + (middle >> half) + (low_carry >> half)
    if a.dtype.kind == "i":
        result = result - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return result.view(a.dtype)


@opcode("mul", "mad")
def multiply(d: Decoder) -> Run:
    if d.modifiers[-1] not in INTEGERS:
        return floating.arithmetic(d)
    kind = d.type(*INTEGERS)
    part = d.need("lo", "hi", "wide")
    bits = TYPE_BITS[kind] * (2 if part == "wide" else 1)
    d.count(4 if d.name == "mad" else 3)
    wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")

    def product(a: Array, b: Array) -> Array:
        if part == "hi":
            return high(a, b)
        return a.astype(wide) * b.astype(wide) if part == "wide" else a * b

    factors = d.signed(1, kind), d.signed(2, kind)
    if d.name == "mul":
        return elementwise(d.sink(0, bits), lambda a, b: raw(product(a, b)), *factors)
    return elementwise(d.sink(0, bits), lambda a, b, c: raw(product(a, b)) + c, *factors, d.source(3, bits))


@opcode("neg", "abs")
def sign(d: Decoder) -> Run:
    if d.modifiers[-1] not in INTEGERS:
        return floating.sign(d)
    kind = d.type("s16", "s32", "s64")
    d.count(2)
    function = np.negative if d.name == "neg" else np.abs
    return elementwise(d.sink(0, TYPE_BITS[kind]), lambda a: raw(function(a)), d.signed(1, kind))


@opcode("and", "or", "xor")
def logic(d: Decoder) -> Run:
    kind = d.type(*BITS, "pred")
    d.count(3)
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[d.name]
    if kind == "pred":
        return elementwise(d.sink(0, 1), function, d.predicate(1), d.predicate(2))
    bits = TYPE_BITS[kind]
    return elementwise(d.sink(0, bits), function, d.source(1, bits), d.source(2, bits))


@opcode("not")
def invert(d: Decoder) -> Run:
    kind = d.type(*BITS, "pred")
    d.count(2)
    if kind == "pred":
        return elementwise(d.sink(0, 1), np.logical_not, d.predicate(1))
    return elementwise(d.sink(0, TYPE_BITS[kind]), np.bitwise_not, d.source(1, TYPE_BITS[kind]))


@opcode("shl", "shr")
def shift(d: Decoder) -> Run:
    kind = d.type(*BITS) if d.name == "shl" else d.type(*BITS, *INTEGERS)
    d.count(3)
    bits = TYPE_BITS[kind]
    limit = np.uint32(bits - 1)
    top = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")

    def left(a: Array, n: Array) -> Array:
        return np.where(n > limit, np.zeros(1, a.dtype), a << np.minimum(n, limit).astype(a.dtype))

    def right(a: Array, n: Array) -> Array:
        if kind[0] == "s":
            return raw(a.view(top) >> np.minimum(n, limit).astype(top))
        return np.where(n > limit, np.zeros(1, a.dtype), a >> np.minimum(n, limit).astype(a.dtype))

    return elementwise(d.sink(0, bits), left if d.name == "shl" else right, d.source(1, bits), d.source(2, 32))


@opcode("shf")
def funnel(d: Decoder) -> Run:
    d.type("b32")
    direction, mode = d.need("l", "r"), d.need("wrap", "clamp")
    d.count(4)

    def function(low: Array, upper: Array, n: Array) -> Array:
        by = (n & np.uint32(31) if mode == "wrap" else np.minimum(n, np.uint32(32))).astype(np.uint64)
        both = upper.astype(np.uint64) << np.uint64(32) | low
        # A shift of 64 bits by 32 is fine: n is at most 32.
        return ((both << by) >> np.uint64(32) if direction == "l" else both >> by).astype(np.uint32)

    return elementwise(d.sink(0, 32), function, d.source(1, 32), d.source(2, 32), d.source(3, 32))


def low_mask(width: Array) -> Array:
    """`width` ones (uint64), width at most 64."""
    wide = np.minimum(width, 63).astype(np.uint64)
    return np.where(width >= 64, ~np.uint64(0), (np.uint64(1) << wide) - np.uint64(1))


@opcode("bfe")
def extract(d: Decoder) -> Run:
    kind = d.type("u32", "s32", "u64", "s64")
    d.count(4)
    bits = TYPE_BITS[kind]

    def function(a: Array, start: Array, length: Array) -> Array:
        first, width = start & np.uint32(255), length & np.uint32(255)
        wide = a.astype(np.uint64)
        field = np.where(first < bits, wide >> np.minimum(first, 63).astype(np.uint64), np.uint64(0)) & low_mask(width)
        if kind[0] == "s":
            last = np.minimum(first.astype(np.int64) + width - 1, bits - 1)
            top = (wide >> np.maximum(last, 0).astype(np.uint64)) & np.uint64(1)
            kept = np.clip(np.minimum(width.astype(np.int64), bits - first.astype(np.int64)), 0, 64)
            field = np.where((top == 1) & (width > 0), field | ~low_mask(kept), field)
        return field.astype(UNSIGNED[bits])

    return elementwise(d.sink(0, bits), function, d.source(1, bits), d.source(2, 32), d.source(3, 32))


@opcode("bfi")
def insert(d: Decoder) -> Run:
    bits = TYPE_BITS[d.type("b32", "b64")]
    d.count(5)
    sources = [d.source(1, bits), d.source(2, bits), d.source(3, 32), d.source(4, 32)]
    sink = d.sink(0, bits)

    def run(m: Machine, mask: Mask) -> None:
        field, into, start, length = (s(m) for s in sources)
        first, width = (start & np.uint32(255)), (length & np.uint32(255))
        by = np.minimum(first, 63).astype(np.uint64)
        ones = np.where(first < bits, low_mask(width) << by, np.uint64(0))
        both = (into.astype(np.uint64) & ~ones) | ((field.astype(np.uint64) << by) & ones)
        sink(m, both.astype(UNSIGNED[bits]), mask)

    return run


def bit_length(a: Array) -> Array:
    """Position of the highest one plus 1, 0 for 0 (uint32)."""
    result = np.zeros(a.shape, np.uint32)
    rest = a.astype(np.uint64)
    for step in (32, 16, 8, 4, 2, 1):
        above = rest >> np.uint64(step)
        result += np.where(above > 0, np.uint32(step), np.uint32(0))
        rest = np.where(above > 0, above, rest)
    return result + (rest > 0)


def reverse_bits(a: Array) -> Array:
    bits = a.dtype.itemsize * 8
    result = np.zeros_like(a)
    for at in range(bits):
        result |= ((a >> a.dtype.type(at)) & a.dtype.type(1)) << a.dtype.type(bits - 1 - at)
    return result


@opcode("clz", "popc", "brev", "bfind")
def count_bits(d: Decoder) -> Run:
    kind = d.type("b32", "b64") if d.name != "bfind" else d.type("u32", "u64", "s32", "s64")
    shift_amount = d.name == "bfind" and d.flag("shiftamt")
    d.count(2)
    bits = TYPE_BITS[kind]

    def find(a: Array) -> Array:
        if kind[0] == "s":
            a = np.where(a.view(SIGNED[bits]) < 0, ~a, a)
        length = bit_length(a)
        found = np.uint32(bits) - length if shift_amount else length - np.uint32(1)
        return np.where(length == 0, np.uint32(0xFFFFFFFF), found)

    functions: dict[str, Callable[[Array], Array]] = {
        "clz": lambda a: np.uint32(bits) - bit_length(a),
        "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
        "brev": reverse_bits,
        "bfind": find,
    }
    return elementwise(d.sink(0, bits if d.name == "brev" else 32), functions[d.name], d.source(1, bits))


@opcode("prmt")
def permute_bytes(d: Decoder) -> Run:
    d.type("b32")
    d.count(4)

    def function(a: Array, b: Array, selector: Array) -> Array:
        a, b, selector = np.broadcast_arrays(a, b, selector)
        both = np.stack([np.ascontiguousarray(v).view(np.uint8).reshape(-1, 4) for v in (a, b)], 1).reshape(-1, 8)
        picks = (selector[:, None] >> (np.uint32(4) * np.arange(4, dtype=np.uint32))) & np.uint32(15)
        chosen = np.take_along_axis(both, (picks & np.uint32(7)).astype(np.int64), 1)
        spread = np.where(chosen & np.uint8(128), np.uint8(255), np.uint8(0))
        return np.where(picks & np.uint32(8), spread, chosen).view(np.uint32).reshape(-1)

    return elementwise(d.sink(0, 32), function, d.source(1, 32), d.source(2, 32), d.source(3, 32))


@opcode("lop3")
def lookup(d: Decoder) -> Run:
    d.type("b32")
    d.count(5)
    table = d.immediate(4)

    def function(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros(1, np.uint32)
        for row in range(8):
            if table >> row & 1:
                result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        return result

    return elementwise(d.sink(0, 32), function, d.source(1, 32), d.source(2, 32), d.source(3, 32))
