"""The conversations and exact renders of qwen3.md 5.3."""

from __future__ import annotations

from typing import Any

HI = [{"role": "user", "content": "Hi"}]
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TOOLS_TEXT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "get_weather", "description": "Get weather", "parameters": \
{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
"""
QUESTION = {"role": "user", "content": "Weather in Paris and Rome?"}


def call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}


ROUND = [
    QUESTION,
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I need two calls.",
        "tool_calls": [call("Paris"), call("Rome")],
    },
    {"role": "tool", "content": '{"temp": 20}'},
    {"role": "tool", "content": '{"temp": 25}'},
]
CALLS_TEXT = """<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
<tool_call>
{"name": "get_weather", "arguments": {"city": "Rome"}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
{"temp": 20}
</tool_response>
<tool_response>
{"temp": 25}
</tool_response><|im_end|>
<|im_start|>assistant
"""
USER_HI = "<|im_start|>user\nHi<|im_end|>\n"
ASSISTANT = "<|im_start|>assistant\n"
# qwen3.md 5.3, by its numbers: messages, options of render, the text.
RENDERS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "1": (
        [SYSTEM, *HI],
        {},
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{USER_HI}{ASSISTANT}",
    ),
    "2": (
        [SYSTEM, *HI],
        {"thinking": False},
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{USER_HI}{ASSISTANT}<think>\n\n</think>\n\n",
    ),
    "3": (HI, {}, USER_HI + ASSISTANT),
    "4": (
        [
            *HI,
            {"role": "assistant", "content": "<think>\nGreet back.\n</think>\n\nHello!"},
            {"role": "user", "content": "2+2? /no_think"},
        ],
        {},
        f"{USER_HI}{ASSISTANT}Hello!<|im_end|>\n<|im_start|>user\n2+2? /no_think<|im_end|>\n{ASSISTANT}",
    ),
    "4, reasoning apart": (
        [
            *HI,
            {"role": "assistant", "content": "Hello!", "reasoning_content": "Greet back."},
            {"role": "user", "content": "2+2? /no_think"},
        ],
        {},
        f"{USER_HI}{ASSISTANT}Hello!<|im_end|>\n<|im_start|>user\n2+2? /no_think<|im_end|>\n{ASSISTANT}",
    ),
    "5": (
        [*HI, {"role": "assistant", "content": "Hello!"}],
        {"add_generation_prompt": False},
        f"{USER_HI}{ASSISTANT}<think>\n\n</think>\n\nHello!<|im_end|>\n",
    ),
    "6": (
        [SYSTEM, QUESTION],
        {"tools": [WEATHER]},
        f"<|im_start|>system\nYou are a helpful assistant.\n\n{TOOLS_TEXT}"
        f"<|im_start|>user\nWeather in Paris and Rome?<|im_end|>\n{ASSISTANT}",
    ),
    "6, no system message": (
        [QUESTION],
        {"tools": [WEATHER]},
        f"<|im_start|>system\n{TOOLS_TEXT}<|im_start|>user\nWeather in Paris and Rome?<|im_end|>\n{ASSISTANT}",
    ),
    "7": (
        ROUND,
        {},
        f"<|im_start|>user\nWeather in Paris and Rome?<|im_end|>\n{ASSISTANT}"
        f"<think>\nI need two calls.\n</think>\n\n{CALLS_TEXT}",
    ),
    "8": (
        [
            *ROUND,
            {"role": "assistant", "content": "20 and 25.", "reasoning_content": "Now answer."},
            {"role": "user", "content": "Thanks"},
        ],
        {},
        f"<|im_start|>user\nWeather in Paris and Rome?<|im_end|>\n{ASSISTANT}{CALLS_TEXT}20 and 25.<|im_end|>\n"
        f"<|im_start|>user\nThanks<|im_end|>\n{ASSISTANT}",
    ),
    "9": (
        [
            {
                "role": "assistant",
                "content": "Let me check.",
                "tool_calls": [{"name": "f", "arguments": {"x": 1, "s": "é<&"}}],
            },
            *HI,
        ],
        {"add_generation_prompt": False},
        f"{ASSISTANT}Let me check.\n<tool_call>\n"
        f'{{"name": "f", "arguments": {{"x": 1, "s": "é<&"}}}}\n</tool_call><|im_end|>\n{USER_HI}',
    ),
    "10, system in the middle": (
        [*HI, {"role": "system", "content": "Be brief."}],
        {},
        f"{USER_HI}<|im_start|>system\nBe brief.<|im_end|>\n{ASSISTANT}",
    ),
}
