"""Chooses the GPU kernels' configurations without a GPU and writes kernels/configs/<target>.json, with the reasons.

    python tools/choose_gpu_configs.py [sm_80 ...]

Compiles every candidate for every target: several minutes. `pagelens tune` measures on a card instead.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_static import search
from gpu_static.compiled import TARGETS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET")
    options = parser.parse_args(arguments)
    for target in options.targets:
        if target not in TARGETS:
            parser.error(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
        print(search.write(target, search.rules(target)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
