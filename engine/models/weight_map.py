"""The weight map of a model as data: which checkpoint tensors make each packed part, and how they are packed.

A model lists its parts beside its forward pass. The same list answers "which tensors, in which shapes, does this
configuration need?" (WeightSpec) and does the packing, so the two cannot disagree. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import WeightsError
from ..loading.weights import WeightSpec
from ..ops import Ops

Pack = Callable[[Ops, Sequence[Tensor]], Any]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One packed part: `spec` names its target, sources and shapes; `pack` turns the sources into what an op takes."""

    spec: WeightSpec
    pack: Pack


class Norm(NamedTuple):
    """weight, bias [C] of a LayerNorm."""

    weight: Tensor
    bias: Tensor


def part(target: str, tensors: Mapping[str, Shape], pack: Pack) -> Part:
    """A part made of `tensors` (checkpoint name -> shape), handed to `pack` in that order."""
    return Part(WeightSpec(target, tuple(tensors), tuple(tensors.values())), pack)


def tensor_part(target: str, name: str, shape: Shape) -> Part:
    """One tensor as it is, copied: a view of the checkpoint would tie the model's life to the file's."""
    return part(target, {name: shape}, lambda _ops, tensors: tensors[0].clone())


def norm_part(target: str, prefix: str, width: int) -> Part:
    """The weight and bias of a LayerNorm, as a Norm."""
    shapes = {f"{prefix}.weight": (width,), f"{prefix}.bias": (width,)}
    return part(target, shapes, lambda _ops, tensors: Norm(tensors[0].clone(), tensors[1].clone()))


def linear_part(target: str, prefix: str, out_features: int, in_features: int, bias: bool) -> Part:
    """One linear layer."""
    shapes: dict[str, Shape] = {f"{prefix}.weight": (out_features, in_features)}
    if bias:
        shapes[f"{prefix}.bias"] = (out_features,)
    return part(target, shapes, lambda ops, tensors: ops.pack_linear(*tensors))


def fused_linear_part(target: str, prefixes: Sequence[str], out_features: Sequence[int], in_features: int) -> Part:
    """Several linear layers without bias that read the same input, packed as one."""
    shapes = {f"{p}.weight": (o, in_features) for p, o in zip(prefixes, out_features)}
    return part(target, shapes, lambda ops, tensors: ops.pack_linear(torch.cat(list(tensors))))


def swiglu_shapes(prefix: str, width: int, hidden: int) -> dict[str, Shape]:
    """Gate, up and down of one SwiGLU feed-forward, in the order that pack_swiglu takes them."""
    return {
        f"{prefix}.gate_proj.weight": (hidden, width),
        f"{prefix}.up_proj.weight": (hidden, width),
        f"{prefix}.down_proj.weight": (width, hidden),
    }


def pack_parts(parts: Iterable[Part], tensors: Mapping[str, Tensor], dtype: torch.dtype, ops: Ops) -> dict[str, Any]:
    """Pack from tensors already in memory (tests, converted models), as strictly as from a file.

    Raises WeightsError naming the missing, left-over and wrongly shaped tensors.
    """
    parts = list(parts)
    shapes = {name: shape for p in parts for name, shape in zip(p.spec.sources, p.spec.shapes)}
    problems = [f"missing {name}" for name in shapes if name not in tensors]
    problems += [f"left over {name}" for name in tensors if name not in shapes]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    if problems:
        raise WeightsError(f"{len(problems)} tensors do not fit the model: {'; '.join(problems[:8])}")
    return {p.spec.target: p.pack(ops, [tensors[name].detach().to(dtype) for name in p.spec.sources]) for p in parts}
