"""Weights into the layout of the C++ kernels (csrc/cpu/kernels.h), once at load, and the checks that adapters share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from .. import _native
from ..errors import ShapeError, UnsupportedError
from ..quantization import INT4_GROUP, QuantizedWeight, Weight, are_alike, own_weight, quantize

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
SCALE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMATS = {"int4": 1, "int8": 2, "fp8": 3}
ACTIVATIONS = {None: 0, "int8": 1, "fp8": 2}


class Layout(NamedTuple):
    """Everything but the numbers of a packed matrix [n, k]: LinearShape in csrc/common/pack.h."""

    n: int
    k: int
    dtype: int
    has_bias: bool = False
    format: int = 0
    activation: int = 0
    scale_dtype: int = 0
    group_size: int = 1
    has_zeros: bool = False
    has_order: bool = False
    activation_group: int = 0


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight [out_features, in_features] and its bias in the kernels' layout; `kept` owns memory that is mapped."""

    handle: _native.Linear
    layout: Layout
    dtype: torch.dtype
    kept: Any = None

    @property
    def out_features(self) -> int:
        return self.layout.n

    @property
    def in_features(self) -> int:
        return self.layout.k


@dataclass(frozen=True, slots=True)
class PackedSwiglu:
    """gate, up [inner, width] as one matrix of gate_up.n rows, and down [width, inner]."""

    handle: _native.Swiglu
    gate_up: Layout
    down: Layout
    dtype: torch.dtype
    kept: Any = None

    @property
    def width(self) -> int:
        return self.down.n

    @property
    def inner(self) -> int:
        return self.down.k


@dataclass(frozen=True, slots=True)
class PackedMoe:
    """Router (float32), experts of one layout, and the shared expert, if there is one."""

    handle: _native.Moe
    num_experts: int
    gate_up: Layout
    down: Layout
    shared: PackedSwiglu | None
    dtype: torch.dtype
    kept: Any = None

    @property
    def width(self) -> int:
        return self.down.n


def refuse(op: str, rule: str, *tensors: Weight | None) -> NoReturn:
    raise ShapeError(f"{op}: {rule}; got {', '.join(_describe(t) for t in tensors if t is not None)}")


def _describe(x: Weight) -> str:
    text = f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
    place = x.values.device if isinstance(x, QuantizedWeight) else x.device
    return text if place.type == "cpu" else f"{text} on {place}"


def all_on_cpu(*tensors: Tensor | None) -> bool:
    """The address of a tensor that lies elsewhere means nothing here."""
    return all(t is None or t.device.type == "cpu" for t in tensors)


def vector(op: str, name: str, x: Tensor, size: int, dtype: torch.dtype) -> int:
    """Address of a contiguous [size] tensor."""
    if x.ndim != 1 or x.shape[0] != size or x.dtype != dtype or not x.is_contiguous() or x.device.type != "cpu":
        refuse(op, f"{name} must be contiguous [{size}] {str(dtype).removeprefix('torch.')} on the CPU", x)
    return x.data_ptr()


def _checked(op: str, name: str, weight: Weight) -> Weight:
    """The weight with contiguous parts."""
    if isinstance(weight, Tensor):
        if weight.ndim != 2 or weight.dtype not in DTYPES or weight.device.type != "cpu":
            refuse(op, f"{name} must be a CPU tensor of two axes, float32 or bfloat16", weight)
        return weight.contiguous()
    if weight.dtype not in DTYPES:
        refuse(op, f"{name} must be for float32 or bfloat16 activations", weight)
    if not all_on_cpu(weight.values, weight.scales, weight.zeros, weight.input_order):
        refuse(op, f"the parts of {name} must be CPU tensors", weight.values, weight.scales, weight.zeros)
    if weight.group_size % 8 and weight.scales.shape[1] > 1:
        raise UnsupportedError(
            f"{op}: {name} has a scale for {weight.group_size} inputs; the native kernels need a multiple of 8, or one "
            "scale a row; use backend='reference'"
        )
    return weight


def _layout(weight: Weight, rows: int, has_bias: bool = False) -> Layout:
    if isinstance(weight, Tensor):
        return Layout(rows, weight.shape[1], DTYPES[weight.dtype], has_bias)
    return Layout(
        rows,
        weight.shape[1],
        DTYPES[weight.dtype],
        has_bias,
        FORMATS[weight.kind],
        ACTIVATIONS[weight.activation],
        SCALE_DTYPES[weight.scales.dtype],
        weight.group_size,
        weight.zeros is not None,
        weight.input_order is not None,
        weight.activation_group or 0,
    )


class _Content:
    """Addresses of one matrix, or of gate and up, for the packing functions; keeps what they point to alive."""

    def __init__(self, *weights: Weight, bias: Tensor | None = None) -> None:
        self._alive: list[Tensor] = []
        parts = [self._parts(weight) for weight in weights]
        first = weights[0]
        order = 0
        if isinstance(first, QuantizedWeight) and first.input_order is not None:
            order = self._address(first.input_order.to(torch.int32))
        second = parts[1] if len(parts) > 1 else (0, 0, 0)
        bias_address = 0 if bias is None else self._address(bias)
        self.value = parts[0], second, first.shape[0], order, bias_address, 0 if bias is None else DTYPES[bias.dtype]

    def _parts(self, weight: Weight) -> tuple[int, int, int]:
        if isinstance(weight, Tensor):
            return self._address(weight), 0, 0
        zeros = 0 if weight.zeros is None else self._address(weight.zeros)
        return self._address(weight.values), self._address(weight.scales), zeros

    def _address(self, tensor: Tensor) -> int:
        self._alive.append(tensor.contiguous())
        return self._alive[-1].data_ptr()


class NativePacking:
    """The pack_* methods of the contract. The packed objects keep their memory alive, also after the pool is closed.

    Quantised weights raise UnsupportedError where gate and up, or two experts, were quantised in different ways.
    """

    _pool: _native.ThreadPool

    def quantize(self, weight: Tensor, kind: Literal["int8", "int4"]) -> QuantizedWeight:
        if weight.ndim != 2 or not weight.is_floating_point() or kind not in ("int8", "int4") or not weight.numel():
            return quantize(weight, kind)  # which says what is wrong, if anything is
        if not all_on_cpu(weight):
            refuse("quantize", "weight must be a CPU tensor", weight)
        source = weight if weight.dtype in DTYPES else weight.float()
        source = source if source.shape[1] < 2 or source.stride(1) == 1 else source.contiguous()
        n, k = source.shape
        size = max(k, 1) if kind == "int8" else min(INT4_GROUP, max(k, 1))
        values = torch.empty(n, k, dtype=torch.int8)
        scales = torch.empty(n, -(-k // size), dtype=torch.float32 if kind == "int8" else torch.bfloat16)
        matrix = source.data_ptr(), n, k, source.stride(0), DTYPES[source.dtype]
        bad = _native.quantize(self._pool, matrix, FORMATS[kind], values.data_ptr(), scales.data_ptr())
        if bad >= 0:
            raise ShapeError(f"quantize: row {bad} of the weight holds NaN or infinity; the checkpoint is damaged")
        return own_weight(kind, values, scales, size, source.dtype)

    def pack_linear(self, weight: Weight, bias: Tensor | None = None) -> PackedLinear:
        weight = _checked("pack_linear", "weight", weight)
        if bias is not None:
            if bias.dtype not in DTYPES:
                refuse("pack_linear", "bias must be float32 or bfloat16", bias)
            bias = bias.contiguous()
            vector("pack_linear", "bias", bias, weight.shape[0], bias.dtype)
        layout = _layout(weight, weight.shape[0], bias is not None)
        content = _Content(weight, bias=bias)
        return PackedLinear(_native.pack_linear(self._pool, layout, content.value), layout, weight.dtype)

    def pack_swiglu(self, gate: Weight, up: Weight, down: Weight) -> PackedSwiglu:
        gate, up, down = self._swiglu_parts("pack_swiglu", gate, up, down)
        layouts = self._swiglu_layouts(gate, down)
        gate_up_content, down_content = _Content(gate, up), _Content(down)
        handle = _native.pack_swiglu(self._pool, layouts[0], gate_up_content.value, layouts[1], down_content.value)
        return PackedSwiglu(handle, *layouts, gate.dtype)

    @staticmethod
    def _swiglu_layouts(gate: Weight, down: Weight) -> tuple[Layout, Layout]:
        return _layout(gate, -(-gate.shape[0] // 16) * 32), _layout(down, down.shape[0])

    @staticmethod
    def _swiglu_parts(op: str, gate: Weight, up: Weight, down: Weight) -> tuple[Weight, Weight, Weight]:
        gate, up, down = _checked(op, "gate", gate), _checked(op, "up", up), _checked(op, "down", down)
        if up.shape != gate.shape or tuple(down.shape) != tuple(gate.shape)[::-1]:
            refuse(op, "gate and up must be [I, C], down [C, I]", gate, up, down)
        if not gate.dtype == up.dtype == down.dtype:
            refuse(op, "gate, up and down must share a dtype", gate, up, down)
        alike = isinstance(gate, Tensor) and isinstance(up, Tensor)
        if isinstance(gate, QuantizedWeight) and isinstance(up, QuantizedWeight):
            alike = are_alike(gate, up)
        if not alike:
            raise UnsupportedError(
                f"{op}: gate and up are quantised in different ways (kind, groups or order of the inputs), and the "
                "native kernels run them as one; use backend='reference'"
            )
        return gate, up, down

    def pack_moe(
        self, router: Tensor, experts: Iterable[tuple[Weight, Weight, Weight]], shared: PackedSwiglu | None
    ) -> PackedMoe:
        raised = _checked("pack_moe", "router", router)
        if not isinstance(raised, Tensor):
            refuse("pack_moe", "router must be a tensor", raised)
        raised = raised.float()
        count, width = raised.shape
        layer: PackedMoe | None = None
        found = 0
        for parts in experts:
            gate, up, down = self._swiglu_parts("pack_moe", *parts)
            layouts = self._swiglu_layouts(gate, down)
            if gate.shape[1] != width or found == count:
                refuse("pack_moe", f"expert {found} does not fit a router [E, C]", gate, router)
            if layer is None:
                layer = self._new_moe(raised, layouts, gate.dtype, shared)
            if layouts != (layer.gate_up, layer.down):
                self._refuse_expert(found, layouts, layer, gate, down)
            gate_up_content, down_content = _Content(gate, up), _Content(down)
            _native.fill_expert(self._pool, layer.handle, found, gate_up_content.value, down_content.value)
            found += 1
        if layer is None or found != count:
            refuse("pack_moe", f"{found} experts for a router [E, C]", router)
        return layer

    def _new_moe(
        self, router: Tensor, layouts: tuple[Layout, Layout], dtype: torch.dtype, shared: PackedSwiglu | None
    ) -> PackedMoe:
        count, width = router.shape
        if shared is not None and (shared.width != width or shared.dtype != dtype):
            raise ShapeError(
                f"pack_moe: the shared expert is {shared.width} wide, {shared.dtype}; the others {width}, {dtype}"
            )
        shared_handle = None if shared is None else shared.handle
        handle = _native.new_moe(self._pool, router.data_ptr(), count, *layouts, shared_handle)
        return PackedMoe(handle, count, *layouts, shared, dtype)

    @staticmethod
    def _refuse_expert(
        expert: int, layouts: tuple[Layout, Layout], layer: PackedMoe, gate: Weight, down: Weight
    ) -> NoReturn:
        first = (layer.gate_up, layer.down)
        if all((a.n, a.k, a.dtype) == (b.n, b.k, b.dtype) for a, b in zip(layouts, first)):
            raise UnsupportedError(
                f"pack_moe: expert {expert} is quantised in another way than expert 0, and the native kernels run all "
                "in one way; use backend='reference'"
            )
        refuse("pack_moe", f"expert {expert} must have the size and dtype of expert 0", gate, down)
