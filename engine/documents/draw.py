"""Pictures of a Page: its figures cut out, its boxes drawn over it, and the folder that holds all of them."""

from __future__ import annotations

import colorsys
import io
import os
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import ImageError
from .page import Page

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

OUTLINE_PX, TITLE_OUTLINE_PX = 2, 4
FILL_ALPHA = 20
LABEL_PX = 15  # height of the white strip above a box
MAX_LABEL_CHARS = 40
JPEG_QUALITY = 95

Color = tuple[int, int, int]


def crop_figures(image: NDArray[np.uint8], page: Page) -> list[Image]:
    """The page's figures in order, as PIL images. image [h, w, 3] uint8, the page that was read (else ImageError)."""
    whole = _as_pillow(image, page)
    return [whole.crop(figure.box) for figure in page.figures]


def draw_boxes(image: NDArray[np.uint8], page: Page) -> Image:
    """A copy of the page with every block's boxes: a faint fill, an outline, and the label on a white strip above.

    A label has the same colour on every page.
    """
    from PIL import Image, ImageDraw

    picture = _as_pillow(image, page)
    fills = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    painter = ImageDraw.Draw(fills)
    for block in page.blocks:
        for box in block.boxes:
            painter.rectangle(_inclusive(box), fill=(*label_color(block.label), FILL_ALPHA))
    picture = Image.alpha_composite(picture.convert("RGBA"), fills).convert("RGB")
    painter = ImageDraw.Draw(picture)
    for block in page.blocks:
        for box in block.boxes:
            line = TITLE_OUTLINE_PX if block.label == "title" else OUTLINE_PX
            painter.rectangle(_inclusive(box), outline=label_color(block.label), width=line)
            _write_label(painter, block.label, box[0], box[1])
    return picture


def save_page(page: Page, image: NDArray[np.uint8], folder: Path | str) -> None:
    """Write result.md, images/K.jpg for the figures it links to, overlay.png and page.json into `folder`.

    The folder is made if needed. Each file is replaced in one step, so a reader never sees half of one; result.md comes
    after the pictures it links to. Other files in the folder are left alone.
    """
    folder = Path(folder)
    crops = crop_figures(image, page)
    overlay = draw_boxes(image, page)
    folder.mkdir(parents=True, exist_ok=True)
    if crops:
        (folder / "images").mkdir(exist_ok=True)
    for figure, crop in zip(page.figures, crops, strict=True):
        _replace(folder / "images" / f"{figure.index}.jpg", _encoded(crop, "JPEG"))
    _replace(folder / "overlay.png", _encoded(overlay, "PNG"))
    _replace(folder / "page.json", _utf8(page.to_json()))
    _replace(folder / "result.md", _utf8(page.markdown))


def label_color(label: str) -> Color:
    """A strong colour that depends on the label alone."""
    hue = zlib.crc32(label.encode("utf-8", "replace")) / 2**32
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.9, 0.75))
    return red, green, blue


def _as_pillow(image: NDArray[np.uint8], page: Page) -> Image:
    from PIL import Image

    if image.shape != (page.height, page.width, 3):
        raise ImageError(
            f"the page was read from {page.width} x {page.height} RGB pixels, but the image is {list(image.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(image))


def _inclusive(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Pillow's rectangles include their right and bottom pixels; ours do not."""
    return box[0], box[1], box[2] - 1, box[3] - 1


def _write_label(painter: ImageDraw, label: str, left: int, top: int) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default()
    text = " ".join(label.split())[:MAX_LABEL_CHARS]
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow without FreeType: a bitmap font of Latin-1 only
        text = text.encode("latin-1", "replace").decode("latin-1")
    y = max(top - LABEL_PX, 0)
    strip = painter.textbbox((left + 1, y + 1), text, font=font)
    painter.rectangle((left, y, strip[2] + 1, y + LABEL_PX - 1), fill=(255, 255, 255))
    painter.text((left + 1, y + 1), text, fill=label_color(label), font=font)


def _utf8(text: str) -> bytes:
    """Lone surrogates, which no file can hold, become question marks."""
    return (text + "\n").encode("utf-8", "replace")


def _encoded(picture: Image, form: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=JPEG_QUALITY)
    return buffer.getvalue()


def _replace(path: Path, content: bytes) -> None:
    """Write beside the target, then rename over it."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
