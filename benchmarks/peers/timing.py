"""Timing for workers. Standard library only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

CALL_S = 0.25  # a sample of a short call lasts about this long


def time_steps(step: Callable[[], object], steps: int) -> float:
    """Median seconds of a step; one step before the first that counts."""
    step()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def time_once(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def time_calls(call: Callable[[], object]) -> float:
    """Median seconds of a call: as many as fit CALL_S, three at least, after one that does not count."""
    call()
    seconds: list[float] = []
    end = time.perf_counter() + CALL_S
    while len(seconds) < 3 or time.perf_counter() < end:
        seconds.append(time_once(call))
    return statistics.median(seconds)
