"""From the text a model wrote to a Page: Markdown, blocks with pixel boxes, figures (deepseek-ocr.md section 9.2).

Knows nothing of models; the only input is text, the size of the page and the counts to report.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .grounding import Box, Element, Event, GroundingParser, held_back, parse_grounding, to_pixels

EOS_TEXT = "<｜end▁of▁sentence｜>"
IMAGE_LABEL = "image"
# LaTeX commands that Markdown renderers do not know; the published code replaces them too.
REPLACEMENTS = ((r"\coloneqq", ":="), (r"\eqqcolon", "=:"), (EOS_TEXT, ""))


@dataclass(frozen=True, slots=True)
class Usage:
    """What reading a page took.

    mode, columns, rows  how the page was shown; 1 x 1 = no tiles
    image_tokens         rows in the prompt, newlines and separator included
    valid_image_tokens   those that show page, not padding
    text_tokens          generated tokens
    seconds              by stage
    """

    mode: str = ""
    columns: int = 1
    rows: int = 1
    image_tokens: int = 0
    valid_image_tokens: int = 0
    prompt_tokens: int = 0
    text_tokens: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def compression_ratio(self) -> float:
        """Text tokens for one valid image token, two decimals; 0 without an image."""
        return round(self.text_tokens / self.valid_image_tokens, 2) if self.valid_image_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "columns": self.columns,
            "rows": self.rows,
            "image_tokens": self.image_tokens,
            "valid_image_tokens": self.valid_image_tokens,
            "prompt_tokens": self.prompt_tokens,
            "text_tokens": self.text_tokens,
            "compression_ratio": self.compression_ratio,
            "seconds": dict(self.seconds),
        }


@dataclass(frozen=True, slots=True)
class Block:
    """A grounded element: label, boxes in pixels (left, top, right, bottom; the last two exclusive) and text."""

    label: str
    boxes: tuple[Box, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture on the page: its number, its box in pixels, and the file that the Markdown links to."""

    index: int
    box: Box
    name: str


@dataclass(frozen=True, slots=True)
class Page:
    """A page as read. `raw_text` is what the model wrote, grounding tags included."""

    markdown: str
    raw_text: str
    blocks: tuple[Block, ...]
    figures: tuple[Figure, ...]
    usage: Usage
    finish_reason: str
    width: int
    height: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            "markdown": self.markdown,
            "raw_text": self.raw_text,
            "blocks": [{"label": b.label, "boxes": [list(x) for x in b.boxes], "text": b.text} for b in self.blocks],
            "figures": [{"index": f.index, "box": list(f.box), "name": f.name} for f in self.figures],
            "usage": self.usage.to_dict(),
            "finish_reason": self.finish_reason,
            "width": self.width,
            "height": self.height,
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=indent)


class MarkdownStream:
    """Grounded text in, clean Markdown out, as it comes. `push` pieces in order, then `finish` once.

    The pieces joined are the `markdown` of build_page, but for white space at its ends. Rules: an element labelled
    `image` becomes a link and a newline for each of its boxes, files numbered from 0; other elements are deleted, with
    the newline after them if they stood at the beginning of a line; `\\coloneqq` and `\\eqqcolon` become := and =:.
    """

    def __init__(self) -> None:
        self._parser = GroundingParser()
        self._cleaner = _Cleaner()

    def push(self, text: str) -> str:
        return self._cleaner.add(self._parser.push(text))

    def finish(self) -> str:
        return self._cleaner.add(self._parser.finish()) + self._cleaner.finish()


class _Cleaner:
    def __init__(self) -> None:
        self._num_figures = 0
        self._tail = ""  # may be the beginning of a word to replace
        self._at_line_start = True
        self._drop_newline = False

    def add(self, events: Iterable[Event]) -> str:
        pieces = []
        for event in events:
            if isinstance(event, str):
                pieces.append(self._text(event))
            else:
                pieces.append(self._element(event))
        return "".join(pieces)

    def finish(self) -> str:
        tail, self._tail = self._tail, ""
        return self._written(tail)

    def _text(self, text: str) -> str:
        text = self._tail + text
        keep = held_back(text, tuple(word for word, _ in REPLACEMENTS))
        self._tail = text[len(text) - keep :]
        return self._written(_replaced(text[: len(text) - keep]))

    def _element(self, element: Element) -> str:
        before = self.finish()
        if element.label == IMAGE_LABEL:
            numbers = range(self._num_figures, self._num_figures + len(element.boxes))
            self._num_figures += len(element.boxes)
            return before + self._written("".join(f"![]({figure_name(number)})\n" for number in numbers))
        self._drop_newline = self._at_line_start
        return before

    def _written(self, text: str) -> str:
        if not text:
            return ""
        if self._drop_newline and text[0] == "\n":
            text = text[1:]
            self._at_line_start = True
        self._drop_newline = False
        if text:
            self._at_line_start = text[-1] == "\n"
        return text


def figure_name(index: int) -> str:
    return f"images/{index}.jpg"


def build_page(raw_text: str, width: int, height: int, usage: Usage | None = None, finish_reason: str = "stop") -> Page:
    """Parse what the model wrote about a page of width x height pixels. Never raises, whatever the text.

    A block's text goes from its tags to the next element's. Text before the first element is in the Markdown only.
    """
    events = parse_grounding(raw_text)
    cleaner = _Cleaner()
    markdown = (cleaner.add(events) + cleaner.finish()).strip()
    blocks: list[Block] = []
    figures: list[Figure] = []
    for position, event in enumerate(events):
        if isinstance(event, str):
            continue
        boxes = tuple(to_pixels(box, width, height) for box in event.boxes)
        if event.label == IMAGE_LABEL:
            first = len(figures)
            figures += [Figure(first + i, box, figure_name(first + i)) for i, box in enumerate(boxes)]
        blocks.append(Block(event.label.strip(), boxes, _following_text(events, position)))
    return Page(markdown, raw_text, tuple(blocks), tuple(figures), usage or Usage(), finish_reason, width, height)


def _following_text(events: list[Event], position: int) -> str:
    parts = []
    for event in events[position + 1 :]:
        if not isinstance(event, str):
            break
        parts.append(event)
    return _replaced("".join(parts)).strip()


def _replaced(text: str) -> str:
    for word, replacement in REPLACEMENTS:
        text = text.replace(word, replacement)
    return text
