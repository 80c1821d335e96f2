"""The font families that pages are drawn with, which of them are kept for evaluation, and where their files are.

Files are looked up by name under a font directory, without fontconfig. Nothing here draws or downloads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import ImageFont

DEFAULT_FONT_DIR = "/usr/share/fonts"


class MissingFontsError(RuntimeError):
    """Font files that the recipe needs are not installed; the message names them and the Debian packages."""


@dataclass(frozen=True)
class Family:
    """One family. `since` is the training run that first used it, 0 for a family kept for evaluation."""

    name: str
    regular: str  # file, relative to the font directory as Debian 12 lays it out
    bold: str
    package: str
    since: int


def _family(
    name: str, folder: str, stem: str, package: str, since: int, names: str = "-Regular.ttf -Bold.ttf"
) -> Family:
    regular, bold = names.split(" ")
    return Family(name, f"{folder}/{stem}{regular}", f"{folder}/{stem}{bold}", package, since)


_DEJAVU, _LIBERATION = "truetype/dejavu", "truetype/liberation"
_URW, _PLAIN = "opentype/urw-base35", ".ttf -Bold.ttf"

# The order matters: a seed draws families by their place in this list, and the first BASE ones more often.
TRAINED = (
    _family("DejaVu Sans", _DEJAVU, "DejaVuSans", "fonts-dejavu", 2, _PLAIN),
    _family("Liberation Sans", _LIBERATION, "LiberationSans", "fonts-liberation", 2),
    _family("Liberation Serif", _LIBERATION, "LiberationSerif", "fonts-liberation", 2),
    _family("DejaVu Sans Mono", _DEJAVU, "DejaVuSansMono", "fonts-dejavu", 2, _PLAIN),
    _family("DejaVu Serif", _DEJAVU, "DejaVuSerif", "fonts-dejavu", 8, _PLAIN),
    _family("Liberation Mono", _LIBERATION, "LiberationMono", "fonts-liberation", 8),
    _family("DejaVu Sans Condensed", _DEJAVU, "DejaVuSansCondensed", "fonts-dejavu-extra", 9, _PLAIN),
    _family("Roboto", "truetype/roboto/unhinted/RobotoTTF", "Roboto", "fonts-roboto-unhinted", 9),
    _family("Roboto Condensed", "truetype/roboto/unhinted", "RobotoCondensed", "fonts-roboto-unhinted", 9),
    _family("Lato", "truetype/lato", "Lato", "fonts-lato", 9),
    _family("Carlito", "truetype/crosextra", "Carlito", "fonts-crosextra-carlito", 9),
    _family("Noto Serif", "truetype/noto", "NotoSerif", "fonts-noto-core", 9),
    _family("C059", _URW, "C059", "fonts-urw-base35", 9, "-Roman.otf -Bold.otf"),
    _family("P052", _URW, "P052", "fonts-urw-base35", 9, "-Roman.otf -Bold.otf"),
    _family("URW Bookman", _URW, "URWBookman", "fonts-urw-base35", 9, "-Light.otf -Demi.otf"),
    _family("Linux Libertine", "opentype/linux-libertine", "LinLibertine", "fonts-linuxlibertine", 9, "_R.otf _RB.otf"),
    _family("Cantarell", "opentype/cantarell", "Cantarell", "fonts-cantarell", 9, "-Regular.otf -Bold.otf"),
    _family("JetBrains Mono", "truetype/jetbrains-mono", "JetBrainsMono", "fonts-jetbrains-mono", 9),
)
BASE = 6

# Kept for evaluation. Noto Sans (a relative of Open Sans) and Nimbus Sans Narrow (of Liberation Sans Narrow) are not
# trained on either, so that these three stay strange to the model.
NEVER_TRAINED = (
    _family("Liberation Sans Narrow", _LIBERATION, "LiberationSansNarrow", "fonts-liberation", 0),
    _family("Open Sans", "truetype/open-sans", "OpenSans", "fonts-open-sans", 0),
    _family("Caladea", "truetype/crosextra", "Caladea", "fonts-crosextra-caladea", 0),
)


class Face:
    """One font file at any size; path None is the face that Pillow carries (for tests on machines without fonts)."""

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._fonts: dict[int, ImageFont.FreeTypeFont] = {}
        self._advances: dict[tuple[int, str], float] = {}

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The face at `size` pixels, laid out one character after another (no kerning), as labels need it."""
        if size not in self._fonts:
            if self.path is None:
                font = ImageFont.load_default(size)
                if not isinstance(font, ImageFont.FreeTypeFont):
                    raise MissingFontsError("this Pillow was built without FreeType and has no scalable font")
            else:
                font = ImageFont.truetype(self.path, size, layout_engine=ImageFont.Layout.BASIC)
            self._fonts[size] = font
        return self._fonts[size]

    def advance(self, size: int, char: str) -> float:
        """Width in pixels that `char` takes."""
        key = (size, char)
        if key not in self._advances:
            self._advances[key] = self.at(size).getlength(char)
        return self._advances[key]

    def width(self, size: int, text: str) -> float:
        """Width in pixels of `text`."""
        return sum(self.advance(size, char) for char in text)


@dataclass(frozen=True)
class FontSet:
    """Families to draw from, as (regular, bold) faces; the first `base` of them are drawn more often."""

    pairs: tuple[tuple[Face, Face], ...]
    base: int = BASE
    names: tuple[str, ...] = field(default=(), compare=False)

    def draw(self, r: np.random.Generator) -> tuple[Face, Face]:
        """One family at random."""
        n = len(self.pairs)
        return self.pairs[r.integers(self.base) if n > self.base and r.random() < 0.25 else r.integers(n)]

    def first(self, n: int) -> FontSet:
        """Only the first n families (a curriculum); all of them if n is 0."""
        return self if n == 0 else FontSet(self.pairs[:n], self.base, self.names[:n])


def locate(file: str, font_dir: str = DEFAULT_FONT_DIR) -> str | None:
    """Path of a family's file below font_dir: at its Debian place, else any file of that name, else None."""
    path = os.path.join(font_dir, file)
    if os.path.exists(path):
        return path
    name = os.path.basename(file)
    return min((os.path.join(d, name) for d, _, files in os.walk(font_dir) if name in files), default=None)


def missing(families: Sequence[Family], font_dir: str = DEFAULT_FONT_DIR) -> list[Family]:
    """The families of which a file is not installed."""
    return [f for f in families if not (locate(f.regular, font_dir) and locate(f.bold, font_dir))]


def load_fonts(families: Sequence[Family] = TRAINED, font_dir: str = DEFAULT_FONT_DIR) -> FontSet:
    """Faces of all `families`. Raises MissingFontsError, naming the missing families and their packages."""
    lost = missing(families, font_dir)
    if lost:
        packages = " ".join(sorted({f.package for f in lost}))
        raise MissingFontsError(
            f"{len(lost)} of {len(families)} font families are missing under {font_dir}: "
            f"{', '.join(f.name for f in lost)}; install them (Debian: apt-get install {packages}) "
            f"or name another folder with --font-dir"
        )
    pairs = tuple((Face(locate(f.regular, font_dir)), Face(locate(f.bold, font_dir))) for f in families)
    return FontSet(pairs, BASE, tuple(f.name for f in families))


def built_in_fonts() -> FontSet:
    """The one face that Pillow carries, as a set: for tests, never for training or for reported figures."""
    face = Face(None)
    return FontSet(((face, face),), BASE, ("Pillow's own",))
