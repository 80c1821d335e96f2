"""The layers of docs/architecture.md hold: an import goes to its own layer or a lower one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "engine"
LAYERS = {
    "kernels": -1,
    "types": 0,
    "errors": 0,
    "config": 0,
    "quantization": 0,
    "loading": 1,
    "text": 1,
    "vision": 1,
    "documents": 1,
    "assets": 1,
    "ops": 2,
    "models": 3,
    "inputs": 4,
    "runtime": 4,
    "core": 5,
    "chat": 5,
    "pooling": 5,
    "llm": 5,
    "handle": 5,
    "reader": 5,
    "doctor": 5,
    "quantize": 5,
    "tune": 5,
    "cli": 6,
    "read_files": 6,
    "chat_command": 6,
    "bench": 5,
}
FRONT_ENDS_MAY_USE = {0, 5, 6}
HEAVY = ("torch", "transformers", "triton", "PIL", "tokenizers", "huggingface_hub")


def modules() -> list[Path]:
    return sorted(path for path in ENGINE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(ENGINE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def internal_imports(path: Path, source: str | None = None) -> set[str]:
    """Names of the top-level parts of the package that a file (or `source` in its place) imports."""
    parts: set[str] = set()
    package = ["pagelens", *path.relative_to(ENGINE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if source is None else source)):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = package[: len(package) - node.level + 1]
        target = [*base, *(node.module.split(".") if node.module else [])]
        if len(target) > 1:
            parts.add(target[1])
        else:
            parts.update(alias.name for alias in node.names)
    return parts


def test_every_part_has_a_layer() -> None:
    unknown = {part_of(path) for path in modules()} - set(LAYERS) - {"__init__", "__main__"}
    assert not unknown, f"give these parts a layer in this test and in docs/architecture.md: {sorted(unknown)}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ENGINE)))
def test_imports_go_down(path: Path) -> None:
    own = part_of(path)
    if own in ("__init__", "__main__"):
        return
    for other in internal_imports(path) - {own, "_native", "__version__"}:
        assert LAYERS[other] <= LAYERS[own], f"{path} (layer {LAYERS[own]}) imports {other} (layer {LAYERS[other]})"
        if LAYERS[own] == 6:
            assert LAYERS[other] in FRONT_ENDS_MAY_USE, f"front end {path} imports {other}: go through layer 5"


def test_models_and_runtime_do_not_import_each_other() -> None:
    for path in modules():
        own, used = part_of(path), internal_imports(path)
        assert not (own == "models" and "runtime" in used), path
        assert not (own == "runtime" and "models" in used), path


def test_the_detector_sees_a_climbing_import() -> None:
    source = "from ..models.sam import Sam\nfrom .. import llm\nfrom .tiling import plan_tiles\n"
    assert internal_imports(ENGINE / "vision" / "modes.py", source) == {"models", "llm", "vision"}


def test_nothing_imports_the_folders_by_their_names() -> None:
    """`engine` and `kernels` are folder names; the packages are `pagelens` and `pagelens.kernels`."""
    for folder in ("engine", "kernels", "tests", "tools", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    names = [node.module]
                for name in names:
                    assert name.split(".")[0] not in ("engine", "kernels"), f"{path} imports {name}"


def test_import_is_light() -> None:
    """`import pagelens` loads no heavy module and starts no thread."""
    import subprocess
    import sys

    code = (
        "import sys, threading, pagelens\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "print(heavy, threading.active_count())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == ["[]", "1"]
