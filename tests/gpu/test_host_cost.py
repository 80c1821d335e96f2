"""What a decode step costs the host on a device that does nothing: launches and microseconds, eager and as a graph."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed: there are wheels for Linux only", allow_module_level=True)

from helpers.null_device import DEEPSEEK_OCR, QWEN3_06B, measure

from pagelens.config import DecoderConfig

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
