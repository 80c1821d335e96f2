"""From the size of a page and a mode to the grid of tiles and the number of vision tokens.

Integers only, but for the float64 comparison of aspect ratios that the published preprocessing makes.
No pixels, no tensors. Source: deepseek-ocr.md sections 4 and 5.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..errors import ImageError
from .layout import row_sources
from .modes import PIXELS_PER_TOKEN, Mode


@dataclass(frozen=True, slots=True)
class TilePlan:
    """How one page is shown to the model.

    width, height  of the page in pixels
    columns, rows  grid of the tiles; 1 x 1 means that there are none (a grid of one tile is never used)
    tile_size      side of a tile in pixels, 0 if the mode has no tiles
    """

    width: int
    height: int
    mode: str
    columns: int
    rows: int
    base_size: int
    tile_size: int
    squash: bool

    @property
    def num_tiles(self) -> int:
        count = self.columns * self.rows
        return count if count > 1 else 0

    @property
    def global_grid(self) -> int:
        """Vision tokens along one side of the global view."""
        return tokens_per_side(self.base_size)

    @property
    def local_grid(self) -> int:
        """Vision tokens along one side of a tile; 0 if the mode has no tiles."""
        return tokens_per_side(self.tile_size)

    @property
    def num_image_tokens(self) -> int:
        """Rows that replace the image mark, newlines and separator included; counted on the row map itself."""
        return len(row_sources(self.columns, self.rows, self.local_grid, self.global_grid))

    @property
    def valid_tokens(self) -> int:
        """Vision tokens that show page, not padding: the denominator of the compression ratio (deepseek-ocr.md 9.6).

        floor(q*q*r) for a padded global view of q x q tokens, r = short side / long side, plus all tokens of the tiles.
        """
        whole = self.global_grid**2
        short, long = sorted((self.width, self.height))
        seen = whole if self.squash else whole * short // long
        return seen + self.num_tiles * self.local_grid**2


def tokens_per_side(pixels: int) -> int:
    """ceil(floor(S/16)/4): patches of 16 pixels, then two convolutions of stride 2."""
    return -(-(pixels // 16) // (PIXELS_PER_TOKEN // 16))


@lru_cache(maxsize=64)
def candidate_grids(min_crops: int, max_crops: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with min_crops <= columns*rows <= max_crops, by rising product.

    The published code leaves the order among equal products to a set's iteration order; it never changes the choice
    (two grids of equal product are never equally near to any aspect ratio and best), so any fixed order serves.
    """
    grids = [(c, r) for c in range(1, max_crops + 1) for r in range(1, max_crops // c + 1) if c * r >= min_crops]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


def choose_grid(width: int, height: int, mode: Mode) -> tuple[int, int]:
    """The (columns, rows) whose ratio is nearest to width/height; (1, 1) = no tiles.

    On an exact tie the larger grid wins if the page has more than half of its pixels.
    """
    tile = mode.tile_size
    if tile is None or (width <= mode.tile_threshold and height <= mode.tile_threshold):
        return 1, 1
    aspect = width / height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in candidate_grids(mode.min_crops, mode.max_crops):
        distance = abs(aspect - columns / rows)
        large_enough = 2 * width * height > tile * tile * columns * rows
        if distance < best_distance or (distance == best_distance and large_enough):
            best, best_distance = (columns, rows), distance
    return best


def plan_tiles(width: int, height: int, mode: Mode) -> TilePlan:
    """Plan the views of a page of width x height pixels. Raises ImageError if a side is not a positive integer."""
    if width < 1 or height < 1:
        raise ImageError(f"an image of {width} x {height} pixels is empty; both sides must be at least 1")
    columns, rows = choose_grid(width, height, mode)
    return TilePlan(width, height, mode.name, columns, rows, mode.base_size, mode.tile_size or 0, mode.squash)
