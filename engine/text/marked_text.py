"""Text of messages made recognisable inside what a template prints.

Before a template runs, the characters of the messages that control tokens are made of (such as "<" and "|") are
replaced by private-use characters that stand for them; afterwards the prompt is searched for control tokens, which now
can only be the template's own, and the characters are put back. Templates look into contents ('</think>' in content):
`MarkedText` answers such questions as the original text would.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, SupportsIndex

from .chat import Segment, SegmentBuilder

_PRIVATE = range(0xF0000, 0xFFFFE)
_WORD = re.compile(r"[^\W_]+")


class Marks:
    """The replacement of characters for one conversation, and the way back.

    control_tokens  texts that must not come out of messages
    used            characters of the messages and the template: none of them is taken as a stand-in
    """

    def __init__(self, control_tokens: Collection[str], used: Collection[str]) -> None:
        self._tokens = [token for token in control_tokens if token.strip()]
        # Quotes, backslashes and spaces keep their meaning for JSON and for templates that trim.
        chars = {char for token in self._tokens for char in token if not char.isspace() and char not in "\"'\\"}
        chars |= {variant for char in chars for variant in (char.upper(), char.lower()) if len(variant) == 1}
        free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        self._stand_ins = str.maketrans(dict(zip(sorted(chars), free, strict=False)))
        self._back = {ord(stand_in): chr(code) for code, stand_in in self._stand_ins.items()}
        always = {char for char in chars if not char.isalnum()}
        always.update(token[0] for token in self._tokens if not always.intersection(token))
        self._always = {ord(char): self._stand_ins[ord(char)] for char in always if ord(char) in self._stand_ins}
        # A template may write "<" + key + ">": the words inside the marks of a token are replaced as well.
        words = sorted({word for token in self._tokens for word in _WORD.findall(token)}, key=len, reverse=True)
        self._words = re.compile(rf"(?<![^\W_])(?:{'|'.join(words)})(?![^\W_])") if words else None
        inside = "".join(map(chr, self._back))
        self._runs = re.compile(f"[{inside}]+" if inside else r"(?!)")

    def mark(self, text: str) -> MarkedText:
        """The text with stand-ins."""
        if self._words is not None:
            text = self._words.sub(lambda match: self._replace(match.group()), text)
        return MarkedText(text.translate(self._always), self)

    def mark_all(self, value: Any) -> Any:
        """A copy of JSON data with every string marked, keys included (they are still found by their names)."""
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, list):
            return [self.mark_all(item) for item in value]
        if isinstance(value, dict):
            return {self.mark(key): self.mark_all(item) for key, item in value.items()}
        return value

    def unmark(self, text: str) -> str:
        return str.translate(text, self._back)

    def wrap(self, text: str) -> str:
        """A text put together by a template: MarkedText if there is something of a message in it."""
        return MarkedText(text, self) if not text.isascii() and self._runs.search(text) else text

    def change_case(self, text: str, upper: bool) -> str:
        """upper() or lower() of a text, stand-ins included."""

        def change(piece: str) -> str:
            return piece.upper() if upper else piece.lower()

        parts, position = [], 0
        for match in self._runs.finditer(text):
            parts.append(change(text[position : match.start()]))
            parts.append(self._replace(change(self.unmark(match.group()))))
            position = match.end()
        return "".join([*parts, change(text[position:])])

    def escape_non_ascii(self, text: str) -> str:
        """Characters beyond ASCII as JSON escapes; a stand-in counts as what it stands for."""

        def escape(match: re.Match[str]) -> str:
            char = match.group()
            original = self.unmark(char)
            if original.isascii():
                return char
            units = original.encode("utf-16-be")
            return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))

        return re.sub(r"[^\x00-\x7f]", escape, text)

    def segments(self, text: str) -> list[Segment]:
        """A rendered prompt with its control tokens recognised and its contents restored."""
        builder = SegmentBuilder(self._tokens)
        builder.template(text)
        return [Segment(self.unmark(piece), is_control) for piece, is_control in builder.segments()]

    def _replace(self, text: str) -> str:
        return text.translate(self._stand_ins)


class MarkedText(str):
    """Text with stand-ins that answers as the original would. Stand-ins are one for one, so that positions agree."""

    _marks: Marks
    _plain: str

    def __new__(cls, text: str, marks: Marks) -> MarkedText:
        self = super().__new__(cls, text)
        self._marks = marks
        self._plain = marks.unmark(text)
        return self

    def __eq__(self, other: object) -> bool:
        return self._plain == self._other(other) if isinstance(other, str) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return self._plain != self._other(other) if isinstance(other, str) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._plain)

    def __contains__(self, part: object) -> bool:
        return isinstance(part, str) and self._other(part) in self._plain

    def __getitem__(self, key: SupportsIndex | slice[Any, Any, Any]) -> str:
        return self._marks.wrap(super().__getitem__(key))

    def startswith(self, prefix: str | tuple[str, ...], *bounds: Any) -> bool:
        return self._plain.startswith(self._others(prefix), *bounds)

    def endswith(self, suffix: str | tuple[str, ...], *bounds: Any) -> bool:
        return self._plain.endswith(self._others(suffix), *bounds)

    def find(self, part: str, *bounds: Any) -> int:
        return self._plain.find(self._other(part), *bounds)

    def rfind(self, part: str, *bounds: Any) -> int:
        return self._plain.rfind(self._other(part), *bounds)

    def index(self, part: str, *bounds: Any) -> int:
        return self._plain.index(self._other(part), *bounds)

    def count(self, part: str, *bounds: Any) -> int:
        return self._plain.count(self._other(part), *bounds)

    def strip(self, chars: str | None = None) -> str:
        return self.lstrip(chars).rstrip(self._some(chars))

    def lstrip(self, chars: str | None = None) -> str:
        return self._cut_like(self._plain.lstrip(self._some(chars)), from_left=True)

    def rstrip(self, chars: str | None = None) -> str:
        return self._cut_like(self._plain.rstrip(self._some(chars)), from_left=False)

    def removeprefix(self, prefix: str) -> str:
        return self._cut_like(self._plain.removeprefix(self._other(prefix)), from_left=True)

    def removesuffix(self, suffix: str) -> str:
        return self._cut_like(self._plain.removesuffix(self._other(suffix)), from_left=False)

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        if sep is None:
            return self._in_order(self._plain.split(None, maxsplit))
        return self._spaced(self._plain.split(self._other(sep), maxsplit), len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        if sep is None:
            return self._in_order(self._plain.rsplit(None, maxsplit))
        return self._spaced(self._plain.rsplit(self._other(sep), maxsplit), len(sep))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._in_order(self._plain.splitlines(keepends))

    def partition(self, sep: str) -> tuple[str, str, str]:
        before, mark, after = self._spaced(list(self._plain.partition(self._other(sep))), 0)
        return before, mark, after

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        before, mark, after = self._spaced(list(self._plain.rpartition(self._other(sep))), 0)
        return before, mark, after

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        # str.replace with an empty `old` puts `new` between all characters: nothing to look for.
        if not self._other(old):
            return self._marks.wrap(super().replace("", new, count))
        return self._marks.wrap(str(new).join(self.split(old, count)))

    def upper(self) -> str:
        return self._marks.wrap(self._marks.change_case(self, upper=True))

    def lower(self) -> str:
        return self._marks.wrap(self._marks.change_case(self, upper=False))

    def _some(self, text: str | None) -> str | None:
        return None if text is None else self._other(text)

    def _other(self, text: str) -> str:
        return self._marks.unmark(text)

    def _others(self, texts: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return tuple(map(self._other, texts)) if isinstance(texts, tuple) else self._other(texts)

    def _cut_like(self, kept: str, from_left: bool) -> str:
        start = len(self._plain) - len(kept) if from_left else 0
        return self[start : start + len(kept)]

    def _spaced(self, pieces: list[str], gap: int) -> list[str]:
        """Pieces of the original text, `gap` characters between them, as pieces of this text."""
        result, position = [], 0
        for piece in pieces:
            result.append(self[position : position + len(piece)])
            position += len(piece) + gap
        return result

    def _in_order(self, pieces: list[str]) -> list[str]:
        """The same for pieces with nothing but white space between them, which no piece begins with."""
        result, position = [], 0
        for piece in pieces:
            position = self._plain.index(piece, position)
            result.append(self[position : position + len(piece)])
            position += len(piece)
        return result
