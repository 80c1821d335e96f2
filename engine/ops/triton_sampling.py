"""The choice of tokens on the device: what a row asks for goes there, token ids come back, logits stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowChoice:
    """How the token of one row of logits is chosen; see kernels/sample.py.

    temperature 0 is greedy; uniform in [0, 1) is the draw. With ngram_size > 0 the n-grams of the last `ngram_window`
    of `history` are not repeated, but for tokens in `allowed`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.0
    ngram_size: int = 0
    ngram_window: int = 0
    history: Sequence[int] = ()
    allowed: frozenset[int] = frozenset()


class DeviceSampling:
    """Chooses tokens by the kernels in kernels/sample.py."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def choose(self, logits: Tensor, rows: Sequence[RowChoice], num_tokens: int | None) -> list[int]:
        """A token a row of logits [R, V] float32, which may be changed; -1 where they are not finite.

        The one place where a step waits for the device and reads from it: 4 bytes a row.
        """
        tokens: list[int] = self.launch(logits, rows, num_tokens).tolist()
        return tokens

    def launch(self, logits: Tensor, rows: Sequence[RowChoice], num_tokens: int | None) -> Tensor:
        """The same as a tensor [R] int32 on the device, without waiting."""
        from ..kernels.sample import sample

        guarded = [row for row in rows if row.ngram_size > 0]
        if guarded:
            self._mask(logits, rows)
        reals = [[row.temperature, row.top_p, row.min_p, row.uniform] for row in rows]
        temperature, top_p, min_p, uniform = self._move(torch.tensor(reals, dtype=torch.float32).T.contiguous())
        top_k = self._move(torch.tensor([row.top_k for row in rows], dtype=torch.int32))
        return sample(logits, temperature, top_k, top_p, min_p, uniform, num_tokens)

    def _mask(self, logits: Tensor, rows: Sequence[RowChoice]) -> None:
        from ..kernels.sample import mask_ngrams

        tails = [list(row.history[-row.ngram_window :]) if row.ngram_size else [] for row in rows]
        history = _padded(tails)
        allowed = _padded([sorted(row.allowed) for row in rows])
        numbers = [[len(tail), row.ngram_size] for tail, row in zip(tails, rows)]
        lengths, sizes = self._move(torch.tensor(numbers, dtype=torch.int32).T.contiguous())
        mask_ngrams(logits, self._move(history), lengths, sizes, self._move(allowed))

    def _move(self, x: Tensor) -> Tensor:
        return x if self._device.type == "cpu" else x.pin_memory().to(self._device, non_blocking=True)


def _padded(lists: Sequence[Sequence[int]]) -> Tensor:
    """[R, longest] int32, the rest -1; at least one column."""
    width = max([1, *(len(x) for x in lists)])
    return torch.tensor([[*x, *[-1] * (width - len(x))] for x in lists], dtype=torch.int32)
