"""Packs the parts of a model from a checkpoint, or maps them from a packed folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..loading.packed import PackedSource
from ..loading.random_weights import RandomWeights
from ..loading.weights import Quantizer, TensorSource, WeightSpec, load_weights
from ..ops import Ops
from ..quantization import Weight
from .packed_parts import map_part
from .weight_map import OpenedParts, Part, QuantizeTo, kind_on_load


def load_parts(
    opened: OpenedParts, dtype: torch.dtype, ops: Ops, quantize_to: QuantizeTo | None = None
) -> dict[str, Any]:
    """Pack every tensor as it is read. Raises WeightsError listing what does not fit.

    quantize_to  linear layers are quantised as they are read, to kind_on_load; routers, table and convolutions are not
    """
    by_target = {p.spec.target: p for p in opened.parts}
    packed = map_parts(opened.source, by_target, dtype, ops)

    def consume(spec: WeightSpec, tensors: Sequence[Weight]) -> None:
        packed[spec.target] = by_target[spec.target].pack(ops, tensors)

    specs = [p.spec for p in by_target.values() if p.spec.target not in packed]
    quantizer = None if quantize_to is None else choose_quantizer(opened.source, ops, quantize_to)
    load_weights(opened.source, specs, opened.unused, dtype, consume, quantizer)
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


def map_parts(checkpoint: TensorSource, parts: dict[str, Part], dtype: torch.dtype, ops: Ops) -> dict[str, Any]:
    """The parts that lie packed in the folder, by target; {} for any other checkpoint."""
    if not isinstance(checkpoint, PackedSource):
        return {}
    unknown = sorted(set(checkpoint.folder.parts) - set(parts))
    if unknown:
        raise WeightsError(f"the folder holds a packed part {unknown[0]!r} that the model does not have")
    return {
        target: map_part(parts[target], entries, dtype, ops, checkpoint.packed_tensor)
        for target, entries in checkpoint.folder.parts.items()
    }
