"""Write tests/helpers/pillow12_resize.json: checksums of 200 pictures resized by a Pillow older than 13.

Pillow 13 changed the order of the passes of its bicubic resize, so the bytes that the engine must reproduce cannot be
made with a current Pillow. To make the file again:

    pip install --target OLD --no-deps pillow==12.0.0
    PYTHONPATH=OLD python tools/make_resize_golden.py
"""

from __future__ import annotations

import json
import random
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "tests" / "helpers" / "pillow12_resize.json"
NUM_CASES = 200
FIXED = [  # sides of one pixel, unchanged axes, the shapes of real pages and tiles at a tenth of their size
    (1, 1, 7, 5),
    (1, 300, 64, 64),
    (300, 1, 64, 64),
    (64, 64, 1, 1),
    (640, 3, 64, 1),
    (50, 60, 50, 60),
    (50, 60, 50, 20),
    (50, 60, 20, 60),
    (50, 60, 90, 60),
    (248, 351, 128, 192),
    (248, 351, 72, 102),
    (192, 48, 102, 26),
]


def picture(width: int, height: int, seed: int) -> np.ndarray:
    """Noise with flat black and white areas (they make the result overshoot and clamp), by integer arithmetic alone."""
    n = np.arange(width * height * 3, dtype=np.uint64) + np.uint64(seed * 1_000_003)
    n = (n * np.uint64(0x9E3779B97F4A7C15)) ^ (n >> np.uint64(7))
    n = (n ^ (n >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    noise = ((n >> np.uint64(40)) & np.uint64(255)).astype(np.uint8).reshape(height, width, 3)
    y, x = np.mgrid[:height, :width]
    patch = ((x // 5 + y // 3 + seed) % 4)[:, :, None]
    return np.where(patch == 0, 0, np.where(patch == 1, 255, noise)).astype(np.uint8)


def sizes() -> list[tuple[int, int, int, int]]:
    rng = random.Random(12)
    drawn = [tuple(round(10 ** rng.uniform(0, 2.6)) for _ in range(4)) for _ in range(NUM_CASES - len(FIXED))]
    return FIXED + drawn  # type: ignore[operator]


def main() -> None:
    if int(PIL.__version__.split(".")[0]) >= 13:
        sys.exit(f"this is Pillow {PIL.__version__}; the file must be made by a Pillow below 13 (see the docstring)")
    cases = []
    for seed, (width, height, new_width, new_height) in enumerate(sizes()):
        resized = Image.fromarray(picture(width, height, seed)).resize(
            (new_width, new_height), Image.Resampling.BICUBIC
        )
        cases.append([width, height, new_width, new_height, zlib.crc32(resized.tobytes())])
    lines = ",\n".join(json.dumps(case) for case in cases)
    TARGET.write_text(f'{{"pillow": "{PIL.__version__}", "cases": [\n{lines}\n]}}\n')
    print(f"{len(cases)} cases by Pillow {PIL.__version__} -> {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
