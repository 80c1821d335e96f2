"""Floating-point arithmetic. Add, subtract and multiply round once; fma goes through float64, so its result may differ
from the fused one in the last bit about once in 2^29. The .approx functions are computed exactly and rounded: a kernel
must not depend on their last bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .bits import Array, flush, halves, join_halves, to_bits, to_values
from .decode import Decoder, Run, Sink, Source, elementwise, opcode
from .machine import Machine, Mask
from .syntax import TYPE_BITS

SCALAR = ("f16", "bf16", "f32", "f64")
PACKED = ("f16x2", "bf16x2")
BINARY: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "min": np.fmin,
    "max": np.fmax,
}


def operands(d: Decoder, kind: str, ftz: bool, first: int, last: int) -> list[Source]:
    """Values of the operands first..last: [lanes], or [lanes, 2] of packed types."""
    sources = []
    for index in range(first, last + 1):
        raw = d.source(index, TYPE_BITS[kind])
        sources.append(reader(raw, kind, ftz))
    return sources


def reader(raw: Source, kind: str, ftz: bool) -> Source:
    if kind in PACKED:
        return lambda m: to_values(halves(raw(m)), kind[:-2])
    if ftz and kind == "f32":
        return lambda m: flush(to_values(raw(m), kind))
    return lambda m: to_values(raw(m), kind)


def result(d: Decoder, kind: str, ftz: bool, saturate: bool) -> Sink:
    sink = d.sink(0, TYPE_BITS[kind])

    def finish(m: Machine, value: Array, mask: Mask) -> None:
        if saturate:
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1))
        if kind in PACKED:
            sink(m, join_halves(to_bits(value, kind[:-2])), mask)
        else:
            bits = to_bits(value, kind)
            sink(m, flush(bits.view(np.float32)).view(np.uint32) if ftz and kind == "f32" else bits, mask)

    return finish


def rounding(d: Decoder) -> None:
    """Only round to nearest even is implemented; it is also the default of add, sub and mul."""
    if d.modifiers and d.modifiers[0] in ("rz", "rm", "rp"):
        raise d.unknown(f"rounding .{d.modifiers[0]}")
    d.flag("rn")


def arithmetic(d: Decoder) -> Run:
    """add, sub, mul, div, min, max of float types (the integer ones are in integer.py)."""
    kind = d.type(*SCALAR, *PACKED)
    propagate = False
    if d.name == "div":
        if kind == "f32" and d.modifiers[:1] in (["full"], ["approx"]):
            d.modifiers.pop(0)
        else:
            d.need("rn")
    elif d.name not in ("min", "max"):
        rounding(d)
    ftz = d.flag("ftz")
    if d.name in ("min", "max"):
        propagate = d.flag("NaN")
    saturate = d.name in ("add", "sub", "mul") and d.flag("sat")
    d.count(3)
    function = {"min": np.minimum, "max": np.maximum}[d.name] if propagate else BINARY[d.name]
    return elementwise(result(d, kind, ftz, saturate), function, *operands(d, kind, ftz, 1, 2))


def fused_down(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32 values, rounded to the next float32 below: exact, also where float64 rounds the sum."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    part = total - product
    rest = (product - (total - part)) + (c - part)  # what the addition rounded away (Knuth's TwoSum)
    near = total.astype(np.float32)
    near = np.where((near > total) | ((near == total) & (rest < 0)), np.nextafter(near, np.float32(-np.inf)), near)
    zero = np.where(np.signbit(product) | np.signbit(c), np.float32(-0.0), np.float32(0.0))  # x - x is -0 here
    return np.where(total == 0, zero, near)


DIRECTED: dict[str, Callable[[Array, Array, Array], Array]] = {
    "rm": fused_down,
    "rp": lambda a, b, c: -fused_down(-a, b, -c),
}


@opcode("fma")
def fused(d: Decoder) -> Run:
    kind = d.type(*SCALAR, *PACKED)
    if kind == "f32" and (direction := d.take(*DIRECTED)):
        ftz = d.flag("ftz")
        d.count(4)
        return elementwise(result(d, kind, ftz, d.flag("sat")), DIRECTED[direction], *operands(d, kind, ftz, 1, 3))
    d.need("rn")
    ftz = d.flag("ftz")
    saturate = d.flag("sat")
    relu = kind != "f32" and kind != "f64" and d.flag("relu")
    d.count(4)

    def function(a: Array, b: Array, c: Array) -> Array:
        value = a.astype(np.float64) * b + c
        if kind == "f32":
            value = value.astype(np.float32)
        return np.where(np.isnan(value), value, np.maximum(value, 0)) if relu else value

    return elementwise(result(d, kind, ftz, saturate), function, *operands(d, kind, ftz, 1, 3))


def sign(d: Decoder) -> Run:
    """neg and abs of float types: only the sign bit changes."""
    kind = d.type(*SCALAR, *PACKED)
    d.flag("ftz")
    d.count(2)
    bits = TYPE_BITS[kind]
    top = {16: 0x8000, 64: 1 << 63}.get(bits, 0x80008000 if kind in PACKED else 0x80000000)

    def function(a: Array) -> Array:
        mask = a.dtype.type(top)
        return a ^ mask if d.name == "neg" else a & ~mask

    return elementwise(d.sink(0, bits), function, d.source(1, bits))


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
}


@opcode(*FUNCTIONS)
def transcendental(d: Decoder) -> Run:
    kind = d.type("f32", "f64") if d.name in ("rcp", "sqrt", "rsqrt") else d.type("f32", "f16", "bf16")
    d.need("approx", "rn") if d.name in ("rcp", "sqrt") else d.need("approx")
    ftz = d.flag("ftz")
    d.count(2)
    function = FUNCTIONS[d.name]
    wide = np.float64

    def exact(a: Array) -> Array:
        return function(a.astype(wide)).astype(a.dtype)

    return elementwise(result(d, kind, ftz, False), exact, *operands(d, kind, ftz, 1, 1))


@opcode("copysign")
def copysign(d: Decoder) -> Run:
    kind = d.type("f32", "f64")
    d.count(3)
    bits = TYPE_BITS[kind]
    top = 1 << (bits - 1)

    def function(a: Array, b: Array) -> Array:
        mask = b.dtype.type(top)
        return (a & mask) | (b & ~mask)

    return elementwise(d.sink(0, bits), function, d.source(1, bits), d.source(2, bits))


@opcode("testp")
def test_property(d: Decoder) -> Run:
    kind = d.type("f32", "f64")
    what = d.need("finite", "infinite", "number", "notanumber")
    d.count(2)
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
    }
    return elementwise(d.sink(0, 1), tests[what], d.value(1, kind))
