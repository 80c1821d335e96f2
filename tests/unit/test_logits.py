"""Logits processors: the n-gram rule against the published loop, penalties against vLLM's formulas, min_tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagelens.runtime.logits import MinTokensProcessor, NgramProcessor, PenaltyProcessor


def banned_by_the_rule(t: list[int], n: int, m: int, whitelist: set[int]) -> set[int]:
    """deepseek-ocr.md section 8, word by word."""
    length = len(t)
    if length < n:
        return set()
    prefix = t[length - n + 1 :]
    banned = {t[i + n - 1] for i in range(max(0, length - m), length - n + 1) if t[i : i + n - 1] == prefix}
    return banned - whitelist


@given(
    tokens=st.lists(st.integers(0, 3), max_size=40),
    size=st.integers(2, 5),
    extra=st.integers(0, 12),
    whitelist=st.frozensets(st.integers(0, 3), max_size=2),
)
def test_ngram_rule_at_every_length(tokens: list[int], size: int, extra: int, whitelist: frozenset[int]) -> None:
    processor = NgramProcessor(size, size + extra, whitelist)
    assert processor.banned() == set()
    for length, token in enumerate(tokens, start=1):
        processor.observe(token)
        assert processor.banned() == banned_by_the_rule(tokens[:length], size, size + extra, set(whitelist))


def test_ngram_rule_at_its_published_size_and_window() -> None:
    block = list(range(100, 130))
    processor = NgramProcessor(30, 90, frozenset())
    for token in block + block[:29]:
        processor.observe(token)
    row = np.zeros(200, np.float32)
    processor.apply(row)
    assert np.flatnonzero(np.isneginf(row)).tolist() == [129]


def test_window_ends_where_the_rule_says() -> None:
    """With window m the earliest start looked at is L-m: a copy one place earlier is forgotten."""
    for gap, found in ((4, {9}), (5, set())):
        tokens = [1, 2, 9, *range(20, 20 + gap), 1, 2]
        processor = NgramProcessor(3, 9, frozenset())
        for token in tokens:
            processor.observe(token)
        assert len(tokens) == 5 + gap
        assert processor.banned() == found == banned_by_the_rule(tokens, 3, 9, set())


def penalised(
    row: np.ndarray, prompt: list[int], answer: list[int], rep: float, pres: float, freq: float
) -> np.ndarray:
    """vLLM's formulas over the whole vocabulary."""
    out = row.astype(np.float64)
    seen = np.isin(np.arange(len(row)), prompt + answer)
    out[seen] = np.where(out[seen] > 0, out[seen] / rep, out[seen] * rep)
    counts = np.bincount(answer, minlength=len(row)) if answer else np.zeros(len(row))
    return out - freq * counts - pres * (counts > 0)


@pytest.mark.parametrize("penalties", [(1.3, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, -0.4), (0.8, 0.5, 0.25)])
def test_penalties_equal_the_formulas(penalties: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 300, 40).tolist()
    answer: list[int] = []
    processor = PenaltyProcessor(prompt, *penalties)
    for _ in range(150):
        row = rng.standard_normal(300).astype(np.float32)
        expected = penalised(row, prompt, answer, *penalties)
        processor.apply(row)
        # Three float32 roundings of numbers below 50.
        np.testing.assert_allclose(row, expected, rtol=3e-7, atol=3e-6)
        token = int(rng.integers(0, 300))
        answer.append(token)
        processor.observe(token)


def test_untouched_logits_keep_their_bits() -> None:
    row = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    before = row.copy()
    processor = PenaltyProcessor([3, 4], 1.5, 0.1, 0.1)
    processor.observe(9)
    processor.apply(row)
    changed = np.flatnonzero(row != before)
    assert changed.tolist() == [3, 4, 9]


def test_min_tokens_forbids_the_end_until_then() -> None:
    processor = MinTokensProcessor(2, {5, 1})
    for expected in ([1, 5], [1, 5], []):
        row = np.zeros(8, np.float32)
        processor.apply(row)
        assert np.flatnonzero(np.isneginf(row)).tolist() == expected
        processor.observe(0)
