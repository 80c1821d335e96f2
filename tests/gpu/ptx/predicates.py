"""Comparisons and selection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .bits import Array, flush
from .decode import Decoder, Run, Source, elementwise, opcode
from .integer import BITS, INTEGERS
from .machine import Machine, Mask
from .syntax import TYPE_BITS, Pair

FLOATS = ("f16", "bf16", "f32", "f64")
ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),  # false if unordered
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
UNORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "equ": lambda a, b: ~ORDERED["ne"](a, b),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
WHOLE = {**ORDERED, "lo": ORDERED["lt"], "ls": ORDERED["le"], "hi": ORDERED["gt"], "hs": ORDERED["ge"]}


def compared(d: Decoder, kind: str, ftz: bool) -> tuple[Source, Source]:
    if kind not in FLOATS:
        return d.signed(1, kind), d.signed(2, kind)
    a, b = d.value(1, kind), d.value(2, kind)
    return (lambda m: flush(a(m)), lambda m: flush(b(m))) if ftz and kind == "f32" else (a, b)


@opcode("setp")
def set_predicate(d: Decoder) -> Run:
    kind = d.type(*BITS, *INTEGERS, *FLOATS)
    if kind in BITS:
        comparisons = {name: ORDERED[name] for name in ("eq", "ne")}
    else:
        comparisons = {**ORDERED, **UNORDERED} if kind in FLOATS else WHOLE
    compare = comparisons[d.need(*comparisons)]
    combine = d.take("and", "or", "xor")
    ftz = d.flag("ftz")
    d.count(4 if combine else 3)
    target = d.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    sink, other = d.sink_of(first, 1), d.sink_of(second, 1)
    a, b = compared(d, kind, ftz)
    if combine is None and second is None:
        return elementwise(sink, compare, a, b)
    also = d.predicate(3) if combine else None
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[combine or "and"]

    def run(m: Machine, mask: Mask) -> None:
        holds = compare(a(m), b(m))
        fails = ~holds
        if also is not None:
            c = also(m)
            holds, fails = function(holds, c), function(fails, c)
        sink(m, holds, mask)
        other(m, fails, mask)

    return run


@opcode("selp")
def select(d: Decoder) -> Run:
    kind = d.type(*BITS, *INTEGERS, "f32", "f64")
    d.count(4)
    bits = TYPE_BITS[kind]
    pick = d.predicate(3)
    return elementwise(d.sink(0, bits), lambda a, b, p: np.where(p, a, b), d.source(1, bits), d.source(2, bits), pick)
