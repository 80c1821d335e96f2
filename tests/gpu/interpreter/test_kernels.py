"""Every kernel against the reference on the small cases of the shared list, its addresses checked, no races."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from gpu.gpu_cases import GPU_SMALL
from ops.cases import BF16, F16, F32, Case, LinearCase, MoeCase, NormCase, difference, noise, rope_table
from torch import Tensor

from pagelens.errors import ShapeError, UnsupportedError
from pagelens.kernels.interpreter.checks import checked
from pagelens.ops import OP_NAMES, OpCase
from pagelens.ops.reference import ReferenceOps
from pagelens.ops.triton import TritonOps

REFERENCE = ReferenceOps()


@pytest.mark.parametrize("case", GPU_SMALL, ids=lambda case: case.id)
def test_equals_the_reference(case: Case, triton_ops: TritonOps) -> None:
    run = case.bind(triton_ops)
    with checked() as checks:
        result = run().clone()
    problem = difference(result, case.bind(REFERENCE)(), case)
    assert problem is None, problem
    assert checks.launches or not result.numel() or not case.bytes(), "no kernel ran"


def test_every_op_has_a_case_and_a_kernel(triton_ops: TritonOps) -> None:
    tested = {case.op for case in GPU_SMALL} | {"moe_routing", "grouped_gemm"}
    assert tested | {"sample"} == set(OP_NAMES)  # test_sampling.py
    assert all(callable(getattr(triton_ops, op)) for op in tested)


# ---- sums over K in parts ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("split", "width"), [(2, 192), (3, 193), (7, 100)])
def test_a_product_in_parts(
    split: int, width: int, dtype: torch.dtype, triton_ops: TritonOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 parts of 100: the last ones are empty."""
    from pagelens.kernels import linear
    from pagelens.kernels.launch import Config

    config = Config.make(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, SPLIT_K=split)
    monkeypatch.setattr(linear, "choose", lambda kernel, *_, **__: config if kernel == "linear" else linear.REDUCE)
    case = LinearCase(dtype, rows=5, width=width, out=77, bias=True, activation="silu", residual=True, alias=True)
    with checked():
        result = case.bind(triton_ops)().clone()
    problem = difference(result, case.bind(REFERENCE)(), case)
    assert problem is None, problem


# ---- norms with a residual -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("layer", [False, True])
def test_a_norm_of_a_sum_keeps_the_sum(layer: bool, dtype: torch.dtype, triton_ops: TritonOps) -> None:
    from pagelens.kernels.layer_norm import layer_norm
    from pagelens.kernels.rms_norm import rms_norm

    g = torch.Generator().manual_seed(0)
    x, residual = noise(g, (5, 193), dtype), noise(g, (5, 193), dtype)
    weight, bias = noise(g, (193,), dtype), noise(g, (193,), dtype)
    total = x.float() + residual.float()
    if layer:
        wanted = REFERENCE.layer_norm(total, weight.float(), bias.float(), 1e-5)
    else:
        wanted = REFERENCE.rms_norm(total, weight.float(), 1e-6)
    with checked():
        if layer:
            result = layer_norm(x, weight, bias, 1e-5, residual=residual)
        else:
            result = rms_norm(x, weight, 1e-6, residual=residual)
    problem = difference(result, wanted.to(dtype), NormCase(dtype, rows=5, width=193, layer=layer))
    assert problem is None, problem
    assert torch.equal(residual, total.to(dtype))


# ---- routing -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "renormalize"),
    [(0, 8, 2, True), (1, 128, 8, True), (7, 64, 6, False), (53, 5, 5, True), (100, 33, 3, False), (2, 1, 1, True)],
)
def test_routing_equals_the_reference(
    tokens: int, experts: int, top_k: int, renormalize: bool, triton_ops: TritonOps
) -> None:
    """One tile and many; experts that are no power of two."""
    logits = noise(torch.Generator().manual_seed(tokens), (tokens, experts), F32, 2.0)
    with checked() as checks:
        mine = triton_ops.moe_routing(logits, top_k, renormalize, 1.5)
    theirs = REFERENCE.moe_routing(logits, top_k, renormalize, 1.5)
    for name in ("expert_ids", "offsets", "permutation"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    torch.testing.assert_close(mine.weights, theirs.weights, rtol=1e-6, atol=0)
    assert checks.launches == (1 if tokens <= 16 else 2)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_routing_at_the_edges(triton_ops: TritonOps) -> None:
    """Equal scores take the lowest id, minus infinity comes last, NaN still chooses different experts."""
    logits = torch.zeros(4, 64)
    logits[1, 40] = logits[1, 7] = 1.0
    logits[2, 9] = -torch.inf
    logits[3] = torch.nan
    routing = triton_ops.moe_routing(logits, 4, False, 1.0)
    assert routing.expert_ids.tolist() == [[0, 1, 2, 3], [7, 40, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert routing.weights[3].isnan().all()
    assert routing.weights[:3].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("tokens", [1, 21])
def test_grouped_gemm_equals_the_reference(dtype: torch.dtype, tokens: int, triton_ops: TritonOps) -> None:
    case = MoeCase(rows=tokens, dtype=dtype, shared=0, seed=3)
    g = case.generator()
    x, weights = noise(g, (tokens, case.width), dtype), case.weights(g)
    routing = REFERENCE.moe_routing(noise(g, (tokens, 8), F32, 2.0), 2, True, 1.5)
    with checked():
        result = triton_ops.grouped_gemm(x, triton_ops.pack_moe(*weights, None), routing)
    problem = difference(result, REFERENCE.grouped_gemm(x, REFERENCE.pack_moe(*weights, None), routing), case)
    assert problem is None, problem


# ---- rounded activations at the edges of their types ---------------------------------------------------------------
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_activations_round_as_the_reference_does(kind: str, triton_ops: TritonOps) -> None:
    """Zeros, subnormal, huge and tied values; NaN and infinity make their own row NaN."""
    from ops.quantized_cases import QuantizedLinearCase, Recipe

    case = QuantizedLinearCase(F32, rows=7, width=136, out=40, recipe=Recipe(kind, 0, activation=kind, scales=F32))
    x, weight, _, _ = case.tensors()
    x[0], x[1], x[2] = 0.0, x[1] * 1e-40, x[2] * 1e30
    x[3], x[3, ::8] = torch.arange(136) % 127 + 0.5, 127.0 if kind == "int8" else 448.0
    x[4], x[5] = x[4] * 0.02, x[5]
    x[4, 0], x[5, 70], x[6, 3] = 448.0, torch.nan, -torch.inf
    with checked():
        result = triton_ops.linear(x, triton_ops.pack_linear(weight))
    wanted = REFERENCE.linear(x, REFERENCE.pack_linear(weight))
    for row in range(7):
        problem = difference(result[row], wanted[row], case)
        assert problem is None, f"row {row}: {problem}"
    assert result[5:].isnan().all()


# ---- rows that are left out ----------------------------------------------------------------------------------------
def test_rows_outside_their_tables_are_left_out(triton_ops: TritonOps) -> None:
    cache, qkv = torch.zeros(2, 2, 4, 1, 8), torch.ones(3, 24)
    positions, slots = (torch.tensor(v, dtype=torch.int32) for v in ([0, 4, 1], [8, 1, 2]))
    with checked():
        triton_ops.qk_norm_rope_store(qkv, positions, slots, rope_table(4, 8), cache[0], cache[1], 1)
        ids = torch.tensor([5, -1, 1], dtype=torch.int32)
        rows = triton_ops.embedding(ids, torch.ones(5, 24))
    assert cache.view(2, 8, 8).any(-1).nonzero().tolist() == [[0, 2], [1, 2]]
    assert rows.any(-1).tolist() == [False, False, True]


# ---- errors --------------------------------------------------------------------------------------------------------
def test_wrong_shapes_and_dtypes_are_refused(triton_ops: TritonOps) -> None:
    ops: Any = triton_ops
    x, packed = torch.zeros(2, 8), ops.pack_linear(torch.zeros(4, 8))
    cache, i32 = torch.zeros(2, 4, 1, 8), torch.zeros(2, dtype=torch.int32)
    q, tables, starts = torch.zeros(2, 1, 8), torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 2]).int()
    experts = [(torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(8, 3))]
    moe = ops.pack_moe(torch.zeros(1, 8), experts, None)
    patches = ops.pack_patch_embed(torch.zeros(8, 3, 4, 4), torch.zeros(8))
    qkv, pad, table = torch.zeros(1, 6, 6, 24), torch.zeros(24), torch.zeros(7, 4)
    calls = {
        "x's width": lambda: ops.linear(torch.zeros(2, 7), packed),
        "x's dtype": lambda: ops.linear(x.bfloat16(), packed),
        "x's rows": lambda: ops.linear(torch.zeros(8, 2).T, packed),
        "activation": lambda: ops.linear(x, packed, "relu"),
        "out": lambda: ops.linear(x, packed, out=torch.zeros(2, 5)),
        "out is x": lambda: ops.linear(x, ops.pack_linear(torch.zeros(8, 8)), out=x),
        "out_dtype": lambda: ops.linear(x, packed, out_dtype=torch.bfloat16),
        "residual": lambda: ops.linear(x, packed, residual=torch.zeros(2, 5)),
        "bias": lambda: ops.pack_linear(torch.zeros(4, 8), torch.zeros(5)),
        "float64": lambda: ops.pack_linear(torch.zeros(4, 8).double()),
        "swiglu": lambda: ops.pack_swiglu(torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(8, 3)),
        "experts": lambda: ops.pack_moe(torch.zeros(2, 8), experts, None),
        "norm": lambda: ops.rms_norm(x, torch.zeros(7), 1e-6),
        "ids": lambda: ops.embedding(torch.tensor([1]), x),
        "slots": lambda: ops.qk_norm_rope_store(torch.zeros(2, 24), i32, i32[:1], rope_table(4, 8), cache, cache, 1),
        "heads": lambda: ops.qk_norm_rope_store(torch.zeros(2, 24), i32, i32, rope_table(4, 8), cache, cache, 2),
        "tables": lambda: ops.paged_attention(q, cache, cache, tables.long(), starts, i32[:1], 1.0),
        "starts": lambda: ops.paged_attention(q, cache, cache, tables, starts[:1], i32[:1], 1.0),
        "cache": lambda: ops.paged_attention(q, cache.bfloat16(), cache.bfloat16(), tables, starts, i32[:1], 1.0),
        "top_k": lambda: ops.moe_routing(x, 9, False, 1.0),
        "top_k of moe": lambda: ops.moe_ffn(x, moe, 2, False, 1.0),
        "patch": lambda: ops.patch_embed(torch.zeros(1, 3, 8, 6), patches, 4),
        "window's tables": lambda: ops.window_attention(qkv, pad, table, table, 2, 3),
        "pad": lambda: ops.window_attention(qkv, pad[1:], table, table, 2, 4),
        "attention's heads": lambda: ops.attention(torch.zeros(1, 5, 24), 5),
        "attention's out": lambda: ops.attention(torch.zeros(1, 5, 24), 2, out=torch.zeros(1, 5, 7)),
        "an int8 cache": lambda: ops.paged_attention(
            q, cache, cache, tables, starts, i32[:1], 1.0, key_scales=cache, value_scales=cache
        ),
    }
    accepted = []
    for name, call in calls.items():
        try:
            call()
        except ShapeError:
            continue
        accepted.append(name)
    assert not accepted


def test_experts_and_gates_that_are_quantised_differently_are_refused(triton_ops: TritonOps) -> None:
    from pagelens.quantization import quantize

    g = torch.Generator().manual_seed(0)

    def weight(kind: Any, *shape: int) -> Any:
        return quantize(noise(g, shape, F32), kind)

    with pytest.raises(UnsupportedError, match="gate and up"):
        triton_ops.pack_swiglu(weight("int8", 8, 32), weight("int4", 8, 32), weight("int8", 32, 8))
    experts = [tuple(weight(kind, *s) for s in ((8, 32), (8, 32), (32, 8))) for kind in ("int8", "int4")]
    with pytest.raises(UnsupportedError, match="expert 1"):
        triton_ops.pack_moe(torch.zeros(2, 32), experts, None)  # type: ignore[arg-type]


def test_supports_says_why_not(triton_ops: TritonOps) -> None:
    assert triton_ops.supports(OpCase("linear", F16)) is None
    assert "float64" in str(triton_ops.supports(OpCase("linear", torch.float64)))
    assert "head_dim" in str(triton_ops.supports(OpCase("paged_attention", F32, (("head_dim", 7),))))
    assert "experts" in str(triton_ops.supports(OpCase("moe_routing", F32, (("num_experts", 5000),))))


def test_the_backend_says_that_it_is_interpreted() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TritonOps("cpu")
    assert any("for tests" in str(w.message) for w in caught)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_a_token_of_the_experts_does_not_depend_on_its_neighbours(triton_ops: TritonOps) -> None:
    """One configuration for both sizes here: then a token's sums have one order whatever else is in the call."""
    case = MoeCase(rows=23, seed=1, shared=0)
    g = case.generator()
    x = noise(g, (case.rows, case.width), F32)
    moe = triton_ops.pack_moe(*case.weights(g), None)
    logits = noise(g, (case.rows, case.experts), F32)

    def run(rows: slice) -> Tensor:
        return triton_ops.grouped_gemm(x[rows], moe, triton_ops.moe_routing(logits[rows], 2, True, 1.0))

    together = run(slice(None))
    for row in (0, 9, 22):
        assert same(run(slice(row, row + 1)), together[row : row + 1])
