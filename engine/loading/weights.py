"""Feeds a checkpoint's tensors to a model, strictly both ways.

A model declares its weights as data (a list of WeightSpec); here the list is compared with the checkpoint before any
data is read, so that a wrong checkpoint fails in milliseconds with everything that is wrong with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import torch

from ..errors import ShapeError, WeightsError
from ..quantization import Weight
from .strict_json import shown

FLOAT_DTYPES = ("BF16", "F16", "F32")
QUANTIZED_DTYPES = ("INT4", "INT8", "FP8")  # of a source whose tensors are QuantizedWeight
MAX_LISTED = 10
# The file's pages of a source are given back once so many later sources were read: those packed together stay.
KEPT_PAGES = 4


class TensorSource(Protocol):
    """Tensors by name: a Checkpoint, a QuantizedCheckpoint, or RandomWeights."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str:
        """Its name in a safetensors file, such as "BF16"; one of QUANTIZED_DTYPES for a QuantizedWeight."""

    def tensor(self, name: str) -> Weight:
        """The values; the caller must not write to them."""

    def release(self, name: str) -> None:
        """The values are not needed for now; they can still be asked for again."""


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One weight of a model and where it comes from.

    target   the model's own name for it
    sources  checkpoint tensors it is made of, in the order in which `consume` gets them (one, or several to fuse)
    shapes   the shape each source must have
    linear   those of the sources that are matrices of linear layers, or stacks [E, R, C] of them: they may be quantised
    kept     those of `linear` that quantising on load leaves as they are
    """

    target: str
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    linear: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.shapes) or not self.sources:
            raise ValueError(
                f"WeightSpec {self.target!r} has {len(self.sources)} sources and {len(self.shapes)} shapes"
            )

    def is_quantized_on_load(self, source: str) -> bool:
        return source in self.linear and source not in self.kept


# What a linear layer's tensor of that name becomes; where it reads it from is its business.
Quantizer = Callable[[WeightSpec, str], Weight]
Consume = Callable[[WeightSpec, Sequence[Weight]], None]


class SpecTensors(Sequence[Weight]):
    """The tensors of one spec, read and converted as they are asked for, so that few are in memory at a time."""

    def __init__(
        self, checkpoint: TensorSource, spec: WeightSpec, dtype: torch.dtype, quantizer: Quantizer | None
    ) -> None:
        self._checkpoint, self._spec, self._dtype, self._quantizer = checkpoint, spec, dtype, quantizer
        self._recent: deque[str] = deque()

    def __len__(self) -> int:
        return len(self._spec.sources)

    @overload
    def __getitem__(self, index: int) -> Weight: ...
    @overload
    def __getitem__(self, index: slice) -> list[Weight]: ...
    def __getitem__(self, index: int | slice) -> Weight | list[Weight]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name = self._spec.sources[index]
        self._recent.append(name)
        if len(self._recent) > KEPT_PAGES:
            self._checkpoint.release(self._recent.popleft())
        if self._quantizer is None or not self._spec.is_quantized_on_load(name):
            return self._checkpoint.tensor(name).to(self._dtype)
        try:
            return self._quantizer(self._spec, name).to(self._dtype)
        except ShapeError as error:
            raise WeightsError(f"{shown(name)}: {error}") from error

    def release(self) -> None:
        """Give back the file's pages of everything that was read."""
        while self._recent:
            self._checkpoint.release(self._recent.popleft())


def load_weights(
    checkpoint: TensorSource,
    specs: Sequence[WeightSpec],
    unused: Iterable[str],
    dtype: torch.dtype,
    consume: Consume,
    quantizer: Quantizer | None = None,
) -> None:
    """Compare all of a checkpoint with `specs` (check_weights), then read it (read_weights).

    unused  tensors that are known and not needed; they may be absent
    """
    check_weights(checkpoint, specs, unused)
    read_weights(checkpoint, specs, dtype, consume, quantizer)


def read_weights(
    checkpoint: TensorSource,
    specs: Sequence[WeightSpec],
    dtype: torch.dtype,
    consume: Consume,
    quantizer: Quantizer | None = None,
) -> None:
    """Call `consume(spec, tensors)` for every spec in order, tensors converted to `dtype`; the specs were checked.

    dtype              float32, bfloat16 or float16; sources are one of these, or quantised where the spec allows
    consume            gets a sequence that reads a tensor when it is asked for it. Tensors are views of the mapped file
                       where no conversion was needed: it must not write to them. Keeping one is allowed (it keeps the
                       file mapped). The file's pages are given back soon after a tensor was read, so memory peaks at
                       what `consume` keeps plus the few tensors that it packs together.
    quantizer          applied to linear layers
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"weights can be loaded as float32, bfloat16 or float16, not {dtype}")
    for spec in specs:
        tensors = SpecTensors(checkpoint, spec, dtype, quantizer)
        consume(spec, tensors)
        tensors.release()


def check_weights(checkpoint: TensorSource, specs: Sequence[WeightSpec], unused: Iterable[str]) -> None:
    """Compare names, shapes and dtypes of a checkpoint with what a model declares; no data is read.

    Raises WeightsError listing every missing, left-over, wrongly shaped and wrongly typed tensor, the first ten of each
    kind.
    """
    wanted = {name: shape for spec in specs for name, shape in zip(spec.sources, spec.shapes, strict=True)}
    not_linear = {name for spec in specs for name in spec.sources if name not in spec.linear}
    present = set(checkpoint.names())
    missing = [shown(name) for name in wanted if name not in present]
    left_over = [shown(name) for name in sorted(present - wanted.keys() - set(unused))]
    wrong_shape, wrong_dtype = [], []
    for name, shape in wanted.items():
        if name not in present:
            continue
        if checkpoint.shape(name) != shape:
            wrong_shape.append(f"{shown(name)} is {list(checkpoint.shape(name))}, needs {list(shape)}")
        dtype = checkpoint.dtype(name)
        if dtype in QUANTIZED_DTYPES and name in not_linear:
            wrong_dtype.append(f"{shown(name)} is quantised ({dtype}), but only linear layers may be")
        elif dtype not in FLOAT_DTYPES + QUANTIZED_DTYPES:
            wrong_dtype.append(f"{shown(name)} is {dtype}, needs one of {', '.join(FLOAT_DTYPES)}")
    kinds = (("missing", missing), ("left over", left_over), ("wrong shape", wrong_shape), ("wrong dtype", wrong_dtype))
    faults = [_listed(kind, entries) for kind, entries in kinds if entries]
    if faults:
        raise WeightsError("the checkpoint does not fit the model: " + "; ".join(faults))


def _listed(kind: str, entries: list[str]) -> str:
    more = f" and {len(entries) - MAX_LISTED} more" if len(entries) > MAX_LISTED else ""
    return f"{len(entries)} {kind}: {', '.join(entries[:MAX_LISTED])}{more}"
