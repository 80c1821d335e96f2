"""The launches of the CUDA kernels: their host code as nvcc compiled it, on a runtime that hands every launch over.

`Kernels` is an extension like pagelens._cuda. A launch goes to its handler with the kernel's name in the PTX, grid,
block, dynamic shared memory and the addresses of the arguments; nothing needs a driver or a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from . import nvcc

RUNTIME = Path(__file__).with_name("cuda_runtime.cpp")
BINDINGS = nvcc.CSRC / "cuda" / "bindings.cpp"
MODULE = "_cuda_launches"
Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class CudaLaunch:
    """name: as the PTX has it. argument(i, n): the n bytes of parameter i, while the launch lasts."""

    name: str
    grid: Sizes
    block: Sizes
    shared: int
    argument: Callable[[int, int], bytes]


Handler = Callable[[CudaLaunch], None]
_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)


class Kernels:
    """`module` has the functions of csrc/cuda/bindings.cpp; their launches go to the handler of `handled_by`."""

    def __init__(self, path: Path) -> None:
        # pybind11 keeps a module by its name, so that one path is loaded once.
        spec = importlib.util.spec_from_file_location(f"{path.parent.name}.{MODULE}", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no extension module")
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._library = ctypes.CDLL(str(path))

    @contextmanager
    def handled_by(self, handler: Handler) -> Iterator[ModuleType]:
        """What `handler` raises makes the launch fail, and is raised again here."""
        raised: list[Exception] = []

        def launcher(name: bytes, grid: Sequence[int], block: Sequence[int], shared: int, pointers: Any) -> int:
            def argument(at: int, size: int) -> bytes:
                return ctypes.string_at(pointers[at], size)

            blocks, threads = ((values[0], values[1], values[2]) for values in (grid, block))
            try:
                handler(CudaLaunch(name.decode(), blocks, threads, shared, argument))
            except Exception as error:
                raised.append(error)
                return 0
            return 1

        callback = _LAUNCHER(launcher)
        self._library.set_launcher(callback)
        try:
            yield self.module
        except RuntimeError as error:
            raise (raised[0] if raised else error) from error
        finally:
            self._library.set_launcher(None)

    @contextmanager
    def with_shared_limit(self, num_bytes: int) -> Iterator[None]:
        """On a device that gives a block so much dynamic shared memory; otherwise it is 227 KiB."""
        limit = ctypes.c_size_t.in_dll(self._library, "shared_limit")
        before, limit.value = limit.value, num_bytes
        try:
            yield
        finally:
            limit.value = before


def record(kernels: Kernels, call: Callable[[ModuleType], object]) -> list[CudaLaunch]:
    """The launches of call(module), none of which runs: addresses may be anything."""
    launches: list[CudaLaunch] = []
    with kernels.handled_by(launches.append) as module:
        call(module)
    return launches


def load(units: Sequence[nvcc.Unit]) -> Kernels:
    """Links the objects of `units` (all files of csrc/cuda) with the bindings; kept in build/nvcc."""
    import pybind11

    made = nvcc.digest(BINDINGS, RUNTIME.read_text(encoding="utf-8"), *(str(unit.object) for unit in units))
    folder = nvcc.KEPT / f"launches-{made}"
    if not folder.is_dir():
        nvcc.forget("launches")
        working = folder.with_name(f"{folder.name}.{os.getpid()}")
        working.mkdir(parents=True)
        includes = [f"-I{nvcc.CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        own = [*includes, "-DPAGELENS_CUDA", f"-DPAGELENS_MODULE={MODULE}"]
        common = [str(nvcc.find()), "-std=c++17", "-O0", nvcc.HOST]
        compiled = {source: working / f"{source.stem}.o" for source in (BINDINGS, RUNTIME)}
        run = functools.partial(subprocess.run, check=True)
        nvcc.side_by_side(run, [[*common, *own, "-c", str(s), "-o", str(o)] for s, o in compiled.items()])
        objects = [*compiled.values(), *(unit.object for unit in units)]
        run([*common, "-shared", "-cudart", "none", *map(str, objects), "-o", str(working / f"{MODULE}.so")])
        working.rename(folder)
    return Kernels(folder / f"{MODULE}.so")
