"""Builds the C++ test programs of csrc/tests with the kernels, under a sanitizer or for aarch64, and runs them.

    python tools/native_tests.py --sanitize address          # AddressSanitizer and UndefinedBehaviorSanitizer
    python tools/native_tests.py --sanitize thread --programs pool
    python tools/native_tests.py --target aarch64            # cross-compiled, run by qemu

Needs only Python and a compiler: no torch, no pybind11. Exit status 1: something failed; 3: a tool is missing, and the
message names it. Objects are kept in build/, and only what changed is compiled again.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PROGRAMS = sorted(path.stem.removeprefix("test_") for path in (CSRC / "tests").glob("test_*.cpp"))
NEED_NO_KERNELS = {"pool"}
MISSING = 3

# -O1 keeps the reports readable. Everything that is found ends the program.
SANITIZERS = {
    "none": ["-O2"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "thread": ["-O1", "-g1", "-fsanitize=thread", "-fno-omit-frame-pointer"],
}
ENVIRONMENT = {
    # Frames of detect_stack_use_after_return lie on 32-byte lines, where GCC expects those of its 64-byte vectors.
    "ASAN_OPTIONS": "detect_stack_use_after_return=0:strict_init_order=1:detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}
CROSS_COMPILERS = ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++-12", "aarch64-linux-gnu-g++-13")
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")


@dataclass(frozen=True)
class Target:
    """How to compile and run: `sets` maps an instruction set to its flags, `portable` first."""

    name: str
    compiler: list[str]
    runner: list[str]
    link: list[str]
    sets: dict[str, list[str]]


def setup_value(name: str) -> object:
    """A literal of setup.py, which cannot be imported: it would build."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ast.literal_eval(node.value)
    raise SystemExit(f"setup.py has no {name}")


def first_of(names: tuple[str, ...], package: str) -> str:
    for name in names:
        if found := shutil.which(name):
            return found
    print(f"native_tests: none of {', '.join(names)} is installed; on Debian: apt-get install {package}")
    raise SystemExit(MISSING)


def choose_target(name: str, isas: str) -> Target:
    if name == "aarch64":
        if platform.machine() == "aarch64":
            return Target("aarch64", shlex.split(os.environ.get("CXX", "c++")), [], [], {"portable": []})
        compiler = first_of(CROSS_COMPILERS, "g++-12-aarch64-linux-gnu")
        return Target(name, [compiler], [first_of(EMULATORS, "qemu-user-static")], ["-static"], {"portable": []})
    flags: dict[str, list[str]] = {"portable": []}
    known = setup_value("X86_FLAGS") if platform.machine().lower() in ("x86_64", "amd64") else {}
    assert isinstance(known, dict)  # noqa: S101
    for isa, extra in known.items():
        if isas == "all" or isa in isas.split(","):
            flags[isa] = extra
    return Target("host", shlex.split(os.environ.get("CXX", "c++")), [], [], flags)


def check_sanitizer(target: Target, sanitize: str) -> None:
    """Ends the program with MISSING where an empty program does not build or run under the sanitizer."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), Path(folder, "probe")
        source.write_text("int main() { return 0; }\n")
        command = [*target.compiler, *SANITIZERS[sanitize], str(source), *target.link, "-o", str(program)]
        for step in (command, [*target.runner, str(program)]):
            result = subprocess.run(step, capture_output=True, text=True)
            if result.returncode != 0:
                why = (result.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"native_tests: {target.compiler[0]} has no working sanitizer {sanitize!r} here: {why}")
                raise SystemExit(MISSING)


def is_fresh(obj: Path, key: str) -> bool:
    stamp, depends = obj.with_suffix(".key"), obj.with_suffix(".d")
    if not (obj.exists() and stamp.exists() and stamp.read_text() == key):
        return False
    read = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    built = obj.stat().st_mtime
    return all(Path(name).exists() and Path(name).stat().st_mtime < built for name in read)


def compile_one(command: list[str], obj: Path) -> None:
    key = hashlib.sha256(" ".join(command).encode()).hexdigest()
    if is_fresh(obj, key):
        return
    obj.parent.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.stderr:
        print(result.stderr, file=sys.stderr)
    if result.returncode != 0:
        raise SystemExit(f"compiling {obj.name} failed: {' '.join(command)}")
    obj.with_suffix(".key").write_text(key)


def build(target: Target, sanitize: str, programs: list[str], jobs: int) -> dict[str, Path]:
    """Program -> executable."""
    folder = ROOT / "build" / f"tests-{target.name}-{sanitize}"
    kept = setup_value("CXX_FLAGS")
    assert isinstance(kept, list)  # noqa: S101
    flags = [flag for flag in kept if not flag.startswith(("-O", "-fvisibility", "-fPIC"))]
    # Code of a sanitizer makes the compiler see uses of what was not set.
    flags += [*SANITIZERS[sanitize], "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    have = [f"-DPAGELENS_HAS_{name.upper()}" for name in target.sets]
    work: list[tuple[list[str], Path]] = []

    def add(source: Path, obj: Path, extra: list[str]) -> Path:
        command = [*target.compiler, *flags, "-I", str(CSRC), *extra, "-MMD", "-c", str(source), "-o", str(obj)]
        work.append((command, obj))
        return obj

    common = [add(source, folder / "common" / f"{source.stem}.o", have) for source in (CSRC / "common").glob("*.cpp")]
    mains = {name: add(CSRC / "tests" / f"test_{name}.cpp", folder / f"{name}.o", []) for name in programs}
    kernels = []
    if set(programs) - NEED_NO_KERNELS:
        for name, own in target.sets.items():
            defines = [f"-DPAGELENS_ISA={name}", f"-DPAGELENS_ISA_{name.upper()}"]
            for source in sorted((CSRC / "cpu").glob("*.cpp")):
                kernels.append(add(source, folder / name / f"{source.stem}.o", [*defines, *own]))
    # The largest first: no core then waits for one that began late.
    work.sort(key=lambda job: -Path(job[0][job[0].index("-c") + 1]).stat().st_size)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda job: compile_one(*job), work))
    executables = {}
    for name, main in mains.items():
        executables[name] = folder / name
        # Objects for every CPU first: of an inline function that several hold, linkers keep the first.
        objects = [main, folder / "common" / "thread_pool.o"] if name in NEED_NO_KERNELS else [main, *common, *kernels]
        command = [*target.compiler, *flags, *target.link, *map(str, objects)]
        subprocess.run([*command, "-o", str(executables[name])], check=True, cwd=ROOT)
    return executables


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sanitize", choices=SANITIZERS, default="none")
    parser.add_argument("--target", choices=("host", "aarch64"), default="host")
    parser.add_argument("--isas", default="all", help="besides portable: avx2,avx512,avx512_bf16 (default: all)")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help=f"of {','.join(PROGRAMS)} (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    programs = args.programs.split(",")
    if unknown := sorted(set(programs) - set(PROGRAMS)):
        parser.error(f"there is no program {unknown[0]!r}; known: {', '.join(PROGRAMS)}")
    target = choose_target(args.target, args.isas)
    check_sanitizer(target, args.sanitize)
    start = time.monotonic()
    executables = build(target, args.sanitize, programs, args.jobs)
    print(f"{target.name}, {args.sanitize}: built in {time.monotonic() - start:.0f} s", flush=True)
    failed = []
    for name, executable in executables.items():
        start = time.monotonic()
        result = subprocess.run([*target.runner, str(executable)], env={**os.environ, **ENVIRONMENT})
        print(f"  {name}: {time.monotonic() - start:.1f} s, exit status {result.returncode}", flush=True)
        if result.returncode != 0:
            failed.append(name)
    if failed:
        print(f"failed under {args.sanitize} for {target.name}: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
