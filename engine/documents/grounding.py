"""Strict parser of grounded text: `<|ref|>LABEL<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>`.

Model output is untrusted: nothing is evaluated, every character is looked at a bounded number of times, and a tag
sequence that does not follow the grammar to the letter stays ordinary text. The parser takes text in pieces of any
size; how it was cut makes no difference. Source: deepseek-ocr.md sections 9.1 and 9.2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

REF, REF_END, DET, DET_END = "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>"
GRID = 999  # coordinates run from 0 to 999 over the whole page, both ends included
MAX_LABEL_CHARS = 2_000  # a label is a word, or one line of text under "OCR this image."
MAX_BOXES_CHARS = 20_000  # about 800 boxes; both limits bound what a stray tag can hold back from a stream
MAX_DIGITS = 6

Box = tuple[int, int, int, int]  # left, top, right, bottom

_TAG = re.compile(r"<\|/?(?:ref|det)\|>")
_BOX_TOKEN = re.compile(r"[ \t\r\n]*([\[\],]|-?[0-9]+)")


@dataclass(frozen=True, slots=True)
class Element:
    """One well-formed tag sequence.

    label  the text between the ref tags, as written
    boxes  on the grid 0..999, corners in order, clamped; empty ones are dropped, so there may be none
    raw    the whole sequence as written
    """

    label: str
    boxes: tuple[Box, ...]
    raw: str


Event = str | Element


class _State(Enum):
    TEXT = 0
    LABEL = 1  # after <|ref|>
    BETWEEN = 2  # after <|/ref|>, where only <|det|> may follow
    BOXES = 3  # after <|det|>


class GroundingParser:
    """Cuts text into plain pieces and Elements. `push` pieces in order, then `finish` once.

    The events' texts (raw for elements) joined are exactly the input.
    """

    def __init__(self) -> None:
        self._tail = ""  # what may be the beginning of a tag
        self._restart()

    def push(self, text: str) -> list[Event]:
        """The events that `text` completes. Text is held back only while it may still belong to a tag sequence."""
        text, events = self._tail + text, []
        keep = held_back(text, (REF, REF_END, DET, DET_END))
        self._tail = text[len(text) - keep :]
        at, end = 0, len(text) - keep
        for match in _TAG.finditer(text, 0, end):
            events += self._characters(text[at : match.start()])
            events += self._tag(match.group())
            at = match.end()
        return events + self._characters(text[at:end])

    def finish(self) -> list[Event]:
        """The end of the text: an unfinished sequence was only text."""
        tail, self._tail = self._tail, ""
        return self._characters(tail) + self._give_up()

    def _restart(self) -> None:
        self._state = _State.TEXT
        self._raw: list[str] = []  # the sequence so far, tags included
        self._part: list[str] = []  # the label or the boxes so far
        self._part_chars = 0
        self._label = ""

    def _give_up(self) -> list[Event]:
        raw = "".join(self._raw)
        self._restart()
        return [raw] if raw else []

    def _characters(self, text: str) -> list[Event]:
        if not text:
            return []
        if self._state is _State.TEXT:
            return [text]
        self._raw.append(text)
        self._part.append(text)
        self._part_chars += len(text)
        limit = {_State.LABEL: MAX_LABEL_CHARS, _State.BETWEEN: 0, _State.BOXES: MAX_BOXES_CHARS}[self._state]
        return self._give_up() if self._part_chars > limit else []

    def _tag(self, tag: str) -> list[Event]:
        if tag == REF:  # a new sequence, whatever was open
            events = self._give_up()
            self._state, self._raw = _State.LABEL, [REF]
            return events
        if self._state is _State.TEXT:
            return [tag]
        self._raw.append(tag)
        part = "".join(self._part)
        self._part, self._part_chars = [], 0
        if self._state is _State.LABEL and tag == REF_END:
            self._state, self._label = _State.BETWEEN, part
            return []
        if self._state is _State.BETWEEN and tag == DET:
            self._state = _State.BOXES
            return []
        boxes = parse_boxes(part) if self._state is _State.BOXES and tag == DET_END else None
        if boxes is None:
            return self._give_up()
        element = Element(self._label, boxes, "".join(self._raw))
        self._restart()
        return [element]


def parse_grounding(text: str) -> list[Event]:
    """The whole of `text` as plain pieces and Elements, in order. Never raises."""
    parser = GroundingParser()
    return parser.push(text) + parser.finish()


def parse_boxes(text: str) -> tuple[Box, ...] | None:
    """`[[x1, y1, x2, y2], ...]` of integers -> boxes clamped, sorted and without empty ones; None if malformed.

    White space may stand between any two signs. At least one box, each of four integers of at most 6 digits.
    """
    tokens: list[str] = []
    at = 0
    end = len(text.rstrip(" \t\r\n"))
    while at < end:
        match = _BOX_TOKEN.match(text, at)
        if match is None:
            return None
        tokens.append(match.group(1))
        at = match.end()
    # [ BOX , BOX ... ] where BOX is the nine tokens [ n , n , n , n ]; so ten tokens a box and one more in front.
    if len(tokens) % 10 != 1 or len(tokens) == 1 or tokens[0] != "[":
        return None
    boxes = []
    for start in range(1, len(tokens), 10):
        group = tokens[start : start + 10]
        numbers = group[1:9:2]
        signs = group[0:1] + group[2:8:2] + group[8:]
        last = start + 10 == len(tokens)
        if signs != ["[", ",", ",", ",", "]", "]" if last else ","]:
            return None
        if not all(number[-1].isdigit() and len(number.lstrip("-")) <= MAX_DIGITS for number in numbers):
            return None
        x1, y1, x2, y2 = (min(max(int(number), 0), GRID) for number in numbers)
        if x1 != x2 and y1 != y2:
            boxes.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return tuple(boxes)


def to_pixels(box: Box, width: int, height: int) -> Box:
    """Grid -> pixels of the page, trunc(v / 999 * size); right and bottom are exclusive.

    On a page so small that a side vanishes it becomes one pixel, so that every box can be cut out.
    """
    left, right = (int(v / GRID * width) for v in box[0::2])
    top, bottom = (int(v / GRID * height) for v in box[1::2])
    return left, top, max(right, left + 1), max(bottom, top + 1)


def held_back(text: str, words: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that is the beginning, but not the whole, of one of `words`."""
    for length in range(min(max(map(len, words)) - 1, len(text)), 0, -1):
        end = text[-length:]
        if any(len(word) > length and word.startswith(end) for word in words):
            return length
    return 0
