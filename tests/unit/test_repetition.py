"""The loop detector and the run tracker against definitions written out in full."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagelens.runtime.repetition import RepetitionDetector, RunTracker


def first_loop(tokens: list[int], whitelist: frozenset[int], max_period: int = 32, repeats: int = 8) -> int | None:
    """Length of the shortest prefix that ends in a block of <= max_period tokens repeated `repeats` times."""
    for length in range(1, len(tokens) + 1):
        for period in range(1, max_period + 1):
            tail = tokens[max(0, length - period * repeats) : length]
            block = tail[-period:]
            if len(tail) == period * repeats and tail == block * repeats and not whitelist.issuperset(block):
                return length
    return None


def detected(tokens: list[int], whitelist: frozenset[int] = frozenset(), **limits: int) -> int | None:
    detector = RepetitionDetector(whitelist, **limits)
    for length, token in enumerate(tokens, start=1):
        if detector.push(token):
            return length
    return None


@pytest.mark.parametrize("period", [1, 2, 3, 31, 32])
def test_eight_repeats_are_found_at_their_last_token(period: int) -> None:
    tokens = [900, 901, *list(range(period)) * 9]
    assert detected(tokens) == 2 + 8 * period


def test_seven_repeats_and_longer_blocks_are_no_loop() -> None:
    assert detected([*list(range(5)) * 7, 99]) is None
    assert detected(list(range(33)) * 12) is None


def test_a_block_of_white_listed_tokens_is_no_loop_but_one_with_another_token_is() -> None:
    whitelist = frozenset({7, 8})
    assert detected([7, 8] * 50, whitelist) is None
    assert detected([7, 8, 9] * 50, whitelist) == 24


@given(st.lists(st.integers(0, 3), max_size=60), st.frozensets(st.integers(0, 3), max_size=2))
def test_equals_the_definition(tokens: list[int], whitelist: frozenset[int]) -> None:
    limits = {"max_period": 4, "min_repeats": 3}
    assert detected(tokens, whitelist, **limits) == first_loop(tokens, whitelist, 4, 3)


def test_runs_equal_a_count_from_the_end() -> None:
    rng = random.Random(1)
    tokens: list[int] = []
    tracker = RunTracker(6)
    for _ in range(500):
        tokens.append(rng.randrange(3))
        tracker.push(tokens[-1])
        for distance in range(1, 7):
            run = 0
            while run + distance < len(tokens) and tokens[-1 - run] == tokens[-1 - run - distance]:
                run += 1
            assert tracker.runs.get(distance, 0) == run
