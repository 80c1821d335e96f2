"""Parser of PTX text: one kernel (.entry) with its parameters, registers, shared variables and instructions.

It knows the grammar, not the meaning: opcodes and modifiers are checked when the instructions are decoded. Debug
sections and line information are dropped; any other unknown directive is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TypeAlias

from .errors import PtxError, UnknownPtx

TYPE_BITS = {
    **{f"{kind}{bits}": bits for kind in "bsu" for bits in (8, 16, 32, 64)},
    **{"b128": 128, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "f16x2": 32, "bf16x2": 32, "tf32": 32, "pred": 1},
}


@dataclass(frozen=True)
class Register:
    name: str
    index: int
    bits: int  # 1: a predicate


@dataclass(frozen=True)
class Immediate:
    """`value` is a signed or unsigned integer; for 0f and 0d literals the bits, `bits` wide."""

    value: int
    bits: int | None = None


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Pair:
    """Two destinations, `a|b`."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Negated:
    """`!%p` as a source."""

    register: Register


Operand: TypeAlias = Register | Immediate | Special | Symbol | Vector | Address | Pair | Negated | None


@dataclass(frozen=True)
class Instruction:
    """`guard` is the predicate register before the opcode, `negate` its `!`. The sink `_` is the operand None."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negate: bool
    text: str


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    bytes: int
    align: int


@dataclass
class Kernel:
    name: str
    target: str
    parameters: list[Parameter]
    threads: tuple[int, int, int] | None  # .reqntid
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: list[Register] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)  # offset of each variable; the dynamic one starts at the end
    shared_bytes: int = 0  # of the static variables
    constants: dict[str, bytes] = field(default_factory=dict)  # .global and .const variables of the module


_STATEMENT = re.compile(
    r"\s*(?:(?P<label>[$\w]+)\s*:(?!:)|(?P<scope>[{}])|(?P<text>[^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)", re.S
)
_VARIABLE = re.compile(
    r"(?:\.(?P<linkage>extern|visible|weak)\s+)?\.(?P<space>shared|global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?P<name>[\w$]+)\s*(?:\[(?P<count>\d*)\])?\s*(?:=\s*(?P<value>.*))?$",
    re.S,
)
_ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)(?P<directives>[^{]*)\{", re.S)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[\w$]+)\s*(?:\[(?P<count>\d+)\])?$"
)


def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel called `name`, or the only one of the text."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.M)
    entries = [m for m in _ENTRY.finditer(text) if name in (None, m["name"])]
    if len(entries) != 1:
        raise PtxError(f"{len(entries)} kernels called {name!r} in the text")
    entry = entries[0]
    target = re.search(r"^\s*\.target\s+(\w+)", text, re.M)
    kernel = Kernel(entry["name"], target[1] if target else "", _parameters(entry["parameters"]), _threads(entry))
    for statement in _module_statements(text):
        _variable(kernel, statement)
    _Body(kernel).read(text, entry.end())
    return kernel


def _parameters(text: str) -> list[Parameter]:
    result = []
    for piece in filter(None, (p.strip() for p in text.split(","))):
        match = _PARAMETER.match(piece)
        if not match or match["type"] not in TYPE_BITS:
            raise UnknownPtx(f"parameter {piece!r}")
        size = TYPE_BITS[match["type"]] // 8
        result.append(
            Parameter(match["name"], match["type"], size * int(match["count"] or 1), int(match["align"] or size))
        )
    return result


def _threads(entry: re.Match[str]) -> tuple[int, int, int] | None:
    directives = entry["directives"]
    left = re.sub(r"\.(reqntid|maxntid|minnctapersm|maxnreg)\s+[\d,\s]+", "", directives).strip()
    if left:
        raise UnknownPtx(f"directive {left.split()[0]} of kernel {entry['name']}")
    match = re.search(r"\.reqntid\s+([\d,\s]+)", directives)
    if not match:
        return None
    sizes = [int(v) for v in match[1].split(",")] + [1, 1]
    return sizes[0], sizes[1], sizes[2]


def _module_statements(text: str) -> list[str]:
    """Variables declared outside kernels."""
    return re.findall(r"^\s*((?:\.extern\s+|\.visible\s+|\.weak\s+)?\.(?:shared|global|const)\s[^;]*);", text, re.M)


def _variable(kernel: Kernel, statement: str) -> None:
    match = _VARIABLE.match(statement.strip())
    if not match:
        raise UnknownPtx(f"variable {statement.strip()!r}")
    if match["name"] in kernel.shared or match["name"] in kernel.constants:
        return  # declared inside the kernel and found by the search of the module too
    size = TYPE_BITS[match["type"]] // 8
    total = size * (int(match["count"]) if match["count"] else 0 if match["count"] == "" else 1)
    if match["space"] == "shared":
        align = int(match["align"] or size)
        start = -(-kernel.shared_bytes // align) * align
        kernel.shared[match["name"]] = start
        kernel.shared_bytes = start + total
        return
    items = [int(v, 0) for v in re.findall(r"-?\w+", match["value"] or "")]
    data = b"".join((v % (1 << 8 * size)).to_bytes(size, "little") for v in items)
    kernel.constants[match["name"]] = data.ljust(total, b"\0")


class _Body:
    """Reads the statements of a kernel; a `{` opens a scope with registers of its own, as inline assembly does."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[dict[str, tuple[int, int | None]]] = [{}]  # name or prefix -> bits, count
        self.names: list[dict[str, Register]] = [{}]

    def read(self, text: str, at: int) -> None:
        while self.scopes:
            match = _STATEMENT.match(text, at)
            if not match:
                raise UnknownPtx(f"statement {text[at : at + 60].strip()!r}")
            at = match.end()
            if match["label"]:
                self.kernel.labels[match["label"]] = len(self.kernel.code)
            elif match["scope"] == "{":
                self.scopes.append({})
                self.names.append({})
            elif match["scope"] == "}":
                self.scopes.pop()
                self.names.pop()
            else:
                self.statement(match["text"].strip())

    def statement(self, text: str) -> None:
        if not text:
            return
        if not text.startswith("."):
            self.kernel.code.append(self.instruction(text))
        elif text.startswith(".reg"):
            self.declare(text)
        elif text.startswith((".shared", ".extern .shared")):
            _variable(self.kernel, text)
        elif not text.startswith(".pragma"):
            raise UnknownPtx(f"directive {text!r}")

    def declare(self, text: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.S)
        if not match or match[1] not in TYPE_BITS:
            raise UnknownPtx(f"directive {text!r}")
        for item in match[2].split(","):
            name = re.match(r"\s*(%?[\w$]+)(?:<(\d+)>)?\s*$", item)
            if not name:
                raise UnknownPtx(f"register {item!r}")
            self.scopes[-1][name[1]] = (TYPE_BITS[match[1]], int(name[2]) if name[2] else None)

    def register(self, name: str) -> Register | None:
        stem = re.sub(r"\d+$", "", name)
        for scope, names in zip(reversed(self.scopes), reversed(self.names)):
            if name in names:
                return names[name]
            bits, count = scope.get(name, (0, None))
            if not bits:
                bits, count = scope.get(stem, (0, None))
                if count is None or not name[len(stem) :] or int(name[len(stem) :]) >= count:
                    continue
            register = Register(name, len(self.kernel.registers), bits)
            self.kernel.registers.append(register)
            names[name] = register
            return register
        return None

    def instruction(self, text: str) -> Instruction:
        match = re.match(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
        if not match:
            raise UnknownPtx(f"statement {text!r}")
        guard = self.register(match[2]) if match[2] else None
        if match[2] and (guard is None or guard.bits != 1):
            raise PtxError(f"guard of {text!r} is not a predicate")
        opcode, *modifiers = re.split(r"\.", match[3])
        operands = tuple(self.operand(piece) for piece in _split(match[4]))
        line = " ".join(text.split())
        return Instruction(opcode, tuple(modifiers), operands, guard, bool(match[1]), line)

    def operand(self, text: str) -> Operand:
        if text == "_":
            return None
        if text.startswith("{"):
            return Vector(tuple(self.operand(piece) for piece in _split(text[1:-1])))
        if text.startswith("["):
            return self.address(text[1:-1].strip())
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first.strip()), self.operand(second.strip()))
        if text.startswith("!"):
            register = self.register(text[1:].strip())
            if register is None:
                raise PtxError(f"operand {text!r} is not a register")
            return Negated(register)
        if register := self.register(text):
            return register
        if text.startswith("%"):
            return Special(text)
        number = _number(text)
        return number if number is not None else Symbol(text)

    def address(self, text: str) -> Address:
        match = re.match(r"(%?[\w$]+)\s*(?:\+\s*(-?\w+))?$", text)
        if not match:
            raise UnknownPtx(f"address [{text}]")
        base = self.operand(match[1])
        if not isinstance(base, Register | Symbol | Immediate):
            raise UnknownPtx(f"address [{text}]")
        return Address(base, int(match[2], 0) if match[2] else 0)


def _number(text: str) -> Immediate | None:
    if match := re.match(r"0([fFdD])([0-9a-fA-F]+)$", text):
        return Immediate(int(match[2], 16), 32 if match[1] in "fF" else 64)
    if re.match(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$", text):
        digits = text.rstrip("U")
        sign, body = (-1, digits[1:]) if digits[0] == "-" else (1, digits)
        octal = len(body) > 1 and body.isdigit() and body[0] == "0"
        return Immediate(sign * (int(body, 8) if octal else int(body, 0)))
    return None


def _split(text: str) -> list[str]:
    """Pieces between commas that stand in no brackets."""
    pieces, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            pieces.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*pieces, last] if last else pieces
