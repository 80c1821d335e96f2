"""Measure pagelens beside its peers: `make bench-peers`, or python -m benchmarks.peers.run [--rows PATTERNS].

Rows that were measured before stay in the results file, so that a whole table can be made in pieces. The table of all
stored rows is printed at the end, and the same as JSON in the last line.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from . import references
from .artifacts import ensure
from .process import ROOT, WorkerError, WorkerProcess
from .report import is_judged, report, summarise, write_between_marks
from .rows import Row, Variant, WorkerSpec, all_rows, worker
from .table import SLOW_GB_S

WAIT_S = 1.0
PAUSE_S = 0.03  # for threads of the last sample to fall asleep
SPARE_BYTES = 1 << 29
PROBE = worker("probe", "ours", 1)


class Bench:
    """The running workers, the probe, and the results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cache: Path = options.cache
        self.pythons = {"ours": Path(sys.executable), "peers": options.peers_python, "torch": options.torch_python}
        self.results_file: Path = options.results or self.cache / "results.json"
        self.results: dict[str, Any] = {"rows": {}}
        if self.results_file.exists() and not options.fresh:
            self.results = json.loads(self.results_file.read_text())
        self._running: dict[WorkerSpec, WorkerProcess] = {}
        self._launched = 0
        self._about: dict[WorkerSpec, dict[str, Any]] = {}
        self._quality: dict[tuple[str, WorkerSpec], float] = {}

    # ---- workers -----------------------------------------------------------------------------------------------------
    def launch(self, spec: WorkerSpec) -> WorkerProcess:
        """Start a worker without waiting for it."""
        values = {
            **dict(spec.spec),
            "threads": self.options.threads,
            "top_priority": not self.options.plain_priority,
        }
        if spec.artifact:
            values["model"] = str(ensure(spec.artifact, self.cache, self.pythons))
        self._launched += 1
        log = self.cache / "logs" / f"{os.getpid()}-{self._launched}-{spec.module}.log"
        return WorkerProcess(self.pythons[spec.environment], spec.module, values, log)

    def start_ready(self, spec: WorkerSpec) -> WorkerProcess:
        process = self.launch(spec)
        self._about[spec] = process.wait_ready()
        return process

    def start_all(self, wanted: list[WorkerSpec], notes: list[str]) -> None:
        """Have these run and no others; a peer for which there is no memory, or that cannot start, is left out."""
        for spec in [spec for spec in self._running if spec not in wanted]:
            self._running.pop(spec).stop()
        free = available_bytes()
        started: dict[WorkerSpec, WorkerProcess] = {}
        for spec in wanted:
            if spec in self._running:
                continue
            free -= spec.memory
            if spec.environment != "ours" and free < SPARE_BYTES:
                notes.append(f"{spec.module} was not run: it takes {spec.memory / 2**30:.0f} GiB, more than is free")
                free += spec.memory
                continue
            started[spec] = self.launch(spec)
        for spec, process in started.items():
            try:
                self._about[spec] = process.wait_ready()
                self._running[spec] = process
            except WorkerError as error:
                process.stop()
                if spec.environment == "ours":
                    raise
                notes.append(f"{spec.module} was not run: {error}")

    def stop_all(self) -> None:
        for process in self._running.values():
            process.stop()
        self._running.clear()

    def ask(self, variant: Variant) -> float:
        request = dict(variant.request)
        if request["op"] == "encode":
            request["pixels"] = str(references.pixels_file(self.cache))
        time.sleep(PAUSE_S)
        return float(self._running[variant.worker].ask(request)["seconds"])

    def probe(self, row: Row) -> dict[str, float]:
        time.sleep(PAUSE_S)
        kinds = [kind for kind in row.needs if kind != "read"]
        rates: dict[str, float] = self._running[PROBE].ask({"kinds": kinds})
        return rates

    # ---- rows --------------------------------------------------------------------------------------------------------
    def measure(self, row: Row) -> None:
        """Measure a row and store it."""
        started, notes = time.monotonic(), list[str]()
        if row.quality in references.REFEREES and not (self.cache / f"reference-{row.quality}.npy").exists():
            self.stop_all()
            references.ensure_reference(row.quality, self.cache, self.start_ready)
        if row.alternate:
            pairs, quality = self._alternate(row, notes), dict[str, float]()
        else:
            variants = [row.ours, *row.rivals]
            self.start_all([PROBE, *dict.fromkeys(variant.worker for variant in variants)], notes)
            quality = self._prepare(row)
            pairs = self._take_turns(row)
        workers = {
            spec.module: self._about[spec]
            for spec in [v.worker for v in [row.ours, *row.rivals]]
            if spec in self._about
        }
        self.results["rows"][row.id] = {
            "title": row.title,
            "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started, 1),
            "pairs": pairs,
            "quality": quality,
            "workers": workers,
            "notes": notes,
        }
        self.results["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": self.options.threads}
        self.results_file.write_text(json.dumps(self.results, indent=1))

    def _prepare(self, row: Row) -> dict[str, float]:
        """Bring everyone to the row's depth, and compare answers. Returns name -> quality."""
        quality: dict[str, float] = {}
        running = [v for v in [row.ours, *row.rivals] if v.worker in self._running]
        for variant in running:  # before the depths: logits are computed in the sequences' place
            if row.quality not in references.REFEREES or variant.worker.artifact is None or variant.own:
                continue
            key = (row.quality, variant.worker)
            if key not in self._quality:
                self._quality[key] = references.compare(row.quality, self.cache, self._running[variant.worker])
            quality[variant.name.removesuffix(" fa off").removesuffix(" fa on")] = self._quality[key]
        for variant in running:
            if variant.request["op"] == "prefill":
                self.ask(variant)  # memory that the first of its kind touches is not timed
            elif variant.request["op"] in ("decode", "call"):
                started = time.monotonic()
                found = self._running[variant.worker].ask({**variant.request, "op": "prepare"})
                if time.monotonic() - started > 5:
                    print(f"{row.id}: {variant.name} ready after {time.monotonic() - started:.0f} s", file=sys.stderr)
                if "error_norm" in found:
                    quality["ours"] = found["error_norm"]
        return quality

    def _take_turns(self, row: Row) -> list[dict[str, Any]]:
        """Rounds of (ours, rival) for each rival, with a probe before and after each pair."""
        pairs: list[dict[str, Any]] = []
        rivals = [rival for rival in row.rivals if rival.worker in self._running]
        before, patience = self.probe(row), self.options.patience
        for _ in range(self.options.rounds or row.rounds):
            for rival in rivals:
                while "read" in row.needs and before["read"] < SLOW_GB_S and patience > 0:
                    time.sleep(WAIT_S)
                    before, patience = self.probe(row), patience - WAIT_S
                ours_s, rival_s = self.ask(row.ours), self.ask(rival)
                after = self.probe(row)
                pairs.append({"rival": rival.name, "ours_s": ours_s, "rival_s": rival_s, "probes": [before, after]})
                before = after
        return pairs

    def _alternate(self, row: Row, notes: list[str]) -> list[dict[str, Any]]:
        """The same where ours and the rivals (one process) do not fit in memory together: they are started in turns."""
        pairs: list[dict[str, Any]] = []
        for _ in range(self.options.rounds or row.rounds):
            seconds, probes = [], []
            for variants in ([row.ours], row.rivals):
                self.start_all([PROBE, variants[0].worker], notes)
                if variants[0].worker not in self._running:
                    raise WorkerError(f"{row.id} needs every worker: {notes[-1]}")
                for variant in variants:
                    self._running[variant.worker].ask({**variant.request, "op": "prepare"})
                    self.ask(variant)  # the pages of the weights are read
                    probes.append(self.probe(row))
                    seconds.append(self.ask(variant))
                    probes.append(self.probe(row))
            self.start_all([PROBE], notes)
            for rival, rival_s in zip(row.rivals, seconds[1:]):
                pairs.append({"rival": rival.name, "ours_s": seconds[0], "rival_s": rival_s, "probes": probes[:2]})
        return pairs


def available_bytes() -> float:
    """Memory that can be had without swapping; endless where /proc does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024.0
    except OSError:
        pass
    return float("inf")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def chosen_rows(patterns: str, rows: list[Row]) -> list[Row]:
    """Rows whose id begins with or matches one of the patterns (commas between); without one all but the slow."""
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    if not wanted:
        return [row for row in rows if not row.slow]
    found = [row for row in rows if any(row.id.startswith(p) or fnmatch.fnmatch(row.id, p) for p in wanted)]
    if not found:
        raise SystemExit(f"no row matches {patterns!r}; there are: {', '.join(row.id for row in rows)}")
    return found


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="ids or patterns with commas; default: all but the 30B model")
    parser.add_argument("--list", action="store_true", help="print the ids of all rows")
    parser.add_argument("--prepare", action="store_true", help="only make the files that the rows need")
    parser.add_argument("--table", action="store_true", help="only print what was measured before")
    parser.add_argument("--missing", action="store_true", help="only rows that are not measured, or not judged")
    parser.add_argument("--document", type=Path, help="write the table between the marks of this file, too")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument(
        "--patience", type=float, default=15, help="seconds that a row may wait for memory's fast phase (default 15)"
    )
    parser.add_argument("--rounds", type=int, default=0, help="rounds of pairs; default: as many as a row asks for")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plain-priority", action="store_true", help="do not ask for top scheduling priority")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "build" / "peers-cache", help="folder for models and results"
    )
    parser.add_argument("--results", type=Path, help="file of what was measured; default: results.json in the cache")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    parser.add_argument("--torch-python", type=Path, default=ROOT / ".venv-peers-torch" / "bin" / "python")
    return parser.parse_args()


def main() -> int:
    options = read_options()
    rows = all_rows()
    if options.list:
        print(*(row.id for row in rows), sep="\n")
        return 0
    options.cache = options.cache.resolve()
    options.cache.mkdir(parents=True, exist_ok=True)
    bench, failed = Bench(options), []
    wanted = [] if options.table else chosen_rows(options.rows, rows)
    if options.missing:
        wanted = [row for row in wanted if not is_judged(row, bench.results)]
    try:
        for row in wanted:
            started = time.monotonic()
            try:
                if options.prepare:
                    prepare(bench, row)
                    continue
                bench.measure(row)
                _, texts = summarise(row, bench.results["rows"][row.id])
                print(f"{row.id} ({time.monotonic() - started:.0f} s): " + " | ".join(texts[1:]), flush=True)
            except (WorkerError, RuntimeError) as error:
                failed.append(row.id)
                print(f"{row.id} failed: {error}", file=sys.stderr, flush=True)
    finally:
        bench.stop_all()
    if not options.prepare:
        text, record = report(bench.results, rows)
        print(f"\n{text}\n{json.dumps(record)}")
        if options.document:
            write_between_marks(options.document, text)
    return 1 if failed else 0


def prepare(bench: Bench, row: Row) -> None:
    """Make every file that a row needs."""
    for variant in [row.ours, *row.rivals]:
        if variant.worker.artifact:
            ensure(variant.worker.artifact, bench.cache, bench.pythons)
    if row.quality in references.REFEREES:
        references.ensure_reference(row.quality, bench.cache, bench.start_ready)


if __name__ == "__main__":
    sys.exit(main())
