"""Bicubic resize of 8-bit RGB pictures with exactly the bytes of Pillow before version 13.

The published models were trained and run on those bytes. Pillow 13 changed the order of the two passes (up to 20 levels
of difference), so Pillow only decodes here. `resize_rgb` is the C++ kernel (csrc/cpu/resize.cpp);
`resize_rgb_reference` says the same in numpy and is its oracle. Source: deepseek-ocr.md sections 3.5 and 5.5.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..errors import ShapeError, UnsupportedError

WEIGHT_BITS = 22
Pixels = NDArray[np.uint8]


def resize_rgb(image: Pixels, width: int, height: int) -> Pixels:
    """The picture at width x height, aspect ratio not kept; antialiased cubic kernel, a = -0.5.

    image [h, w, 3] uint8 -> [height, width, 3] uint8, new memory, contiguous. Raises ShapeError for anything else,
    UnsupportedError if the kernel cannot run here.
    """
    _check(image, width, height)
    try:
        from .. import _native

        resized: Pixels = _native.resize_rgb_u8(np.ascontiguousarray(image), height, width)
    except ImportError as error:
        raise UnsupportedError(f"the native extension is not built ({error}); run `pip install -e .`") from error
    except ValueError as error:  # PAGELENS_CPU_ISA asks for what cannot be used here, or a side is above 65535
        raise UnsupportedError(str(error)) from None
    return resized


def resize_rgb_reference(image: Pixels, width: int, height: int) -> Pixels:
    """The same function in numpy: each axis on its own, horizontal first, 8-bit rounding after each pass."""
    _check(image, width, height)
    result = image.copy()
    if width != image.shape[1]:
        result = _resize_axis(result.swapaxes(0, 1), width).swapaxes(0, 1)
    if height != image.shape[0]:
        result = _resize_axis(result, height)
    return np.ascontiguousarray(result)


def axis_weights(size: int, new_size: int) -> list[tuple[int, NDArray[np.int64]]]:
    """For each output position: the first source position and the integer weights, in units of 2^-22."""
    scale = size / new_size
    stretch = max(scale, 1.0)
    support, inverse = 2.0 * stretch, 1.0 / stretch
    table = []
    for i in range(new_size):
        centre = (i + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), size)
        weights = [_cubic((j - centre + 0.5) * inverse) for j in range(first, last)]
        total = _sum_in_order(weights) or 1.0
        scaled = [weight / total * (1 << WEIGHT_BITS) for weight in weights]
        table.append((first, np.array([int(math.copysign(0.5, s) + s) for s in scaled], dtype=np.int64)))
    return table


def _sum_in_order(values: list[float]) -> float:
    """Left to right, rounding at each step: the builtin `sum` compensates from Python 3.12 on, Pillow does not."""
    total = 0.0
    for value in values:
        total += value
    return total


def _cubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


def _resize_axis(image: Pixels, new_size: int) -> Pixels:
    """Resize the first axis."""
    result = np.empty((new_size, *image.shape[1:]), dtype=np.uint8)
    for i, (first, weights) in enumerate(axis_weights(image.shape[0], new_size)):
        window = image[first : first + len(weights)].astype(np.int64)
        total = np.tensordot(weights, window, axes=1) + (1 << (WEIGHT_BITS - 1))
        result[i] = np.clip(total >> WEIGHT_BITS, 0, 255)
    return result


def _check(image: Pixels, width: int, height: int) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ShapeError(f"resize_rgb needs [h, w, 3] uint8 with h, w >= 1, got {list(image.shape)} {image.dtype}")
    if width < 1 or height < 1:
        raise ShapeError(f"resize_rgb cannot make a picture of {width} x {height}; both sides must be at least 1")
