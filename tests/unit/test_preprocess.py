"""Views of a page against a second implementation on Pillow (deepseek-ocr.md sections 5.3 to 5.6)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pagelens.config import ProcessorConfig
from pagelens.errors import ShapeError
from pagelens.vision.modes import resolve_mode
from pagelens.vision.preprocess import PADDING, contained_size, global_pixels, normalise, preprocess
from pagelens.vision.tiling import TilePlan, plan_tiles

REAL = ProcessorConfig()
SCALED = ProcessorConfig(base_size=192, image_size=128, max_crops=4, scaled=True)


def page(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * 7919 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def resized(picture: Image.Image, width: int, height: int) -> Image.Image:
    """One axis at a time, so that every version of Pillow gives the bytes of those before 13."""
    picture = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def padded(picture: Image.Image, size: int) -> Image.Image:
    """ImageOps.pad in its own terms: compare the aspect ratios as floats, resize, paste in the middle."""
    ratio = picture.width / picture.height
    width = height = size
    if ratio > 1.0:
        height = round(picture.height / picture.width * size)
    elif ratio < 1.0:
        width = round(picture.width / picture.height * size)
    inner = resized(picture, max(width, 1), max(height, 1))
    canvas = Image.new("RGB", (size, size), (127, 127, 127))
    if inner.width != size:
        canvas.paste(inner, (round((size - inner.width) * 0.5), 0))
    else:
        canvas.paste(inner, (0, round((size - inner.height) * 0.5)))
    return canvas


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """As torchvision does it: bytes -> CHW float32 / 255, then (x - mean) / std."""
    planes = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    return planes.to(torch.float32).div(255).sub(0.5).div(0.5)


def expected(image: np.ndarray, plan: TilePlan) -> tuple[torch.Tensor, torch.Tensor | None]:
    picture, size, tile = Image.fromarray(image), plan.base_size, plan.tile_size
    whole = resized(picture, size, size) if plan.squash else padded(picture, size)
    if plan.num_tiles == 0:
        return to_tensor(whole)[None], None
    stretched = resized(picture, plan.columns * tile, plan.rows * tile)
    corners = [(x * tile, y * tile) for y in range(plan.rows) for x in range(plan.columns)]
    tiles = [to_tensor(stretched.crop((x, y, x + tile, y + tile))) for x, y in corners]
    return to_tensor(whole)[None], torch.stack(tiles)


SIZES = [
    (192, 192),
    (100, 100),
    (300, 200),
    (200, 301),
    (131, 97),
    (500, 60),
    (60, 500),
    (1000, 2),
    (2, 1000),
    (1, 1),
    (9, 3000),
]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("mode", ["base", "gundam"])
def test_views_of_a_scaled_model(mode: str, width: int, height: int) -> None:
    check(width, height, mode, SCALED)


@pytest.mark.parametrize(
    ("mode", "width", "height"),
    [
        ("tiny", 700, 300),
        ("small", 333, 900),
        ("base", 620, 877),
        ("large", 877, 620),
        ("gundam", 1240, 1754),
        ("gundam", 640, 640),
        ("gundam-master", 900, 640),
    ],
)
def test_views_of_the_real_model(mode: str, width: int, height: int) -> None:
    check(width, height, mode, REAL)


def check(width: int, height: int, mode: str, processor: ProcessorConfig) -> None:
    image = page(width, height)
    plan = plan_tiles(width, height, resolve_mode(mode, processor))
    views = preprocess(image, plan)
    whole, tiles = expected(image, plan)
    assert views.global_view.dtype == torch.float32
    assert views.global_view.is_contiguous()
    assert torch.equal(views.global_view, whole)
    if tiles is None:
        assert views.tiles is None
    else:
        assert views.tiles is not None
        assert views.tiles.is_contiguous()
        assert torch.equal(views.tiles, tiles)


def test_contained_size() -> None:
    assert contained_size(10_000, 3, 1024) == (1024, 1)  # rounds to 0, which no resize can make
    assert contained_size(3, 10_000, 1024) == (1, 1024)
    assert contained_size(50, 50, 1024) == (1024, 1024)
    assert contained_size(1024, 2, 256) == (256, 1)  # 0.5 ties to 0, then at least 1
    assert contained_size(1024, 6, 256) == (256, 2)  # 1.5 ties to 2
    assert contained_size(1024, 10, 256) == (256, 2)  # 2.5 ties to 2


def test_centring_ties_to_even() -> None:
    for height, top in ((255, 0), (253, 2), (251, 2), (249, 4)):  # half of 1, 3, 5, 7
        plan = plan_tiles(
            256, height, resolve_mode("base", ProcessorConfig(base_size=256, image_size=256, scaled=True))
        )
        pixels = global_pixels(np.zeros((height, 256, 3), np.uint8), plan)
        assert int((pixels[:, 0, 0] == 0).argmax()) == top
        assert int((pixels == 0).all(axis=(1, 2)).sum()) == height


def test_normalise_has_the_float32_values_of_the_published_steps() -> None:
    values = np.arange(256, dtype=np.uint8)
    pixels = np.broadcast_to(values[None, :, None, None], (1, 256, 1, 3))
    found = normalise(pixels)
    steps = (torch.arange(256, dtype=torch.float32) / 255 - 0.5) / 0.5
    assert found.shape == (1, 3, 256, 1)
    for channel in range(3):
        assert torch.equal(found[0, channel, :, 0], steps)
    assert round(float(found[0, 0, PADDING, 0]), 5) == -0.00392


def test_an_image_of_another_size_is_refused() -> None:
    plan = plan_tiles(30, 20, resolve_mode("base", SCALED))
    with pytest.raises(ShapeError, match=r"image is \[30, 20, 3\], but the plan was made for \[20, 30, 3\]"):
        preprocess(np.zeros((30, 20, 3), np.uint8), plan)
