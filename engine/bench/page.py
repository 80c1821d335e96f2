"""`pagelens bench`: one page through the whole pipeline, seconds and peak memory by stage, JSON as the last line.

The answer's end mark is ignored so that every run decodes the same number of tokens, whatever the weights say.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from ..cli import parse_size
from ..doctor import default_num_threads
from ..errors import ConfigError
from ..reader import Reader, default_prompt
from ..types import SamplingParams
from .memory import PeakMemory, shown


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
    """Load, read one page, print a table and a JSON line."""
    if args.tokens < 2:
        raise ConfigError(f"--tokens {args.tokens}: at least 2 tokens are needed to time decoding")
    image = args.image if args.image else generated_page(args.size)
    peak = PeakMemory()
    started = time.perf_counter()
    peak.restart()
    with Reader(args.model, max_num_seqs=1, **options) as reader:
        rows: list[tuple[str, float, int | None]] = [("load model", time.perf_counter() - started, peak.read())]
        sampling = SamplingParams(max_tokens=args.tokens, ignore_eos=True, detect_repetition=False)
        peak.restart()
        stream = reader.stream(image, args.mode, default_prompt(reader.processor), sampling, args.max_crops)
        page = stream.result()
        memory = peak.read()
    seconds = page.usage.seconds
    rows += [(stage, seconds[stage], None) for stage in ("load", "preprocess", "encode", "prefill", "decode")]
    rows[-1] = ("decode", seconds["decode"], memory)
    tokens = page.usage.text_tokens
    decode_rate = (tokens - 1) / seconds["decode"] if seconds["decode"] > 0 else 0.0
    print_table(rows, page.usage, decode_rate, memory)
    record = {
        "model": args.model or "built-in",
        "options": options,
        "mode": page.usage.mode,
        "grid": [page.usage.columns, page.usage.rows],
        "image_tokens": page.usage.image_tokens,
        "text_tokens": tokens,
        "seconds": {"load_model": rows[0][1], **seconds},
        "decode_tokens_per_s": decode_rate,
        "peak_bytes": {"load_model": rows[0][2], "page": memory},
        "threads": options["num_threads"] or default_num_threads(),
    }
    print(json.dumps(record))
    sys.stdout.flush()
    return 0


def print_table(rows: list[tuple[str, float, int | None]], usage: Any, decode_rate: float, memory: int | None) -> None:
    grid = f"{usage.columns}x{usage.rows} tiles" if usage.columns * usage.rows > 1 else "no tiles"
    print(f"mode {usage.mode} ({grid}), {usage.image_tokens} image tokens, {usage.text_tokens} text tokens")
    print(f"{'stage':12} {'seconds':>9} {'peak RSS':>10}")
    for stage, seconds, peak_bytes in rows:
        print(f"{stage:12} {seconds:9.3f} {shown(peak_bytes):>10}")
    print(f"decode {decode_rate:.1f} tokens/s")
    if memory:
        print(f"peak resident memory of the page (model included): {shown(memory)}")
