"""The thinking budget of one answer: counts reasoning tokens and says when the stop text is to be fed.

Source of the procedure and of the stop text: qwen3.md section 6.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..text.chat import THINK_CLOSE, THINK_OPEN
from ..text.reasoning import ReasoningSplitter

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

# Protocol text, as in Qwen's documentation.
STOP_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    f"{THINK_CLOSE}\n\n"
)
MAX_EXTRA_TOKENS = 3  # a UTF-8 character has at most four bytes, so at most three are missing


@dataclass(frozen=True, slots=True)
class ThinkingTokens:
    """The ids of a tokenizer that matter here; control_ids are those of all its added tokens."""

    open_id: int
    close_id: int
    stop_ids: tuple[int, ...]
    control_ids: frozenset[int]

    def are_open_in(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends inside a think block: its last control token is <think>."""
        for id_ in reversed(prompt):
            if id_ in self.control_ids:
                return id_ == self.open_id
        return False


def find_thinking_tokens(tokenizer: Tokenizer) -> ThinkingTokens | None:
    """None if <think> and </think> are no tokens of this model."""
    open_id, close_id = tokenizer.token_id(THINK_OPEN), tokenizer.token_id(THINK_CLOSE)
    if open_id is None or close_id is None:
        return None
    stop_ids = tuple(tokenizer.encode(STOP_TEXT, parse_special=True))
    if close_id not in stop_ids:
        return None
    control = {id_ for text in tokenizer.control_tokens if (id_ := tokenizer.token_id(text)) is not None}
    return ThinkingTokens(open_id, close_id, stop_ids, frozenset(control | {open_id, close_id}))


@dataclass(frozen=True, slots=True)
class ThinkingPlan:
    """What a request asks: at most `budget` reasoning tokens; 0 means that <think> is never chosen.

    starts_inside  whether the prompt ends inside a think block
    """

    tokens: ThinkingTokens
    budget: int
    starts_inside: bool


class ThinkingBudget:
    """Counts one answer's reasoning tokens.

    What is reasoning is for ReasoningSplitter to say, the same that later splits the text, so the two cannot disagree:
    one block, at the start of the answer. Its marks are not counted.
    """

    def __init__(self, plan: ThinkingPlan, token_bytes: Callable[[int], bytes]) -> None:
        self._plan = plan
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._splitter: ReasoningSplitter | None = ReasoningSplitter(plan.starts_inside)
        self.num_tokens = 0

    @property
    def is_inside(self) -> bool:
        """Whether the tokens so far end in a block that the budget will close."""
        return self._splitter is not None and self._splitter.is_inside

    def take(self, token: int) -> tuple[int, ...]:
        """Count a chosen token. Returns the tokens that must follow it now: the stop text once, otherwise nothing."""
        splitter, tokens = self._splitter, self._plan.tokens
        if splitter is None:
            return ()
        was_inside = splitter.is_inside
        splitter.push(self._utf8.decode(self._token_bytes(token)))
        if not splitter.is_inside:
            if splitter.has_block or splitter.answer:
                self._splitter = None
            return ()
        if not was_inside or (token == tokens.open_id and self.num_tokens == 0):
            return ()
        self.num_tokens += 1
        is_cut = bool(self._utf8.getstate()[0])
        if self.num_tokens < self._plan.budget + (MAX_EXTRA_TOKENS if is_cut else 0):
            return ()
        self._splitter = None
        return tokens.stop_ids
