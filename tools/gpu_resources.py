"""The table of resources of the GPU kernels, docs/gpu-resources.md: `--write` makes it anew, without it is compared.

    python tools/gpu_resources.py [--write]

Needs triton, and nvcc for the part of the CUDA kernels, which else stays as it is; no GPU. Compiling all kernels for
all targets takes some minutes; build/triton-cache and build/nvcc keep the results.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_static import cuda_launch, nvcc, table

TABLE = Path(__file__).resolve().parents[1] / "docs" / "gpu-resources.md"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing it")
    options = parser.parse_args(arguments)
    before = TABLE.read_text(encoding="utf-8") if TABLE.is_file() else ""
    rows = table.collect()
    text = table.render(rows)
    if nvcc.find() is None:
        print("no nvcc on the PATH, and NVCC is not set: the part of the CUDA kernels is not looked at")
        text += table.split(before)[1]
    else:
        units = nvcc.compile_all()
        cuda = table.collect_cuda(units, cuda_launch.load(units))
        rows, text = [*rows, *cuda], text + table.render_cuda(cuda)
    for problem in table.problems(rows):
        print(f"problem: {problem}")
    if options.write:
        TABLE.write_text(text, encoding="utf-8")
        return 0
    changed = list(
        difflib.unified_diff(before.splitlines(), text.splitlines(), "checked in", "compiled", lineterm="", n=0)
    )
    print("\n".join(changed))
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
