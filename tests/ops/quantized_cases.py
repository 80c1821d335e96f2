"""Cases of the shared list whose weights are quantised: every kind, with and without zeros, input orders and rounded
activations, with groups of 8 to a whole row, alone, in a SwiGLU and in a mixture of experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from ops.cases import BF16, F32, Case, LinearCase, MoeCase, Run, SwigluCase, element_bytes, noise
from torch import Tensor

from pagelens.quantization import VALUE_DTYPES, QuantizedWeight

# One step of a rounded activation, relative to the largest of its row.
STEP = {"int8": 1 / 127, "fp8": 2.0**-4, None: 0.0}


@dataclass(frozen=True)
class Recipe:
    """How a weight is quantised; group 0 is one scale a row."""

    kind: str = "int4"
    group: int = 32
    zeros: bool = False
    order: bool = False
    activation: str | None = None
    scales: torch.dtype = BF16
    activation_group: int | None = None

    @property
    def name(self) -> str:
        parts = [f"{self.kind}g{self.group or 'row'}", str(self.scales).removeprefix("torch.")]
        parts += [n for n in ("zeros", "order") if getattr(self, n)]
        activation = f"a{self.activation}" + (f"g{self.activation_group}" if self.activation_group else "")
        return "-".join(parts + ([activation] if self.activation else []))

    def bytes(self, n: int, k: int) -> int:
        groups = -(-k // (self.group or k)) if k else 0
        extra = element_bytes(self.scales) + (2 if self.zeros else 0)
        return n * k * (4 if self.kind == "int4" else 8) // 8 + n * groups * extra

    def weight(
        self, g: torch.Generator, n: int, k: int, dtype: torch.dtype, order: Tensor | None = None
    ) -> QuantizedWeight:
        """Random values of the whole range, as large as a real layer's: the sum of k products is of size 1."""
        low, high, spread = {"int4": (-8, 8, 4.6), "int8": (-128, 128, 74.0), "fp8": (0, 0, 1.0)}[self.kind]
        if self.kind == "fp8":
            values = (torch.randn(n, k, generator=g) * 20).to(torch.float8_e4m3fn)
            spread = 20.0
            # the smallest numbers of the format too
            values[:, ::7] = (torch.randn(n, -(-k // 7), generator=g) * 0.006).to(torch.float8_e4m3fn)
        else:
            values = torch.randint(low, high, (n, k), generator=g).to(VALUE_DTYPES[self.kind])
        size = self.group or max(k, 1)
        groups = -(-k // size)
        scales = ((0.5 + torch.rand(n, groups, generator=g)) / (spread * math.sqrt(max(k, 1)))).to(self.scales)
        zeros = None
        if self.zeros:
            top = 8 if self.kind == "int4" else 128
            zeros = torch.randint(-top, top + 1, (n, groups), generator=g).to(torch.int16)
        if self.order and order is None:
            order = torch.randperm(k, generator=g)
        return QuantizedWeight(
            self.kind,
            values,
            scales,
            size,
            zeros,
            order if self.order else None,
            self.activation,
            dtype,
            self.activation_group,
        )


@dataclass(frozen=True)
class QuantizedLinearCase(LinearCase):
    recipe: Recipe = field(default_factory=Recipe)

    def label(self) -> str:
        return f"{super().label()}-{self.recipe.name}"

    def tensors(self) -> tuple[Tensor, Any, Tensor | None, Tensor | None]:
        x, _, bias, residual = super().tensors()
        return x, self.recipe.weight(self.generator(), self.out, self.width, self.dtype), bias, residual

    def absolute(self) -> float:
        # With zeros the sums of x q and zero X are several times their difference.
        return super().absolute() * (4 if self.recipe.zeros else 1)

    def bytes(self) -> int:
        x = element_bytes(self.dtype) * self.rows * (self.out + self.width)
        return x + self.recipe.bytes(self.out, self.width)


def rounding_step(recipe: Recipe, inner: int) -> float:
    """Where a product falls between two steps of rounded activations, the two sides may take different ones."""
    return 2 * STEP[recipe.activation] / math.sqrt(inner)


@dataclass(frozen=True)
class QuantizedSwigluCase(SwigluCase):
    recipe: Recipe = field(default_factory=Recipe)

    def label(self) -> str:
        return f"{super().label()}-{self.recipe.name}"

    def absolute(self) -> float:
        return super().absolute() * (4 if self.recipe.zeros else 1) + rounding_step(self.recipe, self.inner)

    def weights(self, g: torch.Generator) -> Any:
        order = torch.randperm(self.width, generator=g)  # gate and up read the same input
        gate, up = (self.recipe.weight(g, self.inner, self.width, self.dtype, order) for _ in range(2))
        return gate, up, self.recipe.weight(g, self.width, self.inner, self.dtype)

    def bind(self, ops: Any) -> Run:
        g = self.generator()
        x = noise(g, (self.rows, self.width), self.dtype)
        packed = ops.pack_swiglu(*self.weights(g))
        return lambda: ops.swiglu_ffn(x, packed)

    def bytes(self) -> int:
        weights = 2 * self.recipe.bytes(self.inner, self.width) + self.recipe.bytes(self.width, self.inner)
        return weights + 2 * element_bytes(self.dtype) * self.rows * self.width


@dataclass(frozen=True)
class QuantizedMoeCase(MoeCase):
    recipe: Recipe = field(default_factory=Recipe)
    shared: int = 0

    def label(self) -> str:
        return f"{super().label()}-{self.recipe.name}"

    def absolute(self) -> float:
        return super().absolute() * (4 if self.recipe.zeros else 1) + rounding_step(self.recipe, self.inner)

    def weights(self, g: torch.Generator) -> Any:
        router = noise(g, (self.experts, self.width), self.dtype, self.width**-0.5)
        one = QuantizedSwigluCase(width=self.width, inner=self.inner, dtype=self.dtype, recipe=self.recipe)
        return router, [one.weights(g) for _ in range(self.experts)]

    def bytes(self) -> int:
        used = min(self.experts, self.rows * self.top_k)
        one = QuantizedSwigluCase(width=self.width, inner=self.inner, dtype=self.dtype, recipe=self.recipe, rows=0)
        return used * one.bytes() + 2 * element_bytes(self.dtype) * self.rows * self.width


RECIPES = [
    Recipe(),
    Recipe(zeros=True, group=64, scales=torch.float16),
    Recipe(order=True, zeros=True, group=16),
    Recipe(group=8, scales=F32),
    Recipe(group=0),
    Recipe("int8", 0, scales=F32),
    Recipe("int8", 24, zeros=True, scales=torch.float16, order=True),
    Recipe("int8", 0, activation="int8"),
    Recipe("int8", 0, activation="int8", zeros=True),
    Recipe("int8", 0, activation="int8", scales=F32, activation_group=64),
    Recipe("int8", 24, activation="int8", scales=torch.float16, activation_group=24),
    Recipe("int4", 32, activation="int8", activation_group=32),
    Recipe("int4", 0, activation="int8", scales=F32, activation_group=40),
    Recipe("fp8", 64),
    Recipe("fp8", 0, activation="fp8", scales=F32),
]


FP8 = Recipe("fp8", 64)
# What weights="int8" and "int4" make.
OWN_INT8 = Recipe("int8", 0, activation="int8", scales=F32, activation_group=64)
OWN_INT4 = Recipe("int4", 32, activation="int8", activation_group=32)


def _small() -> list[Case]:
    cases: list[Case] = []
    for dtype in (F32, BF16):
        for recipe in RECIPES:
            for rows, width, out in ((1, 192, 96), (5, 193, 33), (15, 264, 40)):
                extra = {"bias": rows == 5, "residual": rows == 5, "strided": rows == 15}
                cases.append(QuantizedLinearCase(dtype, rows=rows, width=width, out=out, recipe=recipe, **extra))
            cases.append(QuantizedSwigluCase(dtype, rows=3, width=72, inner=40, recipe=recipe))
        for recipe in (RECIPES[0], RECIPES[2], RECIPES[7], FP8, OWN_INT8, OWN_INT4):
            cases.append(QuantizedMoeCase(dtype, rows=7, width=64, inner=24, recipe=recipe))
        for rows, width, out in ((0, 64, 32), (1, 1, 1), (3, 7, 5), (4, 0, 3), (2, 32, 0)):
            cases.append(QuantizedLinearCase(dtype, rows=rows, width=width, out=out, recipe=Recipe(group=0)))
        for recipe in (OWN_INT8, OWN_INT4):
            for rows, width, out in ((0, 64, 32), (1, 1, 1), (3, 7, 5), (2, 64, 0), (9, 1029, 65), (200, 70, 33)):
                cases.append(QuantizedLinearCase(dtype, rows=rows, width=width, out=out, recipe=recipe))
    return cases


SMALL_QUANTIZED = _small()
INT4, INT8 = Recipe(), Recipe("int8", 0, scales=F32)
REAL_QUANTIZED = (
    [
        QuantizedLinearCase(BF16, kind="real", rows=rows, width=width, out=out, recipe=recipe)
        for recipe in (
            INT4,
            INT8,
            OWN_INT4,
            OWN_INT8,
            Recipe(zeros=True, group=128, scales=torch.float16),
            Recipe("fp8", 128),
        )
        for rows, width, out in ((1, 1024, 3072), (4, 3072, 1024), (40, 1024, 1024))
    ]
    + [
        QuantizedLinearCase(BF16, kind="real", rows=512, width=1024, out=3072, recipe=recipe)
        for recipe in (OWN_INT8, OWN_INT4)
    ]
    + [
        QuantizedMoeCase(BF16, kind="real", rows=1, width=2048, inner=768, experts=8, top_k=8, recipe=recipe)
        for recipe in (INT4, OWN_INT4)
    ]
)
