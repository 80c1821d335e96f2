"""From grounded text to a Page (deepseek-ocr.md section 9.2), whole and as a stream."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagelens.documents.page import EOS_TEXT, Block, Figure, MarkdownStream, Usage, build_page


def tagged(label: str, boxes: str = "[[100, 100, 200, 200]]") -> str:
    return f"<|ref|>{label}<|/ref|><|det|>{boxes}<|/det|>"


RAW = (
    f"{tagged('title', '[[52, 38, 530, 71]]')}\n# Intro\n\n{tagged('text')}\nSome words.\n\n"
    f"{tagged('image', '[[0, 500, 999, 999]]')}\n\n{tagged('image_caption')}\nFigure 1.\n\n"
    f"{tagged('image', '[[10, 10, 20, 20]]')}\n\n{tagged('table')}\n"
    f"<table><tr><td>a \\coloneqq b</td></tr></table>{EOS_TEXT}"
)


def streamed(text: str, edges: list[int]) -> str:
    stream = MarkdownStream()
    cuts = [0, *sorted(min(edge, len(text)) for edge in edges), len(text)]
    return "".join(stream.push(text[a:b]) for a, b in pairwise(cuts)) + stream.finish()


def test_a_page() -> None:
    page = build_page(RAW, 1998, 999, Usage(mode="base", valid_image_tokens=100, text_tokens=250), "stop")
    assert page.markdown == (
        "# Intro\n\nSome words.\n\n![](images/0.jpg)\n\n\nFigure 1.\n\n![](images/1.jpg)\n\n\n"
        "<table><tr><td>a := b</td></tr></table>"
    )
    assert page.raw_text == RAW
    assert page.blocks[0] == Block("title", ((104, 38, 1060, 71),), "# Intro")
    assert [b.label for b in page.blocks] == ["title", "text", "image", "image_caption", "image", "table"]
    assert [b.text for b in page.blocks][1:4] == ["Some words.", "", "Figure 1."]
    assert page.blocks[5].text == "<table><tr><td>a := b</td></tr></table>"
    assert page.figures == (
        Figure(0, (0, 500, 1998, 999), "images/0.jpg"),
        Figure(1, (20, 10, 40, 20), "images/1.jpg"),
    )
    assert page.usage.compression_ratio == 2.5


def test_plain_text_is_its_own_markdown() -> None:
    page = build_page("  Hello\n\n\n\nworld \n", 10, 10)
    assert (page.markdown, page.blocks, page.figures) == ("Hello\n\n\n\nworld", (), ())
    assert build_page("", 10, 10).markdown == ""


def test_deleting_an_element_takes_its_line_with_it_and_nothing_else() -> None:
    assert build_page(f"a\n{tagged('text')}\nb", 9, 9).markdown == "a\nb"
    assert build_page(f"a {tagged('text')}\nb", 9, 9).markdown == "a \nb"
    assert build_page(f"a\n{tagged('text')}b", 9, 9).markdown == "a\nb"
    assert build_page(f"a\n{tagged('x')}{tagged('y')}\n\nb", 9, 9).markdown == "a\n\nb"


def test_one_number_per_box_of_an_image() -> None:
    page = build_page(f"{tagged('image', '[[1,1,500,500],[5,5,5,9],[500,500,999,999]]')}\nx{tagged('image')}", 999, 999)
    assert page.markdown == "![](images/0.jpg)\n![](images/1.jpg)\n\nx![](images/2.jpg)"
    assert [f.box for f in page.figures] == [(1, 1, 500, 500), (500, 500, 999, 999), (100, 100, 200, 200)]
    nothing = build_page(tagged("image", "[[5,5,5,9]]"), 999, 999)
    assert (nothing.markdown, nothing.figures, nothing.blocks) == ("", (), (Block("image", (), ""),))


def test_only_the_exact_label_image_is_a_figure() -> None:
    for label in ("Image", " image", "images", "image_caption"):
        page = build_page(tagged(label), 99, 99)
        assert (page.markdown, page.figures, len(page.blocks)) == ("", (), 1)


def test_latex_commands_and_the_end_mark() -> None:
    page = build_page(rf"a \coloneqq b \eqqcolon c \colon d{EOS_TEXT}", 9, 9)
    assert page.markdown == r"a := b =: c \colon d"


def test_malformed_tags_stay_visible() -> None:
    text = "<|ref|>title<|/ref|><|det|>[[1,2]]<|/det|>\nx"
    assert build_page(text, 9, 9).markdown == text


def test_json() -> None:
    usage = Usage("gundam", 2, 3, 903, 780, 913, 1560, {"decode": 1.5})
    data = json.loads(build_page(RAW + "é", 100, 200, usage, "length").to_json())
    assert data["usage"]["compression_ratio"] == 2.0
    assert data["usage"]["seconds"] == {"decode": 1.5}
    assert (data["finish_reason"], data["width"], data["height"]) == ("length", 100, 200)
    assert data["blocks"][0] == {"label": "title", "boxes": [[5, 7, 53, 14]], "text": "# Intro"}
    assert data["figures"][1] == {"index": 1, "box": [1, 2, 2, 4], "name": "images/1.jpg"}
    assert "é" in build_page("é", 1, 1).to_json(indent=None)


def test_compression_without_an_image_is_zero() -> None:
    assert Usage(text_tokens=5).compression_ratio == 0.0


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_the_stream_gives_the_same_markdown(step: int) -> None:
    assert streamed(RAW, list(range(0, len(RAW), step))).strip() == build_page(RAW, 50, 50).markdown


def test_the_stream_does_not_wait_without_need() -> None:
    stream = MarkdownStream()
    assert stream.push("# Title \\col") == "# Title "
    assert stream.push("our") == "\\colour"
    assert stream.push(" a<|") == " a"
    assert stream.push("x") == "<|x"


FRAGMENTS = st.sampled_from(
    [
        tagged("text"),
        tagged("image"),
        tagged("image", "[[1,1,1,1]]"),
        "\n",
        "\n\n",
        "\\coloneqq",
        "\\col",
        EOS_TEXT,
        "<|ref|>",
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(FRAGMENTS, st.text(max_size=3)), max_size=20).map("".join),
    st.lists(st.integers(0, 400), max_size=10),
)
def test_any_text_makes_a_page_and_streams_alike(text: str, edges: list[int]) -> None:
    page = build_page(text, 40, 30)
    assert streamed(text, edges).strip() == page.markdown
    assert page.markdown.count("![](images/") >= len(page.figures)
    assert json.loads(page.to_json())["raw_text"] == text
