"""The vision half of the adapter of the C++ kernels; see native.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _native
from .packing import DTYPES, NativePacking, PackedLinear, refuse, vector


@dataclass(frozen=True, slots=True)
class PackedPatches:
    """weight [C, channels, p, p] as a matrix [C, channels*p*p]."""

    linear: PackedLinear
    channels: int
    patch_size: int


@dataclass(frozen=True, slots=True)
class PackedNeck:
    """The convolutions as matrices [out, kernel row * kernel column * in]; the norms' weights and biases in float32."""

    conv1: PackedLinear
    conv2: PackedLinear
    down1: PackedLinear
    down2: PackedLinear
    norms: tuple[Tensor, Tensor, Tensor, Tensor]


def _dense(op: str, name: str, x: Tensor, axes: int) -> Tensor:
    if x.ndim != axes or x.dtype not in DTYPES or not x.is_contiguous() or x.device.type != "cpu":
        refuse(op, f"{name} must be a contiguous CPU tensor of {axes} axes, float32 or bfloat16", x)
    return x


def _matrix(x: Tensor) -> tuple[int, int, int, int, int]:
    """A contiguous tensor [..., C] as rows of C."""
    width = x.shape[-1]
    return x.data_ptr(), x.numel() // max(width, 1), width, width, DTYPES[x.dtype]


class NativeVision(NativePacking):
    """The vision ops of the contract and the packing of their weights."""

    # ---- packing ---------------------------------------------------------------------------------------------------
    def pack_patch_embed(self, weight: Tensor, bias: Tensor) -> PackedPatches:
        if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or bias.shape != weight.shape[:1]:
            refuse("pack_patch_embed", "needs [C, 3, p, p] and [C]", weight, bias)
        return PackedPatches(self.pack_linear(weight.flatten(1), bias), weight.shape[1], weight.shape[2])

    def pack_conv_downsample(self, weights: dict[str, Tensor]) -> PackedNeck:
        op = "pack_conv_downsample"
        convs = [weights[name] for name in ("conv1", "conv2", "down1", "down2")]
        for conv, kernel, before in zip(convs, (1, 3, 3, 3), (None, *convs)):
            fits = conv.ndim == 4 and tuple(conv.shape[2:]) == (kernel, kernel) and conv.dtype == convs[0].dtype
            if not fits or (before is not None and conv.shape[1] != before.shape[0]):
                refuse(op, "conv1 must be 1x1, the others 3x3 over the result of the one before, in one dtype", *convs)
        norms = tuple(weights[f"norm{i}_{name}"].float().contiguous() for i in (1, 2) for name in ("weight", "bias"))
        for norm, conv in zip(norms, (convs[0], convs[0], convs[1], convs[1])):
            vector(op, "a norm", norm, conv.shape[0], torch.float32)
        conv1, conv2, down1, down2 = (self.pack_linear(conv.permute(0, 2, 3, 1).flatten(1)) for conv in convs)
        return PackedNeck(conv1, conv2, down1, down2, (norms[0], norms[1], norms[2], norms[3]))

    # ---- convolutions ----------------------------------------------------------------------------------------------
    def patch_embed(self, pixels: Tensor, weight: PackedPatches, patch_size: int) -> Tensor:
        op = "patch_embed"
        pixels = _dense(op, "pixels", pixels, 4)
        batch, channels, height, width = pixels.shape
        fits = channels == weight.channels and patch_size == weight.patch_size and pixels.dtype == weight.linear.dtype
        if not fits or height != width or height % patch_size:
            rule = f"[B, {weight.channels}, S, S] {weight.linear.dtype}, S a multiple of {weight.patch_size}"
            refuse(op, f"for patches of {patch_size} pixels must be {rule}", pixels)
        grid = height // patch_size
        out = torch.empty((batch, grid, grid, weight.linear.out_features), dtype=pixels.dtype)
        sizes = batch, channels, height, width, patch_size
        _native.patch_embed(self._pool, pixels.data_ptr(), *sizes, weight.linear.handle, _matrix(out))
        return out

    def conv_downsample(self, x: Tensor, neck: PackedNeck, eps: float) -> Tensor:
        op = "conv_downsample"
        batch, grid, other, width = _dense(op, "x", x, 4).shape
        if grid != other or width != neck.conv1.in_features or x.dtype != neck.conv1.dtype:
            refuse(op, f"x must be [B, G, G, {neck.conv1.in_features}] {neck.conv1.dtype}", x)
        half = (grid + 1) // 2
        side = (half + 1) // 2
        out = torch.empty((batch, side, side, neck.down2.out_features), dtype=x.dtype)
        one, two, three, four = (conv.handle for conv in (neck.conv1, neck.conv2, neck.down1, neck.down2))
        first, second, third, fourth = (norm.data_ptr() for norm in neck.norms)
        norms = first, second, third, fourth
        _native.conv_downsample(self._pool, _matrix(x), batch, grid, one, two, three, four, norms, eps, _matrix(out))
        return out

    # ---- attention -------------------------------------------------------------------------------------------------
    def window_attention(
        self,
        qkv: Tensor,
        pad_qkv: Tensor,
        rel_h: Tensor,
        rel_w: Tensor,
        num_heads: int,
        window: int,
        out: Tensor | None = None,
    ) -> Tensor:
        op = "window_attention"
        batch, grid, other, width = _dense(op, "qkv", qkv, 4).shape
        if grid != other or window < 0:
            refuse(op, f"qkv must be [B, G, G, 3*C] and the window, {window}, 0 or more", qkv)
        head_dim, size = self._head_dim(op, qkv, num_heads), window or grid
        for table in (rel_h, rel_w):
            good = table.shape == (2 * size - 1, head_dim) and table.dtype == torch.float32 and table.is_contiguous()
            if not good or table.device.type != "cpu":
                rule = f"[{2 * size - 1}, {head_dim}] float32"
                refuse(op, f"for windows of {size} the tables must be contiguous {rule}", table)
        pad = vector(op, "pad_qkv", pad_qkv, width, qkv.dtype)
        tables = pad, rel_h.data_ptr(), rel_w.data_ptr()
        return self._attend(op, qkv, (batch, grid, grid, size, size), (num_heads, head_dim), tables, out)

    def attention(self, qkv: Tensor, num_heads: int, out: Tensor | None = None) -> Tensor:
        batch, tokens, _ = _dense("attention", "qkv", qkv, 3).shape
        heads = num_heads, self._head_dim("attention", qkv, num_heads)
        return self._attend("attention", qkv, (batch, 1, tokens, 1, tokens), heads, (0, 0, 0), out)

    @staticmethod
    def _head_dim(op: str, qkv: Tensor, num_heads: int) -> int:
        if num_heads < 1 or not qkv.shape[-1] or qkv.shape[-1] % (3 * num_heads):
            refuse(op, f"the last axis of qkv must be three times a multiple of {num_heads} heads", qkv)
        return qkv.shape[-1] // (3 * num_heads)

    def _attend(
        self,
        op: str,
        qkv: Tensor,
        sizes: tuple[int, int, int, int, int],
        heads: tuple[int, int],
        tables: tuple[int, int, int],
        out: Tensor | None,
    ) -> Tensor:
        """sizes: batch, rows and columns of the grid, then of a window; tables: addresses of pad, rel_h, rel_w or 0."""
        shape = (*qkv.shape[:-1], heads[0] * heads[1])
        if out is None:
            out = torch.empty(shape, dtype=qkv.dtype)
        elif _dense(op, "out", out, qkv.ndim).shape != shape or out.dtype != qkv.dtype:
            refuse(op, f"out must be {list(shape)} in qkv's dtype", out)
        if out.numel():
            _native.window_attention(self._pool, _matrix(qkv), *sizes, *heads, *tables, _matrix(out))
        return out
