"""The whole network equals transformers' port of the same architecture, stage by stage, on random weights in float32.

Tolerance: 1e-5 of the largest magnitude of the compared tensor. Both sides sum in float32 in different orders; at these
sizes (sums of at most 432 terms, three to ten layers deep) a faulty formula shows at 1e-3 and more, see the last test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import (
    EVEN,
    TINY,
    PageViews,
    Session,
    make_plan,
    make_views,
    prompt_with_image,
    random_tensors,
)
from helpers.transformers_oracle import build_oracle, oracle_inputs, record
from torch import Tensor

from pagelens.config import DeepseekOcrConfig, ProcessorConfig
from pagelens.models.deepseek_ocr import DeepseekOcr
from pagelens.ops.registry import as_ops, resolve_ops
from pagelens.vision.modes import resolve_mode
from pagelens.vision.tiling import TilePlan, plan_tiles

TOLERANCE = 1e-5
# name -> base size, tile size, columns, rows. 192 is the tables' own size; 128 shrinks and 256 enlarges every table.
PAGES = {
    "native size": (192, 0, 1, 1),
    "smaller": (128, 0, 1, 1),
    "larger": (256, 0, 1, 1),
    "tiles 2x1": (192, 128, 2, 1),
    "tiles 1x2": (256, 128, 1, 2),
    "tiles 3x2": (256, 192, 3, 2),
    "tiles 2x3": (192, 128, 2, 3),
    "tiles 1x4 of the page's size": (192, 192, 1, 4),
    "tiles larger than the page": (128, 256, 2, 2),
}
STAGES = {
    **{f"sam.block.{i}": f"model.vision_tower.sam_encoder.layers.{i}" for i in range(3)},
    "sam": "model.vision_tower.sam_encoder",
    **{f"clip.layer.{i}": f"model.vision_tower.vision_encoder.encoder.layers.{i}" for i in range(2)},
    "clip": "model.vision_tower",
    "projector": "model.multi_modal_projector",
    **{f"layer.{i}": f"model.language_model.layers.{i}" for i in range(3)},
}


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    return float((ours - theirs).abs().max() / theirs.abs().max())


class Stages:
    """Collects every stage; copies, because later stages work in place."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}

    def __call__(self, name: str, value: Tensor) -> None:
        self.seen.setdefault(name, []).append(value.clone())


class Pair:
    """Our model and the port with the same weights."""

    def __init__(self, config: DeepseekOcrConfig, backend: str) -> None:
        self.tensors = random_tensors(config)
        self.oracle = build_oracle(config, self.tensors)
        table = resolve_ops(backend, DeepseekOcr.op_cases(config, torch.float32), num_threads=2)  # type: ignore[arg-type]
        self.ops = table
        self.model = DeepseekOcr.from_tensors(config, self.tensors, torch.float32, as_ops(table))

    def ours(self, views: PageViews, plan: TilePlan, text: list[int]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        stages = Stages()
        rows = self.model.encode_image(views, plan, stages)
        ids, places = prompt_with_image(rows, text)
        return Session(self.model, num_blocks=(len(ids) + 7) // 8).feed(ids, places, stages), stages.seen

    def theirs(self, views: PageViews, plan: TilePlan, text: list[int]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        ids, _ = prompt_with_image(torch.zeros(plan.num_image_tokens, 1), text)
        logits = []

        def run() -> None:
            output = self.oracle(input_ids=torch.tensor([ids]), use_cache=False, **oracle_inputs(views, plan))
            logits.append(output.logits[0])

        paths = dict(self.oracle.named_modules())
        seen = record(self.oracle, run, {stage: path for stage, path in STAGES.items() if path in paths})
        return logits[0], seen


@pytest.fixture(scope="module", params=["reference", "auto"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(TINY, request.param)
    yield made
    made.ops.close()


def by_view(stage: str, ours: list[Tensor], theirs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of the same view: we encode tiles first (or all views at once), the port encodes the page first."""
    if stage.startswith("layer."):
        return [(ours[0], theirs[0][0])]
    if stage == "sam":
        theirs = [t.permute(0, 2, 3, 1) for t in theirs]
    theirs = theirs[1:] + theirs[:1]
    if len(ours) == 1:
        theirs = [torch.cat(theirs)]
    assert len(ours) == len(theirs)
    return list(zip(ours, theirs))


@pytest.mark.parametrize("page", PAGES)
def test_every_stage_and_the_logits(pair: Pair, page: str) -> None:
    plan = make_plan(*PAGES[page])
    views, text = make_views(plan, seed=len(page)), [5, 9, 33, 4, 61]
    logits, stages = pair.ours(views, plan, text)
    expected, expected_stages = pair.theirs(views, plan, text)
    errors = {
        stage: max(error(ours, theirs) for ours, theirs in by_view(stage, stages[stage], found))
        for stage, found in expected_stages.items()
    }
    errors["logits"] = error(logits, expected)
    print(page, {stage: f"{value:.1e}" for stage, value in errors.items()})
    assert set(expected_stages) == set(STAGES)
    assert {stage: value for stage, value in errors.items() if value > TOLERANCE} == {}
    assert logits.shape[0] == 1 + plan.num_image_tokens + len(text)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_other_windows_and_widths(backend: str) -> None:
    """Windows that fit without padding, all blocks windowed but one, even sizes."""
    config = replace(EVEN, sam=replace(EVEN.sam, window_size=4, global_attn_indexes=(2,)))
    both = Pair(config, backend)
    plan = make_plan(256, 192, 2, 1)
    views = make_views(plan)
    assert error(both.ours(views, plan, [3, 4])[0], both.theirs(views, plan, [3, 4])[0]) <= TOLERANCE
    both.ops.close()


def test_text_without_an_image(pair: Pair) -> None:
    ids = [0, 5, 9, 33, 4, 61, 80, 2]
    with torch.no_grad():
        expected = pair.oracle(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    assert error(Session(pair.model).feed(ids), expected) <= TOLERANCE


# The published modes at their real sizes (grids of 32 to 80, windows of 14, tables of 64 and 16), the towers thin.
REAL_GRIDS = replace(
    TINY,
    sam=replace(TINY.sam, width=16, heads=1, layers=2, window_size=14, image_size=1024),
    clip=replace(TINY.clip, image_size=224),
    decoder=replace(TINY.decoder, max_position_embeddings=4096),
)
REAL_PAGES = [(mode, 1000, 700) for mode in ("tiny", "small", "base", "large")]
REAL_PAGES += [("gundam", 1240, 1754), ("gundam", 1920, 1080), ("gundam", 600, 500), ("gundam-master", 700, 1400)]


@pytest.fixture(scope="module")
def real_grids() -> Iterator[Pair]:
    made = Pair(REAL_GRIDS, "auto")
    yield made
    made.ops.close()


@pytest.mark.parametrize(("mode", "width", "height"), REAL_PAGES)
def test_published_modes(real_grids: Pair, mode: str, width: int, height: int) -> None:
    """Every published mode through tiling, encoder, layout and decoder, against the port."""
    plan = plan_tiles(width, height, resolve_mode(mode, ProcessorConfig()))
    views, text = make_views(plan), [5, 9, 33]
    logits, expected = real_grids.ours(views, plan, text)[0], real_grids.theirs(views, plan, text)[0]
    worst = error(logits, expected)
    print(f"{mode} {width}x{height}: {plan.num_image_tokens} rows, error {worst:.1e} of the largest logit")
    assert worst <= TOLERANCE


# Each of these belongs to a published trap; the comparison must see a small fault in it.
FAULTS = {
    "window padding": ("sam_model.blocks.0.attn.qkv.bias", 192),
    "position table when enlarged": ("sam_model.pos_embed", 256),
    "relative table when shrunk": ("sam_model.blocks.1.attn.rel_pos_w", 128),
    "newline": ("image_newline", 192),
    "separator": ("view_seperator", 192),
    "shared expert": ("layers.1.mlp.shared_experts.down_proj.weight", 192),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_a_small_fault(fault: str) -> None:
    """One tensor scaled by 1.01 moves the logits by ten times the tolerance and more."""
    name, base = FAULTS[fault]
    tensors = random_tensors(TINY)
    plan = make_plan(base)
    views = make_views(plan)
    ops = resolve_ops("reference")
    logits = []
    for factor in (1.0, 1.01):
        scaled = {key: value * factor if key.endswith(name) else value for key, value in tensors.items()}
        model = DeepseekOcr.from_tensors(TINY, scaled, torch.float32, as_ops(ops))
        ids, places = prompt_with_image(model.encode_image(views, plan), [5, 9])
        logits.append(Session(model).feed(ids, places))
    assert error(logits[1], logits[0]) > 10 * TOLERANCE
