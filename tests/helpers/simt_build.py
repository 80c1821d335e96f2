"""Builds CUDA sources with g++ on the runtime of csrc/simt: plain, with the race detector, or under sanitizers."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sysconfig
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNTIME = sorted((ROOT / "csrc/simt").glob("*.cpp"))
COMMON = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# The flags of the runtime and drivers, and of the kernels. Only kernels carry the hooks of the race detector; loads
# are not moved into the conditions that use them, so that they tell the rounds of a loop apart (csrc/simt/banks.cpp).
VARIANTS = {
    "plain": (["-O2"], ["-O2"]),
    "race": (["-O2"], ["-O1", "-fsanitize=thread", "-fno-tree-sink"]),
    "asan": (SANITIZE, SANITIZE),
}


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def run(command: Sequence[str | Path]) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")


def build(
    variant: str, kernels: Sequence[Path], drivers: Sequence[Path], folder: Path, cxx: Sequence[str] = ()
) -> Path:
    """The program `folder/variant` of these kernels (.cu) and drivers (.cpp), with the runtime."""
    folder.mkdir(parents=True, exist_ok=True)
    host, device = VARIANTS[variant]
    cxx = list(cxx) or compiler()
    objects: list[Path] = []
    jobs: list[list[str | Path]] = []
    for source, flags in [*((s, host) for s in [*RUNTIME, *drivers]), *((s, device) for s in kernels)]:
        # The runtime without a sanitizer is the same in several programs of one folder.
        tag = "host" if flags is host and variant in ("plain", "race") else variant
        obj = folder / f"{tag}-{source.name}.o"
        objects.append(obj)
        if source in RUNTIME and obj.exists():
            continue
        jobs.append([*cxx, *COMMON, *flags, "-x", "c++", "-c", source, "-o", obj])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, jobs))
    target = folder / variant
    run([*cxx, *(SANITIZE if variant == "asan" else []), *objects, "-ldl", "-o", target])
    return target


EXTENSION = "_cuda_sim"
CACHE = ROOT / "build" / EXTENSION  # objects and modules, named by a hash of what they are made from


def with_headers(kernel: Path) -> str:
    """The kernel's text with the tile headers that it includes in their place, so that a mutant may change them too."""
    text = kernel.read_text()
    for header in (ROOT / "csrc/cuda").glob("*_tile.h"):
        text = text.replace(f'#include "cuda/{header.name}"\n', header.read_text().replace("#pragma once\n", ""))
    return text


def compile_once(source: Path, flags: Sequence[str], headers: str) -> Path:
    """The object of a source in CACHE."""
    command = [*compiler(), *COMMON, "-fPIC", "-fvisibility=hidden", *flags, "-x", "c++", "-c", str(source)]
    key = hashlib.sha256("\0".join([*command, source.read_text(), headers]).encode()).hexdigest()[:16]
    target = CACHE / f"{source.name}-{key}.o"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        run([*command, "-o", part])
        part.replace(target)
    return target


def mutated(kernel: Path, old: str, new: str) -> Path:
    """A copy of the kernel, headers in place, with `old`, which stands there exactly once, replaced."""
    text = with_headers(kernel)
    if text.count(old) != 1:
        raise ValueError(f"{kernel.name} holds {old!r} {text.count(old)} times; a mutant changes one place")
    text = text.replace(old, new)
    path = CACHE / f"mutant-{hashlib.sha256(text.encode()).hexdigest()[:8]}-{kernel.name}"
    path.write_text(text)
    return path


def build_extension(variant: str, mutants: Mapping[str, tuple[str, str]] | None = None) -> Path:
    """pagelens._cuda_sim in a folder of CACHE: all kernels of csrc/cuda, those in `mutants` with one text replaced.

    mutants  file name -> (text that stands there exactly once, what to put in its place)
    """
    import pybind11

    CACHE.mkdir(parents=True, exist_ok=True)
    host, device = VARIANTS[variant]
    headers = "".join(
        path.read_text() for part in ("cuda", "simt") for path in sorted((ROOT / "csrc" / part).glob("*.h"))
    )
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", f"-DPAGELENS_MODULE={EXTENSION}"]
    # Bindings only pass on what they are given: optimised or sanitised they would cost more time than they take.
    jobs = [(ROOT / "csrc/cuda/bindings.cpp", ["-O0", "-g0", *python])]
    for kernel in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        change = (mutants or {}).get(kernel.name)
        jobs.append((mutated(kernel, *change) if change else kernel, device))
    jobs += [(source, host) for source in RUNTIME]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: compile_once(*job, headers), jobs))
    key = hashlib.sha256("".join(obj.name for obj in objects).encode()).hexdigest()[:16]
    target = CACHE / f"{variant}-{key}" / f"{EXTENSION}.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        run([*compiler(), "-shared", *(SANITIZE if variant == "asan" else []), *objects, "-ldl", "-o", part])
        part.replace(target)
    return target
