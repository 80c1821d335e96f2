"""The bicubic resize has exactly the bytes of Pillow before version 13, in C++ (every instruction set) and in numpy."""

from __future__ import annotations

import importlib.util
import json
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from pagelens import _native
from pagelens.errors import ShapeError
from pagelens.vision.resize import Pixels, axis_weights, resize_rgb, resize_rgb_reference

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "tests/helpers/pillow12_resize.json").read_text(encoding="utf-8"))
Resize = Callable[[Pixels, int, int], Pixels]


def golden_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_resize_golden", ROOT / "tools/make_resize_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = golden_tool()


@pytest.fixture(params=_native.supported_isas())
def native(request: pytest.FixtureRequest) -> Iterator[Resize]:
    before = _native.isa()
    _native.set_isa(request.param)
    yield resize_rgb
    _native.set_isa(before)


def one_axis_at_a_time(image: Pixels, width: int, height: int) -> Pixels:
    """What every Pillow gives if the order of its passes is taken out of its hands: horizontal, then vertical."""
    picture = Image.fromarray(image)
    picture = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


@cache
def large_case(width: int, height: int, new_width: int, new_height: int) -> tuple[Pixels, Pixels]:
    image = TOOL.picture(width, height, 1)
    return image, one_axis_at_a_time(image, new_width, new_height)


def check_golden(resize: Resize) -> None:
    assert GOLDEN["pillow"] == "12.0.0"
    assert [tuple(case[:4]) for case in GOLDEN["cases"]] == TOOL.sizes()
    assert len(GOLDEN["cases"]) == 200
    wrong = []
    for seed, (width, height, new_width, new_height, crc) in enumerate(GOLDEN["cases"]):
        resized = resize(TOOL.picture(width, height, seed), new_width, new_height)
        if resized.shape != (new_height, new_width, 3) or zlib.crc32(resized.tobytes()) != crc:
            wrong.append((width, height, new_width, new_height))
    assert not wrong, f"{len(wrong)} of 200 differ from Pillow 12: {wrong[:5]}"


def test_native_has_the_bytes_of_pillow_12(native: Resize) -> None:
    check_golden(native)


def test_reference_has_the_bytes_of_pillow_12() -> None:
    check_golden(resize_rgb_reference)


def test_native_equals_the_installed_pillow_one_axis_at_a_time(native: Resize) -> None:
    rng = np.random.default_rng(5)
    for _ in range(60):
        width, height, new_width, new_height = (int(10 ** rng.uniform(0, 3.1)) for _ in range(4))
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = one_axis_at_a_time(image, new_width, new_height)
        assert np.array_equal(native(image, new_width, new_height), expected), (width, height, new_width, new_height)


@pytest.mark.parametrize("size", [(2480, 3508, 1280, 1920), (2480, 3508, 724, 1024), (192, 48, 1024, 256)])
def test_pages(native: Resize, size: tuple[int, int, int, int]) -> None:
    image, expected = large_case(*size)
    assert np.array_equal(native(image, size[2], size[3]), expected)


@pytest.mark.parametrize("resize", [resize_rgb, resize_rgb_reference])
def test_thin_pictures_and_the_largest_side(resize: Resize) -> None:
    for width, height, new_width, new_height in ((65535, 1, 1024, 1), (1, 65535, 1, 1024), (3, 40000, 2, 640)):
        image = TOOL.picture(width, height, 3)
        assert np.array_equal(resize(image, new_width, new_height), one_axis_at_a_time(image, new_width, new_height))


@pytest.mark.parametrize("resize", [resize_rgb, resize_rgb_reference])
def test_input_is_left_alone_and_output_is_new(resize: Resize) -> None:
    image = TOOL.picture(40, 30, 2)
    before = image.copy()
    same = resize(image, 40, 30)
    assert np.array_equal(same, before)
    assert not np.shares_memory(same, image)
    turned = resize(image.swapaxes(0, 1), 20, 10)  # not contiguous
    assert np.array_equal(turned, resize(np.ascontiguousarray(image.swapaxes(0, 1)), 20, 10))
    assert np.array_equal(image, before)


@pytest.mark.parametrize("resize", [resize_rgb, resize_rgb_reference])
@pytest.mark.parametrize(
    ("image", "width", "height"),
    [
        (np.zeros((4, 4), np.uint8), 2, 2),
        (np.zeros((4, 4, 4), np.uint8), 2, 2),
        (np.zeros((0, 4, 3), np.uint8), 2, 2),
        (np.zeros((4, 4, 3), np.float32), 2, 2),
        (np.zeros((4, 4, 3), np.uint8), 0, 2),
        (np.zeros((4, 4, 3), np.uint8), 2, -1),
    ],
)
def test_bad_shapes_are_refused(resize: Resize, image: Pixels, width: int, height: int) -> None:
    with pytest.raises(ShapeError, match="resize_rgb"):
        resize(image, width, height)


def test_weights_of_an_axis() -> None:
    """Closed forms: rows sum to one (to rounding), halving has the symmetric eight taps of the a = -0.5 kernel."""
    for size, new_size in ((10, 3), (3, 10), (100, 99), (7, 7), (1, 5)):
        for first, weights in axis_weights(size, new_size):
            assert first >= 0
            assert first + len(weights) <= size
            assert abs(int(weights.sum()) - 2**22) <= len(weights)
    first, weights = axis_weights(32, 16)[8]
    distances = np.abs(np.arange(first, first + 8) + 0.5 - 17) / 2
    near = ((1.5 * distances - 2.5) * distances * distances + 1) * (distances < 1)
    far = -0.5 * (((distances - 5) * distances + 8) * distances - 4) * (distances >= 1)
    assert np.array_equal(weights, weights[::-1])
    assert np.allclose(weights / 2**22, (near + far) / (near + far).sum(), atol=2**-22)
