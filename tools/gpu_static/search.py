"""Chooses configurations from what the compilers say and the cost model; writes kernels/configs/<target>.json.

A candidate is dropped if it does not compile, spills, copies less than 16 bytes at once (NVIDIA), or does not fit a
multiprocessor; of the others the one with the least estimated time wins, then the one with fewer registers. Workloads
that share a rule (the same key and limits) add up their times.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagelens.kernels.candidates import candidates
from pagelens.kernels.launch import Config
from pagelens.kernels.tuning import FOLDER, forced_config
from pagelens.kernels.workloads import WORKLOADS, Workload

from .assembly import Resources, read
from .compiled import CompileError, compile_all, setup
from .cost import estimate, main_launch
from .occupancy import occupancy
from .recorded import record


@dataclass(frozen=True)
class Judged:
    """A candidate on one workload: estimated seconds, or the reason why it cannot be taken."""

    seconds: float
    registers: int
    note: str
    refused: str | None = None


def judge(target: str, workload: Workload, launches: list, found: Sequence[Resources | CompileError]) -> Judged:
    for result in found:
        if isinstance(result, CompileError):
            return Judged(0.0, 0, "", f"does not compile ({str(result).split(': ', 1)[-1][:60]})")
        if result.spills:
            return Judged(0.0, 0, "", f"spills ({result.spills} instructions)")
        if not occupancy(target, result).programs:
            return Judged(0.0, 0, "", f"does not fit ({result.shared} bytes of shared memory)")
    whole = [result for result in found if isinstance(result, Resources)]
    pairs = list(zip(launches, whole))
    guess, (_, main) = estimate(target, workload, pairs), main_launch(pairs)
    if main.tensor and main.copies and not main.wide_copies and not target.startswith("gfx"):
        return Judged(0.0, 0, "", "copies less than 16 bytes at once")
    fit = occupancy(target, main)
    note = (
        f"{workload.name}: {1e6 * guess.total:.1f} us by the model, bound by {guess.bound}; {main.registers} "
        f"registers, {main.shared} bytes shared, {fit.programs} a multiprocessor ({fit.limiter})"
    )
    return Judged(guess.total, main.registers, note)


def rules(target: str, processes: int = 0) -> dict[str, list[dict[str, Any]]]:
    """The rules of a target by kernel."""
    setup()
    grouped: dict[tuple[str, str], list[Workload]] = {}
    for workload in WORKLOADS:
        if candidates(workload):
            grouped.setdefault((workload.key, json.dumps(workload.when)), []).append(workload)
    trials = []
    for (key, _), workloads in grouped.items():
        for config in candidates(workloads[0]):
            for workload in workloads:
                with forced_config(key, config):
                    trials.append((config, workload, record(workload, target)))
    jobs = [(launch, target) for _, _, launches in trials for launch in launches]
    found = iter(compile_all(jobs, read, Resources, processes))
    judged = [(c, w, judge(target, w, launches, [next(found) for _ in launches])) for c, w, launches in trials]
    result: dict[str, list[dict[str, Any]]] = {}
    for (key, _), workloads in grouped.items():
        own = [(c, j) for c, w, j in judged if w in workloads]
        result.setdefault(key, []).append(best(target, key, workloads, own))
    return result


def best(target: str, key: str, workloads: list[Workload], own: list[tuple[Config, Judged]]) -> dict[str, Any]:
    sums: dict[str, tuple[float, int, Config, list[str]]] = {}
    refused: dict[str, str] = {}
    for config, judged in own:
        name = describe(config)
        if judged.refused:
            refused[name] = judged.refused
        seconds, registers, _, notes = sums.get(name, (0.0, 0, config, []))
        sums[name] = seconds + judged.seconds, max(registers, judged.registers), config, [*notes, judged.note]
    left = {name: value for name, value in sums.items() if name not in refused}
    if not left:
        raise RuntimeError(f"{target}: no candidate of {key} is left: {refused}")
    name = min(left, key=lambda n: left[n][:2])
    _, _, config, notes = left[name]
    others = [f"{n}: {1e6 * value[0]:.1f} us" for n, value in sorted(left.items(), key=lambda i: i[1][:2]) if n != name]
    rule: dict[str, Any] = {"when": workloads[0].when} if workloads[0].when else {}
    return {
        **rule,
        **config.options,
        **config.sizes,
        "why": notes,
        "others": others + [f"{n}: {reason}" for n, reason in refused.items()],
    }


def describe(config: Config) -> str:
    sizes = "x".join(str(v) for v in config.sizes.values())
    return f"{sizes}, {config.options['num_warps']} warps, {config.options['num_stages']} stages"


def write(target: str, found: dict[str, list[dict[str, Any]]], folder: Path = FOLDER) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{target}.json"
    text = {"target": target, "measured": False, "by": "tools/choose_gpu_configs.py", "kernels": found}
    path.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    return path
