"""Chat messages and tools as they come from a caller, checked strictly and copied into one plain form.

Everything that is not understood is refused by name, so that nothing of a conversation is lost unseen. Knows nothing
of templates and tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..errors import PromptError
from ..loading.strict_json import is_unicode, parse_json, shown

ROLES = ("system", "user", "assistant", "tool")
MAX_JSON_DEPTH = 64
_OPTIONAL_KEYS = {
    "system": frozenset[str](),
    "user": frozenset[str](),
    "assistant": frozenset({"reasoning_content", "tool_calls"}),
    "tool": frozenset({"tool_call_id", "name"}),
}
_FUNCTION_KEYS = frozenset({"name", "description", "parameters", "strict", "return"})
# Templates write a name into JSON without escaping it.
_NAME = re.compile(r"[\w.:/\-]{1,128}")


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A deep copy of a conversation in the one form that renderers take.

    A message is {"role": "system" | "user" | "assistant" | "tool", "content": str}. An assistant's may also have
    "reasoning_content" (str or None) and "tool_calls", and then its content may be None or missing (it becomes ""). A
    tool's may have "tool_call_id" and "name". A tool call is {"type": "function", "id": str, "function": {"name",
    "arguments"}}, type and id optional, or just {"name", "arguments"}; arguments are an object, or the text of one.

    Raises PromptError that names the message, counted from 0, and what is wrong with it.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(f"messages must be a list of messages, not {_kind(messages)}")
    if not messages:
        raise PromptError("messages is empty; a conversation needs at least one message")
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """A deep copy of tool declarations {"type": "function", "function": {"name", "description", "parameters"}}.

    The order of keys is kept: it is part of the prompt. Raises PromptError that names the tool and the fault.
    """
    if tools is None:
        return []
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise PromptError(f"tools must be a list of tools, not {_kind(tools)}")
    checked = []
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        fields = _mapping(tool, where)
        _refuse_unknown(fields, {"type", "function"}, where)
        if fields.get("type") != "function":
            _fail(f'{where}.type must be "function", got {shown(fields.get("type"))}')
        function = _mapping(fields.get("function"), f"{where}.function")
        _refuse_unknown(function, _FUNCTION_KEYS, f"{where}.function")
        _check_name(function.get("name"), f"{where}.function.name")
        checked.append(_copy_json(fields, where))
    return checked


def dump_json(value: Any) -> str:
    """JSON as the models saw it in training: ", " and ": ", order kept, characters beyond ASCII as they are."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def is_name(value: object) -> bool:
    """Whether this may be the name of a function: 1 to 128 letters, digits and _ . : / -"""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _check_message(message: Any, where: str) -> dict[str, Any]:
    fields = _mapping(message, where)
    role = fields.get("role")
    if role not in ROLES:
        _fail(f"{where}.role must be one of {', '.join(ROLES)}, got {shown(role)}")
    _refuse_unknown(fields, {"role", "content", *_OPTIONAL_KEYS[role]}, f"{where} (role {role})")
    result: dict[str, Any] = {"role": role}
    calls = fields.get("tool_calls")
    content = fields.get("content")
    if content is None and calls:
        content = ""
    result["content"] = _text(content, f"{where}.content")
    if fields.get("reasoning_content") is not None:
        result["reasoning_content"] = _text(fields["reasoning_content"], f"{where}.reasoning_content")
    if calls is not None:
        if not isinstance(calls, list | tuple):
            _fail(f"{where}.tool_calls must be a list, not {_kind(calls)}")
        result["tool_calls"] = [_check_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    for key in ("tool_call_id", "name"):
        if fields.get(key) is not None:
            result[key] = _text(fields[key], f"{where}.{key}")
    return result


def _check_call(call: Any, where: str) -> dict[str, Any]:
    fields = _mapping(call, where)
    result: dict[str, Any] = {"type": "function"}
    if "function" in fields:
        _refuse_unknown(fields, {"type", "id", "function"}, where)
        if fields.get("type", "function") != "function":
            _fail(f'{where}.type must be "function", got {shown(fields["type"])}')
        if fields.get("id") is not None:
            result["id"] = _text(fields["id"], f"{where}.id")
        where = f"{where}.function"
        fields = _mapping(fields["function"], where)
    _refuse_unknown(fields, {"name", "arguments"}, where)
    _check_name(fields.get("name"), f"{where}.name")
    arguments = fields.get("arguments")
    if isinstance(arguments, str):
        _check_object_text(_text(arguments, f"{where}.arguments"), f"{where}.arguments")
    else:
        arguments = _copy_json(_mapping(arguments, f"{where}.arguments"), f"{where}.arguments")
    result["function"] = {"name": fields["name"], "arguments": arguments}
    return result


def _check_object_text(text: str, where: str) -> None:
    def fail(reason: str) -> NoReturn:
        _fail(f"{where} is a text that {reason}; give an object, or the JSON text of one")

    value = parse_json(text, lambda reason: fail(f"is not good JSON ({reason})"))
    if not isinstance(value, dict):
        fail("is not a JSON object")


def _copy_json(value: Any, where: str, depth: int = 0) -> Any:
    """A deep copy of what JSON can hold; anything else is refused with the path that leads to it."""
    if depth > MAX_JSON_DEPTH:
        _fail(f"{where} is nested deeper than the limit of {MAX_JSON_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    if type(value) is int:
        if abs(value) >= 10**20:
            _fail(f"{where} is a number of more than 20 digits; give it as a string")
        return value
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            _fail(f"{where} is {value}, which JSON cannot hold")
        return value
    if isinstance(value, list | tuple):
        return [_copy_json(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        result = {}
        for key, item in value.items():
            if not isinstance(key, str):
                _fail(f"{where} has the key {shown(key)}; keys must be strings")
            result[_text(key, f"a key of {where}")] = _copy_json(item, f"{where}.{key}"[:200], depth + 1)
        return result
    _fail(f"{where} is {_kind(value)}, which JSON cannot hold")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        _fail(f"{where} must be a string, not {_kind(value)}")
    if not is_unicode(value):
        _fail(f"{where} has a lone surrogate; it is not Unicode")
    # A subclass of str might render as something else than it was checked for.
    return str.__str__(value)


def _check_name(value: Any, where: str) -> None:
    if not is_name(value):
        _fail(f"{where} must be 1 to 128 letters, digits and _ . : / -, got {shown(value)}")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        _fail(f"{where} must be an object (dict), not {_kind(value)}")
    return value


def _refuse_unknown(fields: Mapping[str, Any], known: set[str] | frozenset[str], where: str) -> None:
    for key in fields:
        if key not in known:
            _fail(f"{where} has the unknown key {shown(key)}; known: {', '.join(sorted(known))}")


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _fail(sentence: str) -> NoReturn:
    raise PromptError(sentence)
