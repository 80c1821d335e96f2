"""Wheel and sdist: what is in them, how large they are, and that a wheel works outside the clone."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_WHEEL_BYTES = 25_000_000


def source_copy(folder: Path) -> Path:
    """The sources, with the compiled objects (so that only changes are compiled), in a folder of their own."""
    copy = folder / "source"
    leave = (
        ".git",
        ".venv*",
        "peers-cache",
        "*.so",
        "__pycache__",
        "*.egg-info",
        "lib",
        "lib.*",
        "bdist.*",
        "dist",
        ".*_cache",
    )
    ignored = shutil.ignore_patterns(*leave)
    shutil.copytree(ROOT, copy, ignore=ignored, ignore_dangling_symlinks=True)
    return copy


def build(source: Path, target: Path, kind: str) -> Path:
    """Run the build backend as pip does, without downloading anything."""
    code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(target)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return target / result.stdout.split()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packaging")
    source = source_copy(folder)
    return {"source": source, **{kind: build(source, folder, kind) for kind in ("sdist", "wheel")}}


def test_the_wheel_has_the_packages_and_nothing_else(built: dict[str, Path]) -> None:
    source = built["source"]
    assert built["wheel"].stat().st_size <= MAX_WHEEL_BYTES
    names = set(zipfile.ZipFile(built["wheel"]).namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"pagelens"}
    assert any(name.startswith("pagelens/_native.") and name.endswith((".so", ".pyd")) for name in names)
    assert {"pagelens/__init__.py", "pagelens/kernels/__init__.py", "pagelens/py.typed"} <= names
    for folder, package in (("engine", "pagelens"), ("kernels", "pagelens/kernels")):
        for path in (source / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(source / folder).as_posix()}" in names, path
    for path in (source / "kernels" / "configs").glob("*.json"):
        assert f"pagelens/kernels/configs/{path.name}" in names, path
    for path in (source / "engine" / "assets").rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            assert f"pagelens/{path.relative_to(source / 'engine').as_posix()}" in names, path
    assert not [name for name in names if "__pycache__" in name or "csrc" in name or name.endswith(".o")]


def test_the_wheel_has_the_version_and_the_command(built: dict[str, Path]) -> None:
    archive = zipfile.ZipFile(built["wheel"])
    names = [name for name in archive.namelist() if ".dist-info/" in name]
    metadata = {Path(name).name: archive.read(name).decode(errors="replace") for name in names}
    assert "pagelens = pagelens.cli:main" in metadata["entry_points.txt"]
    assert "\nVersion: " + declared_version() + "\n" in metadata["METADATA"]
    assert "Root-Is-Purelib: false" in metadata["WHEEL"]


def declared_version() -> str:
    for node in ast.parse((ROOT / "engine" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return str(ast.literal_eval(node.value))
    raise LookupError("no __version__ in engine/__init__.py")


def test_the_wheel_runs_outside_the_clone(built: dict[str, Path], tmp_path: Path) -> None:
    """Unpacked into an empty folder it is imported from there, kernels included."""
    zipfile.ZipFile(built["wheel"]).extractall(tmp_path)
    code = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", type(f).__module__)]
sys.path.insert(0, {str(tmp_path)!r})
import pagelens, pagelens._native as native, pagelens.kernels
assert pagelens.__file__.startswith({str(tmp_path)!r}), pagelens.__file__
assert native.__file__.startswith({str(tmp_path)!r}), native.__file__
import torch
from pagelens.ops.native import NativeOps
print(float(NativeOps(1).rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).sum()), *native.compiled_isas())
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    from pagelens import _native

    assert result.stdout.split() == ["4.0", *_native.compiled_isas()]


def test_the_sdist_can_build_itself(built: dict[str, Path]) -> None:
    """Everything the build and the tests read is in it."""
    source = built["source"]
    with tarfile.open(built["sdist"]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for path in (*(source / "csrc").rglob("*"), *(source / "tests").rglob("*.py"), *(source / "engine").rglob("*.py")):
        if path.suffix in (".cpp", ".h", ".py", ".cu"):
            assert path.relative_to(source).as_posix() in names, path
    for name in ("setup.py", "pyproject.toml", "LICENSE", "engine/py.typed", "engine/_native.pyi"):
        assert name in names, name
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


@pytest.fixture(scope="module")
def portable_only(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source folder and the library built from it with no instruction set but `portable`."""
    folder = tmp_path_factory.mktemp("portable")
    source = source_copy(folder)
    compile_portable(source, folder / "lib")
    return source, folder / "lib"


def compile_portable(source: Path, target: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(target)]
    env = {**os.environ, "PAGELENS_BUILD_ISAS": "portable"}
    result = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def test_only_what_changed_is_compiled_again(portable_only: tuple[Path, Path]) -> None:
    source, target = portable_only

    def times() -> dict[str, float]:
        return {path.stem: path.stat().st_mtime for path in (source / "build").glob("native-*/[cp]o*/*.o")}

    first = times()
    assert {"bindings", "rms_norm", "linear", "swiglu_ffn"} <= set(first)
    compile_portable(source, target)
    assert times() == first, "nothing changed"
    (source / "csrc" / "cpu" / "swiglu.h").touch()
    compile_portable(source, target)
    assert {name for name, time in times().items() if time != first[name]} == {"swiglu_ffn", "grouped_gemm"}


def test_a_set_that_was_not_compiled_in_is_refused_by_name(portable_only: tuple[Path, Path]) -> None:
    code = f"""
import importlib.util, pathlib
path = next(pathlib.Path({str(portable_only[1])!r}, "pagelens").glob("_native.*"))
spec = importlib.util.spec_from_file_location("_native", path)
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print(native.compiled_isas())
native.isa()
"""
    env = {**os.environ, "PAGELENS_CPU_ISA": "avx2"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["['portable']"]
    assert result.returncode == 1
    assert "PAGELENS_CPU_ISA=avx2 was not compiled into this build, which has portable" in result.stderr
