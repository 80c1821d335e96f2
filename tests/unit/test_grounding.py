"""The parser of grounded text: the grammar to the letter, anything else stays text, linear time, any cutting."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagelens.documents.grounding import (
    DET,
    DET_END,
    MAX_BOXES_CHARS,
    MAX_LABEL_CHARS,
    REF,
    REF_END,
    Element,
    Event,
    GroundingParser,
    held_back,
    parse_boxes,
    parse_grounding,
    to_pixels,
)


def tagged(label: str, boxes: str) -> str:
    return f"{REF}{label}{REF_END}{DET}{boxes}{DET_END}"


def joined(events: list[Event]) -> str:
    return "".join(event if isinstance(event, str) else event.raw for event in events)


def merged(events: list[Event]) -> list[Event]:
    """Neighbouring pieces of text as one, which is all that cutting the input may change."""
    result: list[Event] = []
    for event in events:
        if isinstance(event, str) and result and isinstance(result[-1], str):
            result[-1] += event
        else:
            result.append(event)
    return result


def elements(text: str) -> list[Element]:
    return [event for event in parse_grounding(text) if isinstance(event, Element)]


def test_a_page() -> None:
    text = f"before {tagged('title', '[[52, 38, 530, 71]]')}\n# Intro\n\n{tagged('image', '[[1,2,3,4],[5,6,7,8]]')}"
    assert merged(parse_grounding(text)) == [
        "before ",
        Element("title", ((52, 38, 530, 71),), tagged("title", "[[52, 38, 530, 71]]")),
        "\n# Intro\n\n",
        Element("image", ((1, 2, 3, 4), (5, 6, 7, 8)), tagged("image", "[[1,2,3,4],[5,6,7,8]]")),
    ]


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[[0, 0, 999, 999]]", ((0, 0, 999, 999),)),
        (" [ [ 1 ,2,\n3 ,\t4 ] , [5,6,7,8] ] ", ((1, 2, 3, 4), (5, 6, 7, 8))),
        ("[[30, 40, 10, 20]]", ((10, 20, 30, 40),)),  # corners in the wrong order
        ("[[-5, 3, 1500, 999999]]", ((0, 3, 999, 999),)),  # outside the grid
        ("[[5, 5, 5, 9]]", ()),  # no width
        ("[[1000, 1, 2000, 9], [1, 2, 3, 4]]", ((1, 2, 3, 4),)),  # no width once clamped
        ("[[007, 08, 9, 10]]", ((7, 8, 9, 10),)),
    ],
)
def test_boxes(text: str, boxes: tuple[tuple[int, int, int, int], ...]) -> None:
    assert parse_boxes(text) == boxes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[[]]",
        "[1, 2, 3, 4]",
        "[[1, 2, 3]]",
        "[[1, 2, 3, 4, 5]]",
        "[[1, 2, 3, 4]",
        "[1, 2, 3, 4]]",
        "[[1, 2, 3, 4],]",
        "[[1, 2, 3, 4] [5, 6, 7, 8]]",
        "[[1, 2, 3, 4]]]",
        "[[1, 2, 3, 4]] x",
        "[[1.5, 2, 3, 4]]",
        "[[1, 2, 3, 1000000]]",  # more than six digits
        "[[1, 2, 3, --4]]",
        "[[1, 2, 3, -]]",
        "[[+1, 2, 3, 4]]",
        "[[1_0, 2, 3, 4]]",
        "[[0x1, 2, 3, 4]]",
        "[[١, 2, 3, 4]]",  # an Arabic digit, which int() would take
        "[[1, 2, 3, 4\u00a0]]",
        "__import__('os').system('true')",
        "[[1, 2, 3, a]]",
        "[,1,2,3,4]]",
        "[[[,,,,1,2,3,4]",
        "[[1, 2, 3, 4], 5, 6, 7, 8, 9, 1, 2, 3, 4, 5]",
    ],
)
def test_malformed_boxes_leave_the_tags_in_the_text(text: str) -> None:
    assert parse_boxes(text) is None
    whole = f"a{tagged('text', text)}b"
    assert merged(parse_grounding(whole)) == [whole]


@pytest.mark.parametrize(
    "text",
    [
        f"{REF}title{REF_END}",
        f"{REF}title{REF_END} {DET}[[1,2,3,4]]{DET_END}",  # the two pairs must touch
        f"{REF}title{DET}[[1,2,3,4]]{DET_END}",
        f"{DET}[[1,2,3,4]]{DET_END}",
        f"{REF}title{REF_END}{DET}[[1,2,3,4]]",
        f"{REF}title{REF_END}{DET}[[1,2,3,4]]{REF_END}",
        f"{REF_END}{DET_END}{DET}{REF}",
        f"{REF}a{REF_END}{REF_END}{DET}[[1,2,3,4]]{DET_END}",
        "<|ref|title<|/ref|>",
        f"{REF}{'x' * (MAX_LABEL_CHARS + 1)}{REF_END}{DET}[[1,2,3,4]]{DET_END}",
        f"{REF}text{REF_END}{DET}[[1,2,3,4]]{' ' * MAX_BOXES_CHARS}{DET_END}",
    ],
)
def test_malformed_sequences_stay_text(text: str) -> None:
    assert merged(parse_grounding(text)) == [text]


def test_a_new_ref_begins_afresh() -> None:
    text = f"{REF}lost {REF}x{REF_END} {tagged('title', '[[1,2,3,4]]')}"
    assert [e.label for e in elements(text)] == ["title"]
    assert [e.label for e in elements(REF + tagged("title", "[[1,2,3,4]]"))] == ["title"]


def test_labels_are_free_text() -> None:
    for label in ("", "Ein Satz, mit <Zeichen> | und\nUmbruch", "页眉", "x" * MAX_LABEL_CHARS):
        assert [e.label for e in elements(tagged(label, "[[1,2,3,4]]"))] == [label]


FRAGMENTS = st.sampled_from(
    [
        REF,
        REF_END,
        DET,
        DET_END,
        "[[1,2,3,4]]",
        "[[",
        "]]",
        ",",
        "12",
        "title",
        "<",
        "<|",
        "|>",
        "\n",
        "<|re",
        "f|>",
        " ",
    ]
)
TEXTS = st.lists(st.one_of(FRAGMENTS, st.text(max_size=4)), max_size=40).map("".join)


@settings(max_examples=500, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 200), max_size=12))
def test_any_text_parses_and_cutting_it_changes_nothing(text: str, cuts: list[int]) -> None:
    whole = parse_grounding(text)
    assert joined(whole) == text
    parser = GroundingParser()
    pieces: list[Event] = []
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in pairwise(edges):
        pieces += parser.push(text[start:end])
    pieces += parser.finish()
    assert merged(pieces) == merged(whole)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("[],-0123456789 ax"), max_size=60))
def test_any_boxes_parse_or_not(text: str) -> None:
    boxes = parse_boxes(text)
    for left, top, right, bottom in boxes or ():
        assert 0 <= left < right <= 999
        assert 0 <= top < bottom <= 999


def test_streaming_holds_back_no_more_than_needed() -> None:
    parser = GroundingParser()
    assert joined(parser.push("plain text <")) == "plain text "
    assert joined(parser.push("b> and <|r")) == "<b> and "
    assert parser.push("ef|>title") == []
    assert parser.push(f"{REF_END}{DET}[[1,2,3,4]]<|/de") == []
    assert [type(event) for event in parser.push("t|> on")] == [Element, str]
    parser.push(REF)
    assert joined(parser.push("x" * (MAX_LABEL_CHARS + 1))) == REF + "x" * (MAX_LABEL_CHARS + 1)


ADVERSARIAL = {
    "open refs": REF * 150_000,
    "refs and one end": REF * 150_000 + REF_END,
    "labels without boxes": f"{REF}a{REF_END}" * 70_000,
    "open boxes": f"{REF}a{REF_END}{DET}[[" * 40_000,
    "brackets": f"{REF}a{REF_END}{DET}" + "[" * 1_000_000,
    "digits": f"{REF}a{REF_END}{DET}[[" + "9" * 1_000_000,
    "blanks": tagged("a", "[[1,2,3,4]" + " " * 1_000_000),
    "half tags": "<|re" * 250_000,
    "bars": "<|" * 500_000,
    "valid": tagged("a", "[[1,2,3,4]]") * 25_000,
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_megabyte_takes_linear_time(name: str) -> None:
    """A quadratic step would take minutes here; the limit leaves a slow machine a factor of about ten."""
    text = ADVERSARIAL[name]
    start = time.process_time()
    assert joined(parse_grounding(text)) == text
    parser, out = GroundingParser(), []
    for at in range(0, len(text), 50):
        out += parser.push(text[at : at + 50])
    assert joined(out + parser.finish()) == text
    assert time.process_time() - start < 10


def test_pixels() -> None:
    assert to_pixels((0, 0, 999, 999), 1240, 1754) == (0, 0, 1240, 1754)
    assert to_pixels((52, 38, 530, 71), 1000, 2000) == (52, 76, 530, 142)  # 52.05, 76.08, 530.5, 142.1 cut off
    assert to_pixels((500, 500, 501, 501), 20, 20) == (10, 10, 11, 11)  # a side that vanishes becomes one pixel
    assert to_pixels((998, 998, 999, 999), 3, 1) == (2, 0, 3, 1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 999), min_size=4, max_size=4, unique=True), st.integers(1, 5000), st.integers(1, 5000))
def test_pixel_boxes_lie_within_the_page(corners: list[int], width: int, height: int) -> None:
    x1, y1, x2, y2 = corners
    left, top, right, bottom = to_pixels((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_held_back() -> None:
    assert held_back("abc<|", (REF, DET)) == 2
    assert held_back("abc<|ref|>", (REF, DET)) == 0
    assert held_back("", (REF,)) == 0
    assert held_back("<|ref|", (REF,)) == 6
