"""What can go wrong while PTX is read or executed. Nothing here is recovered from: a test fails with the sentence."""

from __future__ import annotations


class PtxError(Exception):
    """Base class of all errors of the interpreter."""


class UnknownPtx(PtxError):
    """An opcode, modifier, type, operand, directive or special register that the interpreter does not implement."""


class UndefinedRegister(PtxError):
    """A register is read that no thread has written."""


class MemoryFault(PtxError):
    """An access outside every allocation, or not aligned to its own size."""


class Hazard(PtxError):
    """An access that nothing orders after the one it depends on: a copy in flight, or another thread's access."""


class Deadlock(PtxError):
    """No thread can go on, or the limit of steps is reached."""
