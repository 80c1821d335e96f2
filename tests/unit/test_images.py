"""Loading of pictures: formats, orientation, transparency, limits, and one clear line for everything bad."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pagelens.errors import ImageError
from pagelens.vision.images import MAX_PIXELS, MAX_SIDE, ImageSource, load_image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
LOSSLESS = ("PNG", "BMP", "TIFF")


def colors(height: int = 20, width: int = 30) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 8, y * 12, (x + y) * 5], axis=2).astype(np.uint8)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def shape_or_message(data: bytes) -> tuple[int, ...] | str:
    """What load_image makes of a damaged file; any exception but ImageError fails the test."""
    try:
        return load_image(data, max_pixels=1_000_000).shape
    except ImageError as error:
        text = str(error)
    return text if "\n" not in text else pytest.fail(f"more than one line: {text}")


def message(source: object, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    assert " at 0x" not in text
    return text


@pytest.mark.parametrize("form", FORMATS)
def test_formats_from_path_bytes_and_pillow(form: str, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(colors()), form)
    path = tmp_path / "page.bin"  # the name says nothing; the content does
    path.write_bytes(data)
    sources: list[ImageSource] = [
        path,
        str(path),
        data,
        bytearray(data),
        memoryview(data),
        Image.open(io.BytesIO(data)),
    ]
    results = [load_image(source) for source in sources]
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for result in results:
        assert result.dtype == np.uint8
        assert result.flags.c_contiguous
        assert np.array_equal(result, expected)
    if form in LOSSLESS:
        assert np.array_equal(results[0], colors())


def test_arrays() -> None:
    rgb = colors()
    loaded = load_image(rgb)
    assert np.array_equal(loaded, rgb)
    assert not np.shares_memory(loaded, rgb)
    assert load_image(rgb[::2, ::-1]).flags.c_contiguous
    assert np.array_equal(load_image(rgb[:, :, 0]), np.stack([rgb[:, :, 0]] * 3, axis=2))
    rgba = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    assert np.array_equal(load_image(rgba), rgb)
    assert not np.shares_memory(load_image(rgba, composite_alpha=False), rgba)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros(4, np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    assert message(array).startswith(
        f"an image array must be [h, w], [h, w, 3] or [h, w, 4] of uint8, got {list(array.shape)}"
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation: int, form: str) -> None:
    """Stored pixels and the EXIF tag of a camera; the eight cases as defined by the EXIF standard (row 0, column 0)."""
    upright = colors()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],  # row 0 at the right: the camera saw it turned, display turns it clockwise
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    loaded = load_image(encoded(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif, **options))
    assert loaded.shape == upright.shape
    assert np.abs(loaded.astype(int) - upright).max() <= (
        6 if form == "JPEG" else 0
    )  # JPEG at quality 100 still rounds


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_does_not_matter() -> None:
    data = encoded(Image.fromarray(colors()), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert load_image(data).shape == (20, 30, 3)


def test_alpha_is_composited_on_white_or_dropped() -> None:
    rgba = np.zeros((1, 256, 4), np.uint8)
    rgba[:, :, :3] = (10, 100, 200)
    rgba[0, :, 3] = np.arange(256)
    white = load_image(encoded(Image.fromarray(rgba), "PNG"))
    a = np.arange(256)[None, :, None] / 255
    assert np.abs(white - (rgba[:, :, :3] * a + 255 * (1 - a))).max() <= 0.5
    assert white[0, 0].tolist() == [255, 255, 255]
    assert white[0, 255].tolist() == [10, 100, 200]
    dropped = load_image(encoded(Image.fromarray(rgba), "PNG"), composite_alpha=False)
    assert np.array_equal(dropped, rgba[:, :, :3])
    assert np.array_equal(load_image(rgba), white)
    assert np.array_equal(load_image(Image.fromarray(rgba)), white)


def test_transparency_in_palette_and_grey_pictures() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.putdata([0, 1])
    data = encoded(palette, "PNG", transparency=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(data).tolist() == [[[255, 255, 255], [200, 0, 0]]]
        assert load_image(data, composite_alpha=False).tolist() == [[[0, 0, 0], [200, 0, 0]]]
        grey_alpha = Image.merge("LA", (Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 128)))
        assert load_image(encoded(grey_alpha, "PNG")).tolist() == [[[127, 127, 127]]]
        assert load_image(encoded(Image.new("L", (1, 1), 7), "PNG", transparency=7)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "La", "RGBa"])
def test_colour_modes_become_rgb(mode: str) -> None:
    source = Image.fromarray(colors()).convert("RGBA" if mode == "RGBa" else "LA" if mode == "La" else mode)
    source = source.convert(mode)
    loaded = load_image(source)
    assert loaded.shape == (20, 30, 3)
    opaque = source.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert("RGB")
    assert np.array_equal(loaded, np.asarray(opaque))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled(form: str) -> None:
    grey = np.array([[0, 257, 128 * 257, 65535, 128, 129]], np.uint16)
    assert load_image(encoded(Image.fromarray(grey), form))[0, :, 0].tolist() == [0, 1, 128, 255, 0, 1]


def test_floating_point_pixels_are_refused() -> None:
    text = message(Image.new("F", (2, 2)))
    assert text == "PIL image has colour mode F, which cannot be converted; save it as RGB"


def test_only_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert load_image(data)[4, 4].tolist() == [255, 0, 0]


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size; there are next to no pixels behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def test_huge_dimensions_are_refused_from_the_header_without_a_warning() -> None:
    limit_before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = message(png_of_size(60_000, 60_000))
        assert text.endswith(f"has 60000 x 60000 pixels, above the limit of {MAX_PIXELS}; make it smaller")
        assert "no side may exceed 65535" in message(png_of_size(MAX_SIDE + 1, 1))
        assert "no side may exceed 65535" in message(png_of_size(2**31 - 1, 2**31 - 1))
        bmp = bytearray(encoded(Image.new("RGB", (4, 4)), "BMP"))
        bmp[18:26] = struct.pack("<ii", 50_000, 50_000)
        assert "50000 x 50000 pixels, above the limit" in message(bytes(bmp))
        gif = bytearray(encoded(Image.new("L", (4, 4)), "GIF"))
        gif[6:10] = struct.pack("<HH", 65_000, 65_000)
        assert "65000 x 65000 pixels, above the limit" in message(bytes(gif))
    assert limit_before == Image.MAX_IMAGE_PIXELS


def test_the_pixel_limit_is_settable_for_every_source() -> None:
    picture = Image.new("RGB", (30, 20))
    for source in (picture, np.asarray(picture), encoded(picture, "PNG")):
        assert load_image(source, max_pixels=600).shape == (20, 30, 3)
        assert "30 x 20 pixels, above the limit of 599" in message(source, max_pixels=599)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns of cut TIFF directories
@pytest.mark.parametrize("form", FORMATS)
def test_every_truncation_is_an_image_error_or_a_picture(form: str) -> None:
    """A cut file never gives anything but ImageError, or a picture of the right size (cut after the last pixel)."""
    data = encoded(Image.fromarray(colors(12, 10)), form)
    refused = 0
    for length in range(len(data)):
        found = shape_or_message(data[:length])
        refused += isinstance(found, str)
        assert isinstance(found, str) or found == (12, 10, 3)
    assert refused > len(data) // 4  # GIF and BMP hold their headers at the front, TIFF its directory at the end


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", FORMATS)
def test_every_damaged_byte_is_an_image_error_or_a_picture(form: str) -> None:
    data = encoded(Image.fromarray(colors(6, 5)), form)
    rng = np.random.default_rng(1)
    for position in range(min(len(data), 400)):
        damaged = bytearray(data)
        damaged[position] ^= int(rng.integers(1, 256))
        found = shape_or_message(bytes(damaged))
        assert isinstance(found, str) or (len(found) == 3 and found[2] == 3)


def test_bad_files(tmp_path: Path) -> None:
    def written(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    empty = written("empty.png", b"")
    assert message(empty) == f"{str(empty)!r} is empty"
    text = written("notes.png", b"hello, this is no picture")
    assert message(text) == f"{str(text)!r} is not a PNG, JPEG, WEBP, BMP, TIFF or GIF image"
    pdf = written("paper.pdf", b"%PDF-1.7 ...")
    assert message(pdf).startswith(f"{str(pdf)!r} is a PDF document; render its pages")
    cut = written("cut.png", encoded(Image.fromarray(colors()), "PNG")[:70])
    assert message(cut) == f"{str(cut)!r} is damaged or truncated: its pixels cannot be decoded"
    header = written("header.png", encoded(Image.fromarray(colors()), "PNG")[:20])
    assert message(header) == f"{str(header)!r} is damaged or truncated: its header cannot be read"
    assert (
        message(tmp_path / "none.png") == f"cannot open image {str(tmp_path / 'none.png')!r}: No such file or directory"
    )
    assert message(tmp_path) == f"cannot open image {str(tmp_path)!r}: it is a folder"
    assert message("/dev/null") == "cannot open image '/dev/null': it is not a regular file"
    os.mkfifo(tmp_path / "pipe")  # opening one waits for a writer, unless told not to
    assert "it is not a regular file" in message(tmp_path / "pipe")
    assert message("a\0b") == "cannot open image 'a\\x00b': a path holds no zero bytes"


def test_bad_sources() -> None:
    assert message(b"") == "image of 0 bytes is empty"
    assert message(b"\x00" * 50) == "image of 50 bytes is not a PNG, JPEG, WEBP, BMP, TIFF or GIF image"
    assert message(3) == "an image must be a path, bytes, a PIL image or a numpy array, not int"
    assert message(None).endswith("not NoneType")
    assert message(np.zeros((0, 5, 3), np.uint8)) == "image array has 5 x 0 pixels; both sides must be at least 1"
    assert message(Image.new("RGB", (0, 5))) == "PIL image has 0 x 5 pixels; both sides must be at least 1"


def test_pillow_pictures_are_not_changed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(io.BytesIO(encoded(Image.fromarray(colors()), "JPEG", exif=exif)))
    assert load_image(picture).shape == (30, 20, 3)
    assert picture.size == (30, 20)
    assert picture.getexif()[0x0112] == 6
