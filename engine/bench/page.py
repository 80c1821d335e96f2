"""`pagelens bench` of a page model: one page, and several together, by stage, with peak memory.

The answer's end mark is ignored so that every run decodes the same number of tokens, whatever the weights say, and the
prefix cache is off so that the same page is encoded each time.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

from ..config import DeepseekOcrConfig, EngineConfig, parse_size
from ..core import Engine
from ..inputs import Prompt
from ..reader import builtin_model, default_prompt
from ..types import NgramGuard, SamplingParams
from ..vision.modes import default_mode
from .counts import decoder_operations, encoder_operations
from .memory import shown
from .plot import check_plot
from .run import Run, finish, loaded, percent
from .steps import Spread, check_at_least, drain, parse_counts, start, time_steps

SIZE = "1240x1754"
STAND_IN_TOKENS = 10  # about as many as the Markdown prompt has
STAGES = ("preprocess", "encode", "prefill", "decode", "page")


@dataclass(slots=True)
class PageRow:
    """`batch` pages at once, several times: seconds by stage, of each page (page: wall time of all / batch; decode: of
    --tokens steps), and of each decode step."""

    batch: int
    stages: dict[str, list[float]]
    steps: list[float]
    prompt_tokens: int
    image_tokens: int
    plan: Any


def generated_page(size: str) -> Any:
    """A grey page with dark bars as lines of "text"; only its size matters for timing."""
    from PIL import Image, ImageDraw

    width, height = parse_size(size)
    page = Image.new("RGB", (width, height), (240, 240, 236))
    draw = ImageDraw.Draw(page)
    for line, top in enumerate(range(20, height - 20, 36)):
        draw.rectangle((20, top, max(20, width - 20 - 97 * (line % 5)), top + 14), fill=(40, 40, 48))
    return page


def run(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Load, read pages, print a table and a JSON line."""
    check_at_least("--tokens", args.tokens, 2)
    check_at_least("--repeats", args.repeats, 1)
    batches = parse_counts("--batch", args.batch, low=1)
    check_plot(args.plot)
    image = args.image if args.image else generated_page(args.size or SIZE)
    model = str(builtin_model()) if args.model is None else args.model
    with loaded(EngineConfig(model, max_num_seqs=max(batches), prefix_cache=False, **options)) as bench:
        print(bench.describe_load())
        if bench.engine.tokenizer is None:
            print(f"the model has no tokenizer: the prompt is the page and {STAND_IN_TOKENS} arbitrary tokens")
        prompt = build_prompt(bench.engine, image, args)
        rows, peaks = [], []
        for batch in batches:
            bench.peak.restart()
            rows.append(time_pages(bench.engine, prompt, batch, args.tokens, args.repeats))
            peaks.append(bench.peak.read())
        bench.limits.probe()
    print(bench.limits.describe())
    entries = [page_json(bench, row, peak) for row, peak in zip(rows, peaks)]
    print_table(rows, entries, args.tokens)
    first, entry, plan = rows[0], entries[0], rows[0].plan
    record = {
        **bench.to_json(args, options),
        "mode": plan.mode,
        "grid": [plan.columns, plan.rows],
        "image_tokens": first.image_tokens,
        "text_tokens": args.tokens,
        "seconds": {"load_model": bench.load_s, **{stage: entry["stages"][stage]["p50"] for stage in STAGES}},
        "decode_tokens_per_s": entry["tokens_per_s"],
        "peak_bytes": {"load_model": bench.load_peak, "page": entry["peak_bytes"]},
        "batches": entries,
    }
    finish(record, args.plot)
    return 0


def build_prompt(engine: Engine, image: Any, args: argparse.Namespace) -> Prompt:
    """The page with the Markdown prompt; without a tokenizer with token ids instead."""
    processor = engine.model_config.processor
    text: Any = default_prompt(processor)
    if engine.tokenizer is None:
        start_id = engine.inputs.bos_token_id or 0
        image_id = engine.inputs.image_token_id
        arbitrary = [id_ for id_ in range(2, 3 + STAND_IN_TOKENS) if id_ != image_id][:STAND_IN_TOKENS]
        text = [start_id, image_id, *arbitrary]
    mode = default_mode(processor).name if args.mode is None else args.mode
    prompt = {"prompt": text, "images": [image], "mode": mode}
    return prompt if args.max_crops is None else {**prompt, "max_crops": args.max_crops}


def time_pages(engine: Engine, prompt: Prompt, batch: int, tokens: int, repeats: int) -> PageRow:
    """Pages that come together: encoded one after another, prefilled as they fit into a pass, decoded together."""
    # The first pages decode while the last ones are encoded, at most one token a page.
    sampling = SamplingParams(
        max_tokens=tokens + batch + 1, ignore_eos=True, detect_repetition=False, ngram_guard=NgramGuard()
    )
    stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
    steps: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        requests = [engine.inputs.build(prompt, sampling, str(i)) for i in range(batch)]
        states, _ = start(engine, requests)
        timed = time_steps(engine, tokens)
        stages["page"].append((time.perf_counter() - started) / batch)
        stages["decode"].append(sum(timed))
        for state in states:
            stages["preprocess"].append(state.metrics.preprocess_s)
            stages["encode"].append(state.metrics.encode_s)
            stages["prefill"].append(state.metrics.prefill_s)
        steps += timed
        drain(engine)
    request = requests[0]
    return PageRow(batch, stages, steps, len(request.token_ids), request.num_image_tokens, request.images[0].plan)


def page_json(bench: Run, row: PageRow, peak: int | None) -> dict[str, Any]:
    config: DeepseekOcrConfig = bench.engine.model_config
    spreads = {stage: Spread.of(seconds) for stage, seconds in row.stages.items()}
    step = Spread.of(row.steps)
    encode_operations = encoder_operations(config.sam, config.clip, config.decoder.hidden_size, row.plan)
    prefill_operations = decoder_operations(config.decoder, row.prompt_tokens, 1)
    num_bytes = bench.step_bytes(row.prompt_tokens, row.batch)
    kind = bench.encoder_kind
    return {
        "batch": row.batch,
        "stages": {stage: spread.to_json() for stage, spread in spreads.items()},
        "step_p50_s": step.p50,
        "step_p95_s": step.p95,
        "tokens_per_s": row.batch / step.p50,
        "peak_bytes": peak,
        "encode_operations": encode_operations,
        "encode_kind": kind,
        "encode_share_of_arithmetic": bench.share_of_arithmetic(kind, encode_operations, spreads["encode"].p50),
        "prefill_operations": prefill_operations,
        "prefill_kind": bench.decoder_kind,
        # A pass may hold several pages, whose time counts for each.
        "prefill_share_of_arithmetic": None
        if row.batch > 1
        else bench.share_of_arithmetic(bench.decoder_kind, prefill_operations, spreads["prefill"].p50),
        "operations": row.batch * decoder_operations(config.decoder, 1, 1, row.prompt_tokens),
        "bytes": num_bytes,
        "share_of_bandwidth": bench.share_of_bandwidth(num_bytes, step.p50),
    }


def print_table(rows: list[PageRow], entries: list[dict[str, Any]], tokens: int) -> None:
    plan = rows[0].plan
    grid = f"{plan.columns}x{plan.rows} tiles" if plan.num_tiles else "no tiles"
    print(
        f"mode {plan.mode} ({grid}), {rows[0].image_tokens} image tokens, a prompt of {rows[0].prompt_tokens}, "
        f"{tokens} steps of decoding"
    )
    print(f"{'batch':>6} {'stage':12} {'p50':>9} {'p95':>9}")
    for row, entry in zip(rows, entries):
        notes = {
            "encode": share_note(entry["encode_share_of_arithmetic"], entry["encode_kind"]),
            "prefill": share_note(entry["prefill_share_of_arithmetic"], entry["prefill_kind"]),
            "decode": f"{entry['tokens_per_s']:.1f} tokens/s, step p50 {1e3 * entry['step_p50_s']:.2f} ms, "
            f"p95 {1e3 * entry['step_p95_s']:.2f} ms",
            "page": f"{1 / entry['stages']['page']['p50']:.3f} pages/s, peak memory {shown(entry['peak_bytes'])}",
        }
        if entry["share_of_bandwidth"] is not None:
            notes["decode"] += f", {percent(entry['share_of_bandwidth'])} of the probed bandwidth"
        for stage in STAGES:
            spread = entry["stages"][stage]
            print(f"{row.batch:6} {stage:12} {spread['p50']:7.3f} s {spread['p95']:7.3f} s  {notes.get(stage, '')}")


def share_note(share: float | None, kind: str) -> str:
    return "" if share is None else f"{percent(share)} of the probed {kind} rate"
