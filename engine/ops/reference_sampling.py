"""`sample` of the contract in plain numpy: sorts what is left after the cuts and adds it up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from . import SamplingCut


class ReferenceSampling:
    """The op `sample` of the reference backend."""

    def sample(self, logits: Tensor, cuts: Sequence[SamplingCut]) -> list[int]:
        return [choose(row, cut) for row, cut in zip(logits.numpy(), cuts, strict=True)]


def choose(row: NDArray[np.float32], cut: SamplingCut) -> int:
    best = int(row.argmax())  # the first of equals, and of NaN if there is one
    if not np.isfinite(row[best]):
        return -1
    return best if cut.temperature == 0 else draw(row, cut)


def draw(row: NDArray[np.float32], cut: SamplingCut) -> int:
    """The token of a row of finite maximum for a temperature above 0."""
    tokens = np.arange(len(row))
    if 0 < cut.top_k < len(row):
        kth = np.partition(row, len(row) - cut.top_k)[len(row) - cut.top_k]
        above, equal = np.flatnonzero(row > kth), np.flatnonzero(row == kth)
        tokens = np.concatenate([above, equal[: cut.top_k - len(above)]])
    weights = (row[tokens] - row.max()).astype(np.float64)
    weights = np.exp(weights / cut.temperature)
    keep = weights > 0
    if cut.min_p > 0:
        keep &= weights >= cut.min_p
    if cut.top_p < 1:
        # Tokens below this share cannot be among the fewest that reach top_p, even all together; most need no sorting.
        total = weights[keep].sum()
        keep &= weights >= (1 - cut.top_p) * total / len(weights) * (1 - 1e-9)
    tokens, weights = tokens[keep], weights[keep]
    order = np.lexsort((tokens, -weights))
    tokens, weights = tokens[order], weights[order]
    cumulative = np.cumsum(weights)
    if cut.top_p < 1:
        last = int(np.searchsorted(cumulative, cut.top_p * total))
        cumulative = cumulative[: last + 1]
    place = int(np.searchsorted(cumulative, cut.uniform * cumulative[-1], side="right"))
    return int(tokens[min(place, len(cumulative) - 1)])
