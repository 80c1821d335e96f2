"""What is printed of the stored results. Standard library only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import table
from .rows import Row

MARKS = ("<!-- measured -->", "<!-- end -->")
QUALITY_NAMES = {"qwen3-0.6b": "KL", "deepseek-ocr": "KL", "encoder": "cosine", "op": "error"}


def summarise(row: Row, stored: dict[str, Any]) -> tuple[table.Result, list[str]]:
    own = next((rival.name for rival in row.rivals if rival.own), None)
    cosine = stored["quality"].get("ours") if row.quality == "encoder" else None
    result = table.judge(table.pairs_from(stored["pairs"]), row.needs, row.goal, row.scale, own, cosine)
    name = QUALITY_NAMES.get(row.quality or "", "")
    return result, table.line(row.title, row.unit, row.goal, result, stored["quality"], name)


def is_judged(row: Row, results: dict[str, Any]) -> bool:
    stored = results["rows"].get(row.id)
    return stored is not None and not summarise(row, stored)[0].verdict.startswith("not judged")


def report(results: dict[str, Any], rows: list[Row]) -> tuple[str, dict[str, Any]]:
    """The table, every peer's ratio, versions and settings in Markdown; and the figures for JSON."""
    lines, ratios, engines, notes, record = [], [], list[str](), [], []
    for row in rows:
        stored = results["rows"].get(row.id)
        if stored is None:
            continue
        result, texts = summarise(row, stored)
        lines.append(texts)
        found = ", ".join(f"{name} {ratio:.2f}" for name, ratio in result.rivals.items())
        ratios += [f"{row.id}: {found}"] if found else []
        for about in stored["workers"].values():
            priority = "top priority" if about.get("top_priority") else "plain priority"
            engines.append(f"{about['engine']}: {about['settings']}; {priority}")
        notes += [f"{row.id}: {note}" for note in stored["notes"]]
        figures = {"id": row.id, "ours_s": result.ours_s, "ratios": result.rivals, "share": result.share}
        figures |= {"keeps": result.keeps, "probe": result.probe_range, "probe_kind": result.probe_kind}
        figures |= {"judged": result.judged, "pairs": result.pairs, "quality": stored["quality"]}
        record.append({**figures, "verdict": result.verdict, "when": stored["when"]})
    machine = results.get("machine", {})
    parts = [f"{machine.get('cpu')}, {machine.get('threads')} threads.", table.markdown(lines)]
    parts.append(listed("How many times faster than each:", ratios))
    parts.append(listed("Engines:", list(dict.fromkeys(engines))))
    if notes:
        parts.append(listed("Notes:", notes))
    return "\n\n".join(parts), {"machine": machine, "rows": record}


def listed(heading: str, items: list[str]) -> str:
    return "\n".join([heading, *(f"- {item}" for item in items)])


def write_between_marks(file: Path, text: str) -> None:
    """Replace what stands between MARKS. Raises SystemExit if the file does not have them."""
    before, start, rest = file.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        raise SystemExit(f"{file} has no {MARKS[0]} ... {MARKS[1]}")
    file.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
