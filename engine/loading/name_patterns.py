"""Regular expressions over tensor names that come from a file: a subset, matched in time linear in the name.

Python's `re` backtracks, so a short pattern such as `(a+)+b` in a config.json would hang it. Here a pattern is a
nondeterministic automaton and all its states advance together (Thompson, "Regular Expression Search Algorithm", 1968).
"""

from __future__ import annotations

import string
from typing import Literal

from ..errors import ConfigError
from .strict_json import shown

MAX_PATTERN = 256
MAX_DEPTH = 16
MAX_REMEMBERED = 50_000  # states, over all sets of them

# A set of characters and whether it is the complement that is meant.
Characters = tuple[frozenset[str], bool]
Condition = Literal["", "^", "$"]

ANY: Characters = (frozenset("\n"), True)
ESCAPES: dict[str, frozenset[str]] = {
    "d": frozenset(string.digits),
    "w": frozenset(string.ascii_letters + string.digits + "_"),
    "s": frozenset(string.whitespace),
}
CLASSES = ", ".join(f"\\{letter}" for letter in ESCAPES)
SUBSET = f"ASCII literals, ., ^, $, |, *, +, ?, ( ), (?: ), [ ], {CLASSES} and their capitals"


class NamePattern:
    """What `re.match(pattern, name)` finds, for the subset of patterns in SUBSET: \\d, \\w and \\s are ASCII only.

    Raises ConfigError if the pattern is longer than MAX_PATTERN, nested deeper than MAX_DEPTH, or outside the subset
    (counted repeats, look-around, back-references, flags).
    """

    def __init__(self, pattern: str, where: str) -> None:
        automaton = _Automaton(pattern, where)
        self._jumps, self._steps, self._accept = automaton.jumps, automaton.steps, automaton.accept
        self._begin = self._closure({0}, "^")
        self._next: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._remembered = 0

    def matches(self, name: str) -> bool:
        """Whether a beginning of `name`, of any length, fits the pattern."""
        states = self._begin
        for character in name:
            if self._accept in states:
                return True
            if not states:
                return False
            states = self._advance(states, character)
        return self._accept in self._closure(states, "$")

    def _advance(self, states: frozenset[int], character: str) -> frozenset[int]:
        """The states after one more character, remembered: few names of a checkpoint differ in more than numbers."""
        key = (states, character)
        if key not in self._next:
            if self._remembered > MAX_REMEMBERED:
                self._next.clear()
                self._remembered = 0
            after = {
                target
                for state in states
                for (characters, negated), target in self._steps.get(state, ())
                if (character in characters) != negated
            }
            self._next[key] = self._closure(after, "")
            self._remembered += 1 + len(self._next[key])
        return self._next[key]

    def _closure(self, states: set[int] | frozenset[int], holds: str) -> frozenset[int]:
        """All states reached without a character, where the conditions in `holds` are true."""
        found, waiting = set(states), list(states)
        while waiting:
            for condition, target in self._jumps.get(waiting.pop(), ()):
                if target not in found and (not condition or condition in holds):
                    found.add(target)
                    waiting.append(target)
        return frozenset(found)


class _Automaton:
    """The states of one pattern: `jumps` need no character, `steps` one. State 0 begins, `accept` ends."""

    def __init__(self, pattern: str, where: str) -> None:
        self._pattern, self._where = pattern, where
        self._at, self._count = 0, 1
        self.jumps: dict[int, list[tuple[Condition, int]]] = {}
        self.steps: dict[int, list[tuple[Characters, int]]] = {}
        if len(pattern) > MAX_PATTERN:
            self._refuse(f"it has {len(pattern)} characters, more than {MAX_PATTERN}")
        if not pattern.isascii():
            self._refuse("it has characters that are not ASCII")
        self.accept = self._alternatives(0, 0)
        if self._at < len(pattern):
            self._refuse("a ) without its (")

    def _refuse(self, reason: str) -> None:
        raise ConfigError(
            f"{self._where}: pattern {shown(self._pattern)} is not supported: {reason}; accepted: {SUBSET}"
        )

    def _new(self) -> int:
        self._count += 1
        return self._count - 1

    def _jump(self, start: int, end: int, condition: Condition = "") -> None:
        self.jumps.setdefault(start, []).append((condition, end))

    def _step(self, start: int, characters: Characters) -> int:
        end = self._new()
        self.steps.setdefault(start, []).append((characters, end))
        return end

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self) -> str:
        taken = self._peek()
        self._at += 1
        if not taken:
            self._refuse("it ends too early")
        return taken

    def _alternatives(self, start: int, depth: int) -> int:
        if depth > MAX_DEPTH:
            self._refuse(f"its groups are nested deeper than {MAX_DEPTH}")
        end = self._new()
        while True:
            # A state of its own: a repeat at the beginning of one alternative must not lead back into the others.
            state = self._new()
            self._jump(start, state)
            while self._peek() not in ("", "|", ")"):
                state = self._repeated(state, depth)
            self._jump(state, end)
            if self._peek() != "|":
                return end
            self._take()

    def _repeated(self, state: int, depth: int) -> int:
        before = self._new()
        self._jump(state, before)
        after = self._atom(before, depth)
        repeat = self._peek()
        if repeat not in ("*", "+", "?", "{"):
            return after
        self._take()
        if repeat == "{":
            self._refuse("a counted repeat { }")
        if self._peek() == "?":  # lazy: the same names match
            self._take()
        if self._peek() and self._peek() in "*+?{":
            self._refuse("a repeat of a repeat")
        end = self._new()
        self._jump(after, end)
        if repeat != "+":
            self._jump(before, end)
        if repeat != "?":
            self._jump(after, before)
        return end

    def _atom(self, state: int, depth: int) -> int:
        character = self._take()
        if character == "(":
            if self._peek() == "?":
                self._take()
                if self._take() != ":":
                    self._refuse("a group (?...) other than (?: )")
            end = self._alternatives(state, depth + 1)
            if self._take() != ")":
                self._refuse("a ( without its )")
            return end
        if character in ("^", "$"):
            end = self._new()
            self._jump(state, end, "^" if character == "^" else "$")
            return end
        if character in ("*", "+", "?", "{"):
            self._refuse(f"{character} with nothing to repeat")
        if character == ".":
            return self._step(state, ANY)
        if character == "[":
            return self._step(state, self._set())
        if character == "\\":
            return self._step(state, self._escape())
        return self._step(state, (frozenset(character), False))

    def _escape(self) -> Characters:
        character = self._take()
        if character.lower() in ESCAPES:
            return ESCAPES[character.lower()], character.isupper()
        if character.isalnum():
            self._refuse(f"the escape \\{character}")
        return frozenset(character), False

    def _set(self) -> Characters:
        negated = self._peek() == "^"
        if negated:
            self._take()
        members: set[str] = set()
        first = True
        while first or self._peek() != "]":
            first = False
            low = self._member()
            if self._peek() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("", "]"):
                self._take()
                high = self._member()
                if len(low) != 1 or len(high) != 1 or min(low) > min(high):
                    self._refuse("a range in [ ] that does not go up")
                members |= {chr(code) for code in range(ord(min(low)), ord(min(high)) + 1)}
            else:
                members |= low
        self._take()
        return frozenset(members), negated

    def _member(self) -> frozenset[str]:
        character = self._take()
        if character != "\\":
            return frozenset(character)
        characters, negated = self._escape()
        if negated:
            self._refuse("a complement within [ ]")
        return characters
