"""The CUDA kernels as the PTX that nvcc emits for sm_80, on the small cases of the shared list, against the reference.

The mutants edit the PTX of a case that passes, and must be found out: by a memory check, as a hazard, or by the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda.kernel_cases import CASES, REFERENCE, cuda_ops, shared_cases
from gpu.ptx.errors import Hazard, PtxError
from gpu_static.cuda_launch import Kernels
from gpu_static.nvcc import Unit
from nvcc.ptx_runner import PtxRunner, kernel_of
from ops.case import Case, difference, noise

from pagelens.ops.cuda import CudaOps
from pagelens.quantization import QuantizedWeight, quantize

CHOSEN = {case.id: case for case in shared_cases(cuda_ops(ModuleType("no kernels")))}
OPS = {"moe_ffn", "qk_norm_rope_store", "paged_attention", "window_attention", "conv_downsample"}


def different(result: Any, expected: Any, case: Case) -> list[str]:
    pairs = zip(result, expected) if isinstance(expected, tuple) else [(result, expected)]
    return [found for pair in pairs if (found := difference(*pair, case))]


def test_every_op_has_cases() -> None:
    assert {case.op for case in CHOSEN.values()} == OPS
    assert len(CASES) > len(CHOSEN)


@pytest.mark.parametrize("name", CHOSEN)
def test_shared_cases(units: list[Unit], launches: Kernels, name: str) -> None:
    case, runner = CHOSEN[name], PtxRunner(launches, units)
    result = runner(lambda ops: case.bind(ops)())
    assert different(result, case.bind(REFERENCE)(), case) == []
    assert runner.reports or "[0x" in name or "[-" in name  # no rows


@pytest.mark.parametrize("experts", [5, 40, 128, 256])
def test_routing_is_the_reference_with_ties(units: list[Unit], launches: Kernels, experts: int) -> None:
    logits = torch.randn(33, experts, generator=torch.Generator().manual_seed(experts)).round()
    expected = REFERENCE.moe_routing(logits, 4, True, 2.5)
    result = PtxRunner(launches, units)(lambda ops: ops.moe_routing(logits.clone(), 4, True, 2.5), cuda_ops)
    for name in ("expert_ids", "offsets", "permutation"):
        assert torch.equal(getattr(result, name), getattr(expected, name))
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [3, 70])
def test_quantised_experts(units: list[Unit], launches: Kernels, kind: str, rows: int) -> None:
    """Inputs whose exact products and sums fit into float32: the reference's dequantised weights, the same numbers."""
    g, experts, width, inner = torch.Generator().manual_seed(rows), 4, 136, 72
    shapes = ((inner, width), (inner, width), (width, inner))

    def quantized(shape: tuple[int, int]) -> QuantizedWeight:
        q = quantize(noise(g, shape, torch.bfloat16, shape[1] ** -0.5), kind)  # type: ignore[arg-type]
        return QuantizedWeight(q.kind, q.values, q.scales, q.group_size, q.zeros, dtype=torch.bfloat16)

    parts = [tuple(quantized(shape) for shape in shapes) for _ in range(experts)]
    x, logits = noise(g, (rows, width), torch.bfloat16), torch.randn(rows, experts, generator=g)
    router, routing = torch.zeros(experts, width), REFERENCE.moe_routing(logits, 2, True, 1.0)
    expected = REFERENCE.grouped_gemm(x, REFERENCE.pack_moe(router, parts, None), routing)

    def work(ops: CudaOps) -> torch.Tensor:
        own = ops.moe_routing(logits.clone(), 2, True, 1.0)
        return ops.grouped_gemm(x.clone(), ops.pack_moe(router.clone(), parts, None), own)

    result = PtxRunner(launches, units)(work, cuda_ops)
    tolerance = 2.0**-8 / inner**0.5 + 8 * 2.0**-24 * (width + inner) ** 0.5
    assert float((result - expected).abs().max()) <= tolerance * float(expected.abs().max())


# ---- mutants -------------------------------------------------------------------------------------------------------
def replaced(pattern: str, new: str | Callable[[re.Match[str]], str], text: str) -> str:
    changed, found = re.subn(pattern, new, text, flags=re.M)
    assert found, f"nothing matches {pattern}"
    return changed


def later_wait(text: str) -> str:
    """Every wait leaves one more group of copies in flight."""
    return replaced(r"cp\.async\.wait_group\s+(\d+)", lambda m: f"cp.async.wait_group {int(m[1]) + 1}", text)


def no_barrier(text: str) -> str:
    return replaced(r"^\s*bar\.sync\s+0;", "", text)


def no_warp_barrier(text: str) -> str:
    return replaced(r"^\s*bar\.warp\.sync\s+[^;]*;", "", text)


def swapped_fragments(text: str) -> str:
    """Upper and lower rows of the left factor change places."""
    return replaced(r"(mma\.sync\S+ \{[^}]*\}, \{)(%r\d+),(%r\d+)", r"\1\3,\2", text)


def wrong_matrix_row(text: str) -> str:
    """ldmatrix reads 16 bytes further on."""
    return replaced(r"(ldmatrix[^\[]*\[%r\d+)\]", r"\1+16]", text)


def wrong_lane(text: str) -> str:
    """A sum over the lanes that only the first lane has."""
    return replaced(r"shfl\.sync\.bfly", "shfl.sync.down", text)


def wrong_reduction(text: str) -> str:
    return replaced(r"redux\.sync\.or", "redux.sync.and", text)


MOE = "moe_ffn[37x192x96-8top2-shared192-bf16]"
WINDOWS, CONV = "window_attention[1x10-window7-2x16-sharp1-bf16]", "conv_downsample[2x8x48-32-40-64-bf16]"
PAGED = "paged_attention[70of70-block5-6of6x32-sharp1-bf16]"
SPLIT = "paged_attention[1of300+2of129+0of0-block16-3of3x64-sharp1-bf16]"
ROPE = "qk_norm_rope_store[11x6of6x32-norm-bf16]"
MUTANTS = [
    (MOE, "gate_up", later_wait, Hazard),
    (MOE, "gate_up", no_barrier, Hazard),
    (MOE, "down", swapped_fragments, None),
    (MOE, "route", wrong_reduction, None),
    (MOE, "route", no_barrier, Hazard),
    (WINDOWS, "attend", later_wait, Hazard),
    (WINDOWS, "attend", no_barrier, Hazard),
    (WINDOWS, "attend", no_warp_barrier, Hazard),
    (PAGED, "attend", no_warp_barrier, Hazard),
    (PAGED, "attend", wrong_lane, None),
    (SPLIT, "attend", later_wait, Hazard),
    (CONV, "conv", no_barrier, Hazard),
    (CONV, "conv", wrong_matrix_row, PtxError),
    (ROPE, "store", wrong_lane, None),
]


@pytest.mark.parametrize(("name", "kernel", "change", "by"), MUTANTS)
def test_mutants_are_caught(
    units: list[Unit],
    launches: Kernels,
    name: str,
    kernel: str,
    change: Callable[[str], str],
    by: type[PtxError] | None,
) -> None:
    """by: the error that says so; None: the result."""
    case, runner = CHOSEN[name], PtxRunner(launches, units, change, kernel)
    if by is not None:
        with pytest.raises(by):
            runner(lambda ops: case.bind(ops)())
        return
    result = runner(lambda ops: case.bind(ops)())
    assert kernel in [kernel_of(launched) for launched, _ in runner.reports]
    assert different(result, case.bind(REFERENCE)(), case)
