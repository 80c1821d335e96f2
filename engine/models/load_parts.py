"""Packs the parts of a model from a checkpoint, or maps them from a packed folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..loading.packed import PackedEntry, PackedSource
from ..loading.random_weights import RandomWeights
from ..loading.weights import Quantizer, TensorSource, WeightSpec, check_weights, read_weights
from ..ops import Ops
from ..quantization import Weight
from .packed_parts import check_part, map_part
from .weight_map import OpenedParts, Part, QuantizeTo, kind_on_load, pack_part


def load_parts(
    opened: OpenedParts,
    dtype: torch.dtype,
    ops: Ops,
    quantize_to: QuantizeTo | None = None,
    wanted: Callable[[str], bool] = lambda target: True,
) -> dict[str, Any]:
    """Pack every tensor as it is read. Raises WeightsError listing what does not fit.

    quantize_to  linear layers are quantised as they are read, to kind_on_load; routers, table and convolutions are not
    wanted       the targets to load; the checkpoint is compared with all of them
    """
    source, by_target = opened.source, {p.spec.target: p for p in opened.parts}
    entries = check_packed_parts(source, by_target, dtype)
    rest = [p.spec for target, p in by_target.items() if target not in entries]
    check_weights(source, rest, opened.unused)
    packed: dict[str, Any] = {}
    # A mapped folder stays open for as long as the model lives, so that a large table need not be copied.
    keeps_views = isinstance(source, PackedSource) and source.use_mmap

    def consume(spec: WeightSpec, tensors: Sequence[Weight]) -> None:
        part = by_target[spec.target]
        packed[spec.target] = tensors[0] if part.as_is and keeps_views else pack_part(part, ops, tensors)

    quantizer = None if quantize_to is None else choose_quantizer(source, ops, quantize_to)
    specs = [spec for spec in rest if wanted(spec.target)]
    read_weights(source, specs, dtype, consume, quantizer)
    if isinstance(source, PackedSource):
        # Last: the table may for a moment be in memory twice.
        packed |= {target: map_part(by_target[target], ops, source) for target in entries if wanted(target)}
    return packed


def choose_quantizer(source: TensorSource, ops: Ops, quantize_to: QuantizeTo) -> Quantizer:
    """How the linear layers become quantised."""
    if isinstance(source, RandomWeights):
        return lambda spec, name: source.quantized(name, kind_on_load(quantize_to, spec))

    def quantizer(spec: WeightSpec, name: str) -> Weight:
        weight = source.tensor(name)
        if not isinstance(weight, Tensor):
            return weight
        # Of stacked matrices [E, R, C]: [E * R, C]
        return ops.quantize(weight.flatten(0, -2), kind_on_load(quantize_to, spec))

    return quantizer


def check_packed_parts(
    source: TensorSource, parts: dict[str, Part], dtype: torch.dtype
) -> Mapping[str, Sequence[PackedEntry]]:
    """The parts that lie packed in the folder, by target; {} for any other checkpoint. Raises WeightsError."""
    if not isinstance(source, PackedSource):
        return {}
    entries = source.folder.parts
    unknown = sorted(set(entries) - set(parts))
    if unknown:
        raise WeightsError(f"the folder holds a packed part {unknown[0]!r} that the model does not have")
    for target, listed in entries.items():
        check_part(parts[target], listed, dtype)
    return entries
