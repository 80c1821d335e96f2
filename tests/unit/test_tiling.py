"""Tile grids and token counts against deepseek-ocr.md sections 4.1, 4.3, 5.2 and 9.6."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagelens.config import ProcessorConfig
from pagelens.errors import ImageError
from pagelens.vision.modes import Mode, resolve_mode
from pagelens.vision.tiling import candidate_grids, choose_grid, plan_tiles, tokens_per_side

REAL = ProcessorConfig()
SCALED = ProcessorConfig(base_size=256, image_size=192, max_crops=4, scaled=True)
GRIDS_TO_NINE = [(w, h) for w in range(1, 10) for h in range(1, 10) if 2 <= w * h <= 9]

# width, height, grid and count with at most 9 tiles, grid and count with at most 6 (section 4.3)
WORKED_EXAMPLES = [
    (640, 640, (1, 1), 273, (1, 1), 273),
    (1, 1, (1, 1), 273, (1, 1), 273),
    (640, 1, (1, 1), 273, (1, 1), 273),
    (641, 640, (2, 2), 693, (2, 2), 693),
    (1000, 1000, (2, 2), 693, (2, 2), 693),
    (1024, 1024, (2, 2), 693, (2, 2), 693),
    (1240, 1754, (2, 3), 903, (2, 3), 903),
    (1190, 1684, (2, 3), 903, (2, 3), 903),
    (1224, 1584, (2, 3), 903, (2, 3), 903),
    (2550, 3300, (2, 3), 903, (2, 3), 903),
    (800, 600, (3, 2), 893, (3, 2), 893),
    (4000, 3000, (3, 2), 893, (3, 2), 893),
    (1280, 1024, (3, 2), 893, (3, 2), 893),
    (1920, 1080, (4, 2), 1093, (2, 1), 483),
    (2000, 2000, (3, 3), 1203, (2, 2), 693),
    (3000, 500, (6, 1), 883, (6, 1), 883),
    (500, 3000, (1, 6), 933, (1, 6), 933),
    (100, 100_000, (1, 9), 1263, (1, 6), 933),
]
# Exact ties of the aspect ratio between a small and a larger grid: the area decides (section 5.2).
TIES = [
    (1357, 1357, (2, 2)),
    (1358, 1358, (3, 3)),
    (1810, 905, (2, 1)),  # 1,638,050 pixels
    (1812, 906, (4, 2)),  # 1,641,672 pixels; the limit is 1,638,400
    (905, 1810, (1, 2)),
    (906, 1812, (2, 4)),
    (1235, 988, (2, 2)),  # 5:4 with 1,220,180 pixels; the limit is 1,228,800
    (1240, 992, (3, 2)),  # 1,230,080
    (988, 1235, (2, 3)),  # 4:5 is no tie: 2/3 is nearer than 1
]


@pytest.mark.parametrize(
    ("mode", "tokens", "count"), [("tiny", 64, 73), ("small", 100, 111), ("base", 256, 273), ("large", 400, 421)]
)
def test_modes_without_tiles(mode: str, tokens: int, count: int) -> None:
    plan = plan_tiles(3000, 3000, resolve_mode(mode, REAL))
    assert (plan.columns, plan.rows, plan.num_tiles, plan.local_grid) == (1, 1, 0, 0)
    assert plan.num_image_tokens == count
    assert plan.valid_tokens == plan.global_grid**2 == tokens


@pytest.mark.parametrize(("width", "height", "grid9", "count9", "grid6", "count6"), WORKED_EXAMPLES)
def test_worked_examples(
    width: int, height: int, grid9: tuple[int, int], count9: int, grid6: tuple[int, int], count6: int
) -> None:
    for max_crops, grid, count in ((9, grid9, count9), (6, grid6, count6)):
        plan = plan_tiles(width, height, resolve_mode("gundam", REAL, max_crops))
        assert (plan.columns, plan.rows, plan.num_image_tokens) == (*grid, count)


@pytest.mark.parametrize(("width", "height", "grid"), TIES)
def test_ties_are_decided_by_area(width: int, height: int, grid: tuple[int, int]) -> None:
    assert choose_grid(width, height, resolve_mode("gundam", REAL)) == grid


@pytest.mark.parametrize("grid", GRIDS_TO_NINE)
def test_all_22_grids(grid: tuple[int, int]) -> None:
    """Each grid is chosen for a page of exactly its own size, with the counts of section 4.1."""
    w, h = grid
    plan = plan_tiles(640 * w, 640 * h, resolve_mode("gundam", REAL))
    assert (plan.columns, plan.rows, plan.num_tiles) == (w, h, w * h)
    assert plan.num_image_tokens == 273 + 10 * h * (10 * w + 1)
    master = plan_tiles(1024 * w, 1024 * h, resolve_mode("gundam-master", REAL))
    assert (master.columns, master.rows) == (w, h)
    assert master.num_image_tokens == 421 + 16 * h * (16 * w + 1)


def test_candidates() -> None:
    assert len(GRIDS_TO_NINE) == 22
    assert sorted(candidate_grids(2, 9)) == sorted(GRIDS_TO_NINE)
    assert len(candidate_grids(2, 6)) == 13
    products = [w * h for w, h in candidate_grids(2, 32)]
    assert products == sorted(products)


def test_threshold_is_640_whatever_the_tile_size_and_the_tile_in_a_scaled_model() -> None:
    master = resolve_mode("gundam-master", REAL)
    assert choose_grid(640, 640, master) == (1, 1)
    assert choose_grid(700, 700, master) == (2, 2)  # although smaller than one 1024 tile
    scaled = resolve_mode("gundam", SCALED)
    assert choose_grid(192, 192, scaled) == (1, 1)
    assert choose_grid(193, 192, scaled) == (2, 2)
    plan = plan_tiles(384, 192, scaled)
    assert (plan.columns, plan.rows, plan.global_grid, plan.local_grid) == (2, 1, 4, 3)
    assert plan.num_image_tokens == 3 * (2 * 3 + 1) + 4 * 5 + 1


def test_tokens_per_side() -> None:
    assert [tokens_per_side(s) for s in (512, 640, 768, 1024, 1280, 192, 256, 320)] == [8, 10, 12, 16, 20, 3, 4, 5]
    assert tokens_per_side(1000) == 16  # ceil(62 / 4)


def test_valid_tokens() -> None:
    def valid(width: int, height: int, mode: str) -> int:
        return plan_tiles(width, height, resolve_mode(mode, REAL)).valid_tokens

    assert valid(1240, 1754, "base") == int(256 * (1240 / 1754)) == 180
    assert valid(1754, 1240, "large") == int(400 * (1240 / 1754)) == 282
    assert valid(1240, 1754, "tiny") == 64
    assert valid(1240, 1754, "small") == 100
    assert valid(1240, 1754, "gundam") == 180 + 600
    assert valid(10_000, 1, "base") == 0
    assert valid(700, 1000, "large") == 280  # exactly 280: a rounded 0.7 times 400 must not lose one


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (-1, 5)])
def test_empty_pages_are_refused(width: int, height: int) -> None:
    with pytest.raises(ImageError, match="both sides must be at least 1"):
        plan_tiles(width, height, resolve_mode("base", REAL))


def published_choice(width: int, height: int, mode: Mode, backwards: bool) -> tuple[int, int]:
    """Section 5.2 to the letter, with either order among grids of equal product."""
    assert mode.tile_size is not None
    if width <= mode.tile_threshold and height <= mode.tile_threshold:
        return 1, 1
    everything = range(1, mode.max_crops + 1)
    grids = {(w, h) for w in everything for h in everything if mode.min_crops <= w * h <= mode.max_crops}
    aspect = width / height
    best, best_difference = (1, 1), float("inf")
    for w, h in sorted(sorted(grids, reverse=backwards), key=lambda g: g[0] * g[1]):
        difference = abs(aspect - w / h)
        if difference < best_difference:
            best, best_difference = (w, h), difference
        elif difference == best_difference and width * height > 0.5 * mode.tile_size * mode.tile_size * w * h:
            best = (w, h)
    return best


SIDES = st.one_of(st.integers(1, 4000), st.integers(1, 70_000), st.sampled_from([640, 641, 1280, 1920, 2560]))


@settings(max_examples=400, deadline=None)
@given(SIDES, SIDES, st.sampled_from([2, 4, 6, 9, 32]), st.sampled_from(["gundam", "gundam-master"]))
def test_same_choice_as_the_published_rule_in_any_order(width: int, height: int, max_crops: int, name: str) -> None:
    mode = resolve_mode(name, REAL, max_crops)
    grid = choose_grid(width, height, mode)
    assert grid == published_choice(width, height, mode, False) == published_choice(width, height, mode, True)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 400), st.sampled_from([6, 9, 32]))
def test_same_choice_on_simple_ratios(w: int, h: int, scale: int, max_crops: int) -> None:
    """Pages of simple ratios meet exact ties far more often than drawn ones."""
    mode = resolve_mode("gundam", REAL, max_crops)
    assert choose_grid(w * scale, h * scale, mode) == published_choice(w * scale, h * scale, mode, True)


@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.sampled_from(["tiny", "small", "base", "large", "gundam", "gundam-master"]))
def test_properties_of_a_plan(width: int, height: int, name: str) -> None:
    mode = resolve_mode(name, REAL)
    plan = plan_tiles(width, height, mode)
    assert plan.num_tiles == 0 or mode.min_crops <= plan.num_tiles <= mode.max_crops
    assert (plan.num_tiles == 0) == ((plan.columns, plan.rows) == (1, 1))
    q_g, q_l = plan.global_grid, plan.local_grid
    local = plan.rows * q_l * (plan.columns * q_l + 1) if plan.num_tiles else 0
    assert plan.num_image_tokens == local + q_g * (q_g + 1) + 1
    assert 0 <= plan.valid_tokens <= q_g**2 + plan.num_tiles * q_l**2


def test_huge_dimensions() -> None:
    mode = resolve_mode("gundam", REAL)
    assert choose_grid(10**12, 10**12, mode) == (3, 3)
    assert choose_grid(10**30, 1, mode) == (9, 1)
    assert choose_grid(1, 10**30, mode) == (1, 9)
