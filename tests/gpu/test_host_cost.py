"""What a decode step costs the host on a device that does nothing: launches and microseconds, eager and as a graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed: there are wheels for Linux only", allow_module_level=True)

from helpers.null_device import DEEPSEEK_OCR, QWEN3_06B, NullOps, measure
from helpers.tiny_models import CLIP, SAM, TINY, make_plan, make_views, random_tensors

from pagelens.config import DecoderConfig
from pagelens.kernels.launch import LaunchCounter, replaced_runner
from pagelens.models.deepseek_ocr import DeepseekOcr

LIMIT_US = 300  # of one sequence, replayed


@pytest.mark.parametrize(
    ("name", "config"), [("qwen3-0.6b", QWEN3_06B), ("deepseek-ocr", DEEPSEEK_OCR)], ids=lambda x: str(x)[:12]
)
def test_a_replayed_step_takes_the_host_less_than_the_limit(name: str, config: DecoderConfig) -> None:
    eager, replayed = measure(config, use_graphs=False, steps=20), measure(config, use_graphs=True)
    for kind, cost in (("eager", eager), ("graph", replayed)):
        print(
            f"{name} {kind}: {sum(cost.launches.values())} launches a token, host {cost.least_us:.0f} us at least, "
            f"{cost.median_us:.0f} us in the middle of the steps; {dict(cost.launches)}"
        )
    assert replayed.least_us < LIMIT_US
    assert replayed.launches["graph"] == 1
    assert sum(replayed.launches.values()) == 5  # the graph, and behind it rows, norm, head and the choice of a token


def test_a_layer_is_as_many_launches_as_documented() -> None:
    """Dense: 2 norms, 2 linear layers, rotary embedding, attention and its reduction, 2 products of the SwiGLU."""
    dense = measure(QWEN3_06B, use_graphs=False, steps=1).launches
    assert sum(dense.values()) == 28 * 9 + 5
    mixed = measure(DEEPSEEK_OCR, use_graphs=False, steps=1).launches
    # A mixture: logits, routing, two grouped products, two of the shared expert, combine, instead of two products.
    assert sum(mixed.values()) == 11 * 14 + 9 + 5


def test_several_sequences_are_filled_up_to_the_ladder() -> None:
    """5 sequences run as 8; the graph of a size is recorded once."""
    cost = measure(QWEN3_06B, use_graphs=True, sequences=5, steps=5)
    assert cost.launches["graph"] == 1


def test_a_page_is_as_many_launches_as_documented() -> None:
    """The depth of the real towers, at miniature widths. Tiles of another size than the page are a second batch."""
    counter = LaunchCounter()
    config = replace(TINY, sam=replace(SAM, layers=12), clip=replace(CLIP, layers=24))
    with replaced_runner(counter):
        ops = NullOps(None)
        model = DeepseekOcr.from_tensors(config, random_tensors(config), torch.float32, ops)
        found = []
        for plan in (make_plan(192), make_plan(192, 128, 2, 1)):
            counter.names.clear()
            model.encode_image(make_views(plan), plan)
            found.append(Counter(counter.names))
    whole, tiled = found
    print(f"a page: {sum(whole.values())} launches, with tiles {sum(tiled.values())}; {dict(whole)}")
    sam = {"patch_embed_kernel": 1, "window_attention_kernel": 12, "conv_kernel": 4}
    assert {name: whole[name] for name in sam} == sam
    assert whole["attention_kernel"] == 24
    assert sum(whole.values()) == (1 + 12 * 7 + 4) + (1 + 24 * 7) + 1
    assert tiled == whole + whole
