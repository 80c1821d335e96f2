"""Pixels of a page -> the normalised views that the vision towers take. Source: deepseek-ocr.md sections 5.3 to 5.6."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import ShapeError
from .resize import resize_rgb
from .tiling import TilePlan

if TYPE_CHECKING:
    from torch import Tensor

PADDING = 127  # int(0.5 * 255): the published canvas, one step below the middle of the range


@dataclass(frozen=True, slots=True)
class Views:
    """global_view [1, 3, S, S], tiles [n, 3, T, T] in row-major order or None; float32 in -1..1, contiguous."""

    global_view: Tensor
    tiles: Tensor | None


def preprocess(image: NDArray[np.uint8], plan: TilePlan) -> Views:
    """The views that `plan` asks for. image [h, w, 3] uint8, of the size the plan was made for (else ShapeError)."""
    if image.shape != (plan.height, plan.width, 3):
        raise ShapeError(f"image is {list(image.shape)}, but the plan was made for [{plan.height}, {plan.width}, 3]")
    page = global_pixels(image, plan)[None]
    return Views(normalise(page), normalise(tile_pixels(image, plan)) if plan.num_tiles else None)


def global_pixels(image: NDArray[np.uint8], plan: TilePlan) -> NDArray[np.uint8]:
    """The whole page at base_size x base_size: squashed, or contained and centred on grey. [S, S, 3] uint8."""
    size = plan.base_size
    width, height = (size, size) if plan.squash else contained_size(plan.width, plan.height, size)
    resized = resize_rgb(image, width, height)
    if width == height == size:
        return resized
    canvas = np.full((size, size, 3), PADDING, dtype=np.uint8)
    left, top = round((size - width) * 0.5), round((size - height) * 0.5)  # Python's round: ties to even, as published
    canvas[top : top + height, left : left + width] = resized
    return canvas


def contained_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Largest (width, height) of this aspect ratio within size x size; ties to even, a side never below 1."""
    if width == height:
        return size, size
    if width > height:
        return size, max(round(height / width * size), 1)
    return max(round(width / height * size), 1), size


def tile_pixels(image: NDArray[np.uint8], plan: TilePlan) -> NDArray[np.uint8]:
    """The page stretched over the whole grid and cut, row-major. [n, T, T, 3] uint8."""
    tile, columns, rows = plan.tile_size, plan.columns, plan.rows
    stretched = resize_rgb(image, columns * tile, rows * tile)
    grid = stretched.reshape(rows, tile, columns, tile, 3)
    return np.ascontiguousarray(grid.swapaxes(1, 2)).reshape(-1, tile, tile, 3)


def normalise(pixels: NDArray[np.uint8]) -> Tensor:
    """((v / 255) - 0.5) / 0.5 in float32, each step rounded as the published code rounds it.

    pixels [n, S, S, 3] uint8 -> [n, 3, S, S] float32. A pixel has 256 values, so a table gives exactly these bits.
    """
    import torch

    views = np.empty((len(pixels), 3, *pixels.shape[1:3]), dtype=np.float32)
    for picture, planes in zip(pixels, views, strict=True):
        for channel in range(
            3
        ):  # plane by plane: np.take makes 8-byte indices of its input, which so stay in the cache
            np.take(_table(), picture[:, :, channel], out=planes[channel], mode="clip")
    return torch.from_numpy(views)


@cache
def _table() -> NDArray[np.float32]:
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    table: NDArray[np.float32] = (values - np.float32(0.5)) / np.float32(0.5)
    table.flags.writeable = False
    return table
