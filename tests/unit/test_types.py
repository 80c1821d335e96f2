"""Sampling options: every wrong value is refused by name when it is made, never by an op in the middle of a pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pagelens.errors import ConfigError
from pagelens.types import NgramGuard, SamplingParams


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", ["hot", None, True, -0.1, float("nan"), float("inf")]),
        ("top_p", ["1", 0.0, 1.5]),
        ("top_k", [1.5, "5", None, True, -2, np.array([3])]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0.0, -1.0, "2"]),
        ("presence_penalty", [2.5]),
        ("frequency_penalty", [-2.5]),
        ("max_tokens", [0, 2.5, "9", True]),
        ("min_tokens", [-1, 1.5, None]),
        ("seed", [[1], 1.5, "7"]),
        ("logprobs", [-1, 21, 1.5, True]),
        ("stop", [5, [""], "", [b"x"], ["a", None]]),
        ("stop_token_ids", [5, "56", [1.5], [True], ["a"]]),
        ("ngram_guard", ["on", 30]),
        ("ignore_eos", [1, "no"]),
        ("detect_repetition", [None]),
        ("skip_special_tokens", [0]),
    ],
)
def test_wrong_sampling_values_are_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"SamplingParams.{name} must be "):
            SamplingParams(**{name: value})


def test_min_tokens_cannot_exceed_max_tokens() -> None:
    with pytest.raises(ConfigError, match="min_tokens must be at most max_tokens, got 6"):
        SamplingParams(min_tokens=6, max_tokens=5)
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    assert SamplingParams(min_tokens=5).max_tokens is None


def test_numpy_numbers_lists_and_none_become_plain_values() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),
        max_tokens=np.int64(3),
        stop_token_ids=np.array([4, 5]),  # type: ignore[arg-type]
        stop=None,
        seed=np.uint8(7),
    )
    assert params == SamplingParams(temperature=0.5, max_tokens=3, stop_token_ids=(4, 5), stop=(), seed=7)
    assert [type(v) for v in (params.temperature, params.max_tokens, params.seed)] == [float, int, int]
    assert SamplingParams(stop="x").stop == SamplingParams(stop=["x"]).stop == ("x",)


@pytest.mark.parametrize("options", [{"size": 2.5}, {"size": 1}, {"size": 30, "window": 20}, {"whitelist": 5}])
def test_wrong_guards_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="NgramGuard"):
        NgramGuard(**options)


def test_a_single_whitelisted_text_is_not_taken_apart() -> None:
    assert NgramGuard(whitelist="<td>").whitelist == ("<td>",)  # type: ignore[arg-type]


def test_from_mapping_names_unknown_options() -> None:
    assert SamplingParams.from_mapping({"max_tokens": 3}) == SamplingParams(max_tokens=3)
    with pytest.raises(ConfigError, match=r"unknown sampling option 'max_token'; known: .*max_tokens"):
        SamplingParams.from_mapping({"max_token": 3})
