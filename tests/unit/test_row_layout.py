"""Row order of an image block, against a plain loop over section 4.2 of deepseek-ocr.md."""

from __future__ import annotations

import pytest
import torch

from pagelens.config import ProcessorConfig
from pagelens.errors import ShapeError
from pagelens.vision.layout import build_rows, row_sources
from pagelens.vision.modes import resolve_mode
from pagelens.vision.tiling import TilePlan, plan_tiles

SIZE = 3


def plan_of(columns: int, rows: int, base: int = 256, tile: int = 192) -> TilePlan:
    return TilePlan(tile * columns, tile * rows, "gundam", columns, rows, base, tile, False)


def features(plan: TilePlan) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Every vector different and telling its origin: (kind, index, 0)."""
    q_g, q_l, n = plan.global_grid, plan.local_grid, plan.num_tiles

    def numbered(kind: int, count: int) -> torch.Tensor:
        rows = torch.zeros(count, SIZE)
        rows[:, 0], rows[:, 1] = kind, torch.arange(count)
        return rows

    local = numbered(2, n * q_l * q_l).reshape(n, q_l, q_l, SIZE) if n else None
    return numbered(1, q_g * q_g).reshape(q_g, q_g, SIZE), local, numbered(3, 1)[0], numbered(4, 1)[0]


def expected_rows(plan: TilePlan) -> torch.Tensor:
    """Section 4.2: stitch the tiles into one picture of features, then end each of its lines with a newline."""
    global_features, local, newline, separator = features(plan)
    lines: list[torch.Tensor] = []
    if local is not None:
        pictures = [torch.cat(list(local[ty * plan.columns : (ty + 1) * plan.columns]), 1) for ty in range(plan.rows)]
        for line in torch.cat(pictures, 0):
            lines += [*line, newline]
    for line in global_features:
        lines += [*line, newline]
    return torch.stack([*lines, separator])


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 3), (1, 9), (9, 1), (3, 3)])
def test_rows_equal_the_plain_loop(columns: int, rows: int) -> None:
    plan = plan_of(columns, rows)
    built = build_rows(*features(plan), plan)
    assert torch.equal(built, expected_rows(plan))
    assert len(built) == plan.num_image_tokens


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large", "gundam", "gundam-master"])
def test_rows_and_count_agree_in_every_mode(name: str) -> None:
    for width, height in ((300, 400), (2480, 3508), (4000, 700)):
        plan = plan_tiles(width, height, resolve_mode(name, ProcessorConfig()))
        built = build_rows(*features(plan), plan)
        assert torch.equal(built, expected_rows(plan))
        assert len(built) == plan.num_image_tokens


def test_every_feature_is_used_once_and_the_separator_is_last() -> None:
    sources = row_sources(2, 3, 10, 16)
    newline = 6 * 100 + 256
    assert len(sources) == 903
    assert sorted(s for s in sources if s < newline) == list(range(newline))
    assert sources.count(newline) == 3 * 10 + 16
    assert sources[-1] == newline + 1
    assert sources.count(newline + 1) == 1


def test_dtype_is_kept() -> None:
    plan = plan_of(2, 1)
    converted = [part.bfloat16() if part is not None else None for part in features(plan)]
    assert build_rows(*converted, plan).dtype == torch.bfloat16  # type: ignore[arg-type]


def test_features_that_do_not_fit_the_plan_are_refused() -> None:
    plan, other = plan_of(2, 2), plan_of(2, 1)
    global_features, local, newline, separator = features(plan)
    with pytest.raises(ShapeError, match=r"local_features has shape \(2, 3, 3, 3\), but a page of 2 x 2 tiles needs"):
        build_rows(global_features, features(other)[1], newline, separator, plan)
    with pytest.raises(ShapeError, match="local_features has shape None"):
        build_rows(global_features, None, newline, separator, plan)
    with pytest.raises(ShapeError, match=r"local_features has shape .* needs None"):
        build_rows(global_features, local, newline, separator, plan_of(1, 1))
    with pytest.raises(ShapeError, match="newline has shape"):
        build_rows(global_features, local, newline[:2], separator, plan)
    with pytest.raises(ShapeError, match="global_features has shape"):
        build_rows(global_features[:3], local, newline, separator, plan)
