"""JSON from files that may be hostile: stricter than `json.loads`, and every fault is one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def parse_json(text: str, fail: Callable[[str], NoReturn], unsigned: bool = False) -> Any:
    """Parse JSON more strictly than `json.loads`: no duplicate keys, no NaN or Infinity, no lone surrogates in keys.

    Numbers of more than 20 digits are refused, and with `unsigned` every negative or fractional number too. Every
    fault ends in `fail(sentence)`, which must raise.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            for key, _ in items:
                if key in seen:
                    fail(f"duplicate key {shown(key)}")
                seen.add(key)
        for key in result:
            if not is_unicode(key):
                fail(f"key {shown(key)} is not valid Unicode")
        return result

    def integer(digits: str) -> int:
        # "-0" is an int to Python's json and a float to others: refused with the negatives.
        if len(digits) > 20 or (unsigned and digits[0] == "-"):
            fail(f"number {digits[:24]} is out of range")
        return int(digits)

    def real(digits: str) -> float:
        if unsigned:
            fail(f"number {digits[:24]} is not an unsigned integer")
        return float(digits)

    def constant(name: str) -> NoReturn:
        fail(f"{name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_int=integer, parse_float=real, parse_constant=constant)
    except RecursionError:
        fail("nested too deeply")
    except json.JSONDecodeError as error:
        fail(f"not valid JSON ({error.msg} at character {error.pos})")


def shown(name: object) -> str:
    """A name from a file, safe to print on one line: quoted, escaped, cut at 80 characters."""
    text = ascii(name)
    return text if len(text) <= 80 else text[:77] + "..."


def is_unicode(text: str) -> bool:
    # JSON escapes may build lone surrogates, which no UTF-8 text holds.
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def read_json_object(path: Path, max_bytes: int, fail: Callable[[str], NoReturn]) -> dict[str, Any]:
    """Read a file that holds one JSON object of at most `max_bytes` bytes; every fault ends in `fail(sentence)`."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        fail(f"cannot be read: {error.strerror or error}")
    if len(data) > max_bytes:
        fail(f"is larger than the limit of {max_bytes} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        fail(f"is not UTF-8 at byte {error.start}")
    raw = parse_json(text, fail)
    if not isinstance(raw, dict):
        fail("is not a JSON object")
    return raw
