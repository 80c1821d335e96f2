"""What the drawn pages say: words, numbers and punctuation put together at random, and the held-out rule.

The word lists are stored in words.txt, so that a page depends on its seed alone and not on the machine. They were taken
from Python 3.11's help topics with Debian's common licence texts ("text") and from the sources of its standard library
(words of at least two files, "library"). A word whose CRC-32 is a multiple of 8 is held out: never used in training.
"""

from __future__ import annotations

import functools
import os
import zlib

import numpy as np

from .fonts import Face

HELD_OUT_EVERY = 8
WORD_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "words.txt")
_COMMON = "the of and to in is it that for on as with are be at this by not or an if from can was but you all"
COMMON = tuple(_COMMON.split())
LOWER = "abcdefghijklmnopqrstuvwxyz"
SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789abcdefghijklmnopqrstuvwxyz!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
WRAPPINGS = ("({})", '"{}"', "'{}'", "[{}]", "{}-x", "*{}*", "{}/or")


def is_held_out(word: str) -> bool:
    """True for one word in eight, by a rule that anyone can check."""
    return zlib.crc32(word.encode()) % HELD_OUT_EVERY == 0


@functools.cache
def word_lists() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(text, library) words, sorted, lower case, held-out ones included."""
    lists: dict[str, list[str]] = {}
    with open(WORD_FILE, encoding="utf-8") as file:
        for line in file.read().split("\n"):
            if line.startswith("# "):
                current = lists.setdefault(line[2:], [])
            elif line:
                current.append(line)
    return tuple(lists["text"]), tuple(lists["library"])


class Words:
    """A source of words and lines.

    held_out=False  the training mix: common words, both lists, invented words, numbers, strings of symbols
    held_out=True   the evaluation mix of the training runs: held-out words of the text list, common words, numbers, ...
    strict=True     for reported figures: every dictionary word is held out (both lists), and there are no common words
    """

    def __init__(self, held_out: bool = False, strict: bool = False) -> None:
        text, library = word_lists()
        self.strict = strict
        self.words = [w for w in text if is_held_out(w) == (held_out or strict)]
        self.extra: list[str] = []
        if strict:
            # A common word is trained on even where the rule holds it out.
            self.words = sorted(w for w in (*text, *library) if is_held_out(w) and w not in COMMON)
        elif not held_out:
            self.extra = [w for w in library if not is_held_out(w)]
        self.trained: frozenset[str] = frozenset()
        if strict:
            self.trained = frozenset(COMMON).union(w for w in (*text, *library) if not is_held_out(w))

    def one(self, r: np.random.Generator) -> str:
        """One item: a word (perhaps dressed with capitals or punctuation), a number, or a string of symbols."""
        u = r.random()
        if self.extra and 0.12 < u < 0.82:  # training: fewer common words, more different ones
            return self._dress(r, self._training_word(r))
        if u < 0.25:
            word = self._pick(r, self.words) if self.strict else COMMON[r.integers(len(COMMON))]
        elif u < 0.82:
            word = self._pick(r, self.words)
        elif u < 0.88:
            word = self._letters(r, 8)
            while word in self.trained:
                word = self._letters(r, 8)
        elif u < 0.97:
            return self._number(r)
        else:
            item = self._symbols(r)
            while item.lower() in self.trained:
                item = self._symbols(r)
            return item
        return self._dress(r, word)

    def line(self, r: np.random.Generator, face: Face, size: int, width: float, max_chars: int) -> str:
        """Items separated by spaces, as many as fit; a first item that does not fit is cut."""
        out, used = "", 0.0
        for _ in range(12):
            item = (" " if out else "") + self.one(r)
            need = face.width(size, item)
            if used + need > width or len(out) + len(item) > max_chars:
                if out:
                    break
                while item and (face.width(size, item) > width or len(item) > max_chars):
                    item = item[:-1]
                return item or "a"
            out, used = out + item, used + need
        return out

    @staticmethod
    def _pick(r: np.random.Generator, words: list[str]) -> str:
        return words[r.integers(len(words))]

    @staticmethod
    def _letters(r: np.random.Generator, longest: int) -> str:
        return "".join(LOWER[i] for i in r.integers(0, 26, r.integers(2, longest)))

    @staticmethod
    def _symbols(r: np.random.Generator) -> str:
        return "".join(SYMBOLS[i] for i in r.integers(0, len(SYMBOLS), r.integers(1, 7)))

    def _training_word(self, r: np.random.Generator) -> str:
        u = r.random()
        if u < 0.52:
            return self._pick(r, self.words)
        if u < 0.82:
            return self._pick(r, self.extra)
        # Unpronounceable or half-known words, so that the decoder has to look instead of guessing.
        a, b = self._pick(r, self.words), self._pick(r, self.extra)
        word = a[: len(a) // 2 + 1] + b[len(b) // 2 :]
        if u > 0.90:
            word = self._letters(r, 9)
        return "x" + word if is_held_out(word) else word

    @staticmethod
    def _number(r: np.random.Generator) -> str:
        n = int(10 ** r.uniform(0, 5))
        kinds = (
            f"{n}",
            f"{n:,}",
            f"${n / 100:.2f}",
            f"{n % 100}%",
            f"{n % 24}:{n % 60:02d}",
            f"{n / 10:.1f}",
            f"{1900 + n % 150}-{1 + n % 12:02d}-{1 + n % 28:02d}",
        )
        return kinds[r.integers(7)]

    @staticmethod
    def _dress(r: np.random.Generator, word: str) -> str:
        u = r.random()
        word = word.capitalize() if u < 0.16 else word.upper() if u < 0.23 else word
        u = r.random()
        if u < 0.14:
            word += ",.;:!?"[r.choice(6, p=[0.35, 0.35, 0.06, 0.1, 0.07, 0.07])]
        elif u < 0.19:
            word = WRAPPINGS[r.integers(7)].format(word)
        return word
