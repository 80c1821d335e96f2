"""The side by side benchmark: what measured pairs come to, what the work needs at least, and how workers fail."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from pagelens.loading.presets import PRESETS
from pagelens.models.registry import class_of

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"


def load(name: str) -> ModuleType:
    """A module of benchmarks/peers, which is no installed package."""
    if "peers_benchmark" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "peers_benchmark", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        assert spec is not None
        sys.modules["peers_benchmark"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"peers_benchmark.{name}")


table, models, quality, rows, report, run, process = map(
    load, ("table", "models", "quality", "rows", "report", "run", "process")
)


def pair(rival: str, ours_s: float, rival_s: float, read: float = 50.0, **limits: float) -> Any:
    return table.Pair(rival, ours_s, rival_s, ({"read": read, **limits}, {"read": read, **limits}))


# ---- the verdict -----------------------------------------------------------------------------------------------------
def test_ratios_are_medians_of_pairs_and_the_best_peer_counts() -> None:
    pairs = [pair("a", 1, 2), pair("b", 2, 3), pair("a", 1, 9), pair("b", 1, 1.5), pair("a", 2, 6)]
    result = table.judge(pairs, {"read": 25.0}, table.Goal(ratio=1.5, share=0.5))
    assert result.rivals == {"a": 3.0, "b": 1.5}  # not 6/1, the ratio of the medians
    assert result.best == "b"
    assert result.ours_s == 1
    assert result.share == 0.5  # 25 GB at 50 GB/s take half a second; ours took 1, 2, 1, 1 and 2
    assert result.verdict == "met"


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        ({"ratio": 2.0, "share": 0.5}, "met"),
        ({"ratio": 2.1, "share": 0.5}, "missed: ratio"),
        ({"ratio": 2.1, "share": 0.6}, "missed: share, ratio"),
        ({"keeps": 0.9}, "missed: own ratio"),
    ],
)
def test_goals(goal: dict[str, float], verdict: str) -> None:
    assert table.judge([pair("a", 1, 2)], {"read": 25.0}, table.Goal(**goal)).verdict == verdict


def test_near_the_limit_no_ratio_is_asked_for_but_a_faster_peer_is_told() -> None:
    assert table.judge([pair("a", 1, 1.1)], {"read": 45.0}, table.Goal(ratio=1.4)).verdict == "met"
    assert table.judge([pair("a", 1, 1.1)], {"read": 44.0}, table.Goal(ratio=1.4)).verdict == "missed: ratio"
    assert table.judge([pair("a", 1, 0.9)], {"read": 45.0}, table.Goal(ratio=1.4)).verdict == "missed: slower than a"


def test_pairs_of_a_slow_phase_are_left_out() -> None:
    pairs = [pair("a", 2, 2, read=32), pair("a", 1, 3), pair("a", 2, 2, read=39.9)]
    result = table.judge(pairs, {"read": 25.0}, table.Goal(ratio=2.0))
    assert (result.rivals, result.judged, result.pairs, result.verdict) == ({"a": 3.0}, 1, 3, "met")
    assert result.probe_range == (32, 50)


def test_with_slow_pairs_alone_nothing_is_judged() -> None:
    result = table.judge([pair("a", 1, 3, read=32)], {"read": 25.0}, table.Goal(ratio=2.0))
    assert (result.rivals, result.judged) == ({"a": 3.0}, 0)
    assert result.verdict == "not judged: probe under 40 GB/s"


def test_a_peer_seen_in_slow_phases_alone_leaves_the_row_unjudged() -> None:
    pairs = [pair("a", 1, 3), pair("b", 2, 3, read=32), pair("b", 2, 3, read=30)]
    result = table.judge(pairs, {"read": 25.0}, table.Goal(ratio=1.0))
    assert result.rivals == {"a": 3.0, "b": 1.5}
    assert (result.ours_s, result.share, result.judged) == (1, 0.5, 1)
    assert result.verdict == "not judged: probe under 40 GB/s beside b"


def test_work_without_reading_is_judged_in_any_phase() -> None:
    result = table.judge([pair("a", 1, 3, read=32, bf16=400.0, int8=800.0)], {"bf16": 100, "int8": 400}, table.Goal())
    assert result.share == 0.75  # a quarter of a second and half a second, one after the other
    assert (result.probe_kind, result.probe_range) == ("int8", (800, 800))
    assert result.verdict == "met"


def test_our_own_other_setting_is_no_peer() -> None:
    pairs = [pair("one row", 2.0, 1.0), pair("a", 2.0, 5.0)]
    result = table.judge(pairs, {}, table.Goal(keeps=1.9), scale=4, own="one row")
    assert result.keeps == 2.0
    assert result.rivals == {"a": 10.0}
    assert result.share is None
    assert result.verdict == "met"
    alone = table.judge(pairs[:1], {}, table.Goal(keeps=2.1), scale=4, own="one row")
    assert (alone.best, alone.verdict) == (None, "missed: own ratio")


def test_a_cosine_is_asked_for() -> None:
    goal = table.Goal(cosine=0.999)
    found = [table.judge([pair("a", 1, 2)], {}, goal, cosine=cosine).verdict for cosine in (0.9991, 0.9989, None)]
    assert found == ["met", "missed: cosine", "missed: cosine"]


def test_no_pairs_are_an_error() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        table.judge([], {}, table.Goal())


def test_a_line_of_the_table() -> None:
    pairs = [pair("a", 0.025, 0.05), pair("a", 0.02, 0.05, read=30)]
    goal = table.Goal(ratio=1.4, share=0.9)
    texts = table.line("decode", "token", goal, table.judge(pairs, {"read": 1.0}, goal), {"ours": 1.234e-4}, "KL")
    expected = ["decode", "40.0 tok/s", "a 20.0 tok/s", "2.00 (>= 1.4)", "0.80 (>= 0.9)", "-"]
    assert texts == [*expected, "30-50 GB/s, 1 of 2 pairs", "KL ours 0.000123", "missed: share"]
    printed = table.markdown([texts]).splitlines()
    assert len(printed) == 3
    assert {text.count("|") for text in printed} == {len(table.HEADINGS) + 1}
    assert len({len(text) for text in printed}) == 1


# ---- the rows --------------------------------------------------------------------------------------------------------
def test_every_row_has_a_name_of_its_own_and_a_goal() -> None:
    every = rows.all_rows()
    assert len({row.id for row in every}) == len(every)
    for row in every:
        assert row.goal != table.Goal(), row.id
        assert row.rivals, row.id
        assert row.goal.keeps is None or any(rival.own for rival in row.rivals), row.id
        assert row.goal.ratio is None or any(not rival.own for rival in row.rivals), row.id
        assert row.goal.share is None or row.needs, row.id


def test_rows_are_chosen_by_beginning_or_pattern() -> None:
    every = rows.all_rows()

    def ids(patterns: str) -> list[str]:
        return [row.id for row in run.chosen_rows(patterns, every)]

    assert "30b-decode-0-int4" not in ids("")
    assert len(ids("")) == len(every) - 1
    assert ids("30b") == ["30b-decode-0-int4"]
    assert ids("op-linear, *-300-*") == ["op-linear-bf16", "op-linear-fp32", "ocr-prefill-300-bf16"]
    with pytest.raises(SystemExit, match="no row matches 'nothing'"):
        ids("nothing")


@pytest.mark.parametrize("sizes", [models.QWEN3, models.OCR, models.QWEN3_30B], ids=lambda sizes: sizes.name)
def test_the_least_bytes_of_a_token_are_those_of_the_weights_it_uses(sizes: Any) -> None:
    """Counted from the weight map: every matrix but the table, of the experts those of a token."""
    network = class_of(PRESETS[sizes.name])
    specs = network.weight_specs(network.read_config(PRESETS[sizes.name]))
    shapes = {name: shape for spec in specs for name, shape in zip(spec.sources, spec.shapes)}
    total = 0.0
    for name, shape in shapes.items():
        tied_head = name == "model.embed_tokens.weight" and "lm_head.weight" not in shapes
        used = name.startswith(("model.layers.", "lm_head.")) or tied_head
        share = sizes.experts / sizes.num_experts if ".experts." in name else 1.0
        total += share * math.prod(shape) if used and len(shape) == 2 else 0.0
    assert sizes.decode_bytes("bf16", 0) == pytest.approx(2 * total)
    assert sizes.decode_bytes("bf16", 10) - sizes.decode_bytes("bf16", 0) == pytest.approx(
        10 * 4 * sizes.layers * sizes.kv_heads * sizes.head_dim
    )
    assert sizes.decode_bytes("int4", 0) < sizes.decode_bytes("int8", 0) < sizes.decode_bytes("bf16", 0)
    with pytest.raises(ValueError, match="fp8"):
        sizes.decode_bytes("fp8", 0)


def stored(row: Any, **probes: float) -> dict[str, Any]:
    rival = row.rivals[0].name
    found = {"rival": rival, "ours_s": 0.02, "rival_s": 0.05, "probes": [probes, probes]}
    worker = {"engine": "pagelens 1", "settings": "fast", "top_priority": True}
    fields = {"pairs": [found], "quality": {"ours": 0.5}, "workers": {"ours": worker}, "notes": ["a note"]}
    return {"title": row.title, "when": "today", **fields}


def test_the_report_holds_what_is_stored_and_replaces_the_last(tmp_path: Path) -> None:
    first, second, third = (row for row in rows.all_rows() if row.id.startswith("qwen3-decode-0"))
    results = {"rows": {first.id: stored(first, read=50.0), second.id: stored(second, read=30.0)}}
    text, record = report.report(results, [first, second, third])
    assert [found["id"] for found in record["rows"]] == [first.id, second.id]
    assert f"- {first.id}: {first.rivals[0].name} 2.50" in text.splitlines()
    assert "- pagelens 1: fast; top priority" in text
    assert [report.is_judged(row, results) for row in (first, second, third)] == [True, False, False]
    file = tmp_path / "page.md"
    file.write_text(f"head\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\ntail\n")
    report.write_between_marks(file, text)
    assert file.read_text() == f"head\n{report.MARKS[0]}\n{text}\n{report.MARKS[1]}\ntail\n"
    file.write_text("no marks")
    with pytest.raises(SystemExit, match="has no <!-- measured -->"):
        report.write_between_marks(file, text)


# ---- quality ---------------------------------------------------------------------------------------------------------
def test_kl_of_known_distributions() -> None:
    reference = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    other = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32)) + 3  # a constant changes nothing
    wanted = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert quality.mean_kl(reference, other) == pytest.approx(wanted, rel=1e-5)
    assert quality.mean_kl(reference, reference) == 0
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(1, 2\)"):
        quality.mean_kl(reference, other[:1])


def test_cosine_of_known_vectors() -> None:
    a = np.array([[3.0, 0.0], [4.0, 0.0]], np.float32)
    assert quality.cosine(a, 7 * a) == pytest.approx(1)
    assert quality.cosine(a, np.array([[0.0, 1.0], [1.0, 0.0]], np.float32)) == pytest.approx(4 / 5 / math.sqrt(2))
    with pytest.raises(ValueError, match="one shape"):
        quality.cosine(a, a[:1])


# ---- workers ---------------------------------------------------------------------------------------------------------
def test_a_worker_answers_complains_and_ends(tmp_path: Path) -> None:
    worker = process.WorkerProcess(Path(sys.executable), "probe", {"threads": 1}, tmp_path / "log")
    try:
        assert worker.wait_ready()["threads"] == 1
        rates = worker.ask({"kinds": ["fp32", "int8"]})
        assert rates.keys() == {"read", "fp32", "int8"}
        assert min(rates.values()) > 0.1
        with pytest.raises(process.WorkerError, match="KeyError: 'fp64'"):
            worker.ask({"kinds": ["fp64"]})
        assert worker.ask({"kinds": []}).keys() == {"read"}  # it goes on after an error
    finally:
        worker.stop()
    with pytest.raises(process.WorkerError, match="probe was stopped"):
        worker.ask({"kinds": []})


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    worker = process.WorkerProcess(Path(sys.executable), "no_such_module", {"threads": 1}, tmp_path / "log")
    with pytest.raises(process.WorkerError, match="no_such_module ended"):
        worker.wait_ready()
    worker.stop()
