"""The order of one image's rows in the prompt: tiles stitched into one map, then the global view, then the separator.

One function, `row_sources`, says where each row comes from. The number of image tokens is its length and `build_rows`
gathers by it, so a count can never disagree with the features. Source: deepseek-ocr.md section 4.2.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from ..errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor

    from .tiling import TilePlan


@lru_cache(maxsize=256)
def row_sources(columns: int, rows: int, local_grid: int, global_grid: int) -> tuple[int, ...]:
    """For each row of the image block, the index of its source in this list of vectors:

        the tiles' features (tile, y, x) row-major, n*q_l*q_l of them (none for a 1 x 1 grid), then
        the global features (y, x) row-major, q_g*q_g, then the newline vector, then the separator vector.

    Local rows: one map of (rows*q_l) x (columns*q_l) features, a newline after every map row, not after every tile row.
    Global rows: q_g rows with a newline each. Last, one separator, with or without tiles.
    """
    num_tiles = columns * rows if columns * rows > 1 else 0
    first_global = num_tiles * local_grid * local_grid
    newline = first_global + global_grid * global_grid
    sources: list[int] = []
    if num_tiles:
        for map_y in range(rows * local_grid):
            tile_y, y = divmod(map_y, local_grid)
            for tile_x in range(columns):
                start = ((tile_y * columns + tile_x) * local_grid + y) * local_grid
                sources.extend(range(start, start + local_grid))
            sources.append(newline)
    for y in range(global_grid):
        start = first_global + y * global_grid
        sources.extend(range(start, start + global_grid))
        sources.append(newline)
    sources.append(newline + 1)
    return tuple(sources)


def build_rows(
    global_features: Tensor, local_features: Tensor | None, newline: Tensor, separator: Tensor, plan: TilePlan
) -> Tensor:
    """The rows of one image, in prompt order.

    global_features [q_g, q_g, C]; local_features [n, q_l, q_l, C] in row-major tile order, None without
    tiles; newline, separator [C]. Returns [plan.num_image_tokens, C] in the features' dtype, new memory.
    Raises ShapeError if a tensor does not fit the plan.
    """
    import torch

    q_g, q_l, n, size = plan.global_grid, plan.local_grid, plan.num_tiles, global_features.shape[-1]
    expected: list[tuple[str, Tensor | None, tuple[int, ...] | None]] = [
        ("global_features", global_features, (q_g, q_g, size)),
        ("local_features", local_features, (n, q_l, q_l, size) if n else None),
        ("newline", newline, (size,)),
        ("separator", separator, (size,)),
    ]
    for name, tensor, shape in expected:
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape:
            raise ShapeError(
                f"{name} has shape {found}, but a page of {plan.columns} x {plan.rows} tiles needs {shape}"
            )
    parts = [global_features.reshape(-1, size), newline[None], separator[None]]
    if local_features is not None:
        parts.insert(0, local_features.reshape(-1, size))
    sources = row_sources(plan.columns, plan.rows, q_l, q_g)
    index = torch.tensor(sources, dtype=torch.long, device=global_features.device)
    return torch.cat(parts).index_select(0, index)
