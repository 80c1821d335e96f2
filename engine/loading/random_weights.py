"""Weights that are noise, made tensor by tensor as they are asked for: a model of any shape without a checkpoint.

For speed and memory only; the text that such a model writes is noise, too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from ..errors import WeightsError
from ..quantization import INT4_GROUP, QuantizedWeight, own_weight
from .strict_json import shown
from .weights import WeightSpec

# Values drawn once and used for every tensor, from a place that its name decides: drawing all of a 30B model would take
# minutes. A prime number, so that the rows of a large matrix do not repeat.
POOL_SIZE = 4_194_301
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class RandomWeights:
    """A TensorSource for the specs of a model. The same seed, name and shape give the same values in any order.

    dtype  float32, bfloat16 or float16: what the tensors are made in, so that loading converts nothing
    """

    def __init__(self, specs: Iterable[WeightSpec], dtype: torch.dtype, seed: int) -> None:
        self._shapes = {name: shape for spec in specs for name, shape in zip(spec.sources, spec.shapes, strict=True)}
        self._dtype = dtype
        self._seed = seed
        self._drawn: dict[str, Tensor] = {}
        self._pool = torch.randn(POOL_SIZE, generator=torch.Generator().manual_seed(seed))

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        try:
            return self._shapes[name]
        except KeyError:
            raise WeightsError(f"the model has no tensor {shown(name)}") from None

    def dtype(self, name: str) -> str:
        return DTYPE_NAMES[self._dtype]

    def tensor(self, name: str) -> Tensor:
        """A new tensor; nothing of it is kept here."""
        shape = self.shape(name)
        spread = spread_of(name, shape)
        if spread is None:
            return torch.ones(shape, dtype=self._dtype)
        values = torch.empty(math.prod(shape), dtype=self._dtype)
        first, place = 0, zlib.crc32(f"{self._seed} {name}".encode()) % POOL_SIZE
        while first < len(values):
            count = min(len(values) - first, POOL_SIZE - place)
            torch.mul(self._pool[place : place + count], spread, out=values[first : first + count])
            first, place = first + count, 0
        return values.view(shape)

    def quantized(self, name: str, kind: Literal["int8", "int4"]) -> QuantizedWeight:
        """A matrix with quantised values of its own: making and rounding 30 billion numbers would take minutes.

        The values are uniform over the range, and the scales give them the spread of a random matrix.
        """
        n, k = self.shape(name)
        low, high, size = (-8, 8, min(INT4_GROUP, max(k, 1))) if kind == "int4" else (-127, 128, max(k, 1))
        drawn = self._drawn.get(kind)
        if drawn is None:
            generator = torch.Generator().manual_seed(self._seed)
            drawn = torch.randint(low, high, (POOL_SIZE,), generator=generator, dtype=torch.int8)
            self._drawn[kind] = drawn
        first = zlib.crc32(f"{self._seed} {name}".encode()) % max(POOL_SIZE - n * k, 1)
        source = drawn if first + n * k <= POOL_SIZE else drawn.repeat(-(-(first + n * k) // POOL_SIZE))
        scale = math.sqrt(12 / max(k, 1)) / (high - low)
        scales = torch.full((n, -(-k // size)), scale, dtype=torch.bfloat16 if kind == "int4" else torch.float32)
        return own_weight(kind, source[first : first + n * k].view(n, k), scales, size, self._dtype)

    def release(self, name: str) -> None:
        """Nothing is kept."""


def spread_of(name: str, shape: tuple[int, ...]) -> float | None:
    """The standard deviation that the values of a tensor should have; None: all are 1.

    Norm weights are 1 and weight matrices have 1/sqrt(inputs), so that activations keep their size through any depth;
    biases, learned vectors and tables are small.
    """
    is_table = any(part in name for part in ("pos_embed", "rel_pos_", "position_embedding", "embed_tokens"))
    if len(shape) == 1 and name.endswith(".weight"):
        return None
    if len(shape) == 1 or is_table:
        return 0.02
    return 1 / math.sqrt(math.prod(shape[1:]))
