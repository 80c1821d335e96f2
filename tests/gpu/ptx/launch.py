"""Launches: a program, a grid, arguments. The CTAs run a few at a time, in lockstep."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import access, floating, integer, matrix, moves, predicates, warp  # noqa: F401  (they register the opcodes)
from .bits import Array
from .decode import Program
from .errors import PtxError
from .machine import Launch, Machine
from .memory import GlobalMemory
from .syntax import Kernel, parse

LANES_TOGETHER = 2048
Argument = int | float | bytes


@dataclass
class Report:
    """What a launch did. `executed` counts instructions by opcode, once for all lanes that ran them together."""

    steps: int
    executed: Counter[str]
    hazards: list[str]
    bytes_read: int
    bytes_written: int


def compile_ptx(text: str, name: str | None = None) -> Program:
    return Program(parse(text, name))


def launch(
    program: Program,
    memory: GlobalMemory,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Argument],
    shared_bytes: int = 0,
    strict: bool = True,
    max_steps: int = 2_000_000,
) -> Report:
    """Runs the whole grid. strict: a hazard is an error, else it is listed in the report."""
    grid3, block3 = three(grid), three(block)
    if program.kernel.threads not in (None, block3):
        raise PtxError(f"kernel {program.kernel.name} needs blocks of {program.kernel.threads} threads, not {block3}")
    for name, data in program.kernel.constants.items():
        program.constants[name] = memory.add(np.frombuffer(data, np.uint8))
    settings = Launch(grid3, block3, shared_bytes, parameter_block(program.kernel, arguments))
    total = int(np.prod(grid3))
    together = max(1, LANES_TOGETHER // int(np.prod(block3)))
    report = Report(0, Counter(), [], -memory.bytes_read, -memory.bytes_written)
    for first in range(0, total, together):
        ctas = list(range(first, min(first + together, total)))
        machine = Machine(program, settings, memory, ctas, max_steps)
        machine.shared.strict = strict
        machine.run()
        report.steps += machine.steps
        report.executed += machine.executed
        report.hazards += machine.shared.hazards
    report.bytes_read += memory.bytes_read
    report.bytes_written += memory.bytes_written
    return report


def three(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = [*sizes, 1, 1][:3]
    return int(x), int(y), int(z)


def parameter_block(kernel: Kernel, arguments: Sequence[Argument]) -> Array:
    """The bytes of the parameters: integers and pointers as their type says, floats, or bytes for a structure."""
    if len(arguments) != len(kernel.parameters):
        raise PtxError(f"kernel {kernel.name} takes {len(kernel.parameters)} arguments, not {len(arguments)}")
    data = bytearray()
    for parameter, value in zip(kernel.parameters, arguments):
        data.extend(bytes(-len(data) % parameter.align))
        if isinstance(value, bytes):
            piece = value
        elif isinstance(value, float):
            piece = struct.pack({4: "<f", 8: "<d", 2: "<e"}[parameter.bytes], value)
        else:
            piece = (value % (1 << 8 * parameter.bytes)).to_bytes(parameter.bytes, "little")
        if len(piece) != parameter.bytes:
            raise PtxError(f"parameter {parameter.name} has {parameter.bytes} bytes, not {len(piece)}")
        data.extend(piece)
    return np.frombuffer(bytes(data), np.uint8)
