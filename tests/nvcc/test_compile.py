"""The CUDA kernels as nvcc compiles them for sm_80, sm_89, sm_90 and sm_100: no spill, no local memory, tensor cores in
their hot loops, and docs/gpu-resources.md says so.

Without nvcc these tests say what they want. cuobjdump comes with the triton package or a CUDA toolkit.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
from gpu_static import cuda_kernels, nvcc, table
from gpu_static.assembly import Resources
from gpu_static.cuda_launch import CudaLaunch, Kernels, record
from gpu_static.nvcc import Unit

WRITTEN = nvcc.ROOT / "docs" / "gpu-resources.md"
# Least share of tensor-core instructions in the hot loop on sm_80, in per cent. bf16 grouped_gemm in tiles of 64 rows
# must have 20; the others are what was reached, and must not fall.
LEAST_SHARE = {
    "grouped_gemm: gate_up<64, bf16>": 20.0,
    "grouped_gemm: down<64, bf16>": 20.0,
    "grouped_gemm: gate_up<16, bf16>": 11.0,
    "grouped_gemm: down<16, bf16>": 11.0,
    "grouped_gemm: gate_up<64, int8>": 8.0,
    "grouped_gemm: down<64, int8>": 8.0,
    "grouped_gemm: gate_up<16, int8>": 4.0,
    "grouped_gemm: down<16, int8>": 4.0,
    "grouped_gemm: gate_up<64, int4>": 6.0,
    "grouped_gemm: down<64, int4>": 6.0,
    "grouped_gemm: gate_up<16, int4>": 3.3,
    "grouped_gemm: down<16, int4>": 3.3,
    "conv_downsample: conv<float>": 16.0,
    "conv_downsample: conv<bf16>": 16.0,
    "window_attention: attend<16>": 1.3,
    "window_attention: attend<32>": 2.5,
    "window_attention: attend<64>": 4.4,
    "window_attention: attend<80>": 5.1,
    "paged_attention: attend<16>": 2.0,
    "paged_attention: attend<32>": 3.4,
    "paged_attention: attend<64>": 4.3,
    "paged_attention: attend<96>": 5.1,
    "paged_attention: attend<128>": 5.3,
}


@pytest.fixture(scope="module")
def code(units: list[Unit]) -> dict[str, dict[str, Resources]]:
    """Target -> kernel -> what its machine code says."""
    found = cuda_kernels.all_code(units)
    names = cuda_kernels.readable(list(found["sm_80"]))
    return {target: {names[name]: r for name, r in kernels.items()} for target, kernels in found.items()}


def test_every_file_and_target(units: list[Unit], code: dict[str, dict[str, Resources]]) -> None:
    assert {unit.source.name for unit in units} == {path.name for path in Path(nvcc.CSRC, "cuda").glob("*.cu")}
    assert set(code) == {"sm_80", "sm_89", "sm_90", "sm_100"}
    with_kernels = {name.partition(":")[0] for name in code["sm_80"]}
    assert with_kernels == {unit.source.stem for unit in units} - {"devices"}


def test_nothing_touches_local_memory(code: dict[str, dict[str, Resources]]) -> None:
    for target, kernels in code.items():
        assert {name: (r.stack, r.spills) for name, r in kernels.items() if r.stack or r.spills} == {}, target


@pytest.mark.usefixtures("units")
def test_local_memory_and_spills_are_refused(tmp_path: Path) -> None:
    """An array with an index known at run time only, and a sum of more values than there are registers."""
    head = "__global__ void __launch_bounds__(1024) k(float* x, int n) {"
    local = "float a[40] = {}; for (int i = 0; i < n; i++) a[i * n % 40] += x[i];\n"
    local += "for (int i = 0; i < 40; i++) x[i] = a[i]; }"
    many = "float a[96];\n#pragma unroll\nfor (int i = 0; i < 96; i++) a[i] = x[i];\n__syncthreads();\n"
    many += "#pragma unroll\nfor (int i = 0; i < 96; i++) x[i * n] = a[i]; }"
    for name, body in (("local", local), ("spill", many)):
        source = tmp_path / f"refused_{name}.cu"
        source.write_text(f"{head}{body}")
        with pytest.raises(nvcc.NvccError, match=r"local memory|stack frame|spill|Local memory"):
            nvcc.compile_unit(source)


def test_hot_loops_on_sm_80(code: dict[str, dict[str, Resources]]) -> None:
    matrix = {name: r for name, r in code["sm_80"].items() if r.tensor}
    assert set(matrix) == set(LEAST_SHARE)
    fallen = {
        name: f"{100 * r.tensor_share:.1f} % of {r.loop_length}, less than {LEAST_SHARE[name]} %"
        for name, r in matrix.items()
        if 100 * r.tensor_share < LEAST_SHARE[name]
    }
    assert fallen == {}


def test_matrix_kernels_copy_16_bytes_at_once(code: dict[str, dict[str, Resources]]) -> None:
    for target, kernels in code.items():
        assert [n for n, r in kernels.items() if r.tensor and not 0 < r.copies == r.wide_copies] == [], target


@pytest.fixture(scope="module")
def rows(units: list[Unit], launches: Kernels) -> list[table.Row]:
    return table.collect_cuda(units, launches)


def test_the_table_is_up_to_date(rows: list[table.Row]) -> None:
    written = table.split(WRITTEN.read_text(encoding="utf-8"))[1]
    if f"By nvcc {nvcc.version()}," not in written:
        pytest.skip(f"docs/gpu-resources.md is of another nvcc than {nvcc.version()}; the other tests hold for any")
    assert table.render_cuda(rows) == written, "run: python tools/gpu_resources.py --write"


def test_every_launch_fits_its_device(rows: list[table.Row]) -> None:
    assert table.problems(rows) == []


def test_launch_errors_become_exceptions(launches: Kernels) -> None:
    with pytest.raises(RuntimeError, match="launching a kernel: cudaErrorLaunchFailure"):
        launches.module.moe_routing(0, 5, 128, 8, True, 1.0, 0, 0, 0, 0, 0)  # with nobody to run it

    def fail(launch: CudaLaunch) -> None:
        raise ArithmeticError(launch.name)

    with pytest.raises(ArithmeticError, match="route"), launches.handled_by(fail) as module:
        module.moe_routing(0, 5, 128, 8, True, 1.0, 0, 0, 0, 0, 0)
    assert launches.module.devices()[0] == 0


def test_shared_memory_that_a_device_has_not(launches: Kernels) -> None:
    """Windows of 128 with heads of 80 fit an A100, and not where a block gets 99 KiB (sm_86, sm_89, sm_120)."""

    def call(module: ModuleType) -> None:
        sizes = {"views": 1, "grid": 128, "size": 128, "across": 1, "heads": 1, "head_dim": 80}
        module.window_attention(0, 0, 0, 0, 0, 0, **sizes, scale=0.1, out=0, stream=0)

    assert [job.shared for job in record(launches, call)] == [108544]
    refused = "asking for 108544 bytes of shared memory: cudaErrorInvalidValue"
    with launches.with_shared_limit(99 << 10), pytest.raises(RuntimeError, match=refused):
        record(launches, call)
    with launches.with_shared_limit(99 << 10):
        record(launches, cuda_kernels.window_attention(0).call)


def test_no_launch_is_taller_than_a_grid_may_be(launches: Kernels) -> None:
    """A prompt of 2^18 tokens has 2^18 tiles of 16 rows where 16 heads share their keys."""

    def call(module: ModuleType) -> None:
        sizes = {"heads": 16, "kv_heads": 1, "head_dim": 128, "block_size": 16, "table_width": 1 << 14, "scale": 1.0}
        places = dict.fromkeys(("q", "keys", "values", "block_tables", "query_starts", "context_lens", "out"), 0)
        lengths = {"sequences": 1, "tokens": 1 << 18, "longest_context": 256}
        module.paged_attention(module.PagedAttentionArgs(**places, **sizes, **lengths), 0, 0)

    heights = [job.grid[1] for job in record(launches, call)]
    assert sum(heights) == (1 << 18) + 1
    assert max(heights) == 65535


@pytest.mark.usefixtures("units")
def test_what_compiled_is_kept(units: list[Unit]) -> None:
    before = [os.stat(unit.ptx).st_mtime_ns for unit in units]
    assert nvcc.compile_all() == units
    assert [os.stat(unit.ptx).st_mtime_ns for unit in units] == before
