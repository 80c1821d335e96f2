"""Opcodes on single registers, against numpy or plain Python."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from gpu.ptx.errors import UnknownPtx
from gpu.ptx_text import elementwise
from numpy.typing import NDArray

RNG = np.random.default_rng(0)
EDGES = np.array(
    [0, 1, 2, 3, 7, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF8000, 12345, 0x00FF00FF], np.uint32
)


def pairs() -> tuple[NDArray, NDArray]:
    a, b = (v.ravel().astype(np.uint32) for v in np.meshgrid(EDGES, EDGES))
    return a, b


def signed(values: NDArray) -> list[int]:
    return [int(v) for v in values.view(np.int32)]


def c_divide(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("add.s32", lambda a, b: a + b),
        ("sub.s32", lambda a, b: a - b),
        ("mul.lo.s32", lambda a, b: a * b),
        ("mul.hi.s32", lambda a, b: a * b >> 32),
        ("min.s32", min),
        ("max.s32", max),
        ("and.b32", lambda a, b: a & b),
        ("or.b32", lambda a, b: a | b),
        ("xor.b32", lambda a, b: a ^ b),
    ],
)
def test_binary_signed(op: str, function) -> None:
    a, b = pairs()
    expected = [function(x, y) % (1 << 32) for x, y in zip(signed(a), signed(b))]
    assert elementwise(f"{op} {{o}}, {{0}}, {{1}};", [a, b]).tolist() == expected


@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("mul.hi.u32", lambda a, b: a * b >> 32),
        ("min.u32", min),
        ("max.u32", max),
        ("shl.b32", lambda a, b: a << b if b < 32 else 0),
        ("shr.u32", lambda a, b: a >> b),
        ("shr.b32", lambda a, b: a >> b),
    ],
)
def test_binary_unsigned(op: str, function) -> None:
    a, b = pairs()
    b = np.minimum(b, 64).astype(np.uint32) if op.startswith("sh") else b
    expected = [function(x, y) % (1 << 32) for x, y in zip(a.tolist(), b.tolist())]
    assert elementwise(f"{op} {{o}}, {{0}}, {{1}};", [a, b]).tolist() == expected


def test_shr_s32_keeps_the_sign() -> None:
    a, b = pairs()
    expected = [(x >> min(y, 31)) % (1 << 32) for x, y in zip(signed(a), b.tolist())]
    assert elementwise("shr.s32 {o}, {0}, {1};", [a, b]).tolist() == expected


def test_division_is_towards_zero() -> None:
    a, b = pairs()
    a, b = a[b != 0], b[b != 0]
    quotient = [c_divide(x, y) % (1 << 32) for x, y in zip(signed(a), signed(b))]
    rest = [(x - c_divide(x, y) * y) % (1 << 32) for x, y in zip(signed(a), signed(b))]
    assert elementwise("div.s32 {o}, {0}, {1};", [a, b]).tolist() == quotient
    assert elementwise("rem.s32 {o}, {0}, {1};", [a, b]).tolist() == rest
    assert elementwise("div.u32 {o}, {0}, {1};", [a, b]).tolist() == (a // b).tolist()
    assert elementwise("rem.u32 {o}, {0}, {1};", [a, b]).tolist() == (a % b).tolist()


def test_wide_and_64_bit_products() -> None:
    a, b = pairs()
    expected = [x * y % (1 << 64) for x, y in zip(signed(a), signed(b))]
    assert elementwise("mul.wide.s32 {o}, {0}, {1};", [a, b], np.uint64).tolist() == expected
    c, d = (RNG.integers(0, 1 << 63, 64, np.uint64) * np.uint64(2) + np.uint64(1) for _ in range(2))
    whole = [int(x) * int(y) for x, y in zip(c, d)]
    assert elementwise("mul.lo.u64 {o}, {0}, {1};", [c, d], np.uint64).tolist() == [v % (1 << 64) for v in whole]
    assert elementwise("mul.hi.u64 {o}, {0}, {1};", [c, d], np.uint64).tolist() == [v >> 64 for v in whole]
    whole = [int(x) * int(y) for x, y in zip(c.view(np.int64), d.view(np.int64))]
    assert elementwise("mul.hi.s64 {o}, {0}, {1};", [c, d], np.uint64).tolist() == [
        (v >> 64) % (1 << 64) for v in whole
    ]


def test_mad() -> None:
    a, b = pairs()
    c = RNG.integers(0, 1 << 32, a.size).astype(np.uint32)
    expected = [(x * y + z) % (1 << 32) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist())]
    assert elementwise("mad.lo.s32 {o}, {0}, {1}, {2};", [a, b, c]).tolist() == expected
    wide = c.astype(np.uint64) << np.uint64(20)
    expected = [(x * y + z) % (1 << 64) for x, y, z in zip(signed(a), signed(b), wide.tolist())]
    assert elementwise("mad.wide.s32 {o}, {0}, {1}, {2};", [a, b, wide], np.uint64).tolist() == expected


def field(value: int, start: int, length: int, sign: bool) -> int:
    """bfe by its definition, bit by bit."""
    top = min(start + length - 1, 31)
    last = (value >> top & 1) if sign and length else 0
    return sum((value >> (start + i) & 1 if i < length and start + i <= 31 else last) << i for i in range(32))


def test_bit_fields() -> None:
    values = RNG.integers(0, 1 << 32, 400).astype(np.uint32)
    start, length = (RNG.integers(0, 40, 400).astype(np.uint32) for _ in range(2))
    triples = list(zip(values.tolist(), start.tolist(), length.tolist()))
    found = elementwise("bfe.u32 {o}, {0}, {1}, {2};", [values, start, length])
    assert found.tolist() == [field(*t, False) for t in triples]
    found = elementwise("bfe.s32 {o}, {0}, {1}, {2};", [values, start, length])
    assert found.tolist() == [field(*t, True) for t in triples]
    into = RNG.integers(0, 1 << 32, 400).astype(np.uint32)
    masks = [((1 << n) - 1 << s) & 0xFFFFFFFF for s, n in zip(start.tolist(), length.tolist())]
    expected = [(b & ~m) | (a << s & m) for (a, s, _), b, m in zip(triples, into.tolist(), masks)]
    text = "bfi.b32 {o}, {0}, {1}, {2}, {3};"
    assert elementwise(text, [values, into, start, length]).tolist() == expected


def test_bit_counts() -> None:
    values = EDGES.tolist()
    assert elementwise("popc.b32 {o}, {0};", [EDGES]).tolist() == [v.bit_count() for v in values]
    assert elementwise("clz.b32 {o}, {0};", [EDGES]).tolist() == [32 - v.bit_length() for v in values]
    assert elementwise("brev.b32 {o}, {0};", [EDGES]).tolist() == [int(f"{v:032b}"[::-1], 2) for v in values]
    highest = [(v.bit_length() - 1) % (1 << 32) for v in values]
    assert elementwise("bfind.u32 {o}, {0};", [EDGES]).tolist() == highest


def test_byte_permutation_and_lookup() -> None:
    a, b = np.array([0x33221100], np.uint32), np.array([0x77665584], np.uint32)
    assert elementwise("prmt.b32 {o}, {0}, {1}, 0x7531;", [a, b]).tolist() == [0x77553311]
    assert elementwise("prmt.b32 {o}, {0}, {1}, 0x00c4;", [a, b]).tolist() == [0x0000FF84]  # c: the sign of byte 4
    x, y, z = (RNG.integers(0, 1 << 32, 32).astype(np.uint32) for _ in range(3))
    assert elementwise("lop3.b32 {o}, {0}, {1}, {2}, 0xca;", [x, y, z]).tolist() == ((x & y) | (~x & z)).tolist()
    assert elementwise("shf.l.wrap.b32 {o}, {0}, {1}, 8;", [x, y]).tolist() == ((y << 8) | (x >> 24)).tolist()
    assert elementwise("shf.r.clamp.b32 {o}, {0}, {1}, 32;", [x, y]).tolist() == y.tolist()


FLOATS = np.array(
    [0.0, -0.0, 1.0, -1.5, 3.25, 1e-40, -1e-39, 3e38, -3e38, np.inf, -np.inf, np.nan, 0.1, 65504.0, 1e-8, 2.5],
    np.float32,
)


def float_pairs() -> tuple[NDArray, NDArray]:
    a, b = (np.ascontiguousarray(v.ravel()) for v in np.meshgrid(FLOATS, FLOATS))
    return a, b


def same(found: NDArray, expected: NDArray) -> None:
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_float_arithmetic() -> None:
    a, b = float_pairs()
    with np.errstate(all="ignore"):
        same(elementwise("add.f32 {o}, {0}, {1};", [a, b], np.float32), a + b)
        same(elementwise("sub.rn.f32 {o}, {0}, {1};", [a, b], np.float32), a - b)
        same(elementwise("mul.f32 {o}, {0}, {1};", [a, b], np.float32), a * b)
        same(elementwise("div.rn.f32 {o}, {0}, {1};", [a, b], np.float32), a / b)
        same(elementwise("max.f32 {o}, {0}, {1};", [a, b], np.float32), np.fmax(a, b))
        same(elementwise("min.NaN.f32 {o}, {0}, {1};", [a, b], np.float32), np.minimum(a, b))
        tenth = np.full(a.size, 0.1)
        same(
            elementwise(
                "{ .reg .f32 t; cvt.rn.f32.f64 t, {2}; fma.rn.f32 {o}, {0}, {1}, t; }", [a, b, tenth], np.float32
            ),
            (a.astype(np.float64) * b + np.float32(0.1)).astype(np.float32),
        )


def test_fused_multiply_add_rounded_down_and_up() -> None:
    """Against exact fractions, where a float64 sum is exact and where it is not."""
    big = RNG.standard_normal((3, 200)).astype(np.float32) * np.float32(2.0) ** RNG.integers(-40, 40, (3, 200))
    edges = np.array([[1, 1, 3, 2.0**-30, 0], [1, 1, 0.5, 2.0**-40, 5], [-1, 2.0**-60, -(2.0**-70), 1, 0]], np.float32)
    a, b, c = np.concatenate([big.astype(np.float32), edges, -edges], 1)
    for mode, worse in (("rm", np.less_equal), ("rp", np.greater_equal)):
        found = elementwise(f"fma.{mode}.f32 {{o}}, {{0}}, {{1}}, {{2}};", [a, b, c], np.float32)
        beyond = np.nextafter(found, np.float32(np.inf if mode == "rm" else -np.inf))
        for x, y, z, got, next_one in zip(*(v.tolist() for v in (a, b, c, found, beyond))):
            exact = Fraction(x) * Fraction(y) + Fraction(z)
            assert worse(Fraction(got), exact)
            assert not worse(Fraction(next_one), exact)
    one = np.ones(1, np.float32)
    assert np.signbit(elementwise("fma.rm.f32 {o}, {0}, {0}, {1};", [one, -one], np.float32)[0])
    assert not np.signbit(elementwise("fma.rp.f32 {o}, {0}, {0}, {1};", [one, -one], np.float32)[0])


def test_subnormals_are_flushed_only_where_asked() -> None:
    tiny = np.array([1e-40, -1e-40, 1e-30], np.float32)
    one = np.ones(3, np.float32)
    same(elementwise("mul.f32 {o}, {0}, {1};", [tiny, one], np.float32), tiny)
    found = elementwise("mul.ftz.f32 {o}, {0}, {1};", [tiny, one], np.float32)
    assert found.view(np.uint32).tolist()[:2] == [0, 0x80000000]
    assert found[2] == tiny[2]


def test_packed_bfloat16() -> None:
    a, b, c = (torch.randn(64, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    raw = [t.view(torch.int16).numpy().view(np.uint32) for t in (a, b, c)]
    found = elementwise("fma.rn.bf16x2 {o}, {0}, {1}, {2};", raw).view(np.uint16)
    expected = (a.double() * b.double() + c.double()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert found.tolist() == expected.tolist()


def test_conversions_of_floats() -> None:
    values = np.concatenate([FLOATS, RNG.standard_normal(500).astype(np.float32)])
    torch_values = torch.from_numpy(values)
    found = elementwise("cvt.rn.bf16.f32 {o}, {0};", [values], np.uint16)
    expected = torch_values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(values)
    assert found[number].tolist() == expected[number].tolist()
    assert set(found[~number].tolist()) == {0x7FFF}
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    same(elementwise("cvt.rn.f16.f32 {o}, {0};", [values], np.float16), half)
    same(elementwise("cvt.f32.f16 {o}, {0};", [half], np.float32), half.astype(np.float32))
    other = np.roll(values, 1)
    packed = elementwise("cvt.rn.f16x2.f32 {o}, {0}, {1};", [values, other]).view(np.float16).reshape(-1, 2)
    with np.errstate(over="ignore"):
        same(np.ascontiguousarray(packed[:, 1]), values.astype(np.float16))  # the first source is the upper half
        same(np.ascontiguousarray(packed[:, 0]), other.astype(np.float16))


def test_conversions_of_integers() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -2.5, 3e9, -3e9, np.nan, 7.99, -7.99], np.float32)
    nearest = [0, 2, 2, 0, -2, 2**31 - 1, -(2**31), 0, 8, -8]
    zero = [0, 1, 2, 0, -2, 2**31 - 1, -(2**31), 0, 7, -7]
    assert elementwise("cvt.rni.s32.f32 {o}, {0};", [values], np.int32).tolist() == nearest
    assert elementwise("cvt.rzi.s32.f32 {o}, {0};", [values], np.int32).tolist() == zero
    assert elementwise("cvt.rzi.u32.f32 {o}, {0};", [values], np.uint32).tolist()[5:7] == [3_000_000_000, 0]
    large = np.array([16777217, 2**31 - 1, -5], np.int32)
    same(elementwise("cvt.rn.f32.s32 {o}, {0};", [large], np.float32), large.astype(np.float32))
    assert elementwise("cvt.s64.s32 {o}, {0};", [large], np.int64).tolist() == large.tolist()
    assert elementwise("cvt.u64.u32 {o}, {0};", [large], np.int64).tolist()[2] == 2**32 - 5
    small = np.array([-1, 127, 128], np.int16)
    assert elementwise("cvt.s32.s8 {o}, {0};", [small], np.int32).tolist() == [-1, 127, -128]
    assert elementwise("cvt.u32.u8 {o}, {0};", [small], np.int32).tolist() == [255, 127, 128]
    assert elementwise("cvt.sat.s8.s32 {o}, {0};", [np.array([300, -300, 5], np.int32)], np.int16).tolist() == [
        127,
        -128,
        5,
    ]


@pytest.mark.parametrize(
    ("compare", "function"),
    [
        ("lt.f32", lambda a, b: a < b),
        ("ltu.f32", lambda a, b: ~(a >= b)),
        ("ne.f32", lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)),
        ("neu.f32", lambda a, b: a != b),
        ("equ.f32", lambda a, b: (a == b) | np.isnan(a) | np.isnan(b)),
        ("nan.f32", lambda a, b: np.isnan(a) | np.isnan(b)),
        ("num.f32", lambda a, b: ~np.isnan(a) & ~np.isnan(b)),
    ],
)
def test_float_comparisons(compare: str, function) -> None:
    a, b = float_pairs()
    found = elementwise(f"setp.{compare} %p1, {{0}}, {{1}}; selp.b32 {{o}}, 1, 0, %p1;", [a, b])
    assert found.astype(bool).tolist() == function(a, b).tolist()


def test_integer_comparisons_and_predicates() -> None:
    a, b = pairs()
    less = elementwise("setp.lt.s32 %p1, {0}, {1}; selp.b32 {o}, 1, 0, %p1;", [a, b])
    assert less.astype(bool).tolist() == [x < y for x, y in zip(signed(a), signed(b))]
    lower = elementwise("setp.lo.u32 %p1, {0}, {1}; selp.b32 {o}, 1, 0, %p1;", [a, b])
    assert lower.astype(bool).tolist() == (a < b).tolist()
    text = "setp.eq.s32 %p2, {0}, 7; setp.lt.and.u32 %p1|%p3, {0}, {1}, !%p2; selp.b32 {o}, 1, 0, {p};"
    holds = elementwise(text.replace("{p}", "%p1"), [a, b])
    fails = elementwise(text.replace("{p}", "%p3"), [a, b])
    assert holds.astype(bool).tolist() == ((a < b) & (a != 7)).tolist()
    assert fails.astype(bool).tolist() == (~(a < b) & (a != 7)).tolist()


@pytest.mark.parametrize(
    ("op", "function"), [("ex2", np.exp2), ("lg2", np.log2), ("rcp", np.reciprocal), ("sqrt", np.sqrt)]
)
def test_approximations_are_within_a_unit(op: str, function) -> None:
    values = np.abs(RNG.standard_normal(200).astype(np.float32)) + np.float32(0.01)
    found = elementwise(f"{op}.approx.f32 {{o}}, {{0}};", [values], np.float32)
    np.testing.assert_allclose(found, function(values.astype(np.float64)), rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "frobnicate.b32 {o}, {0};",
        "add.rz.f32 {o}, {0}, {0};",
        "add.sat.s32 {o}, {0}, {0};",
        "add.s32.foo {o}, {0}, {0};",
        "mov.u32 {o}, %clock;",
        "mov.u32 {o}, %tid.w;",
        "mul.s32 {o}, {0}, {0};",
        "ld.global.frob.b32 {o}, [%rd0];",
        "add.s64 {o}, {0}, {0};",
        "mov.b32 {o}, missing;",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {{o}}, {{0}}, {{0}}, {{0}};",
        "cvt.f32.f64 {o}, %d1;",
    ],
)
def test_what_is_unknown_is_an_error(text: str) -> None:
    with pytest.raises(UnknownPtx):
        elementwise(text, [np.arange(32, dtype=np.uint32)])
