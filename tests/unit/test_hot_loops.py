"""The compiled kernels keep their accumulators in registers: no innermost loop of a leaf moves a vector from or to the
stack, under any instruction set. A spill costs a leaf half of its speed and changes no result, so nothing else sees it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from helpers.disassembly import Function, functions_of, leaves_of

from pagelens import _native

ROOT = Path(__file__).resolve().parents[2]
KERNEL = re.compile(
    r"pagelens::(avx2|avx512|avx512_bf16)::(?:\(anonymous namespace\)::)?(?:\w+(?:<[^(]*>)?::)*(\w+)[<(]"
)
SOFTMAX = {"raise_top", "soften"}  # leaves without a product; each number is read once there
# Vectors that GCC 12 puts on the stack in all hot loops of a leaf together. None may be added. Where a leaf got better
# or is gone, its line must go too.
KNOWN = {
    # int4, two rows: sums in 16 registers beside the totals, the unpacked bytes and the halves of the inputs.
    ("avx2", "int8_panel"): 8,
    ("avx512", "int8_panel"): 2,  # int4, four rows
    # Weights of foreign formats in bfloat16; one row, and four.
    ("avx512_bf16", "few_rows_panel"): 24,
}

needs_objdump = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 instructions"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)"),
]


@pytest.fixture(scope="module")
def leaves() -> dict[tuple[str, str], list[Function]]:
    """(instruction set, name) -> the instances of each leaf in the extension."""
    names = leaves_of(ROOT / "csrc" / "cpu")
    found = defaultdict(list)
    for function in functions_of(Path(_native.__file__)):
        kernel = KERNEL.search(function.name)
        if kernel and kernel.group(2) in names:
            found[kernel.group(1), kernel.group(2)].append(function)
    return found


class TestHotLoops:
    pytestmark = needs_objdump

    def test_every_leaf_is_found(self, leaves: dict[tuple[str, str], list[Function]]) -> None:
        names = leaves_of(ROOT / "csrc" / "cpu")
        assert names >= {"tile_f32", "tile_bf16", "int8_panel", "product"}, "GEMM, int8 and attention tiles"
        assert names == {name for _, name in leaves}, "a leaf without instructions of its own was inlined or is unused"
        for isa in set(_native.compiled_isas()) - {"portable"}:
            for name in ("tile_f32", "tile_bf16", "int8_panel", "product"):
                assert len(leaves[isa, name]) > 1
                assert all(function.hot_loops() for function in leaves[isa, name]), (isa, name)

    def test_accumulators_stay_in_registers(self, leaves: dict[tuple[str, str], list[Function]]) -> None:
        spilled = {
            leaf: [line for function in functions for line in function.spills()]
            for leaf, functions in leaves.items()
            if leaf[1] not in SOFTMAX
        }
        found = {leaf: len(lines) for leaf, lines in spilled.items() if lines}
        worse = [line for leaf, lines in spilled.items() if len(lines) > KNOWN.get(leaf, 0) for line in lines[:3]]
        assert not worse, "\n".join(worse)
        assert found == KNOWN, "fewer vectors on the stack than KNOWN says: lower it"


PRODUCT = """
typedef float v8 __attribute__((vector_size(32)));
template <int R>
__attribute__((noinline)) void leaf(const float* a, const float* b, long n, float* out) {
  v8 c[R];
  _Pragma("GCC unroll 32") for (int r = 0; r < R; r++) c[r] = v8{};
  for (long i = 0; i < n; i++, a += R, b += 8) {
    v8 x;
    __builtin_memcpy(&x, b, sizeof x);
    _Pragma("GCC unroll 32") for (int r = 0; r < R; r++) {
      const v8 y = a[r] - (v8){};
      asm("vfmadd231ps %2, %1, %0" : "+x"(c[r]) : "x"(y), "x"(x));
    }
  }
  _Pragma("GCC unroll 32") for (int r = 0; r < R; r++) __builtin_memcpy(out + 8 * r, &c[r], sizeof c[r]);
}
template void leaf<ROWS>(const float*, const float*, long, float*);
"""


@pytest.mark.parametrize(("rows", "spills"), [(12, False), (20, True)])
@needs_objdump[0]
@needs_objdump[1]
def test_a_spill_is_seen(tmp_path: Path, rows: int, spills: bool) -> None:
    """16 registers hold 12 accumulators and their operands, and cannot hold 20."""
    source, compiled = tmp_path / "leaf.cpp", tmp_path / "leaf.o"
    source.write_text(PRODUCT.replace("ROWS", str(rows)))
    compiler = os.environ.get("CXX", "c++")
    flags = ["-O3", "-mavx2", "-mfma", "-Wno-psabi"]
    subprocess.run([compiler, *flags, "-c", str(source), "-o", str(compiled)], check=True, timeout=60)
    [function] = [f for f in functions_of(compiled) if "leaf" in f.name]
    assert function.hot_loops()
    assert bool(function.spills()) == spills, function.spills()
