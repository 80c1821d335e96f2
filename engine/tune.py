"""Measures the candidates of every workload on the card at hand and writes its kernels/configs/<target>.json.

A candidate that does not run (too much shared memory, for example) is left out with its reason. Before each call the
second cache is overwritten, so that weights come from the device's memory as in a decode step.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from .errors import ConfigError, UnsupportedError
from .ops.devices import find_device

FLUSH_BYTES = 256 << 20  # more than the second cache of any card
FLUSHES = 4  # of about 0.1 ms each: the host has handed the call over before the card comes to it


class Timer(Protocol):
    """What a card does for the tuner."""

    device: torch.device
    target: str

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """The median time of a call."""

    def check(self) -> None:
        """After a call that failed: raises UnsupportedError if all calls will fail from then on."""

    def trying(self) -> Any:
        """A context in which kernels may be called."""


class CudaTimer:
    """CUDA events around each call, cold second cache. Raises UnsupportedError if there is no card."""

    def __init__(self) -> None:
        from .kernels.tuning import target_of

        self.device = find_device("cuda")
        self.target = target_of(self.device)
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        for _ in range(3):  # compiles, and loads what is loaded on first use
            call()
        times: list[float] = []
        for _ in range(repeats):
            for _ in range(FLUSHES):
                self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()  # type: ignore[no-untyped-call]
            call()
            end.record()  # type: ignore[no-untyped-call]
            end.synchronize()
            times.append(float(start.elapsed_time(end)) / 1e3)
        return median(times)

    def check(self) -> None:
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise UnsupportedError(
                f"the card failed and can do nothing more in this process: {first_line(error)}"
            ) from error

    @contextmanager
    def trying(self) -> Iterator[None]:
        yield


class DryTimer:
    """No card: tensors without data, launches counted instead of started, times made up from the count."""

    def __init__(self, target: str = "sm_80") -> None:
        from .kernels.launch import LaunchCounter

        self.device = torch.device("meta")
        self.target = target
        self.counter = LaunchCounter()

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        before = len(self.counter.names)
        for _ in range(repeats):
            call()
        return 1e-6 * (1 + len(self.counter.names) - before) / repeats

    def check(self) -> None: ...

    @contextmanager
    def trying(self) -> Iterator[None]:
        from .kernels.launch import replaced_runner
        from .kernels.tuning import forced_target

        with replaced_runner(self.counter), forced_target(self.target):
            yield


@dataclass(frozen=True)
class Trial:
    """One configuration of one rule: seconds of its workloads together, or why it did not run."""

    options: dict[str, int]
    sizes: dict[str, int]
    seconds: float
    failure: str | None = None

    def describe(self) -> str:
        tiles = "x".join(str(size) for size in self.sizes.values())
        name = f"{tiles}, {self.options['num_warps']} warps, {self.options['num_stages']} stages"
        return f"{name}: {self.failure or f'{1e6 * self.seconds:.1f} us'}"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def tune(timer: Timer, repeats: int = 20, report: Callable[[str], None] = print) -> dict[str, Any]:
    """The contents of the target's file, measured. Raises UnsupportedError if the card fails."""
    from .kernels.candidates import candidates
    from .kernels.launch import Config
    from .kernels.tuning import forced_config
    from .kernels.workloads import WORKLOADS, Workload

    grouped: dict[tuple[str, str], list[Workload]] = {}
    for workload in WORKLOADS:
        if candidates(workload):
            grouped.setdefault((workload.key, json.dumps(workload.when)), []).append(workload)

    def attempt(key: str, config: Config, calls: list[Callable[[], object]]) -> Trial:
        try:
            with timer.trying(), forced_config(key, config):
                return Trial(config.options, config.sizes, sum(timer.seconds(call, repeats) for call in calls))
        except (RuntimeError, ValueError) as error:
            timer.check()
            return Trial(config.options, config.sizes, 0.0, f"does not run: {first_line(error)[:80]}")
        except Exception as error:
            if not type(error).__module__.startswith("triton"):
                raise
            return Trial(config.options, config.sizes, 0.0, f"does not run: {type(error).__name__}")

    kernels: dict[str, list[dict[str, Any]]] = {}
    for (key, _), workloads in grouped.items():
        calls = [workload.make(timer.device) for workload in workloads]
        trials = [attempt(key, config, calls) for config in candidates(workloads[0])]
        rule = choose(workloads[0].when, trials)
        names = ", ".join(workload.name for workload in workloads)
        report(f"{names}: {rule['why'][0] if rule else 'no candidate runs'}")
        if rule:
            kernels.setdefault(key, []).append(rule)
    name = torch.cuda.get_device_name(timer.device) if timer.device.type == "cuda" else "no device: dry run"
    return {"target": timer.target, "measured": timer.device.type == "cuda", "by": name, "kernels": kernels}


def choose(when: dict[str, int], trials: list[Trial]) -> dict[str, Any]:
    """The rule of the fastest trial; {} if none ran."""
    ran = sorted((trial for trial in trials if not trial.failure), key=lambda trial: trial.seconds)
    if not ran:
        return {}
    others = [trial.describe() for trial in [*ran[1:], *(trial for trial in trials if trial.failure)]]
    rule: dict[str, Any] = {"when": when} if when else {}
    return {**rule, **ran[0].options, **ran[0].sizes, "why": [ran[0].describe()], "others": others}


def prepare_folder(folder: Path | None = None) -> Path:
    """The folder for the file, made if need be; the package's own if none is given. Called before anything is measured.

    Raises ConfigError if no file can be written there.
    """
    if folder is None:
        from .kernels.tuning import FOLDER

        folder = FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot hold the file ({error.strerror}); name a folder that can be written with --output"
        ) from error
    return folder


def write(found: dict[str, Any], folder: Path) -> Path:
    """The file of a target's sizes, in a folder of `prepare_folder`."""
    path = folder / f"{found['target']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path
