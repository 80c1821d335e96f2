"""The files that the workers load, made once in a cache folder: random checkpoints, and the peers' forms of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from .process import ROOT

QWEN3_FOLDER, OCR_FOLDER = "qwen3-0.6b", "deepseek-ocr"
# Made from a folder's weights; the 30B model's are random blocks.
CONVERTED = (QWEN3_FOLDER, OCR_FOLDER)


def ensure(name: str, cache: Path, pythons: dict[str, Path]) -> Path:
    """The path of an artifact, which is made if it is not there. Raises RuntimeError if that fails.

    pythons  environment ("ours", "peers") -> its interpreter
    """
    path = cache / name
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = cache / f"unfinished-{name}"
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    print(f"making {path} ...", flush=True)
    command = command_for(name, unfinished, lambda other: ensure(other, cache, pythons), pythons)
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        tail = " | ".join(result.stderr.strip().splitlines()[-3:])
        raise RuntimeError(f"cannot make {name}: {tail}")
    unfinished.rename(path)
    return path


def command_for(name: str, out: Path, need: Callable[[str], Path], pythons: dict[str, Path]) -> list[str | Path]:
    if name == QWEN3_FOLDER:
        return [pythons["ours"], "-m", "benchmarks.peers.make_qwen3", out]
    if name == OCR_FOLDER:
        return [pythons["ours"], "tools/make_random_checkpoint.py", out]
    if name.endswith(".gguf"):
        model, _, kind = name.removesuffix(".gguf").rpartition("-")
        command: list[str | Path] = [pythons["peers"], "-m", "benchmarks.peers.make_gguf", model, kind, out]
        return [*command, "--checkpoint", need(model)] if model in CONVERTED else command
    if name.startswith("openvino-"):
        model, _, kind = name.removeprefix("openvino-").rpartition("-")
        tool = pythons["peers"].with_name("optimum-cli")
        options = ["--task", "text-generation-with-past", "--weight-format", kind, "--disable-convert-tokenizer"]
        return [tool, "export", "openvino", "--model", need(model), *options, out]
    raise ValueError(f"nothing is known of how to make {name!r}")
