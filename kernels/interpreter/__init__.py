"""Runs the kernels on a CPU through Triton's interpreter, for tests: thousands of times slower than a device.

`import_triton()` must come before anything else imports triton; `repair.py` mends what the interpreter computes wrongly
(bfloat16 above all), `checks.py` looks for reads and writes out of bounds and for races between programs.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "TRITON_INTERPRET"


def is_interpreted() -> bool:
    """Whether the kernels that are imported in this process are, or will be, interpreted."""
    module = sys.modules.get("triton")
    if module is None:
        return os.environ.get(VARIABLE) == "1"
    return hasattr(module.language.max, "rewrite")


def import_triton() -> None:
    """Import triton and this package's kernels interpreted, and repair the interpreter.

    Raises RuntimeError if triton was imported to compile before: a process can do one or the other.
    """
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        import triton  # noqa: F401

        if not is_interpreted():
            raise RuntimeError(
                f"triton was imported before it could be set to interpret kernels; start the process with {VARIABLE}=1"
            )
        from . import repair

        repair.apply()
        _import_kernels()
    finally:  # the host's environment stays as it was; triton reads it when kernels are defined
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def _import_kernels() -> None:
    from importlib import import_module
    from pathlib import Path

    package = __package__.rpartition(".")[0]
    for path in sorted(Path(__file__).parent.parent.glob("*.py")):
        if path.stem != "__init__":
            import_module(f"{package}.{path.stem}")
