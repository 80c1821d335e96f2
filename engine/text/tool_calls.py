"""Tool calls (<tool_call>{json}</tool_call>, the Hermes form) in generated text while it arrives, in any pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from ..loading.strict_json import is_unicode, parse_json
from .chat_messages import dump_json, is_name
from .reasoning import partial_suffix

CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"
MAX_CALL_CHARS = 2**20


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function the model wants called."""

    name: str
    arguments: dict[str, Any]

    @property
    def arguments_json(self) -> str:
        return dump_json(self.arguments)


class ToolDelta(NamedTuple):
    """What became certain: text, and the calls that were completed."""

    text: str
    calls: list[ToolCall]


class ToolCallParser:
    """Takes calls out of one answer, in linear time. However the text is cut, the result is the same.

    A call runs from <tool_call> to the first </tool_call> after it and holds one JSON object with exactly the keys
    "name" and "arguments" (an object). JSON is read strictly: no duplicate keys, no NaN. Anything else (a call that
    does not end, bad JSON, more than MAX_CALL_CHARS characters) stays text, marks included. The line breaks just before
    and after a good call belong to it.
    """

    def __init__(self) -> None:
        self._held = ""  # the beginning of a mark, perhaps
        self._num_breaks = 0  # line breaks at the end of the text, not returned yet
        self._body: list[str] | None = None  # inside a call: what it holds so far
        self._body_chars = 0
        self._is_skipping = False  # inside a call that is too long: text until its end
        self._is_after_call = False
        self._texts: list[str] = []
        self._finished = False
        self.calls: list[ToolCall] = []

    @property
    def text(self) -> str:
        """All text returned so far."""
        self._texts = ["".join(self._texts)]
        return self._texts[0]

    def push(self, text: str) -> ToolDelta:
        """Take new text, return what became certain. Raises RuntimeError after `finish`."""
        if self._finished:
            raise RuntimeError("push() after finish(): this answer is complete")
        text, self._held = self._held + text, ""
        out: list[str] = []
        num_calls = len(self.calls)
        position = 0
        while True:
            is_inside = self._body is not None or self._is_skipping
            mark = CALL_CLOSE if is_inside else CALL_OPEN
            found = text.find(mark, position)
            end = found
            if found < 0:
                end = max(position, len(text) - partial_suffix(text[position:], mark))
                self._held = text[end:]
            self._take(text[position:end], out)
            if found < 0:
                return self._result(out, num_calls)
            self._take_mark(mark, out)
            position = found + len(mark)

    def finish(self) -> ToolDelta:
        """Return the text that was held back. Calling it again returns nothing."""
        out: list[str] = []
        if not self._finished:
            self._finished = True
            if self._body is not None:
                self._spill(out)
            self._emit(self._held, out)
            if self._num_breaks:
                out.append("\n" * self._num_breaks)
        return self._result(out, len(self.calls))

    def _take(self, text: str, out: list[str]) -> None:
        if self._body is None:
            self._emit(text, out)
            return
        self._body.append(text)
        self._body_chars += len(text)
        if self._body_chars > MAX_CALL_CHARS:
            self._spill(out)
            self._is_skipping = True

    def _take_mark(self, mark: str, out: list[str]) -> None:
        if mark == CALL_OPEN:
            self._body, self._body_chars = [], 0
        elif self._body is None:
            self._is_skipping = False
            self._emit(mark, out)
        else:
            call = parse_call("".join(self._body))
            if call is None:
                self._spill(out)
                self._emit(mark, out)
            else:
                self.calls.append(call)
                self._body, self._num_breaks, self._is_after_call = None, 0, True

    def _spill(self, out: list[str]) -> None:
        """What looked like a call is text."""
        body = "".join(self._body or ())
        self._body = None
        self._emit(CALL_OPEN + body, out)

    def _emit(self, text: str, out: list[str]) -> None:
        if self._is_after_call:
            text = text.lstrip("\n")
        if not text:
            return
        self._is_after_call = False
        body = text.rstrip("\n")
        if body:
            out.append("\n" * self._num_breaks + body)
            self._num_breaks = 0
        self._num_breaks += len(text) - len(body)

    def _result(self, out: list[str], num_calls: int) -> ToolDelta:
        text = "".join(out)
        if text:
            self._texts.append(text)
        return ToolDelta(text, self.calls[num_calls:])


class _NotACall(Exception):
    pass


def parse_call(body: str) -> ToolCall | None:
    """The call that a text between the marks stands for, or None if it is not one."""

    def fail(_: str) -> NoReturn:
        raise _NotACall

    try:
        value = parse_json(body, fail)
    except _NotACall:
        return None
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
        return None
    name, arguments = value["name"], value["arguments"]
    if not is_name(name) or not isinstance(arguments, dict):
        return None
    try:
        # 1e999 and half a surrogate pair get past the parser, but could not be written out again.
        is_writable = is_unicode(dump_json(arguments))
    except (ValueError, RecursionError):
        return None
    return ToolCall(name, arguments) if is_writable else None
