"""Random sizes, formats and batches against the reference, under every instruction set, with one thread and several.

Every tensor lies beside a page that may not be touched. COUNT can be raised to search longer (28 cases a second).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.guarded import GuardedOps, Guards
from ops.cache_cases import AttentionCase, Int8AttentionCase, Int8RopeCase, Paged, RopeCase
from ops.case import BF16, F32, Case, difference
from ops.cases import LinearCase, MoeCase, NormCase, SwigluCase
from ops.quantized_cases import QuantizedLinearCase, QuantizedSwigluCase, Recipe
from ops.vision_cases import ConvDownsampleCase, PatchEmbedCase, SequenceAttentionCase, WindowAttentionCase

from pagelens import _native
from pagelens.ops.native import NativeOps
from pagelens.ops.reference import ReferenceOps

COUNT = 6  # of each kind
EDGES = (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
ROWS = (1, 2, 3, 4, 5, 14, 15, 28, 29, 32, 33, 47, 48, 49, 168, 169, 340)
CHOSEN = _native.isa()

Dice = random.Random


def size(dice: Dice, most: int) -> int:
    return dice.choice([dice.randint(1, most), dice.randint(1, 40), dice.choice(EDGES)])


def rows(dice: Dice) -> int:
    return dice.choice([dice.randint(1, 40), dice.choice(ROWS)])


def dtype(dice: Dice) -> torch.dtype:
    return dice.choice([F32, BF16])


def often(dice: Dice) -> bool:
    return dice.random() < 0.4


def recipe(dice: Dice) -> Recipe:
    kind, group = dice.choice(["int4", "int8", "fp8"]), dice.choice([0, 8, 16, 24, 32, 40, 64, 128])
    activation = dice.choice([None, "fp8" if kind == "fp8" else "int8"])
    grouped = activation == "int8" and dice.random() < 0.7
    extras = kind != "fp8" and not grouped
    return Recipe(
        kind,
        group,
        zeros=extras and often(dice),
        order=extras and often(dice),
        activation=activation,
        scales=dice.choice([F32, BF16, torch.float16]),
        activation_group=(group or dice.choice([8, 32, 40, 64, 128])) if grouped else None,
    )


def paged(dice: Dice) -> Paged:
    sequences = []
    for _ in range(dice.randint(0, 5)):
        new = dice.choice([0, 1, 1, 1, 2, 3, 4, 5, dice.randint(1, 70)])
        sequences.append((new, new + dice.choice([0, dice.randint(0, 40), dice.randint(0, 400)])))
    return Paged(tuple(sequences), dice.choice([1, 3, 4, 7, 16, 16, 16, 20, 32, 48, 64, 128]))


def linear(dice: Dice) -> Case:
    return LinearCase(
        dtype(dice),
        rows=rows(dice),
        width=size(dice, 1500),
        out=size(dice, 300),
        bias=often(dice),
        activation=dice.choice([None, "gelu", "silu", "quick_gelu"]),
        residual=often(dice),
        strided=often(dice),
        out_dtype=dice.choice([None, F32]),
    )


def quantized_linear(dice: Dice) -> Case:
    sizes = {"rows": rows(dice), "width": size(dice, 1100), "out": size(dice, 200)}
    flags = {name: often(dice) for name in ("bias", "residual", "strided")}
    return QuantizedLinearCase(dtype(dice), **sizes, **flags, recipe=recipe(dice))


def norm(dice: Dice) -> Case:
    return NormCase(dtype(dice), rows=rows(dice), width=size(dice, 1500), layer=often(dice), strided=often(dice))


def rope(dice: Dice) -> Case:
    kv_heads, kind = dice.randint(1, 4), dice.choice([RopeCase, Int8RopeCase])
    heads, head_dim = kv_heads * dice.randint(1, 8), dice.choice([4, 8, 12, 20, 32, 64, 96, 100, 128, 256, 512])
    return kind(dtype(dice), batch=paged(dice), heads=heads, kv_heads=kv_heads, head_dim=head_dim, norm=often(dice))


def attention(dice: Dice) -> Case:
    kv_heads, kind = dice.randint(1, 4), dice.choice([AttentionCase, Int8AttentionCase])
    heads, head_dim = kv_heads * dice.randint(1, 8), dice.choice([4, 8, 12, 20, 32, 64, 96, 100, 128, 160, 256])
    return kind(dtype(dice), batch=paged(dice), heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def swiglu(dice: Dice) -> Case:
    sizes = {"rows": rows(dice), "width": size(dice, 300), "inner": size(dice, 300)}
    if often(dice):
        return QuantizedSwigluCase(dtype(dice), **sizes, recipe=recipe(dice))
    return SwigluCase(dtype(dice), **sizes)


def moe(dice: Dice) -> Case:
    experts = dice.randint(1, 20)
    return MoeCase(
        dtype(dice),
        rows=rows(dice),
        width=size(dice, 150),
        inner=size(dice, 80),
        experts=experts,
        top_k=dice.randint(1, min(experts, 8)),
        shared=dice.choice([0, size(dice, 60)]),
        renormalize=often(dice),
    )


def vision_attention(dice: Dice) -> Case:
    heads, head_dim = dice.randint(1, 3), dice.choice([1, 2, 3, 4, 7, 16, 31, 33, 64, 68, 80])
    kind, batch = dtype(dice), dice.randint(1, 2)
    if often(dice):
        return SequenceAttentionCase(kind, batch=batch, tokens=size(dice, 300), heads=heads, head_dim=head_dim)
    return WindowAttentionCase(
        kind,
        batch=batch,
        grid=dice.randint(1, 20),
        window=dice.choice([0, dice.randint(1, 22)]),
        heads=heads,
        head_dim=head_dim,
        native_tables=often(dice),
    )


def convolution(dice: Dice) -> Case:
    if often(dice):
        patch = dice.randint(1, 9)
        side = patch * dice.randint(1, 8)
        return PatchEmbedCase(dtype(dice), batch=dice.randint(1, 3), side=side, patch=patch, width=size(dice, 100))
    # A norm over two or three channels has a result near +-1 whose sign is decided by the last bits.
    return ConvDownsampleCase(
        dtype(dice),
        batch=dice.randint(1, 2),
        grid=dice.randint(1, 14),
        width=size(dice, 50),
        neck=dice.randint(6, 40),
        down=(dice.randint(1, 40), dice.randint(1, 40)),
    )


KINDS: tuple[Callable[[Dice], Case], ...] = (
    linear,
    quantized_linear,
    norm,
    rope,
    attention,
    swiglu,
    moe,
    vision_attention,
    convolution,
)


@pytest.fixture(scope="module")
def pools() -> Iterator[list[NativeOps]]:
    made = [NativeOps(threads) for threads in (1, 3)]
    yield made
    for ops in made:
        ops.close()
    _native.set_isa(CHOSEN)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_any_sizes_equal_the_reference(kind: Callable[[Dice], Case], pools: list[NativeOps]) -> None:
    dice, guards = random.Random(kind.__name__), Guards()
    for number in range(COUNT):
        case = kind(dice)
        expected = case.bind(ReferenceOps())().clone()
        for isa in _native.supported_isas():
            _native.set_isa(isa)
            results = [case.bind(GuardedOps(ops, guards, at_end=number % 4 > 0))() for ops in pools]
            guards.free()
            problem = difference(results[0], expected, case)
            assert problem is None, f"{isa}: {problem} {case}"
            assert torch.equal(results[0].nan_to_num(), results[1].nan_to_num()), f"{isa}: other bits, {case}"
