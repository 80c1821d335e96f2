"""NamePattern against Python's `re` on the subset, what it refuses, and patterns that would hang `re`."""

from __future__ import annotations

import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagelens.errors import ConfigError
from pagelens.loading.name_patterns import MAX_PATTERN, NamePattern

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.experts.127.down_proj",
    "model.layers.3.mlp.gate",
    "lm_head",
]
REAL = [
    r".*mlp\.gate$",
    r"re:.*",
    r"lm_head",
    r"model\.layers\.(?:0|3)\..*",
    r".*\.layers\.[0-9]+\.mlp\.experts\.\d+\.(gate|up|down)_proj$",
    r"^model.*?q_proj",
    r".*\.(?:1[0-9]|[2-9])\..*(?:gate|down).*",
    r"[^.]+$",
    r"(model|lm)_?.*d\b".replace(r"\b", ""),
    r"\w+\.\w+\.\d\D",
    r"a*|model",
    r"[]m]o",
    r"[a-]*m|[l-m]",
]


@pytest.mark.parametrize("pattern", REAL)
def test_as_python_matches(pattern: str) -> None:
    ours = NamePattern(pattern, "x")
    for name in NAMES:
        assert ours.matches(name) == (re.match(pattern, name) is not None), name


ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", "1", "^", "$"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(inner.map("(?:{})".format), st.sampled_from(["*", "+", "?", "*?", ""])).map("".join),
        inner.map("({})".format),
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=400)
@given(pattern=PATTERNS, names=st.lists(st.text("ab1.", min_size=1, max_size=6), min_size=1, max_size=5))
def test_random_patterns_match_as_python_does(pattern: str, names: list[str]) -> None:
    ours = NamePattern(pattern, "x")
    for name in names:
        assert ours.matches(name) == (re.match(pattern, name) is not None), name


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("a{2,3}", "counted repeat"),
        ("(?!a)b", r"group \(\?"),
        ("(?i)a", r"group \(\?"),
        ("(?P<x>a)", r"group \(\?"),
        (r"(a)\1", r"escape \\1"),
        (r"\bx", r"escape \\b"),
        ("a**", "repeat of a repeat"),
        ("a*+", "repeat of a repeat"),
        ("*a", "nothing to repeat"),
        ("(a", r"without its \)|ends too early"),
        ("a)", r"a \) without"),
        ("[a", "ends too early"),
        ("[z-a]", "does not go up"),
        (r"[\D]", "complement"),
        ("a\\", "ends too early"),
        ("é", "not ASCII"),
        ("a" * (MAX_PATTERN + 1), "257 characters, more than 256"),
        ("(" * 17 + ")" * 17, "nested deeper than 16"),
        ("(" * 200, "nested deeper than 16"),
    ],
)
def test_refused(pattern: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^here: pattern .* is not supported: .*({reason}).*; accepted: ASCII"):
        NamePattern(pattern, "here")


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "(a*)*b", "(?:a?" * 12 + ")" * 12 + "a" * 12 + "b", "a*" * 100 + "b", "(.*)*" * 20]
)
def test_patterns_that_explode_elsewhere(pattern: str) -> None:
    """Each takes Python's `re` ages on the first name."""
    started = time.process_time()
    ours = NamePattern(pattern, "x")
    for length in range(100, 200):
        ours.matches("a" * length + "c")
    assert time.process_time() - started < 5


def test_many_states_are_forgotten_not_kept() -> None:
    """(a|b)*a(a|b)(a|b)... has exponentially many sets of states."""
    ours = NamePattern("(a|b)*a" + "(a|b)" * 30 + "c", "x")
    started = time.process_time()
    generator = random.Random(0)
    for _ in range(300):
        assert not ours.matches("".join(generator.choices("ab", k=200)))
    assert ours.matches("a" * 31 + "c")
    assert time.process_time() - started < 60
    assert ours._remembered < 60_000
