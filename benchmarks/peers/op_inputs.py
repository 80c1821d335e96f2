"""Inputs of the single ops, the same in every environment (numpy draws them)."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

# "exact": the values of bfloat16, held in float32
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "exact": torch.float32}
WINDOW, WINDOWS, GRID, HEADS, HEAD_DIM = 14, 25, 64, 12, 64
TOKENS, IN, OUT = 4096, 768, 3072
NECK, MIDDLE, LAST = 256, 512, 1024  # channels of the neck and after each of the two stride-2 convolutions


def noise(name: str, shape: tuple[int, ...], dtype: str, spread: float = 1.0) -> Tensor:
    """Normal noise that the name decides."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    values = torch.from_numpy(draw.standard_normal(shape, dtype=np.float32) * np.float32(spread))
    return values.bfloat16().float() if dtype == "exact" else values.to(DTYPES[dtype])


def linear(dtype: str) -> tuple[Tensor, Tensor]:
    """x [TOKENS, IN] and weight [OUT, IN]."""
    return noise("x", (TOKENS, IN), dtype), noise("weight", (OUT, IN), dtype, IN**-0.5)


def neck(dtype: str) -> tuple[Tensor, dict[str, Tensor]]:
    """x [1, GRID, GRID, IN] and the weights of the neck and its convolutions."""
    shapes = {
        "conv1": (NECK, IN, 1, 1),
        "conv2": (NECK, NECK, 3, 3),
        "down1": (MIDDLE, NECK, 3, 3),
        "down2": (LAST, MIDDLE, 3, 3),
    }
    weights = {name: noise(name, shape, dtype, float(np.prod(shape[1:])) ** -0.5) for name, shape in shapes.items()}
    weights |= {f"norm{i}_weight": torch.ones(NECK, dtype=DTYPES[dtype]) for i in (1, 2)}
    weights |= {f"norm{i}_bias": torch.zeros(NECK, dtype=DTYPES[dtype]) for i in (1, 2)}
    return noise("pixels", (1, GRID, GRID, IN), dtype), weights
