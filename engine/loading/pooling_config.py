"""How a sentence-transformers folder makes a vector of hidden states: only the last token's is implemented.

A folder without such files (a plain checkpoint) says nothing and is taken as a last-token model.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from ..errors import ConfigError
from .strict_json import read_json_object, shown

MAX_BYTES = 2**20
LAST_TOKEN = "lasttoken"


def check_pooling(folder: Path) -> None:
    """Raises ConfigError if the folder pools in another way, or has a linear layer behind the pooling."""
    for path in sorted(folder.glob("[0-9]*_Dense*")):
        raise ConfigError(f"{folder.name}/{path.name}: a linear layer behind the pooling is not implemented")
    for path in sorted(folder.glob("[0-9]*_Pooling/config.json")):
        label = f"{folder.name}/{path.parent.name}/config.json"

        def fail(reason: str, label: str = label) -> NoReturn:
            raise ConfigError(f"{label}: {reason}")

        raw = read_json_object(path, MAX_BYTES, fail)
        # One switch a way of pooling; newer versions write one key with its name.
        modes = [key.removeprefix("pooling_mode_") for key, value in raw.items() if _is_switch(key) and value]
        if "pooling_mode" in raw:
            modes.append(str(raw["pooling_mode"]))
        if set(modes) != {LAST_TOKEN}:  # none said is the mean, by the library's defaults
            said = shown(", ".join(modes)) if modes else "without a mode"
            fail(f"pooling {said} is not implemented; only {LAST_TOKEN} is")


def _is_switch(key: str) -> bool:
    return key.startswith("pooling_mode_")
