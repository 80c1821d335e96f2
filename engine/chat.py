"""Conversations in, reasoning, answer and tool calls out: what LLM.chat does around the engine.

Knows templates and marks; nothing of queues, threads or the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from .errors import ConfigError
from .text.chat import ChatRenderer, encode_segments, open_chat, opens_thinking, segments_text
from .text.reasoning import ReasoningSplitter
from .text.tool_calls import ToolCall, ToolCallParser
from .types import CompletionOutput, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from .handle import RequestHandle
    from .loading.presets import ModelDescription
    from .text.tokenizer import Tokenizer

Conversation: TypeAlias = Sequence[Mapping[str, Any]]

QWEN3 = ("qwen3", "qwen3_moe")
# Published for Qwen3 (qwen3.md 5.5). Its generation_config.json holds the values of one mode only.
THINKING_VALUES: dict[str, float] = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
ANSWERING_VALUES: dict[str, float] = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}
_GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class AnswerMode(NamedTuple):
    """How to read an answer."""

    starts_inside: bool  # the prompt has opened the think block
    has_tools: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """One conversation ready to run. `text` is for people: the ids cannot be had from it."""

    text: str
    token_ids: list[int]
    sampling: SamplingParams
    mode: AnswerMode


class ChatDelta(NamedTuple):
    """A piece of an answer."""

    reasoning: str
    text: str
    tool_calls: list[ToolCall]


class ChatFormat:
    """The chat format and the sampling defaults of one model."""

    def __init__(
        self,
        renderer: ChatRenderer,
        tokenizer: Tokenizer,
        model_type: str = "",
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        """generation: the object in generation_config.json."""
        self._renderer = renderer
        self._tokenizer = tokenizer
        self._model_type = model_type
        self._generation = generation or {}

    @classmethod
    def open(cls, description: ModelDescription | None, tokenizer: Tokenizer | None) -> ChatFormat:
        """Raises ConfigError if the model has no tokenizer or no chat template."""
        if description is None or description.folder is None or tokenizer is None:
            raise ConfigError("chat needs a model folder with a tokenizer.json; use generate() with token ids")
        model_type = str(description.config.get("model_type", ""))
        renderer = open_chat(description.folder, tokenizer.control_tokens, model_type)
        return cls(renderer, tokenizer, model_type, description.generation)

    def prepare(
        self,
        messages: Conversation,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        thinking_budget: int | None = None,
    ) -> Turn:
        """Arguments as in LLM.chat. Raises PromptError or ConfigError that names the message, tool or option."""
        if not isinstance(thinking, bool):
            raise ConfigError(f"thinking must be True or False, got {thinking!r}")
        if sampling is not None and not isinstance(sampling, (SamplingParams, Mapping)):
            raise ConfigError(f"sampling must be SamplingParams, a mapping or None, not {type(sampling).__name__}")
        if thinking_budget is None and sampling is not None:
            if isinstance(sampling, SamplingParams):
                thinking_budget = sampling.thinking_budget
            else:
                thinking_budget = sampling.get("thinking_budget")
        # Checks the value, before it decides anything.
        thinking_budget = SamplingParams(thinking_budget=thinking_budget).thinking_budget
        thinking = thinking and thinking_budget != 0
        if not isinstance(sampling, SamplingParams):
            sampling = self.default_sampling(thinking, sampling)
        segments = self._renderer.render(messages, tools, thinking)
        # The marks of reasoning and calls must be in the text: some models have them as special tokens.
        sampling = replace(sampling, thinking_budget=thinking_budget if thinking else 0, skip_special_tokens=False)
        mode = AnswerMode(opens_thinking(segments), bool(tools))
        return Turn(segments_text(segments), encode_segments(self._tokenizer, segments), sampling, mode)

    def default_sampling(self, thinking: bool = True, changes: Mapping[str, Any] | None = None) -> SamplingParams:
        """The values of generation_config.json, with `changes` in place of some.

        Greedy if the file says do_sample false. A Qwen3 whose file says nothing of sampling has the published values
        of the mode; one whose file has those of thinking has the others while thinking is off.
        Raises ConfigError for an unknown option and for a bad value, the file's own included.
        """
        given = {key: self._generation[key] for key in _GENERATION_KEYS if self._generation.get(key) is not None}
        is_sampled = self._generation.get("do_sample", True if given else None)
        values: dict[str, Any] = {}
        if is_sampled is None and self._model_type in QWEN3:
            values = dict(THINKING_VALUES if thinking else ANSWERING_VALUES)
        elif is_sampled:
            values = {"temperature": 1.0, **given}
            if self._model_type in QWEN3 and not thinking and _is_for_thinking(values):
                values |= ANSWERING_VALUES
        try:
            defaults = SamplingParams.from_mapping(values)
        except ConfigError as error:
            raise ConfigError(f"generation_config.json: {error}") from error
        return SamplingParams.from_mapping({**_as_mapping(defaults, values), **(changes or {})})


def _as_mapping(params: SamplingParams, names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(params, name) for name in names}


def _is_for_thinking(values: Mapping[str, Any]) -> bool:
    return all(values.get(key) == THINKING_VALUES[key] for key in ("temperature", "top_p"))


class _AnswerReader:
    """Text of one answer as it grows -> reasoning, answer and calls."""

    def __init__(self, mode: AnswerMode) -> None:
        self._splitter = ReasoningSplitter(mode.starts_inside)
        self._parser = ToolCallParser() if mode.has_tools else None

    def push(self, text: str) -> ChatDelta:
        reasoning, answer = self._splitter.push(text)
        return self._parse(reasoning, answer)

    def finish(self) -> ChatDelta:
        reasoning, answer = self._splitter.finish()
        delta = self._parse(reasoning, answer)
        if self._parser is None:
            return delta
        rest = self._parser.finish()
        return ChatDelta(delta.reasoning, delta.text + rest.text, delta.tool_calls + rest.calls)

    @property
    def has_block(self) -> bool:
        return self._splitter.has_block

    def _parse(self, reasoning: str, answer: str) -> ChatDelta:
        if self._parser is None:
            return ChatDelta(reasoning, answer, [])
        text, calls = self._parser.push(answer)
        return ChatDelta(reasoning, text, calls)


def split_answer(output: CompletionOutput, mode: AnswerMode) -> CompletionOutput:
    """A copy with `reasoning`, `tool_calls` and `text` told apart. token_ids and logprobs stay those of everything."""
    reader = _AnswerReader(mode)
    first, last = reader.push(output.text), reader.finish()
    return replace(
        output,
        text=first.text + last.text,
        reasoning=first.reasoning + last.reasoning if reader.has_block else None,
        tool_calls=first.tool_calls + last.tool_calls,
    )


def with_answers(output: RequestOutput, mode: AnswerMode) -> RequestOutput:
    return replace(output, outputs=[split_answer(answer, mode) for answer in output.outputs])


class ChatStream:
    """An answer on its way: iterate to get its pieces, then call `result()`. Joined, the pieces are the result."""

    def __init__(self, handle: RequestHandle, mode: AnswerMode) -> None:
        self._handle = handle
        self._mode = mode

    def __iter__(self) -> Iterator[ChatDelta]:
        """Pieces with anything in them. Raises the error that ended the request."""
        reader = _AnswerReader(self._mode)
        for piece in self._handle.stream_text():
            if any(delta := reader.push(piece)):
                yield delta
        if any(delta := reader.finish()):
            yield delta

    def cancel(self) -> None:
        """End the answer with finish_reason "abort"; what it has so far stays."""
        self._handle.cancel()

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end. Raises the error that ended the request, or TimeoutError after `timeout` seconds."""
        return with_answers(self._handle.result(timeout), self._mode)


def as_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """One conversation becomes a list of one. What is neither is passed on, for the renderer to name."""
    if _is_list(messages) and messages and all(map(_is_list, messages)):
        return list(messages)  # type: ignore[arg-type]
    return [messages]  # type: ignore[list-item]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
