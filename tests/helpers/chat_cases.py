"""Conversations for the chat tests, a Jinja template of Qwen3's format, and a small byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from pagelens.text.tokenizer import Tokenizer

# Written from qwen3.md 5.2 (not a copy of the published templates), so that two programs in two languages must agree.
QWEN3_JINJA = r"""
{%- macro turn(role, text) -%}
{{ '<|im_start|>' ~ role ~ '\n' ~ text ~ '<|im_end|>\n' }}
{%- endmacro -%}
{%- set has_system = messages[0].role == 'system' -%}
{%- if tools -%}
    {{- '<|im_start|>system\n' ~ (messages[0].content ~ '\n\n' if has_system else '') ~ '# Tools\n\n' -}}
    {{- 'You may call one or more functions to assist with the user query.\n\n' -}}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' -}}
    {%- for tool in tools -%}{{ '\n' ~ tool | tojson }}{%- endfor -%}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' -}}
    {{- '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": ' -}}
    {{- '<args-json-object>}\n</tool_call><|im_end|>\n' -}}
{%- elif has_system -%}
    {{- turn('system', messages[0].content) -}}
{%- endif -%}
{%- set query = namespace(index=messages | length - 1, found=false) -%}
{%- for message in messages | reverse -%}
    {%- set by_hand = message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>') -%}
    {%- if not query.found and message.role == 'user' and not by_hand -%}
        {%- set query.found = true -%}
        {%- set query.index = loop.revindex0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
        {{- turn(message.role, message.content) -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' -}}
        {{- '\n<tool_response>\n' ~ message.content ~ '\n</tool_response>' -}}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set answer = message.content -%}
        {%- set thought = message.reasoning_content -%}
        {%- if thought is not string -%}
            {%- set thought = '' -%}
            {%- if '</think>' in answer -%}
                {%- set thought = answer.partition('</think>')[0].rstrip('\n') -%}
                {%- set thought = thought.rsplit('<think>', 1)[-1].lstrip('\n') -%}
                {%- set answer = answer.rpartition('</think>')[2].lstrip('\n') -%}
            {%- endif -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- if loop.index0 > query.index and (loop.last or thought) -%}
            {{- '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' ~ answer.lstrip('\n') -}}
        {%- else -%}
            {{- answer -}}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {{- '\n' if answer or not loop.first -}}
            {{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' -}}
            {%- set args = call.function.arguments -%}
            {{- args if args is string else args | tojson -}}
            {{- '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' ~ ('<think>\n\n</think>\n\n' if enable_thinking is false else '') -}}
{%- endif -%}
"""

ADDED_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip
_PIECES = (
    *ADDED_TOKENS, "\n", "\n\n", "Hi", " /no_think", "é<&", '"q\\', "日本", " x ", "think", "<", ">", "|im_end|", "",
    "\U000f0000", "END", "im_",
)  # fmt: skip
texts = st.lists(st.sampled_from(_PIECES), max_size=6).map("".join)
names = st.sampled_from(["f", "get_weather", "think", "tool_call"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats(-1e6, 1e6) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
objects = st.dictionaries(texts, json_values, max_size=3)
_functions = st.fixed_dictionaries({"name": names, "arguments": objects | st.just('{"a":  1}')})
_calls = _functions | _functions.map(lambda function: {"type": "function", "id": "x", "function": function})
messages = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "user", "system", "tool"]), "content": texts}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": texts},
        optional={"reasoning_content": texts, "tool_calls": st.lists(_calls, max_size=3)},
    ),
)
conversations = st.lists(messages, min_size=1, max_size=7)
tool_lists = st.none() | st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries({"name": names}, optional={"description": texts, "parameters": objects}),
        }
    ),
    max_size=2,
)


def small_tokenizer(folder: Path) -> Tokenizer:
    """Bytes as tokens, one merge (two line breaks, as in Qwen's vocabulary), and Qwen's control tokens."""
    # GPT-2's alphabet: the bytes that do not print come last, from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(0x100 + index) for index in range(len(others))]
    line_break = chr(0x100 + others.index(10))
    vocab = {char: index for index, char in enumerate(alphabet)}
    vocab[line_break * 2] = len(vocab)
    byte_level: dict[str, Any] = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    raw = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": len(vocab) + index, "content": text, "special": text.startswith("<|"), "normalized": False,
                "single_word": False, "lstrip": False, "rstrip": False,
            }
            for index, text in enumerate(ADDED_TOKENS)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", **byte_level},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {"type": "BPE", "vocab": vocab, "merges": [[line_break, line_break]]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return Tokenizer(folder)
