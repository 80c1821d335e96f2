"""Weights into the layout of the Triton kernels (kernels/matrix.py), once at load, on the device of the backend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor

from ..errors import ShapeError, UnsupportedError
from ..loading.packed import PackedEntry
from ..quantization import QuantizedWeight, Weight, are_alike, quantize

if TYPE_CHECKING:
    from ..kernels.conv_downsample import Neck
    from ..kernels.grouped_gemm import Experts
    from ..kernels.matrix import Matrix

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """One linear layer."""

    matrix: Matrix

    @property
    def out_features(self) -> int:
        return self.matrix.n

    @property
    def in_features(self) -> int:
        return self.matrix.k

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype


@dataclass(frozen=True, slots=True)
class PackedSwiglu:
    """gate_up: rows of gate and up in turns; down."""

    gate_up: Matrix
    down: Matrix

    @property
    def width(self) -> int:
        return self.down.n

    @property
    def dtype(self) -> torch.dtype:
        return self.down.dtype


@dataclass(frozen=True, slots=True)
class PackedMoe:
    """router [E, C] in the activations' dtype or float32, the experts, the shared one or None."""

    router: Matrix
    experts: Experts
    shared: PackedSwiglu | None

    @property
    def width(self) -> int:
        return self.experts.down.n

    @property
    def dtype(self) -> torch.dtype:
        return self.experts.down.dtype


@dataclass(frozen=True, slots=True)
class PackedPatches:
    """weight [C, channels, p, p] as a matrix [C, channels*p*p]."""

    matrix: Matrix
    channels: int
    patch_size: int


def refuse(op: str, rule: str, *tensors: Weight | None) -> NoReturn:
    got = ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors if t is not None)
    raise ShapeError(f"{op}: {rule}; got {got}")


def _check(op: str, name: str, weight: Weight) -> None:
    if weight.ndim != 2 or weight.dtype not in DTYPES:
        refuse(op, f"{name} must have two axes and be for float32, bfloat16 or float16 activations", weight)


def make_matrix(weight: Weight, bias: Tensor | None, device: torch.device) -> Matrix:
    """One matrix, on the device."""
    from ..kernels.matrix import Matrix, pack_int4

    n, k = weight.shape
    raised = None if bias is None else bias.to(device, torch.float32).contiguous()
    if isinstance(weight, Tensor):
        values = weight.to(device).contiguous()[None]
        return Matrix(values, n, k, weight.dtype, bias=raised, group=k)
    in_groups = weight.activation_group is not None and weight.activation_group < k
    by_groups = weight.scales.shape[1] > 1
    group = weight.group_size if by_groups else (weight.activation_group if in_groups else k)
    group = max(1, min(group or 1, max(k, 1)))
    if weight.kind == "int4":
        values = pack_int4(weight.values, group)
    else:
        values = weight.values.view(torch.uint8) if weight.kind == "fp8" else weight.values
    scales, zeros = weight.scales, weight.zeros
    if not scales.shape[1]:  # no inputs: nothing is scaled, but kernels read a scale a row
        scales, zeros = scales.new_ones(n, 1), None
    return Matrix(
        values.to(device).contiguous()[None],
        n,
        k,
        weight.dtype,
        weight.kind,
        scales.T.contiguous().to(device)[None],
        None if zeros is None else zeros.T.contiguous().to(device)[None],
        None if weight.input_order is None else weight.input_order.to(device, torch.int32),
        raised,
        group,
        weight.activation,
        in_groups,
    )


def in_turns(op: str, gate: Weight, up: Weight) -> Weight:
    """gate, up [I, C] -> [2*I, C] with rows gate 0, up 0, gate 1, up 1, ..."""
    if isinstance(gate, Tensor) and isinstance(up, Tensor):
        return torch.stack([gate, up], 1).flatten(0, 1)
    if not isinstance(gate, QuantizedWeight) or not isinstance(up, QuantizedWeight) or not are_alike(gate, up):
        raise UnsupportedError(
            f"{op}: gate and up are quantised in different ways (kind, groups or order of the inputs), and the Triton "
            "kernels run them as one; use backend='reference'"
        )

    def turns(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a.view(torch.int8), b.view(torch.int8)], 1).flatten(0, 1).view(a.dtype)

    zeros = None
    if gate.zeros is not None and up.zeros is not None:
        zeros = torch.stack([gate.zeros, up.zeros], 1).flatten(0, 1)
    scales = torch.stack([gate.scales, up.scales], 1).flatten(0, 1)
    return replace(gate, values=turns(gate.values, up.values), scales=scales, zeros=zeros)


class TritonPacking:
    """The pack_* methods of the contract. Packed weights lie on the device; sources may lie anywhere."""

    device: torch.device

    def quantize(self, weight: Tensor, kind: Literal["int8", "int4"]) -> QuantizedWeight:
        return quantize(weight.cpu(), kind)

    def packed_memory(self, packed: Any) -> tuple[PackedEntry, list[Tensor]] | None:
        """Packed folders hold the layout of the native kernels only."""
        return None

    def map_packed(self, entry: PackedEntry, tensors: list[Tensor], copied: bool = False) -> Any:
        raise UnsupportedError(
            "the folder holds weights in the layout of the native kernels, which backend triton cannot read; use "
            "backend='native', or the checkpoint that it was made from"
        )

    def pack_linear(self, weight: Weight, bias: Tensor | None = None) -> PackedLinear:
        _check("pack_linear", "weight", weight)
        if bias is not None and bias.shape != weight.shape[:1]:
            refuse("pack_linear", "bias must be [O]", weight, bias)
        return PackedLinear(make_matrix(weight, bias, self.device))

    def pack_swiglu(self, gate: Weight, up: Weight, down: Weight) -> PackedSwiglu:
        gate_up, down = self._swiglu_parts("pack_swiglu", gate, up, down)
        return PackedSwiglu(make_matrix(gate_up, None, self.device), make_matrix(down, None, self.device))

    @staticmethod
    def _swiglu_parts(op: str, gate: Weight, up: Weight, down: Weight) -> tuple[Weight, Weight]:
        for name, weight in (("gate", gate), ("up", up), ("down", down)):
            _check(op, name, weight)
        if up.shape != gate.shape or tuple(down.shape) != tuple(gate.shape)[::-1]:
            refuse(op, "gate and up must be [I, C], down [C, I]", gate, up, down)
        if not gate.dtype == up.dtype == down.dtype:
            refuse(op, "gate, up and down must share a dtype", gate, up, down)
        return in_turns(op, gate, up), down

    def pack_moe(
        self, router: Tensor, experts: Iterable[tuple[Weight, Weight, Weight]], shared: PackedSwiglu | None
    ) -> PackedMoe:
        from ..kernels.grouped_gemm import Experts

        _check("pack_moe", "router", router)
        count, width = router.shape
        layer: tuple[Matrix, Matrix] | None = None
        found = 0
        for parts in experts:
            gate_up, down = self._swiglu_parts("pack_moe", *parts)
            if gate_up.shape[1] != width or found == count:
                refuse("pack_moe", f"expert {found} does not fit a router [E, C]", gate_up, router)
            one = make_matrix(gate_up, None, self.device), make_matrix(down, None, self.device)
            if layer is None:
                layer = _room_for(one[0], count), _room_for(one[1], count)
            for matrix, whole in zip(one, layer):
                _fill_expert(matrix, whole, found)
            found += 1
        if layer is None or found != count:
            refuse("pack_moe", f"{found} experts for a router [E, C]", router)
        # Products of two 16-bit numbers are exact in float32: a router of the activations' dtype stays as it is.
        kept = router if router.dtype == layer[1].dtype else router.float()
        packed = PackedMoe(make_matrix(kept, None, self.device), Experts(*layer), shared)
        if shared is not None and (shared.width != width or shared.dtype != packed.dtype):
            raise ShapeError(
                f"pack_moe: the shared expert is {shared.width} wide, {shared.dtype}; "
                f"the others {width}, {packed.dtype}"
            )
        return packed

    def pack_patch_embed(self, weight: Tensor, bias: Tensor) -> PackedPatches:
        if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or bias.shape != weight.shape[:1]:
            refuse("pack_patch_embed", "needs [C, 3, p, p] and [C]", weight, bias)
        return PackedPatches(make_matrix(weight.flatten(1), bias, self.device), weight.shape[1], weight.shape[2])

    def pack_conv_downsample(self, weights: dict[str, Tensor]) -> Neck:
        from ..kernels.conv_downsample import Neck

        op = "pack_conv_downsample"
        convs = [weights[name] for name in ("conv1", "conv2", "down1", "down2")]
        for conv, kernel, before in zip(convs, (1, 3, 3, 3), (None, *convs)):
            fits = conv.ndim == 4 and tuple(conv.shape[2:]) == (kernel, kernel) and conv.dtype == convs[0].dtype
            if not fits or (before is not None and conv.shape[1] != before.shape[0]):
                refuse(op, "conv1 must be 1x1, the others 3x3 over the result of the one before, in one dtype", *convs)
        norms = [weights[f"norm{i}_{name}"] for i in (1, 2) for name in ("weight", "bias")]
        for norm, conv in zip(norms, (convs[0], convs[0], convs[1], convs[1])):
            if norm.shape != conv.shape[:1]:
                refuse(op, "a norm must have the channels of the convolution before it", norm, conv)
        return Neck(
            *(conv.to(self.device).permute(0, 2, 3, 1).contiguous() for conv in convs),
            *(norm.to(self.device, torch.float32).contiguous() for norm in norms),
        )


def _room_for(expert: Matrix, count: int) -> Matrix:
    def room(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.new_empty((count, *x.shape[1:]))

    return expert.with_values(
        values=room(expert.values),
        scales=room(expert.scales),
        zeros=room(expert.zeros),
        order=None if expert.order is None else expert.order.new_empty((count, expert.k)),
    )


def _fill_expert(expert: Matrix, layer: Matrix, index: int) -> None:
    """Copy one expert into its place. Raises if it is of another size or quantised in another way than expert 0."""
    if (expert.n, expert.k, expert.dtype) != (layer.n, layer.k, layer.dtype):
        raise ShapeError(
            f"pack_moe: expert {index} is [{expert.n}, {expert.k}] {expert.dtype}, expert 0 [{layer.n}, {layer.k}] "
            f"{layer.dtype}"
        )
    pairs = [(getattr(expert, name), getattr(layer, name)) for name in ("values", "scales", "zeros", "order")]
    alike = (expert.format, expert.group, expert.rounding, expert.rounded_in_groups) == (
        layer.format,
        layer.group,
        layer.rounding,
        layer.rounded_in_groups,
    )
    if not alike or any((a is None) != (b is None) or (a is not None and a.dtype != b.dtype) for a, b in pairs):
        raise UnsupportedError(
            f"pack_moe: expert {index} is quantised in another way than expert 0, and the Triton kernels run all in "
            "one way; use backend='reference'"
        )
    for source, target in pairs:
        if source is not None and target is not None:
            target[index].copy_(source[0] if source.ndim == target.ndim else source)
