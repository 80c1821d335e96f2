"""What a case of an op is, and when a result is right.

Tolerances come from the arithmetic, not from what was seen. Both sides sum in float32, in different orders: a sum of n
terms of like size wanders by about 2^-24 * sqrt(n) of its largest partial sum; 8 of these are allowed, relative to the
largest value of the result. A bfloat16 result is rounded once on both sides, so where that wandering crosses a rounding
boundary it may be one unit (2^-7 of the value) off, but rarely: `max_flips` is the share of elements
that may differ at all. float16, which GPUs run too, is the same with 2^-10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pagelens.ops import OpCase

Run = Callable[[], Any]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHORT = {F32: "f32", BF16: "bf16", F16: "f16"}
UNIT = {F32: 0.0, BF16: 2.0**-7, F16: 2.0**-10}  # of a rounded result, relative; float32 results are not rounded


def noise(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def strided_rows(x: Tensor) -> Tensor:
    """The same values, rows 3 elements further apart than they are wide."""
    wide = torch.full((x.shape[0], x.shape[1] + 3), math.nan, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def element_bytes(dtype: torch.dtype) -> int:
    return 4 if dtype == F32 else 2


@dataclass(frozen=True)
class Case:
    """What all cases share. `terms` is the length of the longest sum."""

    op: ClassVar[str]
    dtype: torch.dtype = F32
    kind: str = "small"
    seed: int = 0
    max_flips: ClassVar[float] = 0.01

    @property
    def id(self) -> str:
        return f"{self.op}[{self.label()}-{SHORT[self.dtype]}]"

    @property
    def terms(self) -> int:
        raise NotImplementedError

    def label(self) -> str:
        raise NotImplementedError

    def sizes(self) -> tuple[tuple[str, int], ...]:
        return ()

    def op_case(self) -> OpCase:
        return OpCase(self.op, self.dtype, self.sizes())

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def bind(self, ops: Any) -> Run:
        """Pack the weights for `ops` and return a call that may be repeated and returns the same result each time."""
        raise NotImplementedError

    def timed(self, ops: Any) -> Run:
        """What a benchmark times: the op alone, where `bind` does more."""
        return self.bind(ops)

    def absolute(self) -> float:
        """Allowed difference, relative to the largest value of the expected result."""
        return 8 * 2.0**-24 * math.sqrt(max(self.terms, 1))

    def bytes(self) -> int:
        """Bytes that must be read and written once."""
        raise NotImplementedError

    def flops(self) -> int:
        raise NotImplementedError


def difference(result: Tensor, expected: Tensor, case: Case) -> str | None:
    """None if `result` is right, else a sentence with the worst element."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return f"{case.id}: {list(result.shape)} {result.dtype} instead of {list(expected.shape)} {expected.dtype}"
    if not expected.numel():
        return None
    if not torch.equal(result.isnan(), expected.isnan()):
        return f"{case.id}: NaN in {int(result.isnan().sum())} places instead of {int(expected.isnan().sum())}"
    a, b = result.double().nan_to_num(), expected.double().nan_to_num()
    once = UNIT[expected.dtype]
    excess = (a - b).abs() - once * b.abs() - case.absolute() * float(b.abs().max())
    worst = int(excess.argmax())
    if float(excess.max()) > 0:
        found, wanted = float(a.flatten()[worst]), float(b.flatten()[worst])
        return f"{case.id}: element {worst} is {found!r} instead of {wanted!r} (largest {float(b.abs().max()):.4g})"
    flips = float((a != b).double().mean())
    if once and flips > max(case.max_flips, 2 / a.numel()):
        return f"{case.id}: {flips:.2%} of the elements differ, at most {case.max_flips:.2%} may"
    return None
