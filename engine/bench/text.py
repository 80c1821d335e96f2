"""`pagelens bench` of a text model: time to first token, and decoding at several depths and batch sizes.

Prompts are random tokens, the end mark is ignored, and the prefix cache is off.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from typing import Any

from ..config import EngineConfig
from ..core import Engine
from ..errors import ConfigError
from ..inputs import Request
from ..types import SamplingParams
from .counts import decoder_operations
from .memory import shown
from .plot import check_plot
from .run import Run, finish, loaded, percent
from .steps import Spread, check_at_least, drain, parse_counts, start, time_steps

PROMPT_TOKENS = 512
DEPTHS = (0, 512, 4096)  # by default those that the model has positions for


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """Decoding `batch` sequences that stand at `depth`: seconds until all had a token, and of a step after that."""

    depth: int
    batch: int
    first_tokens_s: float
    step: Spread

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.step.p50


def run(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Load, time, print a table and a JSON line."""
    prompt_tokens = PROMPT_TOKENS if args.prompt_tokens is None else args.prompt_tokens
    for option, value, low in (
        ("--tokens", args.tokens, 2),
        ("--prompt-tokens", prompt_tokens, 1),
        ("--repeats", args.repeats, 1),
    ):
        check_at_least(option, value, low)
    batches = parse_counts("--batch", args.batch, low=1)
    depths = find_depths(args, options)
    longest = max(prompt_tokens, max(depths)) + args.tokens + 2
    check_plot(args.plot)
    config = EngineConfig(args.model, max_model_len=longest, max_num_seqs=max(batches), prefix_cache=False, **options)
    with loaded(config) as bench:
        print(bench.describe_load())
        first = [time_first_token(bench.engine, prompt_tokens) for _ in range(args.repeats)]
        rows = [time_decode(bench.engine, depth, batch, args.tokens) for depth in depths for batch in batches]
        run_peak = bench.peak.read()
        bench.limits.probe()
    print(bench.limits.describe())
    ttft = Spread.of(first)
    operations = decoder_operations(bench.decoder, prompt_tokens, 1)
    share = bench.share_of_arithmetic(bench.decoder_kind, operations, ttft.p50)
    print(
        f"time to first token, prefill of {prompt_tokens} tokens: p50 {ttft.p50:.3f} s, p95 {ttft.p95:.3f} s, "
        f"{prompt_tokens / ttft.p50:.0f} tokens/s, {percent(share)} of the probed {bench.decoder_kind} rate"
    )
    print(f"{'depth':>6} {'batch':>6} {'step p50':>10} {'p95':>10} {'tokens/s':>9} {'of read':>8}")
    decode = [decode_json(bench, row) for row in rows]
    for row, entry in zip(rows, decode):
        print(
            f"{row.depth:6} {row.batch:6} {1e3 * row.step.p50:7.2f} ms {1e3 * row.step.p95:7.2f} ms "
            f"{row.tokens_per_s:9.1f} {percent(entry['share_of_bandwidth']):>8}"
        )
    print(f"peak memory while running {shown(run_peak)}")
    prefill = {
        "tokens": prompt_tokens,
        "seconds": first,
        **ttft.to_json(),
        "tokens_per_s": prompt_tokens / ttft.p50,
        "operations": operations,
        "bytes": bench.step_bytes(0, 1),
        "kind": bench.decoder_kind,
        "share_of_arithmetic": share,
    }
    peaks = {"load": bench.load_peak, "run": run_peak}
    record = {**bench.to_json(args, options), "peak_bytes": peaks, "prefill": prefill, "decode": decode}
    finish(record, args.plot)
    return 0


def find_depths(args: argparse.Namespace, options: dict[str, Any]) -> list[int]:
    """--depth, or those of DEPTHS that the model has positions for. Raises ConfigError."""
    from ..loading.presets import find_description
    from ..models.registry import class_of

    if args.depth is not None:
        return parse_counts("--depth", args.depth, low=0)
    description = find_description(args.model, bool(options["random_weights"]))
    config = class_of(description.config).read_config(description.config, description.generation)
    room = config.decoder.max_position_embeddings - args.tokens - 2
    depths = [depth for depth in DEPTHS if depth <= room]
    if not depths:
        raise ConfigError(f"--tokens {args.tokens}: the model has {config.decoder.max_position_embeddings} positions")
    return depths


def decode_json(bench: Run, row: DecodeRow) -> dict[str, Any]:
    # A step's tokens stand behind the first one and those decoded before: in the mean half of the timed ones.
    num_bytes = bench.step_bytes(row.depth, row.batch)
    return {
        "depth": row.depth,
        "batch": row.batch,
        "first_tokens_s": row.first_tokens_s,
        "step_p50_s": row.step.p50,
        "step_p95_s": row.step.p95,
        "tokens_per_s": row.tokens_per_s,
        "operations": row.batch * decoder_operations(bench.decoder, 1, 1, row.depth),
        "bytes": num_bytes,
        "share_of_bandwidth": bench.share_of_bandwidth(num_bytes, row.step.p50),
    }


def build_requests(engine: Engine, num_tokens: int, batch: int, max_tokens: int) -> list[Request]:
    """Requests of random tokens, the same ones for the same sizes."""
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, detect_repetition=False)
    draw = random.Random(num_tokens * 1000 + batch)
    vocab = engine.inputs.vocab_size
    prompts = [[draw.randrange(vocab) for _ in range(max(num_tokens, 1))] for _ in range(batch)]
    return [engine.inputs.build(prompt, sampling, str(i)) for i, prompt in enumerate(prompts)]


def time_first_token(engine: Engine, num_tokens: int) -> float:
    _, seconds = start(engine, build_requests(engine, num_tokens, 1, 1))
    drain(engine)
    return seconds


def time_decode(engine: Engine, depth: int, batch: int, tokens: int) -> DecodeRow:
    """`tokens` steps of sequences that stand at `depth` (one token where it is 0) when the first of them begins."""
    # Prompts longer than a pass take turns, so the first of them has decoded a little when the last one begins.
    behind = 2 + batch * (1 + depth // engine.config.max_batch_tokens)
    room = engine.max_model_len - max(depth, 1)
    _, first_s = start(engine, build_requests(engine, depth, batch, min(tokens + behind, room)))
    steps = time_steps(engine, tokens)
    drain(engine)
    return DecodeRow(depth, batch, first_s, Spread.of(steps))
