"""What is done to one sequence's logits before a token is chosen: penalties, the n-gram guard, masks.

A processor changes a row in place and only where it must; sequences without processors are never touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .repetition import RunTracker

Row = NDArray[np.float32]


class LogitsProcessor(Protocol):
    def apply(self, row: Row) -> None:
        """Change the logits [V] in place for the next token."""
        ...

    def observe(self, token: int) -> None:
        """Take note of a token that was generated."""
        ...


class NgramProcessor:
    """Windowed no-repeat n-gram rule over generated tokens (deepseek-ocr.md, section 8).

    With L tokens generated, a token is forbidden if it followed the last size-1 tokens at an earlier place that starts
    at L-window or later; never if it is in the white-list.
    """

    def __init__(self, size: int, window: int, whitelist: frozenset[int]) -> None:
        self._size, self._window = size, window
        self._whitelist = whitelist
        # An earlier copy of the last size-1 tokens that starts at i lies L-(size-1)-i places back, and i >= L-window.
        self._tracker = RunTracker(window - size + 1)
        self._tokens: list[int] = []

    @property
    def rule(self) -> tuple[int, int, frozenset[int], list[int]]:
        """size, window, white-list and the tokens so far: what a device needs to apply the rule itself."""
        return self._size, self._window, self._whitelist, self._tokens

    def banned(self) -> set[int]:
        """Tokens that must not come next."""
        tokens = self._tokens
        found = {tokens[-distance] for distance, run in self._tracker.runs.items() if run >= self._size - 1}
        return found - self._whitelist

    def apply(self, row: Row) -> None:
        for token in self.banned():
            row[token] = -np.inf

    def observe(self, token: int) -> None:
        self._tokens.append(token)
        self._tracker.push(token)


class PenaltyProcessor:
    """Repetition penalty over prompt and answer, presence and frequency penalties over the answer, as vLLM has them.

    First logits > 0 of seen tokens are divided by the repetition penalty and the others multiplied; then
    frequency * count and presence * (count > 0) are subtracted.
    """

    def __init__(self, prompt: Iterable[int], repetition: float, presence: float, frequency: float) -> None:
        self._repetition, self._presence, self._frequency = repetition, presence, frequency
        seen = sorted(set(prompt)) if repetition != 1.0 else []
        self._index = {token: place for place, token in enumerate(seen)}
        self._tokens = np.zeros(max(64, 2 * len(seen)), np.int64)
        self._tokens[: len(seen)] = seen
        self._counts = np.zeros(len(self._tokens), np.float32)

    def apply(self, row: Row) -> None:
        tokens, counts = self._tokens[: len(self._index)], self._counts[: len(self._index)]
        logits = row[tokens]
        if self._repetition != 1.0:
            logits = np.where(logits > 0, logits / np.float32(self._repetition), logits * np.float32(self._repetition))
        logits -= np.float32(self._frequency) * counts + np.float32(self._presence) * (counts > 0)
        row[tokens] = logits

    def observe(self, token: int) -> None:
        place = self._index.setdefault(token, len(self._index))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[place] = token
        self._counts[place] += 1


class BanProcessor:
    """Forbids tokens at every step."""

    def __init__(self, banned: Iterable[int]) -> None:
        self._banned = np.array(sorted(banned), np.int64)

    def apply(self, row: Row) -> None:
        row[self._banned] = -np.inf

    def observe(self, token: int) -> None:
        pass


class MinTokensProcessor:
    """Forbids the tokens that would end the answer until it has min_tokens tokens."""

    def __init__(self, min_tokens: int, end_ids: Iterable[int]) -> None:
        self._missing = min_tokens
        self._end_ids = np.array(sorted(end_ids), np.int64)

    def apply(self, row: Row) -> None:
        if self._missing > 0:
            row[self._end_ids] = -np.inf

    def observe(self, token: int) -> None:
        self._missing -= 1
