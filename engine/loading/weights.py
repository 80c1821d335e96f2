"""Feeds a checkpoint's tensors to a model, strictly both ways.

A model declares its weights as data (a list of WeightSpec); here the list is compared with the checkpoint before any
data is read, so that a wrong checkpoint fails in milliseconds with everything that is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import WeightsError
from .strict_json import shown

FLOAT_DTYPES = ("BF16", "F16", "F32")
MAX_LISTED = 10


class TensorSource(Protocol):
    """Tensors by name: a Checkpoint, or RandomWeights."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str:
        """Its name in a safetensors file, such as "BF16"."""

    def tensor(self, name: str) -> Tensor:
        """The values; the caller must not write to them."""

    def release(self, name: str) -> None:
        """The values are not needed for now; they can still be asked for again."""


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One weight of a model and where it comes from.

    target   the model's own name for it
    sources  checkpoint tensors it is made of, in the order in which `consume` gets them (one, or several to fuse)
    shapes   the shape each source must have
    """

    target: str
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.shapes) or not self.sources:
            raise ValueError(
                f"WeightSpec {self.target!r} has {len(self.sources)} sources and {len(self.shapes)} shapes"
            )


def load_weights(
    checkpoint: TensorSource,
    specs: Sequence[WeightSpec],
    unused: Iterable[str],
    dtype: torch.dtype,
    consume: Callable[[WeightSpec, list[Tensor]], None],
) -> None:
    """Call `consume(spec, tensors)` for every spec in order, tensors converted to `dtype`.

    unused   tensors that are known and not needed; they may be absent
    dtype    float32 or bfloat16; sources are bfloat16, float16 or float32
    consume  gets tensors that are views of the mapped file where no conversion was needed: it must not write to them.
             Keeping one is allowed (it keeps the file mapped). After it returns, the file's pages are given back, so
             memory peaks at what `consume` keeps plus the tensors of one spec.
    Raises   WeightsError listing every missing, left-over, wrongly shaped and wrongly typed tensor (the first ten of
             each kind), before any data is read.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"weights can be loaded as float32 or bfloat16, not {dtype}")
    check_weights(checkpoint, specs, unused)
    for spec in specs:
        consume(spec, [checkpoint.tensor(source).to(dtype) for source in spec.sources])
        for source in spec.sources:
            checkpoint.release(source)


def check_weights(checkpoint: TensorSource, specs: Sequence[WeightSpec], unused: Iterable[str]) -> None:
    """Compare names, shapes and dtypes of a checkpoint with what a model declares; raises WeightsError listing all."""
    wanted = {name: shape for spec in specs for name, shape in zip(spec.sources, spec.shapes, strict=True)}
    present = set(checkpoint.names())
    missing = [shown(name) for name in wanted if name not in present]
    left_over = [shown(name) for name in sorted(present - wanted.keys() - set(unused))]
    wrong_shape, wrong_dtype = [], []
    for name, shape in wanted.items():
        if name not in present:
            continue
        if checkpoint.shape(name) != shape:
            wrong_shape.append(f"{shown(name)} is {list(checkpoint.shape(name))}, needs {list(shape)}")
        if checkpoint.dtype(name) not in FLOAT_DTYPES:
            wrong_dtype.append(f"{shown(name)} is {checkpoint.dtype(name)}, needs one of {', '.join(FLOAT_DTYPES)}")
    kinds = (("missing", missing), ("left over", left_over), ("wrong shape", wrong_shape), ("wrong dtype", wrong_dtype))
    faults = [_listed(kind, entries) for kind, entries in kinds if entries]
    if faults:
        raise WeightsError("the checkpoint does not fit the model: " + "; ".join(faults))


def _listed(kind: str, entries: list[str]) -> str:
    more = f" and {len(entries) - MAX_LISTED} more" if len(entries) > MAX_LISTED else ""
    return f"{len(entries)} {kind}: {', '.join(entries[:MAX_LISTED])}{more}"
