"""Drives an engine step by step in this thread, so that the time of a step is the time between two tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..core import Engine
from ..errors import ConfigError
from ..inputs import Request
from ..runtime.state import RequestState


@dataclass(frozen=True, slots=True)
class Spread:
    """The median and the 95th percentile of some seconds; of few samples that is the largest."""

    p50: float
    p95: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        ordered = sorted(seconds)
        return cls(statistics.median(ordered), ordered[min(len(ordered) - 1, 95 * len(ordered) // 100)])

    def to_json(self) -> dict[str, float]:
        return {"p50": self.p50, "p95": self.p95}


def start(engine: Engine, requests: Sequence[Request]) -> tuple[list[RequestState], float]:
    """Queue the requests and step until each has its first token. Returns their states and the seconds this took.

    Raises what made one of them fail.
    """
    started = time.perf_counter()
    states = [engine.add_request(request) for request in requests]
    while not all(state.answers[0].sequence.num_generated or state.finished for state in states):
        engine.step()
        for state in states:
            if state.error is not None:
                raise state.error
    return states, time.perf_counter() - started


def time_steps(engine: Engine, count: int) -> list[float]:
    """Seconds of each of `count` steps."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def parse_counts(option: str, text: str, low: int) -> list[int]:
    """Whole numbers with commas between them. Raises ConfigError."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} must be whole numbers with commas between, such as 1,4; got {text!r}") from None
    if min(counts) < low:
        raise ConfigError(f"{option} {text}: at least {low}")
    return counts


def check_at_least(option: str, value: int, low: int) -> None:
    """Raises ConfigError naming the option as it is typed."""
    if value < low:
        raise ConfigError(f"{option} {value}: at least {low}")
