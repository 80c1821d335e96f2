"""A conversation as a prompt: which template renders it, and how its pieces become token ids.

A rendered prompt is a list of segments. A control segment is the text of one control token, written by the template;
every other segment is plain text, whoever wrote it, and is encoded with the parsing of control tokens off. So nothing
in a message can become a control token. Plain text between two control tokens is always one segment: the ids of
harmless conversations are those of the whole text encoded at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import ConfigError

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"


class Segment(NamedTuple):
    """A piece of a prompt: exactly one control token's text, or plain text."""

    text: str
    is_control: bool


class ChatRenderer(Protocol):
    """What turns a conversation into a prompt: Qwen3Chat, or a checkpoint's own ChatTemplate."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[Segment]: ...


class SegmentEncoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, parse_special: bool) -> list[int]: ...

    def require_token_id(self, text: str) -> int: ...


def encode_segments(tokenizer: SegmentEncoder, segments: Iterable[Segment]) -> list[int]:
    """Token ids of a rendered prompt. Raises WeightsError if the tokenizer lacks a control token."""
    ids: list[int] = []
    for text, is_control in segments:
        if is_control:
            ids.append(tokenizer.require_token_id(text))
        else:
            ids.extend(tokenizer.encode(text, parse_special=False))
    return ids


def segments_text(segments: Iterable[Segment]) -> str:
    """The prompt as one text. For people and tests: encoding it would lose what is control and what is content."""
    return "".join(segment.text for segment in segments)


def opens_thinking(segments: Sequence[Segment]) -> bool:
    """Whether the prompt ends inside a think block, so that the answer begins with reasoning."""
    for text, is_control in reversed(segments):
        if is_control:
            return text == THINK_OPEN
    return False


def open_chat(folder: str | Path, control_tokens: Collection[str], model_type: str) -> ChatRenderer:
    """The renderer for a checkpoint folder: its own template, else the built-in one of Qwen3 (hybrid).

    control_tokens  Tokenizer.control_tokens
    model_type      of config.json
    Raises ConfigError if the template cannot be used, or if there is none and the model is not a Qwen3.
    """
    # Here, because Jinja is only needed for checkpoints that bring a template.
    from .chat_template import find_template
    from .qwen3_chat import Qwen3Chat

    template = find_template(folder, control_tokens)
    if template is not None:
        return template
    if model_type not in ("qwen3", "qwen3_moe"):
        raise ConfigError(
            f"{Path(folder).name} has no chat template, and there is none built in for model_type {model_type!r}; "
            "put a chat_template.jinja into the folder, or use generate() with a prompt of your own"
        )
    return Qwen3Chat()


class SegmentBuilder:
    """Collects segments; neighbouring plain texts become one."""

    def __init__(self, control_tokens: Collection[str]) -> None:
        self._pattern = control_pattern(control_tokens)
        self._segments: list[Segment] = []
        self._plain: list[str] = []

    def text(self, text: str) -> None:
        """Add content: whatever it says, it stays plain."""
        self._plain.append(text)

    def template(self, text: str) -> None:
        """Add text of the template itself: control tokens in it are control tokens."""
        position = 0
        for match in self._pattern.finditer(text):
            self._plain.append(text[position : match.start()])
            self._flush()
            self._segments.append(Segment(match.group(), True))
            position = match.end()
        self._plain.append(text[position:])

    def segments(self) -> list[Segment]:
        self._flush()
        return self._segments

    def _flush(self) -> None:
        plain = "".join(self._plain)
        self._plain.clear()
        if plain:
            self._segments.append(Segment(plain, False))


def control_pattern(control_tokens: Collection[str]) -> re.Pattern[str]:
    """Finds control tokens in a text, of those that begin at the same place the longest.

    Added tokens of white space alone (some tokenizers have them) control nothing and are left out.
    """
    tokens = sorted((token for token in control_tokens if token.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) if tokens else r"(?!)")
