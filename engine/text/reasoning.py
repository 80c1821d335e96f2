"""Generated text split into reasoning (<think> … </think>) and answer while it arrives, in pieces of any size."""

from __future__ import annotations

from typing import NamedTuple

from .chat import THINK_CLOSE, THINK_OPEN


class Split(NamedTuple):
    """Text that became certain, by what it is."""

    reasoning: str
    answer: str


class ReasoningSplitter:
    """Splits one answer, in linear time. However the text is cut, the pieces add up to the same.

    A think block is open from the start if the prompt ends with one (`starts_inside`), or opens if <think> is the first
    thing of the text, white space apart. It ends at the first </think>; later marks are ordinary text, and so are all
    marks in a text without a block. Reasoning and answer lose the line breaks at their ends, and marks are in neither.
    A block that never ends leaves the answer empty.
    """

    def __init__(self, starts_inside: bool = False) -> None:
        self._is_inside = starts_inside
        self._is_undecided = True  # nothing seen yet but what may become <think>
        self._held = ""  # the beginning of a mark, perhaps
        self._lead: list[str] = []  # white space before the first mark
        self._reasoning = _Trimmer()
        self._answer = _Trimmer()
        self.has_block = starts_inside
        self._finished = False

    @property
    def is_inside(self) -> bool:
        """Whether the text so far ends in reasoning."""
        return self._is_inside

    @property
    def reasoning(self) -> str:
        """All reasoning returned so far."""
        return self._reasoning.text()

    @property
    def answer(self) -> str:
        """All of the answer returned so far."""
        return self._answer.text()

    def push(self, text: str) -> Split:
        """Take new text, return what became certain. Raises RuntimeError after `finish`."""
        if self._finished:
            raise RuntimeError("push() after finish(): this answer is complete")
        text, self._held = self._held + text, ""
        if self._is_undecided:
            text = self._decide(text)
        reasoning = ""
        if self._is_inside and not self._is_undecided:
            end = text.find(THINK_CLOSE)
            if end < 0:
                keep = len(text) - partial_suffix(text, THINK_CLOSE)
                self._held = text[keep:]
                return Split(self._reasoning.push(text[:keep]), "")
            reasoning = self._reasoning.push(text[:end])
            self._is_inside = False
            text = text[end + len(THINK_CLOSE) :]
        return Split(reasoning, self._answer.push(text))

    def finish(self) -> Split:
        """Return the text that was held back. Calling it again returns nothing."""
        if self._finished:
            return Split("", "")
        self._finished = True
        rest = "".join(self._lead) + self._held
        if self._is_inside:
            return Split(self._reasoning.push(rest), "")
        return Split("", self._answer.push(rest))

    def _decide(self, text: str) -> str:
        """Look whether the text begins with <think>; return what is to be split now ("" while it is open)."""
        body = text.lstrip()
        self._lead.append(text[: len(text) - len(body)])
        if len(body) < len(THINK_OPEN) and THINK_OPEN.startswith(body):
            self._held = body
            return ""
        self._is_undecided = False
        lead = "".join(self._lead)
        self._lead.clear()
        if body.startswith(THINK_OPEN):
            # Some models repeat the mark that the prompt has given.
            self._is_inside = self.has_block = True
            return body[len(THINK_OPEN) :]
        return lead + body


def split_reasoning(text: str, starts_inside: bool = False) -> Split:
    """Reasoning and answer of a whole text (see ReasoningSplitter)."""
    splitter = ReasoningSplitter(starts_inside)
    splitter.push(text)
    splitter.finish()
    return Split(splitter.reasoning, splitter.answer)


def partial_suffix(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a beginning of `mark`, which has its first character only once."""
    start = text.rfind(mark[0], max(0, len(text) - len(mark) + 1))
    return len(text) - start if start >= 0 and mark.startswith(text[start:]) else 0


class _Trimmer:
    """Passes text on without the line breaks at its two ends."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._num_breaks = 0
        self._has_begun = False

    def push(self, text: str) -> str:
        if not self._has_begun:
            text = text.lstrip("\n")
        body = text.rstrip("\n")
        if not body:
            self._num_breaks += len(text)
            return ""
        self._has_begun = True
        piece = "\n" * self._num_breaks + body
        self._num_breaks = len(text) - len(body)
        self._parts.append(piece)
        return piece

    def text(self) -> str:
        self._parts = ["".join(self._parts)]
        return self._parts[0]
