"""The static reports: hot loops, occupancy, the cost model and the choice of configurations, on made-up input."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from gpu_static import assembly, cost, search
from gpu_static.assembly import Resources
from gpu_static.compiled import CompileError
from gpu_static.occupancy import DEVICES, occupancy

from pagelens.kernels.candidates import candidates
from pagelens.kernels.launch import Config, Launch
from pagelens.kernels.workloads import WORKLOADS, Workload


def resources(registers: int = 64, shared: int = 0, warps: int = 4, **more: int) -> Resources:
    counts = {
        "accumulators": 0,
        "stack": 0,
        "instructions": 100,
        "tensor": 8,
        "copies": 4,
        "wide_copies": 4,
        "spills": 0,
    }
    return Resources(registers=registers, shared=shared, warps=warps, **{**counts, **more})


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs", "limiter"),
    [
        ("sm_80", 32, 0, 4, 16, "warps"),
        ("sm_80", 255, 0, 4, 2, "registers"),
        ("sm_80", 80, 16384, 4, 6, "registers"),
        ("sm_80", 64, 98304, 8, 1, "shared"),
        ("sm_90", 186, 98304, 8, 1, "registers"),
        ("sm_90", 64, 98304, 4, 2, "shared"),
        ("sm_89", 32, 110000, 4, 0, "shared"),
        ("gfx942", 128, 16384, 4, 4, "registers"),
        ("gfx942", 64, 65536, 4, 1, "shared"),
    ],
)
def test_occupancy(target: str, registers: int, shared: int, warps: int, programs: int, limiter: str) -> None:
    found = occupancy(target, resources(registers, shared, warps))
    assert (found.programs, found.limiter) == (programs, limiter)
    assert found.share == programs * warps / DEVICES[target].warps


def listing(*lines: str) -> list[tuple[int, str, str, str]]:
    found = assembly.sass("\n".join(lines))
    assert len(found) == len(lines)
    return found


def test_hot_loop_is_the_innermost_with_tensor_instructions() -> None:
    lines = [f"        /*{16 * i:04x}*/                   IMAD.MOV.U32 R1, RZ, RZ, R2 ;" for i in range(20)]
    lines[3] = "        /*0030*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;"
    lines[8] = "        /*0080*/              @P0 BRA 0x20 ;"
    lines[18] = "        /*0120*/              @P1 BRA 0x0 ;"
    assert assembly.hot_loop(listing(*lines)) == {"IMAD": 5, "HMMA": 1, "BRA": 1}
    assert assembly.hot_loop(listing(*lines[:8])) == {}


def test_a_loop_without_tensor_instructions_inside_the_hot_loop() -> None:
    """Copying a tile in a loop of its own does not hide the loop that multiplies."""
    lines = [f"        /*{16 * i:04x}*/                   IADD3 R1, R1, R2, RZ ;" for i in range(20)]
    lines[8] = "        /*0080*/              @P0 BRA 0x20 ;"
    lines[12] = "        /*00c0*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;"
    lines[13] = "        /*00d0*/               @P2 EXIT ;"
    lines[18] = "        /*0120*/              @P1 BRA 0x0 ;"
    lines[19] = "        /*0130*/                   EXIT ;"
    assert assembly.hot_loop(listing(*lines)) == {"IADD3": 15, "HMMA": 1, "EXIT": 1, "BRA": 2}


def test_the_way_back_from_a_detour_is_no_loop() -> None:
    lines = [f"        /*{16 * i:04x}*/                   IADD3 R1, R1, R2, RZ ;" for i in range(20)]
    lines[8] = "        /*0080*/              @P0 BRA 0x20 ;"
    lines[10] = "        /*00a0*/                   EXIT ;"
    lines[18] = "        /*0120*/                   BRA 0x10 ;"
    assert assembly.hot_loop(listing(*lines)) == {"IADD3": 6, "BRA": 1}
    lines[18] = "        /*0120*/              @P0 BRA 0xb0 ;"  # a loop behind the end
    assert assembly.hot_loop(listing(*lines)) == {"IADD3": 7, "BRA": 1}


def test_amd_loop() -> None:
    multiply = "\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]"
    lines = (".LBB0_1:", "\tv_add_u32 v1, v2, v3", multiply, "\ts_cbranch_scc1 .LBB0_1", "\tv_mov_b32 v0, v1")
    text = "\n".join(lines)
    assert assembly.amd_loop(text) == {"v_add_u32": 1, "v_mfma_f32_32x32x8_bf16": 1, "s_cbranch_scc1": 1}


def product(m: int, n: int, k: int) -> Workload:
    return Workload(
        "linear", "a product", lambda device: lambda: None, 2 * (m * k + n * k + m * n), 2 * m * n * k,
        rows=m, row_operand=2 * n * k, cols=n, col_operand=2 * m * k,
    )  # fmt: skip


def launch(m: int, n: int, config: Config) -> Launch:
    grid = (math.ceil(m / config.sizes["BLOCK_M"]) * math.ceil(n / config.sizes["BLOCK_N"]),)
    return Launch(SimpleNamespace(__name__="linear_kernel"), grid, (), config.sizes, config.options)


def test_floor_is_the_larger_of_bytes_and_flops() -> None:
    seconds, bound = cost.floor_seconds("sm_80", product(1, 4096, 4096))
    assert bound == "bytes"
    assert seconds == pytest.approx(2 * (4096**2 + 2 * 4096) / 2039e9)
    seconds, bound = cost.floor_seconds("sm_80", product(4096, 4096, 4096))
    assert bound == "FLOPs"
    assert seconds == pytest.approx(2 * 4096**3 / 312e12)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_no_estimate_is_below_the_floor(target: str) -> None:
    for m in (1, 64, 1024):
        for tile in ((16, 64), (64, 64), (128, 128)):
            config = Config.make(BLOCK_M=tile[0], BLOCK_N=tile[1])
            work = product(m, 3840, 1280)
            found = cost.estimate(target, work, [(launch(m, 3840, config), resources(shared=32768))])
            assert found.total > cost.floor_seconds(target, work)[0]


def test_estimates_move_as_they_should() -> None:
    """High tiles read weights less often, few programs cannot ask for the whole bandwidth, two launches cost more."""
    work, used = product(4096, 4096, 4096), resources(shared=32768)
    small, large = (Config.make(BLOCK_M=b, BLOCK_N=b) for b in (32, 128))
    by_small, by_large = (cost.estimate("sm_80", work, [(launch(4096, 4096, c), used)]) for c in (small, large))
    assert by_small.l2 > by_large.l2
    work = product(1, 1024, 8192)
    few, many = (Config.make(BLOCK_M=16, BLOCK_N=n) for n in (256, 16))
    by_few, by_many = (cost.estimate("sm_80", work, [(launch(1, 1024, c), used)]) for c in (few, many))
    assert by_few.memory > by_many.memory
    once = [(launch(1, 1024, many), used)]
    assert cost.estimate("sm_80", work, once * 2).total == pytest.approx(by_many.total + cost.LAUNCH)


def test_spills_and_crowds_are_refused() -> None:
    config = Config.make(BLOCK_M=64, BLOCK_N=64)
    work, call = product(64, 64, 64), launch(64, 64, config)
    assert search.judge("sm_80", work, [call], [resources(stack=8)]).refused is None  # a frame that nothing uses
    assert "spills" in str(search.judge("sm_80", work, [call], [resources(spills=2)]).refused)
    assert "does not fit" in str(search.judge("sm_89", work, [call], [resources(shared=150_000)]).refused)
    assert "does not compile" in str(search.judge("sm_80", work, [call], [CompileError("x for y: z")]).refused)
    assert "16 bytes" in str(search.judge("sm_80", work, [call], [resources(wide_copies=0)]).refused)
    assert search.judge("sm_80", work, [call], [resources()]).refused is None


def test_the_best_candidate_and_why() -> None:
    configs = [Config.make(BLOCK_M=m, BLOCK_N=64) for m in (16, 32, 64)]
    judged = [search.Judged(3e-6, 10, "slow"), search.Judged(1e-6, 20, "fast"), search.Judged(0, 0, "", "spills")]
    rule = search.best("sm_80", "linear", [product(1, 1, 1)], list(zip(configs, judged)))
    assert (rule["BLOCK_M"], rule["why"]) == (32, ["fast"])
    assert rule["others"] == ["16x64, 4 warps, 3 stages: 3.0 us", "64x64, 4 warps, 3 stages: spills"]
    with pytest.raises(RuntimeError, match="no candidate"):
        search.best("sm_80", "linear", [product(1, 1, 1)], [(configs[2], judged[2])])


def test_rules_of_a_key_end_with_one_without_limits() -> None:
    """What no limit holds for must have a rule too, or its configuration would be the kernel's default unseen."""
    for key in {workload.key for workload in WORKLOADS if candidates(workload)}:
        limits = [workload.when for workload in WORKLOADS if workload.key == key]
        if key.startswith("linear_"):
            continue  # 8 and 4 bits: rules for few rows only, as they are meant for decoding
        assert limits[-1] == {}, key
        assert all(limits[:-1]) or len(set(map(str, limits))) == 1, key


def test_workloads_describe_themselves() -> None:
    names = [workload.name for workload in WORKLOADS]
    assert len(set(names)) == len(names)
    for workload in WORKLOADS:
        assert workload.bytes > 0
        assert (workload.flops > 0) == workload.products
        assert callable(workload.make(torch.device("meta")))
