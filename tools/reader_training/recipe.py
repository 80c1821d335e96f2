"""The schedules: what is drawn and how fast is learnt, at each point of a training.

`scratch` is the whole way in one schedule. `continue` is what run 9d did to a reader that could already read,
`tiles` what run 9a did before it (docs/reader.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .fonts import BASE
from .pages import FULL_PAGE, Layout

BATCH = {"192": 26, "256": 16, "320": 10, "2x1": 10, "1x2": 10, "2x2": 7}  # pages a process and step
SQUARE = {"192": 0.8, "256": 0.2}
TILED = {"192": 0.40, "256": 0.34, "2x1": 0.12, "2x2": 0.14}
DENSE_END, GROW, DECAY_FROM = 0.15, 0.45, 0.5  # progress of the scratch recipe


@dataclass(frozen=True)
class Point:
    """What a recipe asks at one moment.

    rate     factor on the learning rates
    level    length of untiled pages (see pages.compose); tiled pages are always drawn at level 1
    read     False while the encoder learns alone
    families how many families, 0 for all
    """

    stage: str
    rate: float
    level: float
    read: bool = True
    families: int = 0
    layouts: dict[str, float] = field(default_factory=lambda: dict(SQUARE))

    def page_level(self, layout: Layout, u: float) -> float:
        """Level of one page from a uniform number u; long pages are favoured."""
        if self.level > 1:
            return self.level
        return (1.0 if layout.grid else self.level) * u**0.35


def scratch(t: float) -> Point:
    """Encoder alone on full pages; then short pages in six families; then all families and longer pages.

    The rate is constant and decays linearly to 0 over the second half.
    """
    if t < DENSE_END:
        return Point("dense", min(1.0, t / 0.02), FULL_PAGE, read=False, families=BASE)
    rate = 0.6 * min(1.0, (1 - t) / (1 - DECAY_FROM))
    if t < GROW:
        return Point("short pages", rate, 0.3, families=BASE)
    return Point("all pages", rate, 0.4)


def continued(t: float) -> Point:
    """Run 9d: all families, resized drawing and JPEG; the rate decays linearly after the first 15 %."""
    return Point("continue", 0.45 * min(1.0, (1 - t) / 0.85), 0.4)


def tiles(t: float) -> Point:
    """Run 9a: all families, and a quarter of the batches tiled."""
    return Point("tiles", 0.55 * min(1.0, (1 - t) / 0.85), 0.4, layouts=dict(TILED))


RECIPES: dict[str, Callable[[float], Point]] = {"scratch": scratch, "continue": continued, "tiles": tiles}


def helper_weight(t: float) -> float:
    """Factor on the helpers' losses: they leave before the end."""
    return max(0.0, min(1.0, (0.95 - t) / 0.25))
