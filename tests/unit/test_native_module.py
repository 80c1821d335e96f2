"""The extension itself: which instruction sets it has, how one is forced, and what stays outside it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pagelens import _native

ROOT = Path(__file__).resolve().parents[2]
ALL = ["portable", "avx2", "avx512", "avx512_bf16"]


def run(code: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PAGELENS_CPU_ISA"}
    if isa is not None:
        env["PAGELENS_CPU_ISA"] = isa
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)


def test_lists_are_in_order_and_portable_is_always_there() -> None:
    compiled, supported = _native.compiled_isas(), _native.supported_isas()
    assert compiled == [name for name in ALL if name in compiled]
    assert supported == [name for name in compiled if name in supported]
    assert supported[0] == "portable"
    if platform.machine() != "x86_64":
        assert compiled == ["portable"]


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="compares with /proc/cpuinfo")
def test_supported_sets_agree_with_the_operating_system() -> None:
    flags = set(re.findall(r"\w+", next(iter(re.findall(r"^flags.*", Path("/proc/cpuinfo").read_text(), re.M)), "")))
    needed = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma"},
        "avx512_bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"},
    }
    for name in set(_native.compiled_isas()) - {"portable"}:
        assert (name in _native.supported_isas()) == (needed[name] <= flags), name


def test_the_newest_supported_set_is_chosen() -> None:
    result = run("from pagelens import _native; print(_native.isa())", None)
    assert result.stdout.split() == [_native.supported_isas()[-1]]


@pytest.mark.parametrize("name", _native.supported_isas())
def test_the_environment_forces_a_set(name: str) -> None:
    assert run("from pagelens import _native; print(_native.isa())", name).stdout.split() == [name]


def test_an_unknown_set_is_an_error_that_names_the_choices() -> None:
    result = run("from pagelens import _native; _native.isa()", "sse9")
    assert result.returncode == 1
    assert (
        "PAGELENS_CPU_ISA=sse9 is not an instruction set; known: portable, avx2, avx512, avx512_bf16" in result.stderr
    )


def test_a_set_that_is_missing_is_an_error_that_says_which_way() -> None:
    """Not in this build, and not on this CPU, are two errors; the machine at hand may be able to show neither."""
    for name in ALL:
        if name not in _native.compiled_isas():
            with pytest.raises(ValueError, match=f"isa={name} was not compiled into this build, which has portable"):
                _native.set_isa(name)
        elif name not in _native.supported_isas():
            with pytest.raises(ValueError, match=f"isa={name} is not supported by this CPU, which can run portable"):
                _native.set_isa(name)
    with pytest.raises(ValueError, match="isa=AVX2 is not an instruction set"):
        _native.set_isa("AVX2")


def test_importing_does_not_read_the_environment() -> None:
    """A wrong PAGELENS_CPU_ISA must not break `import pagelens`, only the first kernel."""
    assert run("import pagelens, pagelens._native; print('ok')", "sse9").stdout.split() == ["ok"]


def test_a_wrong_choice_is_not_answered_by_another_backend() -> None:
    result = run("from pagelens.ops.registry import resolve_ops; resolve_ops('auto')", "sse9")
    assert result.returncode == 1
    assert "UnsupportedError: PAGELENS_CPU_ISA=sse9 is not an instruction set" in result.stderr
    result = run("from pagelens.ops.registry import resolve_ops; print(resolve_ops('reference').name)", "sse9")
    assert result.stdout.split() == ["reference"], result.stderr


def test_no_torch_header_and_no_native_march() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h")]
    assert len(sources) > 20
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", text), path
        if path.parent.name in ("cpu", "common"):
            assert "pybind11" not in text, f"{path}: only csrc/bindings*.cpp know Python"
    flags = [line for line in (ROOT / "setup.py").read_text().splitlines() if "march=" in line]
    assert all(line.strip().startswith("#") for line in flags), flags


def test_kernel_sources_keep_to_their_namespace() -> None:
    """A function outside namespace PAGELENS_ISA would exist once per instruction set, and the linker would pick one."""
    for path in (ROOT / "csrc" / "cpu").glob("*.cpp"):
        assert "namespace pagelens::PAGELENS_ISA {" in path.read_text(encoding="utf-8"), path


def test_resize_checks_its_arguments() -> None:
    image = np.zeros((4, 5, 3), np.uint8)
    assert _native.resize_rgb_u8(image, 2, 3).shape == (2, 3, 3)
    for bad, h, w in ((image[:, :, :2], 2, 2), (np.zeros((4, 5), np.uint8), 2, 2), (image, 0, 2), (image, 2, -1)):
        with pytest.raises((ValueError, TypeError)):
            _native.resize_rgb_u8(bad, h, w)
    with pytest.raises(ValueError, match="between 1 and 65535"):
        _native.resize_rgb_u8(image, 70000, 2)
    with pytest.raises(ValueError, match="at least one pixel"):
        _native.resize_rgb_u8(np.zeros((0, 5, 3), np.uint8), 2, 2)
    with pytest.raises(TypeError):
        _native.resize_rgb_u8(image.astype(np.float32), 2, 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _native.resize_rgb_u8(image[:, ::2], 2, 2)  # not contiguous: refused, not copied in silence
