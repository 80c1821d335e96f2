"""What int8 and int4 cost the built-in reader, in character errors over 200 fresh pages.

The pages are drawn with the font that Pillow carries, so that the test needs no installed fonts; the figures with the
families that the reader was trained on are in docs/quantization.md (`tools/train_reader.py eval --weights int4`).
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from reader_training import evaluate, fonts  # noqa: E402

pytestmark = pytest.mark.slow
READER = str(ROOT / "engine" / "assets" / "reader")
PAGES = 200
MOST = {"int8": 0.005, "int4": 0.02}  # more character errors than the reader as it is, of all characters


@functools.cache
def error_rate(weights: str) -> float:
    layout = evaluate.Layout(evaluate.stored_base_size(READER))
    task = evaluate.Task("Pillow's own font", "trained", "base", layout)
    pages = evaluate.fresh_pages(fonts.built_in_fonts(), task, False, PAGES, 20261126)
    read = evaluate.engine_reader(READER, weights=weights)
    found = evaluate.score(pages, read(pages, task.mode, layout, False))
    exact = f"{100 * found.exact:.1f} % of pages exact"
    print(f"{weights}: errors in {100 * found.cer:.2f} % of {found.characters} characters, {exact}")
    return found.cer


@pytest.mark.parametrize("weights", list(MOST))
def test_quantised_weights_cost_few_character_errors(weights: str) -> None:
    assert error_rate("auto") < 0.2, "the reader knows this font well enough for the comparison to mean something"
    assert error_rate(weights) - error_rate("auto") <= MOST[weights]
