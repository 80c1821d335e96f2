"""Incremental detokeniser: pieces add up to the one-shot text, nothing uncertain comes out, stop strings, cost."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagelens.text.stream import IncrementalDetokenizer

from ..helpers.checkpoint_files import ocr_tokenizer


class ByteTokens:
    """Token n is byte n; tokens of 256 and above are whole texts. Counts its calls."""

    special_ids = frozenset({256})

    def __init__(self, *texts: str) -> None:
        self.texts = ["<s>", *texts]
        self.num_calls = 0

    def id_to_bytes(self, id_: int) -> bytes:
        self.num_calls += 1
        return bytes([id_]) if id_ < 256 else self.texts[id_ - 256].encode()


def chunks(ids: list[int], seed: int) -> list[list[int]]:
    """Cut ids in random places; some chunks are empty."""
    draw = random.Random(seed)
    cuts = sorted(draw.randint(0, len(ids)) for _ in range(draw.randint(0, 6)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def run(detokenizer: IncrementalDetokenizer, pieces: list[list[int]]) -> list[str]:
    out = [detokenizer.push(piece) for piece in pieces]
    return [*out, detokenizer.finish()]


real_ids = st.integers(0, 129279) | st.sampled_from([0, 1, 128815, 128821, 223, *range(3, 260)])


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(real_ids, max_size=50), seed=st.integers(0, 1000), skip=st.booleans())
def test_pieces_add_up_to_the_one_shot_text(ids: list[int], seed: int, skip: bool) -> None:
    """Random tokens of the real vocabulary; many are parts of characters, and invalid bytes become U+FFFD."""
    tokenizer = ocr_tokenizer()
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    pieces = run(detokenizer, chunks(ids, seed))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip) == detokenizer.text
    assert detokenizer.stopped is None


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=24) | st.text(max_size=8).map(lambda s: s.encode("utf-8", "surrogatepass")))
def test_any_bytes_one_at_a_time(data: bytes) -> None:
    detokenizer = IncrementalDetokenizer(ByteTokens())
    assert "".join(run(detokenizer, [[byte] for byte in data])) == data.decode("utf-8", "replace")


def test_half_characters_are_held_back() -> None:
    detokenizer = IncrementalDetokenizer(ByteTokens())
    assert [detokenizer.push([byte]) for byte in "é€😀x".encode()] == ["", "é", "", "", "€", "", "", "", "😀", "x"]
    assert detokenizer.push([0xE2, 0x82]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.text == "é€😀x\ufffd"


def test_real_text_split_in_characters() -> None:
    tokenizer = ocr_tokenizer()
    text = "𝒳 的 😀👩‍👩‍👧 <|ref|>ü<|/ref|>"
    ids = tokenizer.encode(text, parse_special=True)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([id_]) for id_ in ids]
    assert "".join(pieces) == text
    assert "" in pieces, "some tokens must be parts of a character for this test to mean anything"
    assert "\ufffd" not in "".join(pieces)


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """The definition: the stop string completed first; of several at one character the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


letters = st.text("ab\n", max_size=14)
stop_sets = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4).map(tuple)


@settings(max_examples=500, deadline=None)
@given(texts=st.lists(st.text("ab\n", max_size=4), max_size=8), stops=stop_sets, seed=st.integers(0, 1000))
def test_stop_strings_against_the_definition(texts: list[str], stops: tuple[str, ...], seed: int) -> None:
    """Whatever the tokens and however they arrive."""
    tokenizer = ByteTokens(*texts)
    ids = [257 + i for i in range(len(texts))]
    detokenizer = IncrementalDetokenizer(tokenizer, stops)
    pieces = run(detokenizer, chunks(ids, seed))
    expected, stopped = cut("".join(texts), stops)
    assert ("".join(pieces), detokenizer.stopped) == (expected, stopped)
    assert detokenizer.text == expected


@settings(max_examples=300, deadline=None)
@given(text=letters, stops=stop_sets)
def test_what_is_held_back_is_exactly_what_a_stop_string_may_still_claim(text: str, stops: tuple[str, ...]) -> None:
    detokenizer = IncrementalDetokenizer(ByteTokens(), stops)
    for end in range(1, len(text) + 1):
        detokenizer.push([ord(text[end - 1])])
        if detokenizer.stopped is not None:
            return
        seen = text[:end]
        possible = [len(seen) - len(stop[:n]) for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])]
        assert detokenizer.text == seen[: min(possible, default=len(seen))]


def test_a_stop_string_across_tokens_and_inside_one() -> None:
    tokenizer = ByteTokens("one\n", "\ntwo", "xx\n\nyy")
    across = IncrementalDetokenizer(tokenizer, ("\n\n",))
    assert across.push([257]) == "one"
    assert across.push([258]) == ""
    assert across.stopped == "\n\n"
    assert across.push([259]) == ""
    assert across.finish() == ""
    assert across.text == "one"
    inside = IncrementalDetokenizer(tokenizer, ("\n\n",))
    assert inside.push([259, 257]) == "xx"
    assert inside.stopped == "\n\n"


def test_a_false_start_is_given_back() -> None:
    detokenizer = IncrementalDetokenizer(ByteTokens("<|", "end", "|>!"), ("<|end|>?",))
    assert [detokenizer.push([id_]) for id_ in (257, 258, 259)] == ["", "", "<|end|>!"]
    assert IncrementalDetokenizer(ByteTokens("<|"), ("<|end",)).text == ""


def test_a_held_start_comes_out_at_the_end() -> None:
    detokenizer = IncrementalDetokenizer(ByteTokens("a<|"), ("<|end",))
    assert detokenizer.push([257]) == "a"
    assert detokenizer.finish() == "<|"
    assert detokenizer.finish() == ""
    assert detokenizer.stopped is None


def test_a_stop_string_completed_by_the_last_broken_character() -> None:
    detokenizer = IncrementalDetokenizer(ByteTokens(), ("x\ufffd",))
    assert detokenizer.push([ord("a"), ord("x"), 0xE2]) == "a"
    assert detokenizer.finish() == ""
    assert detokenizer.stopped == "x\ufffd"


def test_special_tokens_and_stop_strings() -> None:
    """A skipped token adds nothing and does not interrupt; a kept one is text like any other."""
    skipping = IncrementalDetokenizer(ByteTokens("a", "b"), ("ab",), skip_special_tokens=True)
    skipping.push([257, 256, 258])
    assert (skipping.text, skipping.stopped) == ("", "ab")
    keeping = IncrementalDetokenizer(ByteTokens("a", "b"), ("ab", "<s>"))
    keeping.push([257, 256, 258])
    assert (keeping.text, keeping.stopped) == ("a", "<s>")


def test_min_tokens_shields_the_beginning() -> None:
    detokenizer = IncrementalDetokenizer(ByteTokens(), ("ab",), min_tokens=3)
    assert "".join(detokenizer.push([byte]) for byte in b"aba") == "ab"
    assert detokenizer.push(b"b") == "", "completed by the fourth token"
    assert (detokenizer.text, detokenizer.stopped) == ("ab", "ab")
    short = IncrementalDetokenizer(ByteTokens(), ("ab",), min_tokens=9)
    assert short.push(b"abab") + short.finish() == "abab"
    assert short.stopped is None


@settings(max_examples=300, deadline=None)
@given(text=letters, stops=stop_sets, min_tokens=st.integers(0, 16))
def test_min_tokens_against_the_definition(text: str, stops: tuple[str, ...], min_tokens: int) -> None:
    detokenizer = IncrementalDetokenizer(ByteTokens(), stops, min_tokens=min_tokens)
    pieces = run(detokenizer, [[ord(char)] for char in text])
    expected, stopped = text, None
    for end in range(min_tokens + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stopped = max(found, key=len)
            expected = text[: end - len(stopped)]
            break
    assert ("".join(pieces), detokenizer.stopped) == (expected, stopped)


def test_push_after_finish_is_an_error() -> None:
    detokenizer = IncrementalDetokenizer(ByteTokens())
    detokenizer.finish()
    with pytest.raises(RuntimeError, match="complete"):
        detokenizer.push([65])


def test_cost_is_linear() -> None:
    """Each token is looked up once, and hostile stop strings do not make the search quadratic."""
    tokenizer = ByteTokens()
    detokenizer = IncrementalDetokenizer(tokenizer, ("a" * 5000 + "b",))
    advances = 0
    matcher = detokenizer._matchers[0]
    original = matcher.advance

    def counted(char: str) -> bool:
        nonlocal advances
        advances += 1
        return original(char)

    matcher.advance = counted  # type: ignore[method-assign]
    for _ in range(20_000):
        detokenizer.push([ord("a")])
    assert tokenizer.num_calls == advances == 20_000
    assert len(detokenizer.text) == 20_000 - 5000
    assert len(detokenizer._held) == 5000


def test_text_that_was_fed_cannot_complete_a_stop_string() -> None:
    detokenizer = IncrementalDetokenizer(ByteTokens(), ["abc"])
    assert detokenizer.push(b"xab") == "x"
    assert detokenizer.push(b"cabcd", can_stop=False) == "abcabcd"
    assert detokenizer.stopped is None
    assert detokenizer.push(b"abc") == ""
    assert (detokenizer.stopped, detokenizer.text) == ("abc", "xabcabcd")
    # Begun in fed text and completed by the model, it counts.
    detokenizer = IncrementalDetokenizer(ByteTokens(), ["abc"])
    detokenizer.push(b"xab", can_stop=False)
    assert detokenizer.push(b"cd") == ""
    assert (detokenizer.stopped, detokenizer.text) == ("abc", "x")
