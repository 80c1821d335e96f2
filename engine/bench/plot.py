"""Charts of a benchmark's record: latencies, and the roofline of the machine with what was measured under it."""

from __future__ import annotations

import importlib.util
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError


class Point(NamedTuple):
    """Something measured: operations a byte of weights and cache that must be read, and operations a second."""

    label: str
    intensity: float
    rate: float


def check_plot(path: str | None) -> None:
    """Raises ConfigError if a chart is wanted that cannot be drawn."""
    if path is None:
        return
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {path}: the name must end in .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed; pip install 'pagelens[bench]'")


def points_of(record: dict[str, Any]) -> list[Point]:
    """What of a record can stand in a roofline: all of which operations and bytes are known."""
    found = []
    prefill = record.get("prefill")
    if prefill and prefill["bytes"]:
        rate = prefill["operations"] / prefill["p50"]
        found.append(Point(f"prefill {prefill['tokens']}", prefill["operations"] / prefill["bytes"], rate))
    for row in record.get("decode", record.get("batches", [])):
        if row["bytes"]:
            where = f"depth {row['depth']}, " if "depth" in row else ""
            rate = row["operations"] / row["step_p50_s"]
            found.append(Point(f"decode {where}batch {row['batch']}", row["operations"] / row["bytes"], rate))
    return found


def latencies_of(record: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(label, p50, p95) in milliseconds."""
    rows = []
    if "prefill" in record:
        prefill = record["prefill"]
        rows.append((f"first token\n({prefill['tokens']} tokens)", 1e3 * prefill["p50"], 1e3 * prefill["p95"]))
    for row in record.get("decode", ()):
        label = f"step, depth {row['depth']}\nbatch {row['batch']}"
        rows.append((label, 1e3 * row["step_p50_s"], 1e3 * row["step_p95_s"]))
    for row in record.get("batches", ()):
        for stage, spread in row["stages"].items():
            rows.append((f"{stage}\nbatch {row['batch']}", 1e3 * spread["p50"], 1e3 * spread["p95"]))
    return rows


def draw(record: dict[str, Any], path: str) -> None:
    """Write both charts. Raises ConfigError if the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    FigureCanvasAgg(figure)  # no display and no global state
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"pagelens bench: {record['model']}, {record['threads']} threads, {record['limits']['isa']}")
    _draw_latencies(left, record)
    _draw_roofline(right, record)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error.strerror or error}") from error


def _draw_latencies(axes: Any, record: dict[str, Any]) -> None:
    rows = latencies_of(record)
    places = range(len(rows))
    axes.bar([place - 0.2 for place in places], [p50 for _, p50, _ in rows], 0.4, label="p50")
    axes.bar([place + 0.2 for place in places], [p95 for _, _, p95 in rows], 0.4, label="p95")
    axes.set_xticks(list(places), [label for label, _, _ in rows], rotation=60, ha="right", fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds")
    axes.set_title("latency")
    axes.legend()


def _draw_roofline(axes: Any, record: dict[str, Any]) -> None:
    limits, points = record["limits"], points_of(record)
    bandwidth = statistics.median(limits["bandwidth_bytes_per_s"])
    roofs = {kind: statistics.median(rates) for kind, rates in limits["operations_per_s"].items()}
    knees = [roof / bandwidth for roof in roofs.values()]
    low = min([0.25, *(point.intensity / 2 for point in points)])
    high = 4 * max([*knees, *(point.intensity for point in points)])
    steps = [low * (high / low) ** (i / 100) for i in range(101)]
    for kind, roof in roofs.items():
        axes.plot(steps, [min(roof, bandwidth * x) / 1e9 for x in steps], label=f"{kind}, {roof / 1e9:.0f} GFLOP/s")
    for point in points:
        axes.plot([point.intensity], [point.rate / 1e9], "o", color="black", markersize=4)
        place = (point.intensity * math.sqrt(math.sqrt(2)), point.rate / 1e9)
        axes.annotate(point.label, place, fontsize=7, va="center")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte of weights and cache")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"roofline, reading {bandwidth / 1e9:.1f} GB/s")
    axes.legend(loc="lower right")
