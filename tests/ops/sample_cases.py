"""Cases of the op `sample`: rows of logits of many shapes times ways to cut and draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from ops.cases import strided_rows
from torch import Tensor

from pagelens.ops import SamplingCut

QWEN3_VOCABULARY = 151_936
CUTS = {
    "greedy": SamplingCut(0.0),
    "temperature": SamplingCut(1.0),
    "cold": SamplingCut(0.3),
    "hot": SamplingCut(50.0),
    "frozen": SamplingCut(1e-9),
    "top_k 1": SamplingCut(1.0, top_k=1),
    "top_k 20, top_p 0.95": SamplingCut(0.6, top_k=20, top_p=0.95),
    "top_k 50, min_p": SamplingCut(2.0, top_k=50, min_p=0.05),
    "top_k 3000": SamplingCut(1.0, top_k=3000, top_p=0.99),
    "top_p 0.95": SamplingCut(1.0, top_p=0.95),
    "top_p 0.001": SamplingCut(1.0, top_p=0.001),
    "top_p 0.9999": SamplingCut(1.5, top_p=0.9999),
    "min_p": SamplingCut(1.0, min_p=0.1),
    "min_p 1": SamplingCut(1.0, min_p=1.0),
    "all three": SamplingCut(1.2, top_k=40, top_p=0.9, min_p=0.01),
}


def normal(g: np.random.Generator, size: int) -> np.ndarray:
    return g.standard_normal(size) * 3


def with_ties(g: np.random.Generator, size: int) -> np.ndarray:
    return np.round(normal(g, size), 1)


def flat(g: np.random.Generator, size: int) -> np.ndarray:
    return g.standard_normal(size) * 0.01


def equal(g: np.random.Generator, size: int) -> np.ndarray:
    return np.full(size, -3.5)


def peaked(g: np.random.Generator, size: int) -> np.ndarray:
    row = normal(g, size)
    row[g.integers(size)] = 60.0
    return row


def masked(g: np.random.Generator, size: int) -> np.ndarray:
    row = normal(g, size)
    row[g.random(size) < 0.7] = -np.inf
    row[g.integers(size)] = 1.0
    return row


def rising(g: np.random.Generator, size: int) -> np.ndarray:
    return np.linspace(-20, 5, size)


KINDS = {f.__name__: f for f in (normal, with_ties, flat, equal, peaked, masked, rising)}


@dataclass(frozen=True)
class SampleCase:
    """`draws` rows of one kind, one uniform number each, 0 and one near 1 among them. (In the last
    1e-9 below 1 tokens of a long tail stand so near to each other that rounding decides.)"""

    vocabulary: int
    kind: str
    cut: str
    draws: int = 24

    @property
    def id(self) -> str:
        return f"{self.vocabulary}-{self.kind}-{self.cut}"

    def tensors(self) -> tuple[Tensor, list[SamplingCut]]:
        """logits [draws, vocabulary], rows strided, and their cuts."""
        g = np.random.default_rng(self.vocabulary)
        rows = np.stack([KINDS[self.kind](g, self.vocabulary) for _ in range(self.draws)]).astype(np.float32)
        uniforms = [0.0, 1 - 1e-6, *g.random(self.draws - 2).tolist()]
        return strided_rows(torch.from_numpy(rows)), [CUTS[self.cut]._replace(uniform=u) for u in uniforms]


SMALL_SAMPLES = [SampleCase(v, kind, cut) for v in (1, 2, 65, 1000) for kind in KINDS for cut in CUTS]
REAL_SAMPLES = [
    SampleCase(QWEN3_VOCABULARY, kind, cut, draws=4) for kind in ("normal", "with_ties", "rising") for cut in CUTS
]
