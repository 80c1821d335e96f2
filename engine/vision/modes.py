"""The page modes as data: how large the views of a page are, and whether it is cut into tiles.

Knows names and sizes only; the tile grid of a given page is tiling.py. Source: deepseek-ocr.md sections 4.1 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import MAX_TILES, ProcessorConfig
from ..errors import ConfigError, PromptError

PIXELS_PER_TOKEN = 64  # one vision token stands for 64x64 pixels: patches of 16, then 4x fewer per side


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to show a page to the model.

    base_size       side of the global view in pixels
    tile_size       side of a tile in pixels; None = the mode has no tiles
    min_crops, max_crops   limits of the number of tiles (0 without tiles)
    tile_threshold  a page with both sides at most this is not tiled (published: 640 for any tile size)
    squash          the global view is resized to a square ignoring the aspect ratio (else contained and padded)
    experimental    no released weights were trained for this mode
    """

    name: str
    base_size: int
    tile_size: int | None = None
    min_crops: int = 0
    max_crops: int = 0
    tile_threshold: int = 0
    squash: bool = False
    experimental: bool = False
    description: str = ""


PUBLISHED_MODES: tuple[Mode, ...] = (
    Mode("tiny", 512, squash=True, description="one 512 px view, aspect ratio ignored: slides, little text"),
    Mode("small", 640, squash=True, description="one 640 px view, aspect ratio ignored: short pages"),
    Mode("base", 1024, description="one padded 1024 px view: ordinary pages"),
    Mode("large", 1280, description="one padded 1280 px view: dense pages"),
    Mode("gundam", 1024, 640, 2, 9, 640, description="640 px tiles and a padded 1024 px view: the default for pages"),
    Mode(
        "gundam-master",
        1280,
        1024,
        2,
        9,
        640,
        experimental=True,
        description="1024 px tiles and a padded 1280 px view; its fine-tuned weights were never released",
    ),
)


def available_modes(processor: ProcessorConfig) -> dict[str, Mode]:
    """The modes of a checkpoint by lower-case name, in the order of falling speed.

    The real model has all six, with its own limits for gundam's tiles. A scaled model has `base` (one padded view of
    processor.base_size) and `gundam` (tiles of processor.image_size beside that view); the others, at their published
    sizes, only if processor.modes names them.
    Raises ConfigError if processor.modes names a mode that does not exist.
    """
    published = {mode.name: mode for mode in PUBLISHED_MODES}
    listed = tuple(name.lower() for name in processor.modes or ())
    for name in listed:
        if name not in published:
            raise ConfigError(f"processor.modes names {name!r}; known modes: {', '.join(published)}")
    if not processor.scaled:
        own = replace(published["gundam"], min_crops=processor.min_crops, max_crops=processor.max_crops)
        return published | {"gundam": own}
    base, tile = processor.base_size, processor.image_size
    scaled = {
        "base": Mode("base", base, description=f"one padded {base} px view"),
        "gundam": Mode(
            "gundam",
            base,
            tile,
            processor.min_crops,
            processor.max_crops,
            tile,
            description=f"{tile} px tiles and a padded {base} px view",
        ),
    }
    return {name: scaled.get(name, mode) for name, mode in published.items() if name in scaled or name in listed}


def resolve_mode(name: str, processor: ProcessorConfig, max_crops: int | None = None) -> Mode:
    """The mode called `name` (case ignored), with at most `max_crops` tiles if that is given.

    `max_crops` is an upper limit, so a mode without tiles satisfies any. Raises PromptError if the checkpoint has no
    such mode, or if max_crops is outside the mode's minimum to MAX_TILES.
    """
    modes = available_modes(processor)
    mode = modes.get(name.lower()) if isinstance(name, str) else None
    if mode is None:
        raise PromptError(f"unknown mode {name!r}; this model has: {', '.join(modes)}")
    if max_crops is None:
        return mode
    lowest = mode.min_crops if mode.tile_size else 1
    if isinstance(max_crops, bool) or not isinstance(max_crops, int) or not lowest <= max_crops <= MAX_TILES:
        raise PromptError(
            f"max_crops={max_crops!r} for mode {mode.name!r} must be an integer from {lowest} to {MAX_TILES}"
        )
    return replace(mode, max_crops=max_crops) if mode.tile_size else mode


def default_mode(processor: ProcessorConfig) -> Mode:
    """gundam where the checkpoint was trained on tiles (processor.crop_mode), else base."""
    modes = available_modes(processor)
    return modes["gundam"] if processor.crop_mode else modes["base"]
