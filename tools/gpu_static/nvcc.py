"""Compiles csrc/cuda with nvcc, a file at a time and alone: PTX and machine code for every target, and an object.

Spills and any use of local memory are errors. What a file compiles to is kept in build/nvcc by a hash of all that it
was made from.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KEPT = ROOT / "build" / "nvcc"
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100")
# ptxas reports a spill and a use of local memory as warnings, and warnings as errors.
GATE = ("--warn-on-spills", "--warn-on-local-memory-usage", "-Werror")
HOST = "-Xcompiler=-fPIC,-fvisibility=hidden"
FLAGS = ("-std=c++17", "-O3", f"-I{CSRC}", HOST, *(f"-Xptxas={flag}" for flag in GATE))
Item = TypeVar("Item")
Result = TypeVar("Result")


class NvccError(Exception):
    """nvcc refused a file; the message is what it said."""


@dataclass(frozen=True)
class Unit:
    """What one .cu compiled to. cubins by target; object: the host code with the registration of its kernels."""

    source: Path
    ptx: Path  # for sm_80
    cubins: dict[str, Path]
    object: Path


def find() -> str | None:
    """nvcc by the variable NVCC, or on the PATH."""
    return os.environ.get("NVCC") or shutil.which("nvcc")


@cache
def version() -> str:
    """As nvcc says it, for example "13.0.88"."""
    text = subprocess.run([str(find()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bV([\d.]+)", text)
    return found[1] if found else text.strip()


def sources() -> list[Path]:
    """The kernels, the longest first, so that it does not start when the others are done."""
    return sorted((CSRC / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)


def digest(source: Path, *more: str) -> str:
    """Of a source, every header that it may include, the compiler and its flags."""
    made = hashlib.sha256("\n".join((*FLAGS, version(), *more, *TARGETS)).encode())
    for path in (source, *sorted(CSRC.glob("cuda/*.h")), *sorted(CSRC.glob("simt/*.h"))):
        made.update(path.name.encode() + b"\0" + path.read_bytes())
    return made.hexdigest()[:16]


def compile_unit(source: Path) -> Unit:
    """Raises NvccError: it does not compile for every target, spills, or uses local memory."""
    folder = KEPT / f"{source.stem}-{digest(source)}"
    files = {target: folder / f"{source.stem}.{target.replace('sm', 'compute')}.cubin" for target in TARGETS}
    unit = Unit(source, folder / f"{source.stem}.compute_80.ptx", files, folder / f"{source.stem}.o")
    if folder.is_dir():
        return unit
    working = folder.with_name(f"{folder.name}.{os.getpid()}")
    working.mkdir(parents=True)
    targets = [f"-gencode=arch={target.replace('sm', 'compute')},code={target}" for target in TARGETS]
    output = ["-c", str(source), "-o", str(working / unit.object.name), "--keep", "--keep-dir", str(working)]
    result = subprocess.run([str(find()), *FLAGS, *targets, *output], capture_output=True, text=True)
    if result.returncode != 0:
        shutil.rmtree(working)
        raise NvccError(f"{source.name}: {result.stderr.strip()}")
    kept = {path.name for path in (unit.ptx, unit.object, *unit.cubins.values())}
    for path in working.iterdir():
        if path.name not in kept:
            path.unlink()
    forget(source.stem)
    working.rename(folder)
    return unit


def forget(stem: str) -> None:
    """Removes what older versions of a file compiled to."""
    for old in KEPT.glob(f"{stem}-*"):
        if re.fullmatch(r"[0-9a-f]{16}", old.name.removeprefix(f"{stem}-")):
            shutil.rmtree(old, ignore_errors=True)


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """work(item) of all, as many at once as there are CPUs; what they start are processes."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(work, items))


def compile_all() -> list[Unit]:
    return side_by_side(compile_unit, sources())
