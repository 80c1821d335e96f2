"""From parsed instructions to callables: operand access, the table of opcodes, and the decoded program.

Each family of opcodes (integer.py, floating.py, ...) registers one builder per opcode. A builder takes the modifiers
that it knows from the instruction; whatever is left over, and every opcode that nobody registered, is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .bits import UNSIGNED, Array, to_bits, to_values
from .errors import UnknownPtx
from .machine import Machine, Mask, signed_bits
from .syntax import TYPE_BITS, Address, Immediate, Instruction, Kernel, Negated, Operand, Register, Special, Symbol

Run = Callable[[Machine, Mask], None]
Source = Callable[[Machine], Array]
Sink = Callable[[Machine, Array, Mask], None]
Builder = Callable[["Decoder"], Run]
Anything = TypeVar("Anything")
BUILDERS: dict[str, Builder] = {}
SHARED_WINDOW = 1 << 40  # where shared memory appears among generic addresses


def opcode(*names: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        for name in names:
            if name in BUILDERS:
                raise ValueError(f"opcode {name} is registered twice")
            BUILDERS[name] = builder
        return builder

    return register


@dataclass(frozen=True)
class Step:
    """A decoded instruction. scope: "" or what must be together: "warp" or "cta"; members: lanes it must wait for."""

    name: str
    text: str
    run: Run
    guard: int | None
    negate: bool
    control: bool
    target: int
    scope: str
    aligned: bool
    members: Callable[[Machine, Array], Array] | None


class Program:
    """A kernel, decoded once. `granule` is the smallest shared access in bytes, at most 4."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.granule = 4
        self.constants: dict[str, int] = {}  # addresses of module variables, set before a launch
        self.code = [Decoder(self, instruction).step() for instruction in kernel.code]


class Decoder:
    """One instruction while its builder reads it."""

    def __init__(self, program: Program, instruction: Instruction) -> None:
        self.program, self.instruction = program, instruction
        self.name, self.operands = instruction.opcode, instruction.operands
        self.modifiers = list(instruction.modifiers)
        self.scope, self.aligned = "", False
        self.members: Callable[[Machine, Array], Array] | None = None
        self.control, self.target = False, -1

    def step(self) -> Step:
        builder = BUILDERS.get(self.name)
        if builder is None:
            raise UnknownPtx(f"opcode {self.name}: {self.instruction.text}")
        run = builder(self)
        if self.modifiers:
            raise self.unknown(f"modifier .{self.modifiers[0]}")
        guard = self.instruction.guard
        return Step(
            name=self.name,
            text=self.instruction.text,
            run=run,
            guard=None if guard is None else guard.index,
            negate=self.instruction.negate,
            control=self.control,
            target=self.target,
            scope=self.scope,
            aligned=self.aligned,
            members=self.members,
        )

    def unknown(self, what: str) -> UnknownPtx:
        return UnknownPtx(f"{what}: {self.instruction.text}")

    # ---- modifiers -------------------------------------------------------------------------------------------------
    def take(self, *names: str) -> str | None:
        """The first modifier if it is one of these."""
        if self.modifiers and self.modifiers[0] in names:
            return self.modifiers.pop(0)
        return None

    def need(self, *names: str) -> str:
        found = self.take(*names)
        if found is None:
            raise self.unknown(f"expected one of {', '.join(names)}")
        return found

    def flag(self, name: str) -> bool:
        return self.take(name) is not None

    def type(self, *allowed: str) -> str:
        """The last modifier, a type."""
        kind = self.modifiers.pop() if self.modifiers else ""
        if kind not in allowed:
            raise self.unknown(f"type .{kind}")
        return kind

    # ---- sources ---------------------------------------------------------------------------------------------------
    def count(self, *allowed: int) -> int:
        if len(self.operands) not in allowed:
            raise self.unknown(f"{len(self.operands)} operands")
        return len(self.operands)

    def source(self, index: int, bits: int, wider: bool = False) -> Source:
        """Raw bits of an operand; `wider`: the register may be larger, its low bits count."""
        return self.source_of(self.operands[index], bits, wider)

    def source_of(self, operand: Operand, bits: int, wider: bool = False) -> Source:
        if isinstance(operand, Register):
            at, kind = operand.index, UNSIGNED[bits]
            if operand.bits == bits:
                return lambda m: m.read(at)
            if wider and operand.bits > bits:
                return lambda m: m.read(at).astype(kind)
            raise self.unknown(f"{operand.name} has {operand.bits} bits where {bits} belong")
        if isinstance(operand, Immediate):
            if operand.bits not in (None, bits):
                raise self.unknown(f"a literal of {operand.bits} bits where {bits} belong")
            constant = signed_bits(operand.value, bits)
            return lambda m: constant
        if isinstance(operand, Special):
            name = operand.name
            return lambda m: m.special(name).astype(UNSIGNED[bits])
        raise self.unknown(f"operand {operand}")

    def signed(self, index: int, kind: str, wider: bool = False) -> Source:
        """An integer operand as numbers of its type."""
        bits = TYPE_BITS[kind]
        raw = self.source(index, bits, wider)
        if kind[0] != "s":
            return raw
        view = np.dtype(f"i{bits // 8}")
        return lambda m: raw(m).view(view)

    def value(self, index: int, kind: str, wider: bool = False) -> Source:
        """A float operand (f16, bf16, f32, f64) as float32 or float64 values."""
        raw = self.source(index, TYPE_BITS[kind], wider)
        return lambda m: to_values(raw(m), kind)

    def predicate(self, index: int) -> Source:
        operand = self.operands[index]
        if isinstance(operand, Negated):
            at = operand.register.index
            return lambda m: ~m.read(at)
        if isinstance(operand, Register) and operand.bits == 1:
            at = operand.index
            return lambda m: m.read(at)
        if isinstance(operand, Immediate) and operand.value in (0, 1, -1):
            constant = np.array([operand.value != 0])
            return lambda m: constant
        raise self.unknown("expected a predicate")

    def immediate(self, index: int) -> int:
        operand = self.operands[index]
        if not isinstance(operand, Immediate) or operand.bits is not None:
            raise self.unknown("expected an integer constant")
        return operand.value

    # ---- destinations ----------------------------------------------------------------------------------------------
    def sink(self, index: int, bits: int, signed: bool = False, wider: bool = False) -> Sink:
        return self.sink_of(self.operands[index], bits, signed, wider)

    def sink_of(self, operand: Operand, bits: int, signed: bool = False, wider: bool = False) -> Sink:
        """Takes raw bits of `bits`; `wider`: a larger register is filled by extension with the sign or with zeros."""
        if operand is None:
            return lambda m, value, mask: None
        if not isinstance(operand, Register) or (bits == 1) != (operand.bits == 1):
            raise self.unknown(f"destination {operand}")
        at = operand.index
        if operand.bits == bits:
            return lambda m, value, mask: m.write(at, value, mask)
        if not wider or operand.bits < bits:
            raise self.unknown(f"{operand.name} has {operand.bits} bits where {bits} belong")
        full = UNSIGNED[operand.bits]
        if not signed:
            return lambda m, value, mask: m.write(at, value.astype(full), mask)
        part, whole = np.dtype(f"i{bits // 8}"), np.dtype(f"i{operand.bits // 8}")
        return lambda m, value, mask: m.write(at, value.view(part).astype(whole).view(full), mask)

    def float_sink(self, index: int, kind: str) -> Callable[[Machine, Array, Mask], None]:
        """Takes values and rounds them to `kind`."""
        raw = self.sink(index, TYPE_BITS[kind])
        return lambda m, value, mask: raw(m, to_bits(value, kind), mask)

    # ---- addresses -------------------------------------------------------------------------------------------------
    def address(self, index: int, space: str) -> Source:
        """int64 addresses of an operand [base + offset] in global, shared or generic space."""
        operand = self.operands[index]
        if not isinstance(operand, Address):
            raise self.unknown("expected an address")
        base, offset = operand.base, operand.offset
        if isinstance(base, Register):
            at = base.index
            if base.bits == 64:
                return lambda m: m.read(at).view(np.int64) + offset
            if base.bits == 32 and space == "shared":
                return lambda m: m.read(at).astype(np.int64) + offset
            raise self.unknown(f"an address of {base.bits} bits")
        if isinstance(base, Symbol):
            start = self.symbol(base, space)
            return lambda m: start(m).view(np.int64) + offset
        fixed = np.array([base.value + offset], np.int64)
        return lambda m: fixed

    def symbol(self, symbol: Symbol, space: str) -> Source:
        """The address of a variable (uint64)."""
        kernel, constants = self.program.kernel, self.program.constants
        if symbol.name in kernel.shared and space in ("shared", "any"):
            start = np.array([kernel.shared[symbol.name]], np.uint64)
            return lambda m: start
        if symbol.name in kernel.constants and space != "shared":
            return lambda m: np.array([constants[symbol.name]], np.uint64)
        raise self.unknown(f"symbol {symbol.name}")


def elementwise(sink: Sink, function: Callable[..., Array], *sources: Source) -> Run:
    """The instruction that writes function(*sources) to the sink; specialised by arity, since it runs most often."""
    if len(sources) == 1:
        (a,) = sources
        return lambda m, mask: sink(m, function(a(m)), mask)
    if len(sources) == 2:
        a, b = sources
        return lambda m, mask: sink(m, function(a(m), b(m)), mask)
    a, b, c = sources
    return lambda m, mask: sink(m, function(a(m), b(m), c(m)), mask)
