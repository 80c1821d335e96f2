"""`pagelens bench` of a text model: prefill, and decoding at several depths and batch sizes; JSON as the last line.

The engine is driven step by step in this thread, so a step's time is the time between two tokens of an answer. Prompts
are random tokens, the end mark is ignored, and the prefix cache is off.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

from ..config import EngineConfig
from ..core import Engine, build_engine
from ..doctor import default_num_threads
from ..errors import ConfigError
from ..types import SamplingParams
from .memory import PeakMemory, shown

SAMPLING = {"ignore_eos": True, "detect_repetition": False}


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """Decoding `batch` sequences that stand at `depth`: seconds until all had a token, and of a step after that."""

    depth: int
    batch: int
    first_tokens_s: float
    step_p50_s: float
    step_p95_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.step_p50_s


def run(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Load, time, print a table and a JSON line."""
    depths, batches = parse_counts("--depth", args.depth, low=0), parse_counts("--batch", args.batch, low=1)
    if args.tokens < 2 or args.prompt_tokens < 1 or args.repeats < 1:
        raise ConfigError("--tokens must be at least 2, --prompt-tokens and --repeats at least 1")
    longest = max(args.prompt_tokens, max(depths)) + args.tokens + 2
    peak = PeakMemory()
    peak.restart()
    started = time.perf_counter()
    config = EngineConfig(args.model, max_model_len=longest, max_num_seqs=max(batches), prefix_cache=False, **options)
    engine = build_engine(config)
    try:
        load_s, load_peak = time.perf_counter() - started, peak.read()
        peak.restart()
        prefill = [time_first_tokens(engine, args.prompt_tokens, 1) for _ in range(args.repeats)]
        rows = [time_decode(engine, depth, batch, args.tokens) for depth in depths for batch in batches]
        run_peak = peak.read()
    finally:
        engine.close()
    prefill_s = statistics.median(prefill)
    threads = options.get("num_threads") or default_num_threads()
    print(f"load {load_s:.1f} s, peak {shown(load_peak)}; running peak {shown(run_peak)}; {threads} threads")
    print(f"prefill of {args.prompt_tokens} tokens: {prefill_s:.3f} s, {args.prompt_tokens / prefill_s:.0f} tokens/s")
    print(f"{'depth':>6} {'batch':>6} {'step p50':>10} {'p95':>10} {'tokens/s':>9}")
    for row in rows:
        print(
            f"{row.depth:6} {row.batch:6} {1e3 * row.step_p50_s:7.2f} ms {1e3 * row.step_p95_s:7.2f} ms "
            f"{row.tokens_per_s:9.1f}"
        )
    record = {
        "model": args.model,
        "options": options,
        "threads": threads,
        "load_s": load_s,
        "peak_bytes": {"load": load_peak, "run": run_peak},
        "prefill": {"tokens": args.prompt_tokens, "seconds": prefill, "tokens_per_s": args.prompt_tokens / prefill_s},
        "decode": [
            {
                "depth": row.depth,
                "batch": row.batch,
                "first_tokens_s": row.first_tokens_s,
                "step_p50_s": row.step_p50_s,
                "step_p95_s": row.step_p95_s,
                "tokens_per_s": row.tokens_per_s,
            }
            for row in rows
        ],
    }
    print(json.dumps(record))
    sys.stdout.flush()
    return 0


def start(engine: Engine, num_tokens: int, batch: int, max_tokens: int) -> float:
    """Queue `batch` random prompts and step until each has its first token. Returns the seconds this took."""
    vocab = engine.inputs.vocab_size
    sampling = SamplingParams(max_tokens=max_tokens, **SAMPLING)  # type: ignore[arg-type]
    draw = random.Random(num_tokens * 1000 + batch)
    prompts = [[draw.randrange(vocab) for _ in range(max(num_tokens, 1))] for _ in range(batch)]
    started = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(engine.inputs.build(prompt, sampling, str(i)))
    waiting = batch
    while waiting > 0:
        waiting -= len([state for state in engine.step() if state.answers[0].sequence.num_generated == 1])
    return time.perf_counter() - started


def time_first_tokens(engine: Engine, num_tokens: int, batch: int) -> float:
    seconds = start(engine, num_tokens, batch, 1)
    while engine.has_work:
        engine.step()
    return seconds


def time_decode(engine: Engine, depth: int, batch: int, tokens: int) -> DecodeRow:
    """`tokens` steps of sequences that stand at `depth` (one token where it is 0) when the first of them begins."""
    first_s = start(engine, depth, batch, tokens + 2)
    steps = []
    for _ in range(tokens):
        started = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - started)
    while engine.has_work:
        engine.step()
    steps.sort()
    return DecodeRow(
        depth, batch, first_s, statistics.median(steps), steps[min(len(steps) - 1, 95 * len(steps) // 100)]
    )


def parse_counts(option: str, text: str, low: int) -> list[int]:
    """Whole numbers with commas between them. Raises ConfigError."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} must be whole numbers with commas between, such as 0,512; got {text!r}") from None
    if min(counts) < low:
        raise ConfigError(f"{option} {text}: at least {low}")
    return counts
