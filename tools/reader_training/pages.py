"""Draws synthetic pages: a few lines of text in one family, with the expected output and where its characters stand.

A page depends on the generator, the words, the fonts and the arguments, on nothing else. It is drawn as a mask of ink,
then painted (colours, blur, noise, JPEG). Knows nothing of tokens, tensors or models.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .fonts import Face, FontSet
from .words import Words

CELL_WIDTH, CELL_HEIGHT = 8, 16  # pixels of a label cell: a vision token of 64x64 pixels holds 8 x 4 of them
CLASSES = {chr(c): c - 32 for c in range(33, 127)} | {"•": 95}
NUM_CLASSES = 96  # 0 is an empty cell
TILE = 192
FULL_PAGE = 2.0  # a level above 1: as many lines as the page holds
FULL_PAGE_LINES = 16
RESIZED, LARGEST = 0.3, 2.2  # share of pages that are drawn larger and then resized, and the largest factor


class Layout(NamedTuple):
    """How a page becomes views: one padded view of `view` pixels, and a grid of (columns, rows) tiles or None."""

    view: int
    grid: tuple[int, int] | None = None
    tile: int = TILE


LAYOUTS = {
    "192": Layout(192),
    "256": Layout(256),
    "320": Layout(320),
    "2x1": Layout(256, (2, 1)),
    "1x2": Layout(256, (1, 2)),
    "2x2": Layout(256, (2, 2)),
}


class Glyph(NamedTuple):
    """One character of the expected output and the centre of what is drawn for it, in pixels."""

    char: str
    x: float
    y: float


@dataclass(frozen=True)
class Page:
    """A drawn page: the picture, the expected output, and the label grid [rows, columns] of character classes."""

    image: Image.Image
    glyphs: list[Glyph]
    labels: np.ndarray

    @property
    def text(self) -> str:
        return "".join(g.char for g in self.glyphs)


@dataclass
class _Sheet:
    """What is decided before the first line is drawn; lengths are in pixels of the drawing."""

    width: int
    height: int
    scale: float
    regular: Face
    bold: Face
    size: int
    margin: int
    top: int
    gap: int
    fill: float  # share of the width that lines may take
    kinds: list[str]  # of each line: paragraph, heading, bullet, number


def _plan_lines(r: np.random.Generator, n_lines: int) -> list[str]:
    kinds = ["p"] * n_lines
    if r.random() < 0.45 and n_lines > 1:
        kinds[0] = "h"
    i = 1
    while i < n_lines:  # runs of up to three list items
        if r.random() < 0.2:
            kind = "b" if r.random() < 0.6 else "n"
            for j in range(i, min(n_lines, i + 3)):
                kinds[j], i = kind, j
        i += 1
    return kinds


def _plan(r: np.random.Generator, fonts: FontSet, width: int, height: int, level: float, lines: int | None) -> _Sheet:
    # Sometimes drawn larger and then resized, like a scan or a photograph.
    scale = float(r.uniform(1.2, LARGEST)) if r.random() < RESIZED else 1.0
    width, height = round(width * scale), round(height * scale)
    regular, bold = fonts.draw(r)
    if r.random() < 0.12:
        regular = bold
    size = round(int(r.integers(24, 31)) * scale)
    margin, top = int(r.integers(3, 17) * scale), int(r.integers(2, 15) * scale)
    if lines is None:
        lines = FULL_PAGE_LINES if level > 1 else int(r.integers(1, 2 + round(level * 8)))
    fill = r.uniform(0.3, 1.0) if level < 0.5 or r.random() < 0.3 else 1.0
    gap = int(size * r.uniform(1.12, 1.5))
    kinds = _plan_lines(r, lines)
    total, room = gap * (lines + 0.6), height - 2 * top
    if room > total and r.random() < 0.5:
        top += int(r.uniform(0, room - total))
    return _Sheet(width, height, scale, regular, bold, size, margin, top, gap, fill, kinds)


def compose(
    r: np.random.Generator,
    words: Words,
    fonts: FontSet,
    width: int,
    height: int,
    level: float,
    markdown: bool,
    lines: int | None = None,
) -> tuple[Image.Image, list[Glyph]]:
    """Draw text on a page; return its mask of ink and the expected output in reading order.

    level    how many lines: 1 to 1 + 8 * level at random, or a full page above 1
    markdown the expected output has "# ", "- " and blank lines between blocks; else the lines as drawn
    lines    this many lines instead of a random number (fewer if the page is full)
    """
    sheet = _plan(r, fonts, width, height, level, lines)
    mask = Image.new("L", (sheet.width, sheet.height), 0)
    draw = ImageDraw.Draw(mask)
    out: list[Glyph] = []
    y, number, previous = sheet.top, 0, ""
    for kind in sheet.kinds:
        heading = kind == "h"
        face = sheet.bold if heading else sheet.regular
        size = min(int(sheet.size * 1.4), round(38 * sheet.scale)) if heading else sheet.size
        new_block = bool(previous) and (kind != previous or (kind == "p" and r.random() < 0.15) or previous == "h")
        if new_block:
            y += int(sheet.gap * 0.5)
        if y + size * 1.2 > sheet.height:
            if out:
                break
            y, size = 1, min(size, int(sheet.height / 1.3))
        number = number + 1 if kind == "n" and previous == "n" else 1
        prefix = {"b": "• ", "n": f"{number}. "}.get(kind, "")
        x: float = sheet.margin + (int(r.integers(0, 9) * sheet.scale) if prefix and previous != kind else 0)
        room = (sheet.width - x - 3 * sheet.scale) * sheet.fill - face.width(size, prefix)
        text = prefix + words.line(r, face, size, max(room, 3 * size), 60)
        draw.text((x, y), text, fill=255, font=face.at(size), anchor="la")
        if out:
            out += [Glyph("\n", out[-1].x, out[-1].y)] * (2 if markdown and new_block else 1)
        out += _place(face, size, text, x, y + 0.62 * size, kind if markdown else "p")
        y += int(size * 1.45) if heading else sheet.gap
        previous = kind
    if (sheet.width, sheet.height) != (width, height):
        mask = mask.resize((width, height), Image.Resampling(int(r.choice([1, 2, 3, 4, 5]))))
        out = [Glyph(g.char, g.x * width / sheet.width, g.y * height / sheet.height) for g in out]
    return mask, out


def _place(face: Face, size: int, text: str, x: float, y: float, kind: str) -> list[Glyph]:
    """The expected characters of a line; `kind` is its kind for Markdown output, "p" for plain output."""
    out: list[Glyph] = []
    for i, char in enumerate(text):
        step = face.advance(size, char)
        if i == 0 and kind == "h":
            out += [Glyph("#", x + step / 2, y), Glyph(" ", x + step / 2, y)]
        out.append(Glyph("-" if kind == "b" and char == "•" else char, x + step / 2, y))
        x += step
    return out


def paint(r: np.random.Generator, mask: Image.Image) -> np.ndarray:
    """The page [H, W, 3] uint8 of a mask: ink on paper of random colours, sometimes blurred, inverted or noisy."""
    if r.random() < 0.12:
        mask = mask.filter(ImageFilter.GaussianBlur(r.uniform(0.3, 0.8)))
    paper, ink = np.full(3, 255.0), np.zeros(3)
    if r.random() < 0.65:
        paper, ink = r.uniform(205, 256) + r.uniform(-12, 1, 3), r.uniform(0, 80) + r.uniform(-25, 40, 3)
    if r.random() < 0.03:
        paper, ink = ink, paper
    ramp = np.linspace(0, 1, 256)[:, None]
    pixels = np.clip(paper * (1 - ramp) + ink * ramp, 0, 255).astype(np.uint8)[np.asarray(mask)]
    if r.random() < 0.3:
        noise = r.standard_normal(pixels.shape[:2], dtype=np.float32) * r.uniform(1, 7)
        pixels = np.clip(pixels + noise[..., None].astype(np.int16), 0, 255).astype(np.uint8)
    return pixels


def label_grid(glyphs: list[Glyph], rows: int, columns: int, markdown: bool) -> np.ndarray:
    """[rows, columns] class of the character whose centre lies in each cell, 0 where there is none.

    "#" has no label in Markdown output, where it usually stands for a heading and is not drawn.
    """
    labels = np.zeros((rows, columns), np.int64)
    for char, x, y in glyphs:
        if char not in " \n" and not (char == "#" and markdown):
            labels[int(y) // CELL_HEIGHT, int(x) // CELL_WIDTH] = CLASSES[char]
    return labels


def draw_page(
    r: np.random.Generator,
    words: Words,
    fonts: FontSet,
    layout: Layout,
    level: float,
    markdown: bool,
    lines: int | None = None,
) -> Page:
    """One page for a layout: as large as its tiles together, or at most as large as its view (see `compose`).

    Positions and labels are in pixels of the padded view, or of the tiled page where there are tiles.
    """
    view, grid, tile = layout
    if grid:
        width, height, full = tile * grid[0], tile * grid[1], (tile * grid[0], tile * grid[1])
    else:  # sometimes not square: it will be centred on grey, as the processor pads
        width, height, full = view, view, (view, view)
        if r.random() < 0.25:
            side = int(r.integers(max(48, view // 4), view))
            width, height = (view, side) if r.random() < 0.75 else (max(side, view // 2), view)
    left, above = round((full[0] - width) * 0.5), round((full[1] - height) * 0.5)
    mask, glyphs = compose(r, words, fonts, width, height, level, markdown, lines)
    image = Image.fromarray(paint(r, mask))
    if r.random() < 0.08:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(r.integers(55, 96)))
        image = Image.open(buffer).convert("RGB")
    columns, rows = full[0] // CELL_WIDTH, full[1] // CELL_HEIGHT
    right, below = columns * CELL_WIDTH - 1, rows * CELL_HEIGHT - 1
    glyphs = [Glyph(c, min(max(x + left, 0), right), min(y + above, below)) for c, x, y in glyphs]
    return Page(image, glyphs, label_grid(glyphs, rows, columns, markdown))
