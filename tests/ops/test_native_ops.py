"""The C++ kernels against the reference backend, under every instruction set this machine can run.

Also: a row's bits do not depend on the rows, chunks and threads around it; aliasing; errors; no leak of scratch memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from ops.cases import (
    BF16,
    F32,
    LARGE,
    REAL,
    SMALL,
    AttentionCase,
    Case,
    Int8AttentionCase,
    Int8RopeCase,
    LinearCase,
    MoeCase,
    Paged,
    SwigluCase,
    difference,
    noise,
    rope_table,
)
from ops.kv_layout import from_backend
from ops.quantized_cases import (
    OWN_INT4,
    OWN_INT8,
    REAL_QUANTIZED,
    SMALL_QUANTIZED,
    QuantizedLinearCase,
    QuantizedMoeCase,
    QuantizedSwigluCase,
    Recipe,
)
from torch import Tensor

from pagelens import _native
from pagelens.errors import EngineClosedError, ShapeError, UnsupportedError
from pagelens.ops import OpCase, RopeTable
from pagelens.ops.native import NativeOps
from pagelens.ops.reference import ReferenceOps


@cache
def expected(case: Case) -> Tensor:
    return case.bind(ReferenceOps())().clone()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bytes: NaN equals NaN, and 0.0 does not equal -0.0."""
    integer = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


@pytest.mark.parametrize("case", [*SMALL, *REAL, *SMALL_QUANTIZED, *REAL_QUANTIZED], ids=lambda case: case.id)
def test_equals_the_reference(case: Case, isa: str, native: NativeOps) -> None:
    run = case.bind(native)
    result = run().clone()
    problem = difference(result, expected(case), case)
    assert problem is None, problem
    assert same_bits(run(), result), "a second run gives other bits"


@pytest.mark.parametrize(
    "case", [case for case in LARGE if case.bytes() < 100e6 or case.op == "moe_ffn"], ids=lambda c: c.id
)
def test_large_sizes_equal_the_reference(case: Case, native: NativeOps) -> None:
    problem = difference(case.bind(native)().clone(), case.bind(ReferenceOps())(), case)
    assert problem is None, problem


# ---- a row's bits are its own --------------------------------------------------------------------------------------
ROWS = [
    LinearCase(rows=37, width=193, out=77, bias=True, activation="gelu", residual=True),
    LinearCase(rows=190, width=1281, out=70),
    SwigluCase(rows=37, width=192, inner=99),
    MoeCase(rows=37),
    MoeCase(rows=33, width=64, inner=24, shared=0, renormalize=True, experts=128, top_k=8),
    QuantizedLinearCase(rows=37, width=264, out=70, recipe=Recipe()),
    QuantizedLinearCase(rows=37, width=193, out=77, recipe=Recipe("int8", 24, zeros=True, order=True)),
    QuantizedLinearCase(rows=37, width=192, out=77, recipe=Recipe("int8", 0, activation="int8")),
    QuantizedLinearCase(rows=37, width=192, out=77, recipe=Recipe("fp8", 64)),
    QuantizedSwigluCase(rows=37, width=192, inner=99, recipe=Recipe(zeros=True)),
    QuantizedLinearCase(rows=37, width=264, out=77, recipe=OWN_INT8),
    QuantizedLinearCase(rows=190, width=1281, out=70, recipe=OWN_INT4),
    QuantizedSwigluCase(rows=37, width=192, inner=99, recipe=OWN_INT8),
    QuantizedMoeCase(rows=37, recipe=Recipe()),
    QuantizedMoeCase(rows=37, recipe=OWN_INT4),
]


def row_call(case: Any, ops: NativeOps) -> tuple[Tensor, Any]:
    """x and a function from rows of x (and their residuals) to a result, with one set of packed weights."""
    g = case.generator()
    if isinstance(case, LinearCase):
        x, weight, bias, _ = case.tensors()
        packed = ops.pack_linear(weight, bias)
        return x, lambda rows: ops.linear(rows, packed, case.activation, rows[:, : case.out] if case.residual else None)
    x = noise(g, (case.rows, case.width), case.dtype)
    if isinstance(case, MoeCase):
        pair = (noise(g, (case.shared, case.width), case.dtype, 0.1) for _ in range(2))
        down = noise(g, (case.width, case.shared), case.dtype, 0.1)
        shared = ops.pack_swiglu(*pair, down) if case.shared else None
        moe = ops.pack_moe(*case.weights(g), shared)
        return x, lambda rows: ops.moe_ffn(rows, moe, case.top_k, case.renormalize, case.scale, residual=rows)
    if isinstance(case, QuantizedSwigluCase):
        quantized = ops.pack_swiglu(*case.weights(g))
        return x, lambda rows: ops.swiglu_ffn(rows, quantized, residual=rows)
    gate, up = (noise(g, (case.inner, case.width), case.dtype, 0.1) for _ in range(2))
    ffn = ops.pack_swiglu(gate, up, noise(g, (case.width, case.inner), case.dtype, 0.1))
    return x, lambda rows: ops.swiglu_ffn(rows, ffn, residual=rows)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(
    case: Any, dtype: torch.dtype, isa: str, native: NativeOps
) -> None:
    x, call = row_call(type(case)(**{**vars(case), "dtype": dtype}), native)
    together = call(x)
    for i in {0, 1, 13, 14, 32, x.shape[0] - 1}:
        assert same_bits(call(x[i : i + 1]), together[i : i + 1]), f"row {i} alone"
    for a, b in ((0, 5), (7, 22), (1, 33)):
        assert same_bits(call(x[a:b]), together[a:b]), f"rows {a}..{b}"


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kind", [AttentionCase, Int8AttentionCase], ids=["auto", "int8"])
@pytest.mark.parametrize(
    "heads", [(6, 6, 32, 16), (4, 2, 128, 32), (6, 2, 64, 5), (8, 1, 96, 16), (2, 2, 20, 16)], ids=str
)
def test_attention_does_not_depend_on_the_chunking(
    heads: tuple[int, int, int, int], kind: type[AttentionCase], dtype: torch.dtype, isa: str, native: NativeOps
) -> None:
    """One prefill of 290 rows, chunks of it, single rows, and a batch with other sequences: the same bits."""
    h, k, d, block = heads
    case = kind(batch=Paged(((290, 290),), block), heads=h, kv_heads=k, head_dim=d, dtype=dtype)
    (q, keys, values, tables, _, _), named = case.inputs(native)

    def attend(ranges: list[tuple[int, int]]) -> list[Tensor]:
        rows = torch.cat([q[a:b] for a, b in ranges])
        starts = torch.tensor([0, *(b - a for a, b in ranges)]).cumsum(0).int()
        contexts = torch.tensor([b for _, b in ranges], dtype=torch.int32)
        places = tables.repeat(len(ranges), 1), starts, contexts
        out = native.paged_attention(rows, keys, values, *places, d**-0.5, **named)
        return list(out.split([b - a for a, b in ranges]))

    whole = attend([(0, 290)])[0]
    edges = [(i, i + 1) for i in (0, 15, 16, 31, 127, 128, 129, 255, 256, 289)]
    chunkings = (
        [(0, 40), (40, 41), (41, 290)],
        [(0, 1), (1, 97), (97, 100)],
        [(126, 130), (253, 257), (13, 17)],
        edges,
    )
    for ranges in chunkings:
        for (a, b), part in zip(ranges, attend(ranges)):
            assert same_bits(part, whole[a:b]), f"rows {a}..{b} of {ranges}"
            assert same_bits(attend([(a, b)])[0], whole[a:b]), f"rows {a}..{b} alone"


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kind", [AttentionCase, Int8AttentionCase], ids=["auto", "int8"])
@pytest.mark.parametrize("poisoned_key", [34, 35])
def test_attention_never_reads_above_a_rows_own_position(
    poisoned_key: int, kind: type[AttentionCase], dtype: torch.dtype, isa: str, native: NativeOps
) -> None:
    """NaN in a later key of the same chunk must not reach an earlier row, whether the key pairs with it or not."""
    case = kind(batch=Paged(((40, 40),)), dtype=dtype)
    plain = case.tensors()
    _, keys, values, tables, _, _ = plain
    clean_inputs, named = case.inputs(native, plain)
    clean = native.paged_attention(*clean_inputs, 0.2, **named)
    block, offset = int(tables[0, poisoned_key // 16]), poisoned_key % 16
    keys[block, offset], values[block, offset] = torch.nan, torch.nan
    poisoned_inputs, named = case.inputs(native, plain)
    poisoned = native.paged_attention(*poisoned_inputs, 0.2, **named)
    assert same_bits(poisoned[:poisoned_key], clean[:poisoned_key])
    assert poisoned[poisoned_key:].isnan().all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("block", [16, 6])
def test_rows_of_an_int8_cache(block: int, dtype: torch.dtype, isa: str, native: NativeOps) -> None:
    """Values and their scales are those of the contract; keys may lie a rounding of the rotation beside them."""
    case = Int8RopeCase(batch=Paged(((40, 50), (1, 20)), block), heads=4, kv_heads=2, head_dim=64, dtype=dtype)
    found = []
    for ops in (native, ReferenceOps()):
        store, cache, scales = case.store(ops)
        store()
        assert scales is not None
        found.append((from_backend(ops, cache[0], False), from_backend(ops, cache[1], True), scales))
    (keys, values, scales), (wanted_keys, wanted_values, wanted_scales) = found
    assert torch.equal(values, wanted_values)
    assert torch.equal(scales[1], wanted_scales[1])
    assert torch.allclose(scales[0], wanted_scales[0], rtol=2e-6, atol=0)
    written = (scales[0] != 0).transpose(1, 2)[..., None]  # what other slots hold differs
    off = (keys.int() - wanted_keys.int()).abs() * written
    assert int(off.max()) <= 1
    assert float(off.float().mean()) < 1e-3


def test_odd_rows_in_an_int8_cache(isa: str, native: NativeOps) -> None:
    """Zeros, the smallest numbers, ties, a NaN and an infinity."""
    rows = torch.zeros(6, 4)
    rows[1], rows[2] = 1e-38, torch.tensor([127.0, 0.5, 1.5, -2.5])
    rows[3, 1], rows[4, 2], rows[5, 0] = torch.nan, -torch.inf, -3e38
    qkv = torch.cat([torch.zeros(6, 4), rows, rows], 1)
    rope = RopeTable(torch.ones(1, 2), torch.zeros(1, 2))
    slots, results = torch.arange(6, dtype=torch.int32), []
    for ops in (native, ReferenceOps()):
        cache, scales = torch.full((2, 1, 8, 1, 4), 9, dtype=torch.uint8), torch.full((2, 1, 1, 8), 9.0)
        ops.qk_norm_rope_store(
            qkv, slots * 0, slots, rope, cache[0], cache[1], 1, key_scales=scales[0], value_scales=scales[1]
        )
        results.append((from_backend(ops, cache[1], True)[0, :6, 0], scales[1, 0, 0]))
    (values, scale), (wanted, wanted_scale) = results
    assert values.tolist() == wanted.tolist()
    assert values.tolist()[:3] == [[0] * 4, [0] * 4, [127, 0, 2, -2]]
    assert values[5].tolist() == [-127, 0, 0, 0]
    assert scale[:3].tolist() == [0.0, 0.0, 1.0]
    assert scale[3:5].isnan().all()
    assert scale.nan_to_num(-1.0).tolist() == wanted_scale.nan_to_num(-1.0).tolist()


THREADED = [
    LinearCase(rows=1, width=1280, out=3000, dtype=BF16),
    LinearCase(rows=300, width=500, out=600),
    SwigluCase(rows=3, width=512, inner=1024, dtype=BF16),
    MoeCase(rows=40, dtype=BF16),
    AttentionCase(batch=Paged(((1, 700), (90, 120))), dtype=BF16),
    AttentionCase(batch=Paged(((1, 700), (0, 0), (3, 400), (5, 9))), heads=6, kv_heads=3, head_dim=64, dtype=BF16),
    AttentionCase(batch=Paged(((1, 520), (2, 40)), 7), heads=6, kv_heads=3, head_dim=64, dtype=BF16),
    Int8AttentionCase(batch=Paged(((1, 700), (3, 400), (50, 90))), heads=6, kv_heads=3, head_dim=64, dtype=BF16),
]


@pytest.mark.parametrize("case", THREADED, ids=lambda case: case.id)
def test_threads_do_not_change_a_bit(case: Case, isa: str) -> None:
    results = []
    for threads in (1, 2, 5):
        ops = NativeOps(threads)
        assert ops.num_threads == threads
        results.append(case.bind(ops)().clone())
        ops.close()
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_experts_in_pieces_give_the_same_bits(native: NativeOps) -> None:
    """More tokens than terms are kept at a time (64 MiB): the pieces must not show."""
    case = MoeCase(rows=6000, width=1024, inner=8, experts=4, top_k=4, shared=8)
    assert case.rows * (case.top_k + 1) * case.width * 4 > 1.8 * (64 << 20)
    x, call = row_call(case, native)
    together = call(x)
    for a, b in ((0, 1), (3270, 3290), (5999, 6000)):
        assert same_bits(call(x[a:b]), together[a:b])


# ---- routing, and the ops that share it ---------------------------------------------------------------------------
def test_routing_equals_the_reference(isa: str, native: NativeOps) -> None:
    g = torch.Generator().manual_seed(1)
    for tokens, experts, top_k, renormalize, scale in (
        (37, 64, 6, False, 1.0),
        (1, 128, 8, True, 2.5),
        (0, 8, 2, True, 1.0),
    ):
        logits = noise(g, (tokens, experts), F32, 2.0)
        mine = native.moe_routing(logits, top_k, renormalize, scale)
        theirs = ReferenceOps().moe_routing(logits, top_k, renormalize, scale)
        for name in ("expert_ids", "offsets", "permutation"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        torch.testing.assert_close(mine.weights, theirs.weights, rtol=1e-6, atol=0)


def test_equal_scores_choose_the_lowest_id(isa: str, native: NativeOps) -> None:
    logits = torch.zeros(3, 64)
    logits[1, 40] = logits[1, 7] = 1.0
    logits[2, 9] = -torch.inf
    ids = native.moe_routing(logits, 4, False, 1.0).expert_ids
    assert ids.tolist() == [[0, 1, 2, 3], [7, 40, 0, 1], [0, 1, 2, 3]]


def test_nan_logits_still_choose_different_experts(isa: str, native: NativeOps) -> None:
    routing = native.moe_routing(torch.full((2, 8), torch.nan), 3, True, 1.0)
    assert routing.expert_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert routing.weights.isnan().all()
    assert routing.offsets.tolist() == [0, 2, 4, 6, 6, 6, 6, 6, 6]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_grouped_gemm_equals_the_reference(dtype: torch.dtype, isa: str, native: NativeOps) -> None:
    case = MoeCase(rows=21, dtype=dtype, shared=0, seed=3)
    g = case.generator()
    x, weights, reference = noise(g, (21, case.width), dtype), case.weights(g), ReferenceOps()
    routing = reference.moe_routing(noise(g, (21, 8), F32, 2.0), 2, True, 1.5)
    result = native.grouped_gemm(x, native.pack_moe(*weights, None), routing)
    wanted = reference.grouped_gemm(x, reference.pack_moe(*weights, None), routing)
    problem = difference(result, wanted, case)
    assert problem is None, problem


def test_grouped_gemm_refuses_a_routing_that_is_not_sorted(native: NativeOps) -> None:
    case = MoeCase(rows=5, shared=0)
    g = case.generator()
    x, moe = noise(g, (5, case.width), F32), native.pack_moe(*case.weights(g), None)
    good = native.moe_routing(noise(g, (5, 8), F32), 2, False, 1.0)
    native.grouped_gemm(x, moe, good)
    for name, index, value in (("permutation", 0, 99), ("permutation", 3, -1), ("offsets", 8, 11), ("offsets", 4, 100)):
        bad = {n: getattr(good, n).clone() for n in ("expert_ids", "weights", "offsets", "permutation")}
        bad[name][index] = value
        with pytest.raises(ShapeError, match="not sorted"):
            native.grouped_gemm(x, moe, type(good)(**bad))


# ---- numbers at the edges ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "silu"])
def test_activations_over_their_whole_range(activation: str, isa: str, native: NativeOps) -> None:
    """A 1x1 identity weight: the result is the activation itself, next to its float64 value."""
    x = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([0.0, -1e-30, 1e-30, 100.0, -100.0, 1e30, -1e30])])
    result = native.linear(x[:, None], native.pack_linear(torch.ones(1, 1)), activation)[:, 0].double()
    y = x.double()
    exact = {
        "gelu": 0.5 * y * torch.special.erfc(-y / 2**0.5),
        "quick_gelu": y * torch.special.expit(1.702 * y),
        "silu": y * torch.special.expit(y),
    }[activation]
    # Ten roundings of 2^-24; the exponential of an argument rounded to 24 bits; below 2^-126 nothing is asked.
    argument = {"gelu": y.square() / 2, "quick_gelu": 1.702 * y.abs(), "silu": 0 * y}[activation]
    relative = 2.0**-24 * (10 + 2 * argument.clamp_max(90))
    assert ((result - exact).abs() <= relative * exact.abs() + 2.0**-126 * y.abs().clamp(1, 100)).all()


def test_nan_and_infinity_go_through(isa: str, native: NativeOps) -> None:
    x = torch.ones(3, 64)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    for dtype in (F32, BF16):
        packed = native.pack_linear(torch.ones(33, 64).to(dtype))
        for activation in (None, "gelu", "silu", "quick_gelu"):
            y = native.linear(x.to(dtype), packed, activation)
            assert y[0].isfinite().all(), activation
            assert y[1].isnan().all(), activation
            assert y[2].isposinf().all(), activation
        assert native.rms_norm(x.to(dtype), torch.ones(64, dtype=dtype), 1e-6)[1].isnan().all()


def test_bfloat16_results_are_rounded_to_even_and_keep_nan(isa: str, native: NativeOps) -> None:
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).int()
    ties = (torch.arange(0x3F80, 0x3F90) << 16 | 0x8000).int()
    nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FFF8000]).int()
    values = torch.cat([bits, ties, nans]).view(F32)
    one = native.pack_linear(torch.zeros(values.numel(), 2, dtype=BF16), values)  # 0 @ x + bias, rounded
    result = native.linear(torch.zeros(1, 2, dtype=BF16), one)[0]
    expected_values = values.to(BF16)
    assert torch.equal(result.isnan(), expected_values.isnan())
    finite = ~expected_values.isnan()
    assert torch.equal(result[finite], expected_values[finite])


# ---- errors, life and death ---------------------------------------------------------------------------------------
def test_wrong_shapes_and_dtypes_are_refused(native: NativeOps) -> None:
    x, half = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.float16)
    packed = native.pack_linear(torch.zeros(4, 8))
    cache = torch.zeros(2, 4, 1, 8)
    rope, i32 = rope_table(4, 8), torch.zeros(2, dtype=torch.int32)
    qkv = torch.zeros(2, 24)
    tables, starts = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    q, two = torch.zeros(2, 1, 8), torch.tensor([2], dtype=torch.int32)
    calls = {
        "width": lambda: native.linear(torch.zeros(2, 7), packed),
        "dtype": lambda: native.linear(half, packed),
        "mixed": lambda: native.linear(x.bfloat16(), packed),
        "transposed": lambda: native.linear(torch.zeros(8, 2).T, packed),
        "activation": lambda: native.linear(x, packed, "tanh"),  # type: ignore[arg-type]
        "residual": lambda: native.linear(x, packed, residual=torch.zeros(2, 5)),
        "out": lambda: native.linear(x, packed, out=torch.zeros(2, 4, dtype=BF16)),
        "out is x": lambda: native.linear(
            square := torch.zeros(2, 8), native.pack_linear(torch.zeros(8, 8)), out=square
        ),
        "weight": lambda: native.pack_linear(torch.zeros(8)),
        "bias": lambda: native.pack_linear(torch.zeros(4, 8), torch.zeros(5)),
        "norm": lambda: native.rms_norm(x, torch.zeros(7), 1e-6),
        "id": lambda: native.embedding(torch.tensor([1, 2], dtype=torch.int32), x),
        "negative id": lambda: native.embedding(torch.tensor([-1], dtype=torch.int32), x),
        "int64 ids": lambda: native.embedding(torch.tensor([1]), x),
        "swiglu": lambda: native.pack_swiglu(torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(8, 3)),
        "moe": lambda: native.pack_moe(
            torch.zeros(2, 8), [(torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(8, 3))], None
        ),
        "top_k": lambda: native.moe_routing(x, 9, False, 1.0),
        "slot": lambda: native.qk_norm_rope_store(qkv, i32, i32 + 8, rope, cache, cache.clone(), 1),
        "position": lambda: native.qk_norm_rope_store(qkv, i32 + 4, i32, rope, cache, cache.clone(), 1),
        "heads": lambda: native.qk_norm_rope_store(qkv, i32, i32, rope, cache, cache.clone(), 2),
        "block": lambda: native.paged_attention(q, cache, cache, tables + 2, starts, two, 1.0),
        "context": lambda: native.paged_attention(q, cache, cache, tables, starts, two + 3, 1.0),
        "too short": lambda: native.paged_attention(q, cache, cache, tables, starts, two - 1, 1.0),
        "starts": lambda: native.paged_attention(q, cache, cache, tables, starts + 1, two, 1.0),
    }
    accepted = []
    for name, call in calls.items():
        try:
            call()
        except ShapeError:
            continue
        accepted.append(name)
    assert not accepted


def test_a_refused_store_writes_nothing(native: NativeOps) -> None:
    cache = torch.zeros(2, 2, 4, 1, 8)
    slots = torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises(ShapeError, match="slot 8 of 8"):
        native.qk_norm_rope_store(torch.ones(2, 24), slots * 0, slots, rope_table(4, 8), cache[0], cache[1], 1)
    assert not cache.any()


def test_supports_says_why_not(native: NativeOps) -> None:
    assert native.supports(OpCase("linear", BF16, (("in_features", 7),))) is None
    assert "float16" in str(native.supports(OpCase("linear", torch.float16)))
    assert "head_dim" in str(native.supports(OpCase("paged_attention", F32, (("head_dim", 7),))))
    assert native.supports(OpCase("window_attention", BF16, (("head_dim", 64),))) is None


def test_scratch_memory_stops_growing_and_is_freed() -> None:
    ops = NativeOps(2)
    runs = [case.bind(ops) for case in THREADED]
    for run in runs:
        run()
    held = ops.scratch_bytes
    assert held > 0
    for run in runs:
        run()
    assert ops.scratch_bytes == held
    ops.close()
    assert ops.scratch_bytes == 0
    ops.close()
    with pytest.raises(EngineClosedError, match="closed"):
        runs[0]()


def test_an_unknown_instruction_set_makes_native_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise ValueError("PAGELENS_CPU_ISA=sse9 is not an instruction set; known: portable")

    monkeypatch.setattr(_native, "isa", refuse)
    with pytest.raises(UnsupportedError, match="sse9"):
        NativeOps(1)
