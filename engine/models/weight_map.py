"""The weight map of a model as data: which checkpoint tensors make each packed part, and how they are packed.

A model lists its parts beside its forward pass. The same list answers "which tensors, in which shapes, does this
configuration need?" (WeightSpec) and does the packing, so the two cannot disagree. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import WeightsError
from ..loading.weights import TensorSource, WeightSpec
from ..ops import Ops
from ..quantization import Weight, stack_rows

Pack = Callable[[Ops, Sequence[Any]], Any]
Shape = tuple[int, ...]
QuantizeTo = Literal["int8", "int4"]
DECODER_PARTS = "decoder."  # how the targets of the decoder's parts begin
HEAD_PART = "decoder.lm_head"


def kind_on_load(quantize_to: QuantizeTo, spec: WeightSpec) -> QuantizeTo:
    """What a linear layer becomes.

    Two keep 8 bits: the output head, which is one layer and whose errors go straight into the choice of tokens, and the
    vision towers, which multiply many rows, so that 4 bits would save no time and little memory.
    """
    return quantize_to if spec.target.startswith(DECODER_PARTS) and spec.target != HEAD_PART else "int8"


@dataclass(frozen=True, slots=True)
class Part:
    """One packed part: `spec` names its target, sources and shapes; `pack` turns the sources into what an op takes.

    fused  `pack` gives a FusedLinear
    as_is  `pack` gives a copy of the one source
    """

    spec: WeightSpec
    pack: Pack
    fused: bool = False
    as_is: bool = False


class OpenedParts(NamedTuple):
    """A checkpoint as a model takes it: the source of its tensors, the parts they make, names that are not used."""

    source: TensorSource
    parts: list[Part]
    unused: list[str]


class Norm(NamedTuple):
    """weight, bias [C] of a LayerNorm."""

    weight: Tensor
    bias: Tensor


def part(
    target: str, tensors: Mapping[str, Shape], pack: Pack, linear: Iterable[str] = (), kept: Iterable[str] = ()
) -> Part:
    """A part made of `tensors` (checkpoint name -> shape), handed to `pack` in that order.

    linear  those that may be quantised; `pack` gets a QuantizedWeight then
    kept    those of them that quantising on load leaves as they are
    """
    return Part(WeightSpec(target, tuple(tensors), tuple(tensors.values()), frozenset(linear), frozenset(kept)), pack)


def plain(weight: Weight) -> Tensor:
    """A weight as a tensor: a quantised one is computed, in the dtype it is multiplied in."""
    return weight if isinstance(weight, Tensor) else weight.float().to(weight.dtype)


def place(packed: Any, device: torch.device) -> Any:
    """What a part packed, its plain tensors moved to the device; packed weights are where their backend put them."""
    if isinstance(packed, Tensor):
        return packed.to(device)
    if isinstance(packed, tuple):
        moved = [place(item, device) for item in packed]
        return type(packed)(*moved) if hasattr(packed, "_fields") else tuple(moved)
    return packed


def tensor_part(target: str, name: str, shape: Shape) -> Part:
    """One tensor as it is, copied: a view of the checkpoint would tie the model's life to the file's."""
    return replace(part(target, {name: shape}, lambda _ops, tensors: tensors[0].clone()), as_is=True)


def norm_part(target: str, prefix: str, width: int) -> Part:
    """The weight and bias of a LayerNorm, as a Norm."""
    shapes = {f"{prefix}.weight": (width,), f"{prefix}.bias": (width,)}
    return part(target, shapes, lambda _ops, tensors: Norm(tensors[0].clone(), tensors[1].clone()))


def linear_part(target: str, prefix: str, out_features: int, in_features: int, bias: bool) -> Part:
    """One linear layer."""
    weight = f"{prefix}.weight"
    shapes: dict[str, Shape] = {weight: (out_features, in_features)}
    if bias:
        shapes[f"{prefix}.bias"] = (out_features,)
    return part(target, shapes, lambda ops, tensors: ops.pack_linear(*tensors), linear=[weight])


class FusedLinear(NamedTuple):
    """Linear layers that read the same input: packed ones and the columns of the result that each of them gives.

    One, but where a checkpoint quantised them in ways that do not fit together.
    """

    packed: tuple[Any, ...]
    columns: tuple[slice, ...]

    def apply(self, ops: Ops, x: Tensor, out: Tensor) -> Tensor:
        """out [N, sum of all out_features] = x times each."""
        for packed, columns in zip(self.packed, self.columns):
            ops.linear(x, packed, out=out[:, columns] if len(self.packed) > 1 else out)
        return out


def fused_linear_part(target: str, prefixes: Sequence[str], out_features: Sequence[int], in_features: int) -> Part:
    """Several linear layers without bias that read the same input, packed as one."""
    shapes = {f"{p}.weight": (o, in_features) for p, o in zip(prefixes, out_features)}

    def pack(ops: Ops, tensors: Sequence[Weight]) -> FusedLinear:
        weights = list(tensors)
        whole = stack_rows(weights)
        if whole is not None:
            return FusedLinear((ops.pack_linear(whole),), (slice(None),))
        ends = [sum(out_features[: i + 1]) for i in range(len(out_features))]
        columns = tuple(slice(end - size, end) for end, size in zip(ends, out_features))
        return FusedLinear(tuple(ops.pack_linear(weight) for weight in weights), columns)

    return replace(part(target, shapes, pack, linear=shapes), fused=True)


def swiglu_shapes(prefix: str, width: int, hidden: int) -> dict[str, Shape]:
    """Gate, up and down of one SwiGLU feed-forward, in the order that pack_swiglu takes them."""
    return {
        f"{prefix}.gate_proj.weight": (hidden, width),
        f"{prefix}.up_proj.weight": (hidden, width),
        f"{prefix}.down_proj.weight": (width, hidden),
    }


def pack_parts(
    parts: Iterable[Part],
    tensors: Mapping[str, Weight],
    dtype: torch.dtype,
    ops: Ops,
    quantize_to: QuantizeTo | None = None,
) -> dict[str, Any]:
    """Pack from tensors already in memory (tests, converted models), as strictly as from a file.

    quantize_to  as in load_parts
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

    def taken(spec: WeightSpec, name: str) -> Weight:
        tensor = tensors[name]
        if not isinstance(tensor, Tensor):
            return tensor.to(dtype)
        if quantize_to is not None and spec.is_quantized_on_load(name):
            return ops.quantize(tensor.detach().flatten(0, -2), kind_on_load(quantize_to, spec)).to(dtype)
        return tensor.detach().to(dtype)

    return {p.spec.target: pack_part(p, ops, [taken(p.spec, name) for name in p.spec.sources]) for p in parts}


def pack_part(part: Part, ops: Ops, tensors: Sequence[Any]) -> Any:
    """A part packed, on the device of the ops."""
    packed = part.pack(ops, tensors)
    return packed if ops.device.type == "cpu" else place(packed, ops.device)
