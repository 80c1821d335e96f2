"""Token ids in, text out once it is certain: complete characters only, nothing that a stop string may still cut off."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """What is needed of a tokenizer."""

    special_ids: frozenset[int]

    def id_to_bytes(self, id_: int) -> bytes: ...


class IncrementalDetokenizer:
    """The text of one answer, built token by token in linear time.

    The pieces returned by `push` and `finish` put together are the one-shot decoding of all tokens (invalid bytes
    become U+FFFD just as there), cut before the first stop string. First means: completed first, character by
    character, whatever the tokens; among stop strings completed by the same character the longest.

    stop                 stop strings, none empty
    skip_special_tokens  special tokens add no text (and do not interrupt a stop string)
    min_tokens           stop strings completed within the first `min_tokens` tokens are ordinary text (as in vLLM)
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._matchers = [_StopMatcher(text) for text in stop]
        self._held = ""
        self._parts: list[str] = []
        self._finished = False
        self.stopped: str | None = None

    @property
    def text(self) -> str:
        """All text returned so far."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def push(self, token_ids: Iterable[int], can_stop: bool = True) -> str:
        """Take new tokens, return the text that became certain. After a stop string it takes nothing more.

        Without `can_stop` a stop string that these tokens complete is ordinary text.
        Raises RuntimeError after `finish`.
        """
        if self._finished:
            raise RuntimeError("push() after finish(): this answer is complete")
        pieces = []
        for id_ in token_ids:
            if self.stopped is not None:
                break
            self._num_tokens += 1
            if id_ not in self._skipped:
                pieces.append(self._take(self._utf8.decode(self._tokenizer.id_to_bytes(id_)), can_stop))
        return self._emit("".join(pieces))

    def finish(self) -> str:
        """Return the text that was held back; an incomplete character becomes U+FFFD. Calling it again returns ""."""
        if self._finished:
            return ""
        self._finished = True
        piece = ""
        if self.stopped is None:
            piece = self._take(self._utf8.decode(b"", final=True))
            piece, self._held = piece + self._held, ""
        return self._emit(piece)

    def _emit(self, piece: str) -> str:
        if piece:
            self._parts.append(piece)
        return piece

    def _take(self, new: str, can_stop: bool = True) -> str:
        """Advance over new characters; return those that no stop string can claim any more."""
        if not self._matchers:
            return new
        shielded = not can_stop or (self._num_tokens <= self._min_tokens and not self._finished)
        buffer = self._held + new
        for position, char in enumerate(new, start=len(self._held) + 1):
            found = [matcher.text for matcher in self._matchers if matcher.advance(char)]
            if found and not shielded:
                self.stopped = max(found, key=len)
                self._held = ""
                return buffer[: position - len(self.stopped)]
        kept = len(buffer) - max(matcher.matched for matcher in self._matchers)
        self._held = buffer[kept:]
        return buffer[:kept]


class _StopMatcher:
    """Knuth-Morris-Pratt search for one stop string in a stream of characters.

    `matched` is the length of the longest prefix of the stop string that the text seen so far ends with.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # fallback[n]: length of the longest proper prefix of text[:n] that is also its suffix.
        self._fallback = [0, 0]
        length = 0
        for char in text[1:]:
            while length and char != text[length]:
                length = self._fallback[length]
            length += char == text[length]
            self._fallback.append(length)

    def advance(self, char: str) -> bool:
        """Take one character; True if it completes the stop string."""
        if self.matched == len(self.text):
            # The last match was ignored: only what its end may begin anew still counts.
            self.matched = self._fallback[self.matched]
        while self.matched and char != self.text[self.matched]:
            self.matched = self._fallback[self.matched]
        self.matched += char == self.text[self.matched]
        return self.matched == len(self.text)
