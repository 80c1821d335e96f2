"""Typed reads from the nested objects of a config.json, with the path of a key in every message."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from ..config import DType
from ..errors import ConfigError

logger = logging.getLogger(__name__)

# Above any width, vocabulary or number of heads; a larger value is a damaged file, not a model.
MAX_SIZE = 2**20

# A type, or a one-element tuple of one: (int,) is a list of integers, returned as a tuple.
Kind = type | tuple[type]


class ConfigReader:
    """One object of config.json. A key that is null counts as absent.

    where     its path for messages
    fallback  another reader asked for keys that are not in this object at all
    """

    def __init__(self, raw: Mapping[str, Any], where: str, fallback: ConfigReader | None = None) -> None:
        self._raw = raw
        self._where = where
        self._fallback = fallback
        self._known: set[str] = set()
        self._sections: list[ConfigReader] = []

    def get(
        self,
        key: str,
        kind: Kind,
        default: Any,
        only: tuple[Any, ...] | None = None,
        low: float | None = None,
        high: float | None = None,
    ) -> Any:
        """The value of `key`, or `default` if it is absent or null.

        kind  int (a bool or 1.0 is refused), float (an int is converted), bool, str, dict, object (anything), or (t,)
              for a list of t, returned as a tuple
        only  the values that are implemented; low, high bound numbers (in lists: every element)
        Raises ConfigError naming the key, its value and what is accepted. `default` itself is not checked.
        """
        value = self._find(key)
        if value is None:
            return default
        value = self._typed(key, value, kind)
        if only is not None and value not in only:
            listed = [list(choice) if isinstance(choice, tuple) else choice for choice in only]
            self.refuse(key, self._find(key), " or ".join("null" if item is None else repr(item) for item in listed))
        for number in value if isinstance(value, tuple) else (value,):
            if (low is not None and number < low) or (high is not None and number > high):
                self.refuse(key, self._find(key), f"{low} to {high}")
        return value

    def require(
        self,
        key: str,
        kind: Kind,
        only: tuple[Any, ...] | None = None,
        low: float | None = None,
        high: float | None = None,
    ) -> Any:
        """As `get`, but a key that is absent or null is a ConfigError."""
        value = self.get(key, kind, None, only, low, high)
        if value is None:
            self.missing(key)
        return value

    def get_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Token ids given as one integer or as a list; () if absent."""
        kind: Kind = (int,) if isinstance(self._find(key), list) else int
        value = self.get(key, kind, (), low=0, high=vocab_size - 1)
        return value if isinstance(value, tuple) else (value,)

    def get_dtype(self) -> DType:
        """The dtype to run in when the user leaves it open. float16 runs as float32: bfloat16 would lose three bits."""
        choices = ("bfloat16", "float32", "float16")
        name = self.get("torch_dtype", str, None, only=choices) or self.get("dtype", str, "bfloat16", only=choices)
        return "bfloat16" if name == "bfloat16" else "float32"

    def section(self, key: str, fallback: ConfigReader | None = None) -> ConfigReader:
        """A reader of the object under `key`; an absent one reads as empty."""
        value = self.get(key, dict, {})
        reader = ConfigReader(value, f"{self._where}.{key}", fallback)
        self._sections.append(reader)
        return reader

    def has(self, key: str) -> bool:
        return self._find(key) is not None

    def ignore(self, key: str) -> None:
        """Mark a key as known and deliberately not used."""
        self._known.add(key)

    def require_divides(self, divisor_key: str, divisor: int, key: str, value: int) -> None:
        if value % divisor:
            raise ConfigError(f"{self._where}: {key}={value} must be a multiple of {divisor_key}={divisor}")

    def refuse(self, key: str, value: object, accepted: str) -> NoReturn:
        raise ConfigError(f"{self._where}: {key}={_short(value)} is not supported; accepted: {accepted}")

    def missing(self, key: str) -> NoReturn:
        raise ConfigError(f"{self._where}: {key} is missing; add it, or download the file again")

    def log_unread(self) -> None:
        """Log at debug level the keys that nothing asked for, here and in all sections."""
        for key in sorted(set(self._raw) - self._known):
            logger.debug("%s: key %s is not used", self._where, _short(key))
        for reader in self._sections:
            reader.log_unread()

    def _find(self, key: str) -> Any:
        self._known.add(key)
        if self._fallback is not None:
            # Also when the key is here: the copy at the fallback is known too, not an unused key.
            other = self._fallback._find(key)
            if key not in self._raw:
                return other
        return self._raw.get(key)

    def _typed(self, key: str, value: Any, kind: Kind) -> Any:
        if isinstance(kind, tuple):
            if not isinstance(value, list):
                self.refuse(key, value, f"a list of {kind[0].__name__}")
            return tuple(self._typed(key, item, kind[0]) for item in value)
        if kind is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        # bool is a subclass of int: true must not pass as 1.
        if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
            self.refuse(key, value, f"a value of type {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            self.refuse(key, value, "a finite number")
        return value


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
