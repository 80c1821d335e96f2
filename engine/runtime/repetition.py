"""Finds repetition in a growing list of tokens, for each distance, how long the list repeats itself.

Used by the n-gram guard (which forbids it) and by the loop detector (which ends the answer).
"""

from __future__ import annotations

from collections import deque

MAX_PERIOD = 32
MIN_REPEATS = 8


class RunTracker:
    """runs[d] = how many of the last tokens in a row equal the token d places before them, for 1 <= d <= max_distance.

    Distances without a run have no entry. A push costs one step for each earlier use of the token within max_distance.
    """

    def __init__(self, max_distance: int) -> None:
        self.max_distance = max_distance
        self.runs: dict[int, int] = {}
        self._count = 0
        self._places: dict[int, deque[int]] = {}

    def push(self, token: int) -> None:
        places = self._places.setdefault(token, deque())
        while places and self._count - places[0] > self.max_distance:
            places.popleft()
        before = self.runs
        self.runs = {self._count - place: before.get(self._count - place, 0) + 1 for place in places}
        places.append(self._count)
        self._count += 1


class RepetitionDetector:
    """Tells when a block of at most max_period tokens has come min_repeats times in a row.

    A block made only of white-listed tokens does not count: rows of empty table cells are no loop.
    """

    def __init__(
        self, whitelist: frozenset[int] = frozenset(), max_period: int = MAX_PERIOD, min_repeats: int = MIN_REPEATS
    ) -> None:
        self._tracker = RunTracker(max_period)
        self._whitelist = whitelist
        self._min_repeats = min_repeats
        self._last = [0] * max_period
        self._count = 0

    def push(self, token: int) -> bool:
        """Add a generated token; True if it completes the last repeat of such a block."""
        self._tracker.push(token)
        self._last[self._count % len(self._last)] = token
        self._count += 1
        for period, run in self._tracker.runs.items():
            if run >= period * (self._min_repeats - 1):
                block = (self._last[(self._count - 1 - back) % len(self._last)] for back in range(period))
                if any(token not in self._whitelist for token in block):
                    return True
        return False
