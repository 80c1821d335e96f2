"""Reasoning and tool calls taken out of generated text: the same however it is cut, linear, malformed stays text."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagelens.text import tool_calls
from pagelens.text.reasoning import ReasoningSplitter, Split, split_reasoning
from pagelens.text.tool_calls import ToolCall, ToolCallParser, parse_call

think_texts = st.lists(
    st.sampled_from(["<think>", "</think>", "<thi", "</thi", "<", "\n", "\n\n", " ", "a", "é", "</think", "nk>"]),
    max_size=10,
).map("".join)
GOOD = '{"name": "f", "arguments": {"x": 1}}'
call_texts = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", f"\n{GOOD}\n", GOOD, f"<tool_call>\n{GOOD}\n</tool_call>", "{", "\n", "\n\n",
         "a", " ", "<tool", "</tool_call", "<", ">", '{"name": "f"}', "<tool_call"]
    ),
    max_size=10,
).map("".join)  # fmt: skip


def pieces(text: str, seed: int) -> list[str]:
    draw = random.Random(seed)
    cuts = sorted(draw.randint(0, len(text)) for _ in range(draw.randint(0, 12)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def split_in(parts: list[str], starts_inside: bool) -> Split:
    splitter = ReasoningSplitter(starts_inside)
    out = [splitter.push(part) for part in parts]
    out.append(splitter.finish())
    whole = Split("".join(piece.reasoning for piece in out), "".join(piece.answer for piece in out))
    assert whole == (splitter.reasoning, splitter.answer)
    return whole


def parse_in(parts: list[str]) -> tuple[str, list[ToolCall]]:
    parser = ToolCallParser()
    out = [parser.push(part) for part in parts]
    out.append(parser.finish())
    whole = ("".join(delta.text for delta in out), [call for delta in out for call in delta.calls])
    assert whole == (parser.text, parser.calls)
    return whole


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "answer"),
    [
        ("<think>\nI greet.\n</think>\n\nHello!", False, "I greet.", "Hello!"),
        ("I greet.\n</think>\n\nHello!", True, "I greet.", "Hello!"),
        ("<think>\nI greet.\n</think>\n\nHello!", True, "I greet.", "Hello!"),
        ("<think>\n\n</think>\n\nHello!", False, "", "Hello!"),
        (" \n<think>a</think>b", False, "a", "b"),
        ("Hello!", False, "", "Hello!"),
        ("Hello <think>a</think>", False, "", "Hello <think>a</think>"),
        ("still thinking\n", True, "still thinking", ""),
        ("<think>still thinking </thi", False, "still thinking </thi", ""),
        ("<think>a</think>b</think>c", False, "a", "b</think>c"),
        ("a\n\nb\n</think>c\n\nd\n", True, "a\n\nb", "c\n\nd"),
        ("<thi", False, "", "<thi"),
        ("  <thing>", False, "", "  <thing>"),
        ("</think>", True, "", ""),
        ("", True, "", ""),
    ],
)
def test_reasoning_and_answer(text: str, inside: bool, reasoning: str, answer: str) -> None:
    assert split_reasoning(text, inside) == (reasoning, answer)
    assert split_in(list(text), inside) == (reasoning, answer)


@settings(max_examples=500, deadline=None)
@given(think_texts, st.booleans(), st.integers(0, 2**32))
def test_splitting_does_not_depend_on_the_pieces(text: str, inside: bool, seed: int) -> None:
    assert split_in(pieces(text, seed), inside) == split_in([text], inside) == split_in(list(text), inside)


@settings(max_examples=300, deadline=None)
@given(think_texts, st.booleans())
def test_splitting_loses_only_marks_and_line_breaks(text: str, inside: bool) -> None:
    """An independent way to the same result: regular string methods on the whole text."""
    body = text.lstrip()
    opened = body.startswith("<think>")
    if opened:
        before, _, after = body[len("<think>") :].partition("</think>")
        expected = Split(before.strip("\n"), after.strip("\n"))
    elif inside:
        before, _, after = text.partition("</think>")
        expected = Split(before.strip("\n"), after.strip("\n"))
    else:
        expected = Split("", text.strip("\n"))
    assert split_reasoning(text, inside) == expected


def test_state_of_the_splitter() -> None:
    splitter = ReasoningSplitter()
    assert (splitter.is_inside, splitter.has_block) == (False, False)
    assert splitter.push("<think>") == ("", "")
    assert (splitter.is_inside, splitter.has_block) == (True, True)
    assert splitter.push("a\n") == ("a", "")
    assert splitter.push("b</th") == ("\nb", "")
    assert splitter.push("ink>\n\nc") == ("", "c")
    assert not splitter.is_inside
    assert splitter.finish() == splitter.finish() == ("", "")
    with pytest.raises(RuntimeError, match="finish"):
        splitter.push("x")


@pytest.mark.parametrize(
    ("text", "rest", "num_calls"),
    [
        (f"<tool_call>\n{GOOD}\n</tool_call>", "", 1),
        (f"Let me check.\n<tool_call>\n{GOOD}\n</tool_call>\n<tool_call>{GOOD}</tool_call>\n", "Let me check.", 2),
        (f"a\n\n<tool_call>{GOOD}</tool_call>\n\nb\n", "ab\n", 1),
        (f"<tool_call>{GOOD}", f"<tool_call>{GOOD}", 0),
        (f"a\n<tool_call>{GOOD[:-1]}</tool_call>\nb", f"a\n<tool_call>{GOOD[:-1]}</tool_call>\nb", 0),
        (f"<tool_call>x</tool_call><tool_call>{GOOD}</tool_call>", "<tool_call>x</tool_call>", 1),
        (f"</tool_call>{GOOD}", f"</tool_call>{GOOD}", 0),
        ("a <tool_cal", "a <tool_cal", 0),
    ],
)
def test_tool_calls(text: str, rest: str, num_calls: int) -> None:
    for parts in ([text], list(text)):
        assert parse_in(parts) == (rest, [ToolCall("f", {"x": 1})] * num_calls)


@pytest.mark.parametrize(
    "body",
    [
        "", "[]", "{", '"f"', '{"name": "f"}', '{"arguments": {}}', '{"name": "f", "arguments": "{}"}',
        '{"name": "f", "arguments": []}', '{"name": 1, "arguments": {}}', '{"name": "", "arguments": {}}',
        '{"name": "f", "arguments": {}, "id": 1}', '{"name": "f", "name": "g", "arguments": {}}',
        '{"name": "f", "arguments": {"x": NaN}}', '{"name": "f", "arguments": {"x": 1e999}}',
        '{"name": "f", "arguments": {"x": "\\ud800"}}', '{"name": "f", "arguments": {"x": 1, "x": 2}}',
        '{"name": "f", "arguments": {}} x', "{'name': 'f', 'arguments': {}}",
        '{"name": "f", "arguments": {"x": ' + "[" * 100_000 + "]" * 100_000 + "}}",
        '{"name": "f", "arguments": {"x": ' + "9" * 100_000 + "}}",
    ],
)  # fmt: skip
def test_malformed_calls_stay_text(body: str) -> None:
    assert parse_call(body) is None
    text = f"a\n<tool_call>{body}</tool_call>\nb"
    assert parse_in([text]) == (text, [])


@settings(max_examples=500, deadline=None)
@given(call_texts, st.integers(0, 2**32))
def test_parsing_does_not_depend_on_the_pieces(text: str, seed: int) -> None:
    assert parse_in(pieces(text, seed)) == parse_in([text]) == parse_in(list(text))


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(), max_size=4))
def test_arguments_come_back(arguments: dict[str, Any]) -> None:
    text = json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=False)
    rest, calls = parse_in([f"<tool_call>\n{text}\n</tool_call>"])
    if "</tool_call>" not in text:
        assert (rest, calls) == ("", [ToolCall("f", arguments)])
        assert json.loads(calls[0].arguments_json) == arguments


def test_a_call_that_is_too_long_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_calls, "MAX_CALL_CHARS", len(GOOD))
    long = f"<tool_call>{GOOD} </tool_call>"
    text = f"a\n{long}\n<tool_call>{GOOD}</tool_call>"
    for parts in ([text], list(text), pieces(text, 1), pieces(text, 2)):
        assert parse_in(parts) == (f"a\n{long}", [ToolCall("f", {"x": 1})])
    # A mark inside it opens nothing: all is text until its end.
    text = f"<tool_call>{' ' * len(GOOD)} <tool_call>{GOOD}</tool_call>"
    for parts in ([text], list(text), pieces(text, 1), pieces(text, 2)):
        assert parse_in(parts) == (text, [])


def test_parser_after_the_end() -> None:
    parser = ToolCallParser()
    assert parser.push("a\n") == ("a", [])
    assert parser.finish() == ("\n", [])
    assert parser.finish() == ("", [])
    with pytest.raises(RuntimeError, match="finish"):
        parser.push("x")


@pytest.mark.parametrize("unit", ["<", "\n", "<tool_call>", "</think>", "<tool_call>x</tool_call>", "</tool_cal", " "])
@pytest.mark.parametrize("run", [parse_in, lambda parts: split_in(parts, True), lambda parts: split_in(parts, False)])
def test_cost_grows_with_the_length(unit: str, run: Callable[[list[str]], object]) -> None:
    """100,000 characters, at once and one by one, take well under a second; a quadratic parser would take minutes."""
    text = unit * (100_000 // len(unit))
    begin = time.monotonic()
    run([text])
    run(list(text))
    assert time.monotonic() - begin < 15
