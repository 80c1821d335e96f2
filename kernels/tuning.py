"""Tile sizes as data: configs/<target>.json, read on first use.

A file is {"target": ..., "kernels": {kernel: [rule, ...]}}; a rule is {"when": {size: limit, ...}, "num_warps": ...,
"num_stages": ..., "BLOCK_M": ..., ...}. The first rule counts whose sizes are all at most their limits; a rule without
"when" always counts. A target without a file, and a kernel without a rule, use the defaults beside the kernel.
Targets: sm_80 and so on (NVIDIA's compute capability), gfx942 and so on (AMD), "interpreter" (CPU tensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .launch import Config

FOLDER = Path(__file__).parent / "configs"
_forced: str | None = None
_OPTIONS = ("num_warps", "num_stages")


@contextmanager
def forced_target(target: str | None) -> Iterator[None]:
    """Choose for another target than the tensors' device, to compile ahead of time. Not for several threads at once."""
    global _forced
    before = _forced
    _forced = target
    try:
        yield
    finally:
        _forced = before


_trial: dict[str, Config] = {}


@contextmanager
def forced_config(kernel: str, config: Config) -> Iterator[None]:
    """Use `config` for a kernel whatever the rules say, to try it out. Not for several threads at once."""
    before = _trial.get(kernel)
    _trial[kernel] = config
    try:
        yield
    finally:
        del _trial[kernel]
        if before is not None:
            _trial[kernel] = before


@cache
def target_of(device: torch.device) -> str:
    """Name of a device's target."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def load_rules(target: str) -> dict[str, list[tuple[dict[str, int], Config]]]:
    """Rules of a target by kernel; {} if it has no file."""
    path = FOLDER / f"{target}.json"
    if not path.is_file():
        return {}
    kernels: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    return {kernel: [_read_rule(rule) for rule in rules] for kernel, rules in kernels.items()}


def _read_rule(rule: dict[str, Any]) -> tuple[dict[str, int], Config]:
    sizes = {name: int(value) for name, value in rule.items() if name.isupper()}
    options = {name: int(rule[name]) for name in _OPTIONS if name in rule}
    return {name: int(limit) for name, limit in rule.get("when", {}).items()}, Config.make(**options, **sizes)


def choose(kernel: str, device: torch.device, default: Config, **sizes: int) -> Config:
    """The configuration of a kernel for `sizes`; tile sizes that a rule does not name come from `default`."""
    if kernel in _trial:
        config = _trial[kernel]
        return Config({**default.sizes, **config.sizes}, {**default.options, **config.options})
    for when, config in load_rules(_forced or target_of(device)).get(kernel, ()):
        if all(sizes[name] <= limit for name, limit in when.items()):
            return Config({**default.sizes, **config.sizes}, {**default.options, **config.options})
    return default
