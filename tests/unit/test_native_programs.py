"""The cheap part of `make sanitize` and of `make test-aarch64`: the C++ test programs of csrc/tests."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MISSING = 3  # of tools/native_tests.py: a tool is not installed


def run(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "tools" / "native_tests.py"), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    if result.returncode == MISSING:
        pytest.skip(result.stdout.strip().splitlines()[-1])
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout


def test_the_thread_pool_under_thread_sanitizer() -> None:
    assert "pool: " in run("--sanitize", "thread", "--programs", "pool")


def test_kernels_under_address_and_undefined_behaviour_sanitizers() -> None:
    out = run("--sanitize", "address", "--isas", "portable", "--programs", "rows,convolutions")
    assert "convolutions: " in out
    assert "0 failed" in out


def test_kernels_on_aarch64() -> None:
    assert "rows: " in run("--target", "aarch64", "--programs", "pool,rows,convolutions")


def broken(folder: Path, code: str, flags: list[str]) -> subprocess.CompletedProcess[str]:
    """A program with the pool and one mistake, built and run as the tool does it."""
    source = folder / "broken.cpp"
    source.write_text('#include "tests/check.h"\nusing namespace pagelens;\nusing namespace pagelens::tests;\n' + code)
    pool = str(ROOT / "csrc" / "common" / "thread_pool.cpp")
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++17", "-O1", "-pthread", *flags, "-I", str(ROOT / "csrc"), str(source), pool]
    built = subprocess.run([*command, "-o", str(folder / "broken")], capture_output=True, text=True)
    if built.returncode != 0 and "cannot find" in built.stderr:
        pytest.skip(f"{compiler} has no {' '.join(flags)} here")
    assert built.returncode == 0, built.stderr[-2000:]
    return subprocess.run([str(folder / "broken")], capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="sanitizers are tried on x86-64")
@pytest.mark.parametrize(
    ("flag", "code", "message"),
    [
        (
            "-fsanitize=address",
            "int main() { Matrix m(3, 5, DType::bf16, 2); volatile uint16_t* p = static_cast<uint16_t*>(m.data());"
            " return p[2 * 7 + 5]; }",
            "heap-buffer-overflow",
        ),
        (
            "-fsanitize=thread",
            "int main() { ThreadPool pool(2); auto held = pool.lock(); int sum = 0;"
            " for (int i = 0; i < 2000; i++) pool.run(64, [&](int64_t, int) { sum++; }); return sum == 0; }",
            "data race",
        ),
    ],
    ids=["one element too far", "two threads on one number"],
)
def test_a_mistake_is_found(tmp_path: Path, flag: str, code: str, message: str) -> None:
    result = broken(tmp_path, code, [flag])
    assert result.returncode != 0
    assert message in result.stderr
