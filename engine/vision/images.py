"""Any picture a user may hand over -> [height, width, 3] uint8, or an ImageError of one clear line.

Formats are told by their first bytes and opened by that format's decoder alone, so no other Pillow plugin runs, no
decompression-bomb warning is raised and no setting of Pillow (which belongs to the host program) is touched.
"""

from __future__ import annotations

import io
import os
import stat
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

# A string, because Pillow is imported on first use.
ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image | NDArray[np.uint8]"

# Pillow's own default limit: 268 MB of RGB, an A3 page at 600 dpi (70 million pixels) passes.
MAX_PIXELS = 178_956_970 // 2
# The largest side a JPEG can have. Longer strips would need tables and buffers out of proportion to their pixels.
MAX_SIDE = 65_535
FORMATS = "PNG, JPEG, WEBP, BMP, TIFF or GIF"
ORIENTATION_TAG = 0x0112


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS, composite_alpha: bool = True) -> NDArray[np.uint8]:
    """Decode, turn upright (EXIF orientation) and convert to RGB.

    source           path, encoded bytes, PIL image, or array [h, w], [h, w, 3] or [h, w, 4] of uint8 (grey, RGB, RGBA)
    max_pixels       limit on width*height, checked on the file's header before anything is decoded
    composite_alpha  transparent parts become white; False drops alpha as the published code does, so that they show
                     whatever colour is stored beneath them (often black)
    Only the first frame or page of a file is read. 16-bit grey is scaled to 8 bits.
    Returns [h, w, 3] uint8, contiguous, never sharing memory with the source.
    Raises ImageError naming the source, if it cannot be read, is damaged, of another format, or above the limits.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels, composite_alpha)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return _from_file(io.BytesIO(data), f"image of {len(data)} bytes", max_pixels, composite_alpha)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(source, max_pixels, composite_alpha)
    from PIL import Image

    if isinstance(source, Image.Image):
        return _from_pillow(source, "PIL image", max_pixels, composite_alpha)
    raise ImageError(f"an image must be a path, bytes, a PIL image or a numpy array, not {type(source).__name__}")


def _from_path(path: str | os.PathLike[str], max_pixels: int, composite_alpha: bool) -> NDArray[np.uint8]:
    name = repr(os.fspath(path))
    try:
        file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 - closed below; here only the opening may fail
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except IsADirectoryError:
        raise ImageError(f"cannot open image {name}: it is a folder") from None
    except OSError as error:
        raise ImageError(f"cannot open image {name}: {os.strerror(error.errno or 0)}") from None
    except ValueError:
        raise ImageError(f"cannot open image {name}: a path holds no zero bytes") from None
    with file:
        if not regular:
            raise ImageError(f"cannot open image {name}: it is not a regular file")
        return _from_file(file, name, max_pixels, composite_alpha)


def _open_at_once(path: str, flags: int) -> int:
    """Without this the opening of a FIFO would wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _from_file(file: BinaryIO, name: str, max_pixels: int, composite_alpha: bool) -> NDArray[np.uint8]:
    head = file.read(16)
    file.seek(0)
    if not head:
        raise ImageError(f"{name} is empty")
    if head.startswith(b"%PDF"):
        raise ImageError(f"{name} is a PDF document; render its pages to {FORMATS} images first")
    decoder = _decoder(head)
    if decoder is None:
        raise ImageError(f"{name} is not a {FORMATS} image")
    try:
        image = decoder(file)
    # Decoders answer damaged files with nearly every built-in exception; all of them mean the same to the caller.
    except Exception as error:
        raise ImageError(f"{name} is damaged or truncated: its header cannot be read") from error
    with image:
        return _from_pillow(image, name, max_pixels, composite_alpha)


def _decoder(head: bytes) -> Any:
    """The Pillow class for files that begin like `head`, or None."""
    from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

    if head.startswith(b"RIFF"):
        return WebPImagePlugin.WebPImageFile if head[8:12] == b"WEBP" else None
    decoders: tuple[tuple[tuple[bytes, ...], Any], ...] = (
        ((b"\x89PNG\r\n\x1a\n",), PngImagePlugin.PngImageFile),
        ((b"\xff\xd8\xff",), JpegImagePlugin.JpegImageFile),
        ((b"BM",), BmpImagePlugin.BmpImageFile),
        ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
        ((b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
    )
    return next((decoder for starts, decoder in decoders if head.startswith(starts)), None)


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} has {width} x {height} pixels; both sides must be at least 1")
    if width > MAX_SIDE or height > MAX_SIDE:
        raise ImageError(f"{name} has {width} x {height} pixels; no side may exceed {MAX_SIDE}, make it smaller")
    if width * height > max_pixels:
        raise ImageError(f"{name} has {width} x {height} pixels, above the limit of {max_pixels}; make it smaller")


def _from_pillow(image: Image, name: str, max_pixels: int, composite_alpha: bool) -> NDArray[np.uint8]:
    _check_size(*image.size, name, max_pixels)
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # see _from_file
        raise ImageError(f"{name} is damaged or truncated: its pixels cannot be decoded") from error
    try:
        pixels = _to_rgb(_upright(image), composite_alpha)
    except (ValueError, OSError, KeyError) as error:
        raise ImageError(f"{name} has colour mode {image.mode}, which cannot be converted; save it as RGB") from error
    return pixels


def _upright(image: Image) -> Image:
    """Apply the EXIF orientation. Damaged EXIF data says nothing about the pixels, so it counts as upright."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:
        orientation = 1
    turn = turns.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image, composite_alpha: bool) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16-bit grey (I;16*), or 32-bit integers holding it
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return _grey_to_rgb(((wide + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha; Pillow converts them only to their plain forms
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        return _drop_alpha(np.asarray(image.convert("RGBA")), composite_alpha)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _from_array(array: NDArray[Any], max_pixels: int, composite_alpha: bool) -> NDArray[np.uint8]:
    shape = list(array.shape)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (3, 4)):
        raise ImageError(f"an image array must be [h, w], [h, w, 3] or [h, w, 4] of uint8, got {shape} {array.dtype}")
    _check_size(shape[1], shape[0], "image array", max_pixels)
    if array.ndim == 2:
        return _grey_to_rgb(array)
    if shape[2] == 4:
        return _drop_alpha(array, composite_alpha)
    return np.array(array, order="C")


def _grey_to_rgb(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _drop_alpha(rgba: NDArray[np.uint8], composite: bool) -> NDArray[np.uint8]:
    """Over white: round((c*a + 255*(255-a)) / 255), which fits 16 bits."""
    if not composite:
        return np.array(rgba[:, :, :3], order="C")
    alpha = rgba[:, :, 3:].astype(np.uint16)
    blended = (rgba[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return blended.astype(np.uint8)
