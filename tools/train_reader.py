#!/usr/bin/env python3
"""Train and measure the built-in reader: a tiny model of DeepSeek-OCR's architecture, from drawn pages, on a CPU.

  train_reader.py fonts                          the font families, their Debian packages, and which are missing
  train_reader.py train --out DIR --minutes 200  the whole recipe from scratch, in one schedule
  train_reader.py train --out DIR --init DIR --aux FILE --recipe continue
                                                 go on from a reader that can read
  train_reader.py eval [--model DIR]             character error rates on fresh pages, read through the engine
  train_reader.py samples --out DIR              drawn pages with their texts and what the reader makes of them
  train_reader.py tokenizer --out FILE           learn the tokenizer anew (a reader's weights belong to its tokenizer)

What the figures mean, the lineage of the shipped weights and their limits: docs/reader.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

import torch
from reader_training import evaluate, fonts
from reader_training.data import make_tokenizer, tokenizer_text, write_json
from reader_training.loop import Settings, train
from reader_training.recipe import RECIPES

ASSETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "engine", "assets", "reader")
EVAL_SEED = 20261201  # the reported figures; used for nothing else


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font-dir", default=fonts.DEFAULT_FONT_DIR, help="where font files are looked for")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fonts", help="list the families and what is missing")

    p = commands.add_parser("tokenizer", help="learn the tokenizer anew")
    p.add_argument("--out", required=True, help="file to write")

    p = commands.add_parser("train", help="train a reader")
    p.add_argument("--out", required=True, help="folder for the reader, log.jsonl, aux.pt and state.pt")
    p.add_argument("--recipe", choices=sorted(RECIPES), default="scratch")
    p.add_argument("--minutes", type=float, default=200.0, help="length of the schedule")
    p.add_argument("--steps", type=int, default=0, help="length in steps instead: the same result at every run")
    p.add_argument("--seed", type=int, default=1234)
    p.add_argument("--world", type=int, default=2, help="processes, one core each")
    p.add_argument("--init", default="", help="folder of a reader to start from")
    p.add_argument("--aux", default="", help="its training-only heads (aux.pt)")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted training in --out")
    p.add_argument("--tokenizer", default=os.path.join(ASSETS, "tokenizer.json"))
    p.add_argument("--slow", type=float, default=1.0, help="factor on the encoder's rate (run 9: 0.7)")
    p.add_argument("--freeze", type=float, default=0.0, help="first minutes with a frozen encoder")
    p.add_argument("--lr", type=float, default=2e-3, help="AdamW's rate")
    p.add_argument("--muon-lr", type=float, default=0.02)
    p.add_argument("--float32", action="store_true", help="no bfloat16 arithmetic")
    p.add_argument("--batch-scale", type=float, default=1.0, help="factor on the pages a step (recipe.BATCH)")
    p.add_argument("--save-minutes", type=float, default=10.0)
    p.add_argument("--log-every", type=int, default=50, help="steps")

    p = commands.add_parser("eval", help="print the character error rates")
    _add_reading(p)
    p.add_argument("--pages", type=int, default=200, help="pages a line of the report")
    p.add_argument("--seed", type=int, default=EVAL_SEED)
    p.add_argument("--markdown", action="store_true", help="the Markdown prompt instead of the plain one")
    p.add_argument("--json", default="", help="file to write the figures to")

    p = commands.add_parser("samples", help="write drawn pages and what is read")
    _add_reading(p)
    p.add_argument("--out", required=True, help="folder")
    p.add_argument("--pages", type=int, default=6)
    p.add_argument("--seed", type=int, default=777)
    return parser


def _add_reading(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", default=ASSETS, help="folder of the reader; default: the built-in one")
    p.add_argument("--through", choices=("engine", "training"), default="engine", help="which code reads the pages")
    p.add_argument("--base-size", type=int, default=0, help="side of the whole-page view, instead of config.json's")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--backend", default="auto")
    p.add_argument("--weights", default="auto", help="int8 or int4: the engine's decoder quantised")
    p.add_argument("--threads", type=int, default=0, help="threads to read with; 0 leaves the choice to the engine")


def list_fonts(font_dir: str) -> int:
    """Print every family; exit status 1 if one is missing."""
    for family in (*fonts.TRAINED, *fonts.NEVER_TRAINED):
        use = f"trained since run {family.since}" if family.since else "evaluation only"
        state = "missing" if fonts.missing([family], font_dir) else "found"
        print(f"{state:8s} {family.name:24s} {use:22s} {family.package}")
    lost = fonts.missing([*fonts.TRAINED, *fonts.NEVER_TRAINED], font_dir)
    if lost:
        print("apt-get install " + " ".join(sorted({f.package for f in lost})))
    return 1 if lost else 0


def run(a: argparse.Namespace) -> int:
    """Carry out one command; returns the exit status."""
    if a.command == "fonts":
        return list_fonts(a.font_dir)
    if a.command == "tokenizer":
        make_tokenizer(tokenizer_text()).save(a.out)
        return 0
    if a.command == "train":
        same = "out tokenizer recipe minutes steps seed world init aux resume lr muon_lr slow freeze log_every"
        values = {name: getattr(a, name) for name in [*same.split(" "), "save_minutes", "batch_scale", "font_dir"]}
        train(Settings(**values, bf16=not a.float32))
        return 0
    if a.threads:
        torch.set_num_threads(a.threads)
    source = evaluate.Source(a.model, a.through, a.base_size, a.font_dir, a.dtype, a.backend, a.threads, a.weights)
    if a.command == "samples":
        os.makedirs(a.out, exist_ok=True)
        write_json(os.path.join(a.out, "index.json"), evaluate.samples(source, a.out, a.pages, a.seed))
        return 0
    result = evaluate.report(source, a.pages, a.seed, a.markdown)
    print(json.dumps(result))
    if a.json:
        write_json(a.json, result)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; one line on stderr and status 2 for what the user can mend."""
    try:
        return run(_parser().parse_args(arguments))
    except (fonts.MissingFontsError, FileNotFoundError, RuntimeError, ValueError) as error:
        print(f"train_reader: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
