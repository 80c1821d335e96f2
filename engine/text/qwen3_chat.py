"""The chat format of Qwen3, built in: what the Jinja templates of the published models give, without Jinja.

Source of the format: qwen3.md section 5. Soft switches ("/think", "/no_think") are ordinary text of a message; the
model, not the format, obeys them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError, PromptError
from .chat import THINK_CLOSE, THINK_OPEN, Segment, SegmentBuilder
from .chat_messages import check_messages, check_tools, dump_json

VARIANTS = ("hybrid", "instruct-2507", "thinking-2507")
CONTROL_TOKENS = frozenset(
    {
        "<|im_start|>", "<|im_end|>", THINK_OPEN, THINK_CLOSE,
        "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    }
)  # fmt: skip
# Protocol text the models were trained on.
_TOOLS_HEADER = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_FOOTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call><|im_end|>\n"
)


class Qwen3Chat:
    """The built-in renderer.

    variant  "hybrid" (the first Qwen3 models: thinking can be switched), "instruct-2507" (never thinks: contents of
             assistants are rendered as they are, reasoning_content is left out), "thinking-2507" (always thinks)
    """

    def __init__(self, variant: str = "hybrid") -> None:
        if variant not in VARIANTS:
            raise ConfigError(f"unknown Qwen3 chat variant {variant!r}; known: {', '.join(VARIANTS)}")
        self.variant = variant

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[Segment]:
        """The conversation as a prompt.

        thinking  False closes the think block before the answer begins ("hybrid"); "instruct-2507" never thinks,
                  whatever this says
        Raises PromptError for bad messages or tools, and for thinking=False with "thinking-2507".
        """
        chat, functions = check_messages(messages), check_tools(tools)
        if not thinking and self.variant == "thinking-2507":
            raise PromptError("thinking=False is not possible: a Qwen3 Thinking-2507 model always thinks")
        out = SegmentBuilder(CONTROL_TOKENS)
        _render_head(out, chat, functions)
        last_query = _last_query(chat)
        for index, message in enumerate(chat):
            role = message["role"]
            if role == "user" or (role == "system" and index > 0):
                _render_turn(out, role, message["content"])
            elif role == "assistant":
                is_last = index == len(chat) - 1
                self._render_assistant(out, message, is_current=index > last_query, is_last=is_last)
            elif role == "tool":
                _render_tool_response(out, chat, index)
        if add_generation_prompt:
            out.template("<|im_start|>assistant\n")
            if self.variant == "thinking-2507":
                out.template("<think>\n")
            elif self.variant == "hybrid" and not thinking:
                out.template("<think>\n\n</think>\n\n")
        return out.segments()

    def _render_assistant(self, out: SegmentBuilder, message: dict[str, Any], is_current: bool, is_last: bool) -> None:
        content = message["content"]
        out.template("<|im_start|>assistant\n")
        if self.variant != "instruct-2507":
            reasoning, content = _split_reasoning(message)
            if is_current and (is_last or reasoning):
                out.template("<think>\n")
                out.text(reasoning.strip("\n"))
                out.template("\n</think>\n\n")
                # The template cuts what it prints, but asks the uncut content below whether a line break is needed.
                out.text(content.lstrip("\n"))
            else:
                out.text(content)
        else:
            out.text(content)
        _render_calls(out, message.get("tool_calls", ()), follows_text=bool(content))
        out.template("<|im_end|>\n")


def _render_head(out: SegmentBuilder, chat: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    """The system turn: the first message if it is the system's, and the tools."""
    system = chat[0]["content"] if chat[0]["role"] == "system" else None
    if not tools:
        if system is not None:
            _render_turn(out, "system", system)
        return
    out.template("<|im_start|>system\n")
    if system is not None:
        out.text(system + "\n\n")
    out.template(_TOOLS_HEADER)
    for tool in tools:
        out.text("\n" + dump_json(tool))
    out.template(_TOOLS_FOOTER)


def _render_turn(out: SegmentBuilder, role: str, content: str) -> None:
    out.template(f"<|im_start|>{role}\n")
    out.text(content)
    out.template("<|im_end|>\n")


def _render_calls(out: SegmentBuilder, calls: Sequence[dict[str, Any]], follows_text: bool) -> None:
    for index, call in enumerate(calls):
        if index or follows_text:
            out.template("\n")
        function = call["function"]
        arguments = function["arguments"]
        out.template('<tool_call>\n{"name": "')
        out.text(function["name"])
        out.template('", "arguments": ')
        out.text(arguments if isinstance(arguments, str) else dump_json(arguments))
        out.template("}\n</tool_call>")


def _render_tool_response(out: SegmentBuilder, chat: list[dict[str, Any]], index: int) -> None:
    """Results that follow one another share one turn, which is the user's."""
    if index == 0 or chat[index - 1]["role"] != "tool":
        out.template("<|im_start|>user")
    out.template("\n<tool_response>\n")
    out.text(chat[index]["content"])
    out.template("\n</tool_response>")
    if index == len(chat) - 1 or chat[index + 1]["role"] != "tool":
        out.template("<|im_end|>\n")


def _last_query(chat: list[dict[str, Any]]) -> int:
    """Index of the last user message that is not a tool's result written by hand; reasoning after it is kept."""
    for index in range(len(chat) - 1, -1, -1):
        text = chat[index]["content"]
        if chat[index]["role"] == "user" and not (
            text.startswith("<tool_response>") and text.endswith("</tool_response>")
        ):
            return index
    return len(chat) - 1


def _split_reasoning(message: dict[str, Any]) -> tuple[str, str]:
    """Reasoning and answer of a message; reasoning may be given apart or stand in the content."""
    content: str = message["content"]
    if "reasoning_content" in message:
        return message["reasoning_content"], content
    before, mark, after = content.partition(THINK_CLOSE)
    if not mark:
        return "", content
    reasoning = before.rstrip("\n").rpartition(THINK_OPEN)[2].lstrip("\n")
    return reasoning, after.rpartition(THINK_CLOSE)[2].lstrip("\n")
