"""The arithmetic of `pagelens bench`: what is counted, how it is spread, what stands in the charts."""

from __future__ import annotations

import importlib.util
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.text_models import make_oracle, save
from helpers.tiny_models import DECODER, TINY

from pagelens.bench import plot
from pagelens.bench.counts import (
    clip_operations,
    decoder_operations,
    encoder_operations,
    head_weights,
    kv_bytes,
    layer_weights,
    sam_operations,
)
from pagelens.bench.steps import Spread, check_at_least, parse_counts
from pagelens.config import ClipConfig, EngineConfig, SamConfig
from pagelens.core import build_engine
from pagelens.errors import ConfigError
from pagelens.models.deepseek_ocr import DeepseekOcr
from pagelens.vision.modes import available_modes
from pagelens.vision.tiling import plan_tiles


# ---- counts ----------------------------------------------------------------------------------------------------------
def matrices_of(prefix: str) -> dict[str, tuple[int, ...]]:
    """Linear matrices of TINY by checkpoint name."""
    return {
        name: shape
        for spec in DeepseekOcr.weight_specs(TINY)
        for name, shape in zip(spec.sources, spec.shapes)
        if name.startswith(prefix) and len(shape) == 2 and "embed" not in name and "rel_pos" not in name
    }


def test_weights_of_a_token_are_those_of_the_checkpoint() -> None:
    moe = DECODER.moe
    assert moe is not None
    shapes = matrices_of("model.layers.")
    experts = {name: shape for name, shape in shapes.items() if ".experts." in name}
    total = sum(math.prod(shape) for shape in shapes.values())
    idle = sum(math.prod(shape) for shape in experts.values()) * (moe.num_experts - moe.top_k) // moe.num_experts
    assert layer_weights(DECODER) == total - idle
    dense = replace(DECODER, moe=None)
    assert layer_weights(dense) == 3 * (4 * 64 * 64 + 3 * 64 * 96)
    assert head_weights(DECODER) == 96 * 64


def test_attention_grows_with_what_is_seen() -> None:
    alone = [decoder_operations(DECODER, 1, 1, first) for first in range(5)]
    steps = {b - a for a, b in itertools.pairwise(alone)}
    assert steps == {4 * 3 * 64}  # a key and a value of 64 numbers in 3 layers
    assert decoder_operations(DECODER, 5, 5) == sum(alone)
    assert decoder_operations(DECODER, 5, 1) == sum(alone) - 4 * 2 * head_weights(DECODER)
    assert kv_bytes(DECODER, 10, 2) == 10 * 3 * 2 * 64 * 2


def test_towers_of_the_published_sizes() -> None:
    """1.1e12 for a view of 1024 pixels, as other counts of DeepEncoder say (956 and 162e9 for the two towers)."""
    assert sam_operations(SamConfig(), 1024) == pytest.approx(956e9, rel=0.02)
    assert clip_operations(ClipConfig(), 256) == pytest.approx(162e9, rel=0.01)


def test_a_page_is_its_views() -> None:
    mode = available_modes(TINY.processor)["gundam"]
    whole, tiled = plan_tiles(100, 100, mode), plan_tiles(3 * mode.base_size, 2 * mode.base_size, mode)
    assert (whole.num_tiles, tiled.num_tiles) == (0, 6)

    def count(plan: Any) -> int:
        return encoder_operations(TINY.sam, TINY.clip, DECODER.hidden_size, plan)

    projector = 2 * (48 + 48) * 64
    side, tokens = tiled.tile_size, tiled.local_grid**2
    tile = sam_operations(TINY.sam, side) + clip_operations(TINY.clip, tokens) + projector * tokens
    assert count(tiled) - count(whole) == 6 * tile


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Qwen3MoeForCausalLM"])
def test_bytes_of_a_token(architecture: str, weights: Any, tmp_path: Path) -> None:
    """The packed bytes themselves; whole panels of 32 rows, so a little more than the weights alone."""
    folder = save(make_oracle(architecture), tmp_path)
    engine = build_engine(EngineConfig(str(folder), weights=weights, backend="native", num_threads=1))
    try:
        decoder = engine.runner.model.decoder  # type: ignore[attr-defined]
        found = decoder.token_bytes()
        size = decoder.dtype.itemsize
        moe = decoder.config.moe
        router = 0 if moe is None else decoder.config.num_layers * moe.num_experts * decoder.config.hidden_size
        inner, head = layer_weights(decoder.config) - router, head_weights(decoder.config)
        least = 4 * router + {"auto": size * (inner + head), "int8": inner + head, "int4": 0.5 * inner + head}[weights]
        assert least <= found < 1.7 * least + 60_000
        assert decoder.rounds_inputs == (weights != "auto")
    finally:
        engine.close()


def test_the_reference_backend_does_not_tell(tmp_path: Path) -> None:
    folder = save(make_oracle("Qwen3ForCausalLM"), tmp_path)
    engine = build_engine(EngineConfig(str(folder), backend="reference"))
    try:
        assert engine.runner.model.decoder.token_bytes() is None  # type: ignore[attr-defined]
    finally:
        engine.close()


# ---- spreads and options ---------------------------------------------------------------------------------------------
def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0)
    assert Spread.of([5.0, 1.0, 3.0]) == Spread(3.0, 5.0)
    assert Spread.of([float(i) for i in range(100)]) == Spread(49.5, 95.0)


def test_counts_on_the_command_line() -> None:
    assert parse_counts("--batch", "1,4,16", 1) == [1, 4, 16]
    for text in ("", "x", "1,,2", "1.5"):
        with pytest.raises(ConfigError, match="--depth must be whole numbers"):
            parse_counts("--depth", text, 0)
    with pytest.raises(ConfigError, match="--batch 0: at least 1"):
        parse_counts("--batch", "0", 1)
    with pytest.raises(ConfigError, match="--tokens 1: at least 2"):
        check_at_least("--tokens", 1, 2)


# ---- charts ----------------------------------------------------------------------------------------------------------
LIMITS = {
    "isa": "avx2",
    "bandwidth_bytes_per_s": [2e10, 4e10, 3e10],
    "operations_per_s": {"float32": [1e11], "bfloat16": [2e11], "int8": [4e11]},
}
TEXT = {
    "model": "m",
    "threads": 2,
    "limits": LIMITS,
    "prefill": {"tokens": 8, "p50": 0.5, "p95": 0.6, "operations": 1e10, "bytes": 1e9},
    "decode": [
        {"depth": 0, "batch": 1, "step_p50_s": 0.01, "step_p95_s": 0.02, "operations": 1e8, "bytes": 1e8},
        {"depth": 0, "batch": 4, "step_p50_s": 0.02, "step_p95_s": 0.02, "operations": 4e8, "bytes": None},
    ],
}
PAGE = {
    "model": "m",
    "threads": 2,
    "limits": LIMITS,
    "batches": [
        {
            "batch": 1,
            "stages": {"encode": {"p50": 2.0, "p95": 3.0}, "page": {"p50": 4.0, "p95": 5.0}},
            "step_p50_s": 0.01,
            "step_p95_s": 0.02,
            "operations": 1e8,
            "bytes": 2e8,
        }
    ],
}


def test_points_and_latencies() -> None:
    assert plot.points_of(TEXT) == [("prefill 8", 10.0, 2e10), ("decode depth 0, batch 1", 1.0, 1e10)]
    assert plot.points_of(PAGE) == [("decode batch 1", 0.5, 1e10)]
    assert [row[1:] for row in plot.latencies_of(TEXT)] == [(500.0, 600.0), (10.0, 20.0), (20.0, 20.0)]
    assert plot.latencies_of(PAGE) == [("encode\nbatch 1", 2000.0, 3000.0), ("page\nbatch 1", 4000.0, 5000.0)]


def test_a_chart_that_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    plot.check_plot(None)
    with pytest.raises(ConfigError, match=r"--plot chart.txt: the name must end in .png"):
        plot.check_plot("chart.txt")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--plot needs matplotlib, which is not installed; pip install 'pagelens\["):
        plot.check_plot("chart.png")


@pytest.mark.parametrize("record", [TEXT, PAGE], ids=["text", "page"])
def test_charts(record: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `bench`")
    plot.draw(record, str(tmp_path / "chart.png"))
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot be written"):
        plot.draw(record, str(tmp_path / "no" / "chart.png"))
