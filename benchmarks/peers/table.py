"""What the measured pairs of a row come to: medians, ratios, shares of limits, a verdict. Standard library only."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

SLOW_GB_S = 40.0  # pairs that were probed below this are printed, not judged
GOOD_SHARE = 0.90  # so near to the limit, no ratio is asked for


@dataclass(frozen=True)
class Pair:
    """One sample of ours and one of a rival, in seconds of a unit of work, between two probes.

    probes  name of a limit -> G a second (bytes for "read", else operations), before and after (and between, where the
            two cannot run side by side)
    """

    rival: str
    ours_s: float
    rival_s: float
    probes: tuple[dict[str, float], ...]

    def limit(self, kind: str) -> float:
        return statistics.mean(probe[kind] for probe in self.probes)


@dataclass(frozen=True)
class Goal:
    """What a row aims at, at least; None: nothing.

    share   of the probed limits
    ratio   over the best rival
    keeps   over ours in another setting
    cosine  of the features with float32's
    """

    share: float | None = None
    ratio: float | None = None
    keeps: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class Result:
    ours_s: float
    rivals: dict[str, float]  # name -> median of the pairs' ratios: how many times faster ours is
    rivals_s: dict[str, float]
    share: float | None
    keeps: float | None
    judged: int  # pairs in which the limit was high enough; of every rival at least one, or the verdict says so
    pairs: int
    probe_range: tuple[float, float]
    probe_kind: str
    verdict: str

    @property
    def best(self) -> str | None:
        return min(self.rivals, key=lambda name: self.rivals[name]) if self.rivals else None


def judge(
    pairs: list[Pair],
    needs: dict[str, float],
    goal: Goal,
    scale: float = 1.0,
    own: str | None = None,
    cosine: float | None = None,
) -> Result:
    """The figures of a row.

    needs  name of a limit -> G of work of one unit: what the unit must take is the sum of work over limit
    scale  units of ours that one of ours' samples is worth beside one of a rival's
    own    name of a rival that is ours in another setting: it is no peer, `keeps` is the ratio over it
    cosine  what ours reached, where the goal asks for it
    Rows that need reading count only pairs probed at SLOW_GB_S or more. A rival that has none is shown by its slow
    ones, and then nothing is judged.
    """
    if not pairs:
        raise ValueError("no pairs were measured")
    names = list(dict.fromkeys(pair.rival for pair in pairs))
    fast = [pair for pair in pairs if "read" not in needs or pair.limit("read") >= SLOW_GB_S]
    unjudged = [name for name in names if name not in {pair.rival for pair in fast}]
    counted = fast + [pair for pair in pairs if pair.rival in unjudged]
    ratios = {
        name: statistics.median(scale * pair.rival_s / pair.ours_s for pair in counted if pair.rival == name)
        for name in names
    }
    seconds = {name: statistics.median(pair.rival_s for pair in counted if pair.rival == name) for name in names}
    keeps = ratios.pop(own, None) if own else None
    kind = "read" if "read" in needs or not needs else max(needs, key=lambda name: needs[name])
    rates = [probe[kind] for pair in pairs for probe in pair.probes]
    share = statistics.median(floor_s(needs, pair) / pair.ours_s for pair in fast or pairs) if needs else None
    beside = "" if len(unjudged) == len(names) else f" beside {', '.join(unjudged)}"
    verdict = (
        f"not judged: probe under {SLOW_GB_S:g} GB/s{beside}"
        if unjudged
        else decide(goal, share, ratios, keeps, cosine)
    )
    return Result(
        ours_s=statistics.median(pair.ours_s for pair in fast or pairs),
        rivals=ratios,
        rivals_s=seconds,
        share=share,
        keeps=keeps,
        judged=len(fast),
        pairs=len(pairs),
        probe_range=(min(rates), max(rates)),
        probe_kind=kind,
        verdict=verdict,
    )


def floor_s(needs: dict[str, float], pair: Pair) -> float:
    """Seconds that a unit must take at the limits probed beside this pair."""
    return sum(work / pair.limit(kind) for kind, work in needs.items())


def decide(goal: Goal, share: float | None, ratios: dict[str, float], keeps: float | None, cosine: float | None) -> str:
    """ "met", or what is missed. A ratio also counts as met where our share of the limit is GOOD_SHARE."""
    missed = [f"slower than {name}" for name, ratio in ratios.items() if ratio < 1]
    if goal.share is not None and (share is None or share < goal.share):
        missed.append("share")
    near = share is not None and share >= GOOD_SHARE
    if goal.ratio is not None and not near and (not ratios or min(ratios.values()) < goal.ratio):
        missed.append("ratio")
    if goal.keeps is not None and (keeps is None or keeps < goal.keeps):
        missed.append("own ratio")
    if goal.cosine is not None and (cosine is None or cosine < goal.cosine):
        missed.append("cosine")
    return "missed: " + ", ".join(missed) if missed else "met"


def shown_time(seconds: float, unit: str) -> str:
    if unit == "token":
        return f"{1 / seconds:.1f} tok/s"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def against(value: float | None, goal: float | None, digits: int = 2) -> str:
    """A figure and, in brackets, what was aimed at."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" (>= {goal:g})" if goal is not None else "")


def line(title: str, unit: str, goal: Goal, result: Result, quality: dict[str, float], quality_name: str) -> list[str]:
    """One row of the table, as texts."""
    best = result.best
    low, high = result.probe_range
    probe_unit = "GB/s" if result.probe_kind == "read" else "GF/s" if result.probe_kind != "int8" else "GOP/s"
    judged = "" if result.judged == result.pairs else f", {result.judged} of {result.pairs} pairs"
    digits = ".6f" if quality_name == "cosine" else ".3g"
    figures = ", ".join(f"{name} {value:{digits}}" for name, value in quality.items())
    return [
        title,
        shown_time(result.ours_s, unit),
        "-" if best is None else f"{best} {shown_time(result.rivals_s[best], unit)}",
        "-" if best is None else against(result.rivals[best], goal.ratio),
        against(result.share, goal.share),
        against(result.keeps, goal.keeps),
        f"{low:.0f}-{high:.0f} {probe_unit}{judged}",
        f"{quality_name} {figures}" if figures else "-",
        result.verdict,
    ]


HEADINGS = ["workload", "pagelens", "best peer", "ratio", "share of limit", "own ratio", "probed", "quality", "verdict"]


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table with HEADINGS."""
    widths = [max(len(row[i]) for row in [HEADINGS, *rows]) for i in range(len(HEADINGS))]
    parts = [HEADINGS, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in parts)


def pairs_from(stored: list[dict[str, Any]]) -> list[Pair]:
    return [Pair(item["rival"], item["ours_s"], item["rival_s"], tuple(item["probes"])) for item in stored]
