"""Build of pagelens. The folders engine/ and kernels/ are the packages `pagelens` and `pagelens.kernels`.

One pybind11 extension, `pagelens._native`, is built from csrc/, and on demand `pagelens._cuda` (cuda_modules); no torch
header is included. Each kernel source in csrc/cpu is compiled once per instruction set (the flags are below) and chosen
at run time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# Relative to the source folder, where build front ends start this file: setuptools wants it so, and a copy of the
# folder, objects included, need not be compiled again.
CSRC = Path("csrc")
OBJECTS = Path("build") / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

# Never -march=native: what is built here also runs elsewhere. -ffp-contract=off keeps a*b+c at two roundings wherever
# the source does not ask for a fused one, so that a result does not depend on the optimiser's mood.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "avx512_bf16": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-mavx512bf16",
        "-mavx512vnni",
    ],
}


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def accepts(flags: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int probe() { return 0; }\n")
        command = [*compiler(), *flags, "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def instruction_sets() -> dict[str, list[str]]:
    """Instruction set -> extra flags; `portable` first. A set that the compiler does not know is left out.

    PAGELENS_BUILD_ISAS=avx2,avx512 builds only these, besides `portable`.
    """
    wanted = os.environ.get("PAGELENS_BUILD_ISAS", ",".join(X86_FLAGS)).split(",")
    unknown = sorted(set(wanted) - set(X86_FLAGS) - {"portable", ""})
    if unknown:
        raise SystemExit(f"PAGELENS_BUILD_ISAS names {unknown[0]!r}; known: portable, {', '.join(X86_FLAGS)}")
    sets: dict[str, list[str]] = {"portable": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        for name, flags in X86_FLAGS.items():
            if name not in wanted:
                continue
            if accepts(flags):
                sets[name] = flags
            else:
                print(f"setup.py: {compiler()[0]} does not accept {' '.join(flags)}; leaving out {name}")
    return sets


def free_order_sets(sets: dict[str, list[str]]) -> list[str]:
    """PAGELENS_FREE_ORDER=avx2,avx512 adds these sets a second time, as `<name>_free`: with sums in free order, for
    benchmarks/bench_invariance.py. They are no instruction sets to choose from; only `set_isa` knows them."""
    wanted = [name for name in os.environ.get("PAGELENS_FREE_ORDER", "").split(",") if name]
    for name in wanted:
        if name not in sets:
            raise SystemExit(f"PAGELENS_FREE_ORDER names {name!r}, which is not built; built are {', '.join(sets)}")
    return wanted


# sm_100 and sm_120 need CUDA 12.8 or newer. The PTX is that of the oldest: PTX serves its own target and newer ones
# only, and the kernels use nothing newer. So it serves what comes later and what lies between (sm_110).
CUDA_TARGETS = ("80", "86", "89", "90", "100", "120")
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def cuda_modules() -> list[str]:
    """What PAGELENS_CUDA adds: 1 is pagelens._cuda, which needs nvcc on the PATH (or NVCC), and no GPU; sim is
    pagelens._cuda_sim, the same kernels for the CPU by the C++ compiler, for tests."""
    wanted = os.environ.get("PAGELENS_CUDA", "") or "0"
    known = {"0": [], "1": ["_cuda"], "sim": ["_cuda_sim"]}
    if wanted not in known:
        raise SystemExit(f"PAGELENS_CUDA={wanted!r} is not one of {', '.join(known)}")
    return known[wanted]


def nvcc() -> str:
    found = os.environ.get("NVCC") or shutil.which("nvcc")
    if not found:
        raise SystemExit("setup.py: PAGELENS_CUDA=1 needs nvcc (CUDA 12.8 or newer) on the PATH, or NVCC=/path/to/nvcc")
    return found


class BuildNative(build_ext):
    """Compiles in parallel, and only what changed: an object is kept if its command and all files it read are older."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "pagelens._cuda":
            self.build_cuda(ext)
        elif ext.name == "pagelens._cuda_sim":
            self.build_cuda_sim(ext)
        else:
            self.build_cpu(ext)

    def build_cuda(self, ext: Extension) -> None:
        """Kernels by nvcc, bindings by the C++ compiler (nvcc would read pybind11 once a target), cudart static."""
        import pybind11

        include = ["-I", pybind11.get_include(), "-I", sysconfig.get_paths()["include"]]
        defines = ["-DPAGELENS_CUDA", "-DPAGELENS_MODULE=_cuda"]
        folder = OBJECTS / "cuda"
        jobs = [self.job(CSRC / "cuda/bindings.cpp", folder, [*CXX_FLAGS, "-I", str(CSRC), *include, *defines])]
        targets = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in CUDA_TARGETS]
        targets.append(f"-gencode=arch=compute_{CUDA_TARGETS[0]},code=compute_{CUDA_TARGETS[0]}")
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            obj = folder / f"{source.stem}.cu.o"
            depend = ["-MMD", "-MF", str(obj.with_suffix(".d"))]
            jobs.append(
                ([nvcc(), *NVCC_FLAGS, "-I", str(CSRC), *targets, *depend, "-c", str(source), "-o", str(obj)], obj)
            )
        self.compile_all(jobs)
        target = self.target(ext)
        self.run_link([nvcc(), "-shared", "-cudart", "static", *(str(obj) for _, obj in jobs), "-o", str(target)])

    def build_cuda_sim(self, ext: Extension) -> None:
        """Kernels and the runtime of csrc/simt, by the C++ compiler."""
        import pybind11

        include = ["-I", str(CSRC), "-I", pybind11.get_include(), "-I", sysconfig.get_paths()["include"]]
        flags = [*CXX_FLAGS, "-Wno-unknown-pragmas", *include, "-DPAGELENS_MODULE=_cuda_sim", "-x", "c++"]
        sources = [path for part in ("cuda", "simt") for path in sorted((CSRC / part).glob("*.c*"))]
        jobs = [self.job(source, OBJECTS / "cuda_sim", flags) for source in sources]
        self.compile_all(jobs)
        objects = [str(obj) for _, obj in jobs]
        self.run_link([*compiler(), "-shared", *objects, "-ldl", "-o", str(self.target(ext))])

    def build_cpu(self, ext: Extension) -> None:
        import pybind11

        sets = instruction_sets()
        free = free_order_sets(sets)
        include = ["-I", str(CSRC), "-I", pybind11.get_include(), "-I", sysconfig.get_paths()["include"]]
        have = [f"-DPAGELENS_HAS_{name.upper()}" for name in [*sets, *(f"{name}_free" for name in free)]]
        jobs: list[tuple[list[str], Path]] = []
        for source in [*sorted(CSRC.glob("*.cpp")), *sorted((CSRC / "common").glob("*.cpp"))]:
            chosen = have if source.stem == "cpu_features" else []
            folder = OBJECTS / ("common_free" if free and chosen else "common")  # each keeps its own object
            jobs.append(self.job(source, folder, [*CXX_FLAGS, *include, *chosen]))
        variants = [(name, name, []) for name in sets]
        variants += [(name, f"{name}_free", ["-DPAGELENS_FREE_ORDER"]) for name in free]
        for name, namespace, defines in variants:
            own = [*CXX_FLAGS, "-I", str(CSRC), f"-DPAGELENS_ISA={namespace}", f"-DPAGELENS_ISA_{name.upper()}"]
            for source in sorted((CSRC / "cpu").glob("*.cpp")):
                jobs.append(self.job(source, OBJECTS / namespace, [*own, *defines, *sets[name]]))
        self.compile_all(jobs)
        self.link(ext, [str(obj) for _, obj in jobs])

    def compile_all(self, jobs: list[tuple[list[str], Path]]) -> None:
        with ThreadPoolExecutor(self.parallel or os.cpu_count() or 1) as pool:
            for _ in pool.map(lambda job: self.compile(*job), jobs):
                pass

    @staticmethod
    def job(source: Path, folder: Path, flags: list[str]) -> tuple[list[str], Path]:
        obj = folder / f"{source.stem}.o"
        command = [*compiler(), *flags, "-MMD", "-MF", str(obj.with_suffix(".d")), "-c", str(source), "-o", str(obj)]
        return command, obj

    def compile(self, command: list[str], obj: Path) -> None:
        key = hashlib.sha256(" ".join(command).encode()).hexdigest()
        stamp = obj.with_suffix(".key")
        if not self.force and self.is_fresh(obj, stamp, key):
            return
        obj.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        result = subprocess.run(command, capture_output=True, text=True)
        if result.stderr:
            print(result.stderr, file=sys.stderr)
        if result.returncode != 0:
            raise SystemExit(f"compiling {obj.stem} failed:\n{' '.join(command)}")
        stamp.write_text(key)

    @staticmethod
    def is_fresh(obj: Path, stamp: Path, key: str) -> bool:
        if not (obj.exists() and stamp.exists() and stamp.read_text() == key):
            return False
        read = obj.with_suffix(".d").read_text().replace("\\\n", " ").split(":", 1)[1].split()
        built = obj.stat().st_mtime
        return all(Path(name).exists() and Path(name).stat().st_mtime < built for name in read)

    def link(self, ext: Extension, objects: list[str]) -> None:
        """Objects for every CPU come first: of an inline function that several objects hold, linkers keep the first,
        and that one must run on the oldest CPU."""
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        self.run_link([*compiler(), *shared, "-pthread", *objects, "-o", str(self.target(ext))])

    def target(self, ext: Extension) -> Path:
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @staticmethod
    def run_link(command: list[str]) -> None:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(f"linking failed:\n{result.stderr}")


PACKAGES = [
    "pagelens",
    *(f"pagelens.{name}" for name in find_packages("engine")),
    "pagelens.kernels",
    *(f"pagelens.kernels.{name}" for name in find_packages("kernels")),
]

setup(
    package_dir={"pagelens": "engine", "pagelens.kernels": "kernels"},
    packages=PACKAGES,
    package_data={"pagelens": ["py.typed", "*.pyi", "assets/**/*"], "pagelens.kernels": ["configs/*.json"]},
    exclude_package_data={"pagelens": ["*.so"]},
    ext_modules=[
        Extension("pagelens._native", [str(path) for path in sorted(CSRC.glob("**/*.cpp"))]),
        *(
            Extension(f"pagelens.{name}", [str(path) for path in sorted(CSRC.glob("cuda/*"))])
            for name in cuda_modules()
        ),
    ],
    cmdclass={"build_ext": BuildNative},
)
