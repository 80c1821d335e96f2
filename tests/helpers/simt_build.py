"""Builds CUDA sources with g++ on the runtime of csrc/simt: plain, with the race detector, or under sanitizers."""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNTIME = sorted((ROOT / "csrc/simt").glob("*.cpp"))
COMMON = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# The flags of the runtime and drivers, and of the kernels. Only kernels carry the hooks of the race detector.
VARIANTS = {
    "plain": (["-O2"], ["-O2"]),
    "race": (["-O2"], ["-O1", "-fsanitize=thread"]),
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


def with_headers(kernel: Path) -> str:
    """The kernel's text with the tile headers that it includes in their place, so that a mutant may change them too."""
    text = kernel.read_text()
    for header in (ROOT / "csrc/cuda").glob("*_tile.h"):
        text = text.replace(f'#include "cuda/{header.name}"\n', header.read_text().replace("#pragma once\n", ""))
    return text


def build_extension(variant: str, folder: Path, mutants: Mapping[str, tuple[str, str]] | None = None) -> Path:
    """pagelens._cuda_sim in `folder`: all kernels of csrc/cuda, those named in `mutants` with one text replaced.

    mutants  file name -> (text that stands there exactly once, what to put in its place)
    Objects are kept in `folder`, so that the next variant or mutant compiles only what differs.
    """
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    host, device = VARIANTS[variant]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", f"-DPAGELENS_MODULE={EXTENSION}"]
    shared = ["-fPIC", "-fvisibility=hidden"]
    tag = variant if variant == "asan" else "host"
    jobs: list[tuple[Path, list[str | Path]]] = []
    for source in [*RUNTIME, ROOT / "csrc/cuda/bindings.cpp"]:
        jobs.append((folder / f"{tag}-{source.name}.o", [*COMMON, *shared, *host, *python, source]))
    changed = mutants or {}
    for kernel in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        source, name = kernel, f"{variant}-{kernel.name}"
        if kernel.name in changed:
            old, new = changed[kernel.name]
            text = with_headers(kernel)
            if text.count(old) != 1:
                raise ValueError(f"{kernel.name} holds {old!r} {text.count(old)} times; a mutant changes one place")
            name = f"{variant}-mutant-{abs(hash((old, new)))}-{kernel.name}"
            source = folder / name
            source.write_text(text.replace(old, new))
        jobs.append((folder / f"{name}.o", [*COMMON, *shared, *device, "-x", "c++", source]))
    missing = [(target, command) for target, command in jobs if not target.exists()]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: run([*compiler(), *job[1], "-c", "-o", job[0]]), missing))
    key = f"mutant-{abs(hash(tuple(changed.items())))}" if changed else variant
    target = folder / f"{variant}-{key}" / f"{EXTENSION}.so"
    target.parent.mkdir(exist_ok=True)
    sanitizer = SANITIZE if variant == "asan" else []
    run([*compiler(), "-shared", *sanitizer, *(obj for obj, _ in jobs), "-ldl", "-o", target])
    return target
