"""Weights into the layout of the C++ kernels (csrc/cpu/kernels.h), once at load, and the checks that adapters share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from .. import _native
from ..errors import ShapeError

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight [out_features, in_features] and its bias in the kernels' layout."""

    handle: _native.Linear
    out_features: int
    in_features: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class PackedSwiglu:
    """gate, up [inner, width] and down [width, inner]."""

    handle: _native.Swiglu
    width: int
    inner: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class PackedMoe:
    """Router (float32), experts and the shared expert, if there is one."""

    handle: _native.Moe
    width: int
    num_experts: int
    dtype: torch.dtype


def refuse(op: str, rule: str, *tensors: Tensor | None) -> NoReturn:
    got = ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors if t is not None)
    raise ShapeError(f"{op}: {rule}; got {got}")


def vector(op: str, name: str, x: Tensor, size: int, dtype: torch.dtype) -> int:
    """Address of a contiguous [size] tensor."""
    if x.ndim != 1 or x.shape[0] != size or x.dtype != dtype or not x.is_contiguous() or x.device.type != "cpu":
        refuse(op, f"{name} must be contiguous [{size}] {str(dtype).removeprefix('torch.')}", x)
    return x.data_ptr()


def _weight(op: str, name: str, weight: Tensor) -> Tensor:
    if weight.ndim != 2 or weight.dtype not in DTYPES or weight.device.type != "cpu":
        refuse(op, f"{name} must be a CPU tensor of two axes, float32 or bfloat16", weight)
    return weight.contiguous()


class NativePacking:
    """The pack_* methods of the contract. The packed objects keep their memory alive, also after the pool is closed."""

    _pool: _native.ThreadPool

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        weight = _weight("pack_linear", "weight", weight)
        out_features, in_features = weight.shape
        code = DTYPES[weight.dtype]
        bias_address, bias_code = 0, 0
        if bias is not None:
            if bias.dtype not in DTYPES:
                refuse("pack_linear", "bias must be float32 or bfloat16", bias)
            bias = bias.contiguous()
            bias_address = vector("pack_linear", "bias", bias, out_features, bias.dtype)
            bias_code = DTYPES[bias.dtype]
        handle = _native.pack_linear(
            self._pool, weight.data_ptr(), bias_address, bias_code, out_features, in_features, code
        )
        return PackedLinear(handle, out_features, in_features, weight.dtype)

    def pack_swiglu(self, gate: Tensor, up: Tensor, down: Tensor) -> PackedSwiglu:
        gate, up, down = self._swiglu_parts("pack_swiglu", gate, up, down)
        inner, width = gate.shape
        addresses = gate.data_ptr(), up.data_ptr(), down.data_ptr()
        handle = _native.pack_swiglu(self._pool, *addresses, inner, width, DTYPES[gate.dtype])
        return PackedSwiglu(handle, width, inner, gate.dtype)

    @staticmethod
    def _swiglu_parts(op: str, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = _weight(op, "gate", gate), _weight(op, "up", up), _weight(op, "down", down)
        if up.shape != gate.shape or down.shape != gate.shape[::-1]:
            refuse(op, "gate and up must be [I, C], down [C, I]", gate, up, down)
        if not gate.dtype == up.dtype == down.dtype:
            refuse(op, "gate, up and down must share a dtype", gate, up, down)
        return gate, up, down

    def pack_moe(
        self, router: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor], shared: PackedSwiglu | None
    ) -> PackedMoe:
        raised = _weight("pack_moe", "router", router).float()
        experts, width = raised.shape
        if not experts or not len(gate) == len(up) == len(down) == experts:
            refuse("pack_moe", f"{len(gate)} gates, {len(up)} ups, {len(down)} downs for a router [E, C]", router)
        parts = [self._swiglu_parts("pack_moe", *three) for three in zip(gate, up, down)]
        first = parts[0][0]
        for own, *_ in parts:
            if own.shape != first.shape or own.dtype != first.dtype or own.shape[1] != width:
                refuse("pack_moe", "experts must have one size and dtype, and the router's width", own, first, router)
        if shared is not None and (shared.width != width or shared.dtype != first.dtype):
            raise ShapeError(
                f"pack_moe: the shared expert is {shared.width} wide, {shared.dtype}; the others {width}, {first.dtype}"
            )
        addresses = [(g.data_ptr(), u.data_ptr(), d.data_ptr()) for g, u, d in parts]
        handle = _native.pack_moe(
            self._pool,
            raised.data_ptr(),
            addresses,
            None if shared is None else shared.handle,
            first.shape[0],
            width,
            DTYPES[first.dtype],
        )
        return PackedMoe(handle, width, experts, first.dtype)
