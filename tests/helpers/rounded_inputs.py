"""The transformers models with the inputs of their linear layers rounded, as W8A8 and FP8_DYNAMIC ask (qwen3.md 7.5).

Written without torch's own float8 and without engine/: the two must agree on where a tie goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .quantized_checkpoints import E4M3

FLOATS = E4M3[:127]  # those of 0 to 448, in order: the code is the index
MIDDLES = (FLOATS[1:] + FLOATS[:-1]) / 2


def round_int8(x: Tensor) -> Tensor:
    """Each row on -127..127 steps of a 127th of its largest magnitude; ties to even."""
    rows = x.numpy()
    step = row_steps(rows, 127)
    return torch.from_numpy(np.rint(rows / step).clip(-127, 127) * step)


def round_int8_groups(size: int) -> Callable[[Tensor], Tensor]:
    """As round_int8, with a scale for each `size` inputs of a row (the last group may be shorter)."""
    return lambda x: torch.cat([round_int8(part) for part in x.split(size, -1)], -1)


def round_fp8(x: Tensor) -> Tensor:
    """Each row as E4M3 numbers times a scale that puts its largest magnitude on 448; ties to the even mantissa."""
    rows = x.numpy()
    scale = row_steps(rows, 448)
    size = np.abs(rows / scale)
    code = np.searchsorted(MIDDLES, size, side="left")  # the lower one on a tie
    tie = (code < len(MIDDLES)) & (size == MIDDLES[np.minimum(code, len(MIDDLES) - 1)])
    return torch.from_numpy(np.copysign(FLOATS[code + (tie & (code % 2 == 1))], rows) * scale)


def row_steps(rows: Any, most: int) -> Any:
    largest = np.abs(rows).max(-1, keepdims=True)
    return np.where(largest > 0, largest / np.float32(most), np.float32(1))


@contextmanager
def inputs_rounded(
    oracle: Any, rounding: Callable[[Tensor], Tensor], of_head: Callable[[Tensor], Tensor] = lambda x: x
) -> Iterator[None]:
    """While this lasts, every linear layer rounds its input first, but for routers; the head by `of_head`."""
    oracle.set_experts_implementation("eager")  # the one that goes through functional.linear
    head = oracle.lm_head.weight.data_ptr()
    kept = {value.data_ptr() for name, value in oracle.named_parameters() if name.endswith(".mlp.gate.weight")}
    functional = torch.nn.functional
    linear = functional.linear

    def rounded(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.data_ptr() not in kept:
            x = (of_head if weight.data_ptr() == head else rounding)(x.detach())
        return linear(x, weight, bias)

    functional.linear = rounded  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.linear = linear
