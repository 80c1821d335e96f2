"""Answers in float32 to compare with, made once in the cache folder; and the inputs they are answers to."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .process import WorkerProcess
from .quality import Array, cosine, mean_kl
from .rows import WorkerSpec, worker

TOKENS = 32
VIEW = 1024
Start = Callable[[WorkerSpec], WorkerProcess]
# The kind of a row's quality -> who answers in float32. transformers knows DeepSeek-OCR's text model under other names;
# ours in float32 was shown equal to it on small sizes (tests/models).
REFEREES = {
    "qwen3-0.6b": worker("transformers", "torch", 5, "qwen3-0.6b", kind="qwen3", dtype="fp32"),
    "deepseek-ocr": worker("ours", "ours", 16, "deepseek-ocr", dtype="float32"),
    "encoder": worker("transformers", "torch", 5, "deepseek-ocr", kind="encoder", dtype="fp32"),
}
VOCAB = {"qwen3-0.6b": 151936, "deepseek-ocr": 128000}


def token_ids(kind: str) -> list[int]:
    draw = random.Random(7)
    return [draw.randrange(VOCAB[kind]) for _ in range(TOKENS)]


def pixels_file(cache: Path) -> Path:
    """A view [1, 3, VIEW, VIEW] float32 of smooth noise, as normalised pixels are spread."""
    path = cache / "pixels.npy"
    if not path.exists():
        coarse = np.random.default_rng(3).standard_normal((1, 3, VIEW // 8, VIEW // 8), dtype=np.float32)
        np.save(path, coarse.repeat(8, axis=2).repeat(8, axis=3))
    return path


def request_for(kind: str, cache: Path, file: Path) -> dict[str, object]:
    if kind == "encoder":
        return {"op": "encode", "pixels": str(pixels_file(cache)), "file": str(file)}
    return {"op": "logits", "ids": token_ids(kind), "file": str(file)}


def ensure_reference(kind: str, cache: Path, start: Start) -> Path:
    """The file with the float32 answer; `start` gives a ready worker."""
    path = cache / f"reference-{kind}.npy"
    if not path.exists():
        print(f"making {path} ...", flush=True)
        unfinished = cache / f"unfinished-{kind}.npy"
        referee = start(REFEREES[kind])
        try:
            referee.ask(request_for(kind, cache, unfinished))
        finally:
            referee.stop()
        unfinished.rename(path)
    return path


def compare(kind: str, cache: Path, process: WorkerProcess) -> float:
    """Mean KL of logits, or cosine of features, of a worker beside the reference."""
    found = cache / f"answer-{os.getpid()}.npy"
    process.ask(request_for(kind, cache, found))
    reference: Array = np.load(cache / f"reference-{kind}.npy")
    answer: Array = np.load(found)
    found.unlink()
    return cosine(reference, answer) if kind == "encoder" else mean_kl(reference, answer)
