"""The vision half of the adapter of the Triton kernels, and the checks that both halves share; see triton.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .triton_packing import DTYPES, PackedPatches, TritonPacking, refuse

if TYPE_CHECKING:
    from ..kernels.conv_downsample import Neck


class TritonVision(TritonPacking):
    """The vision ops of the contract."""

    # ---- checks ----------------------------------------------------------------------------------------------------
    def _is_here(self, x: Tensor) -> bool:
        return x.device.type == self.device.type and (self.device.index is None or x.device == self.device)

    def _rows(self, op: str, x: Tensor, width: int, dtype: torch.dtype) -> None:
        if x.ndim != 2 or x.shape[1] != width or x.dtype != dtype or (width > 1 and x.stride(1) != 1):
            refuse(op, f"a matrix must be [N, {width}] {str(dtype).removeprefix('torch.')} with contiguous rows", x)
        if dtype not in DTYPES or not self._is_here(x):
            refuse(op, f"matrices must be float32, bfloat16 or float16 on {self.device}, not on {x.device}", x)

    def _vector(self, op: str, name: str, x: Tensor, size: int, dtype: torch.dtype) -> None:
        if x.ndim != 1 or x.shape[0] != size or x.dtype != dtype or not x.is_contiguous() or not self._is_here(x):
            refuse(op, f"{name} must be contiguous [{size}] {str(dtype).removeprefix('torch.')} on {self.device}", x)

    def _like(self, op: str, name: str, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if x is None:
            return
        if x.shape != shape or x.dtype != dtype or (shape[-1] > 1 and x.stride(-1) != 1) or not self._is_here(x):
            refuse(op, f"{name} must be {list(shape)} {str(dtype).removeprefix('torch.')}, last axis contiguous", x)

    def _heads(self, op: str, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """[N, H, D] with the heads of a row together; rows may be strided."""
        self._like(op, "q or out", x, shape, dtype)
        if x is not None and shape[1] > 1 and x.stride(1) != shape[2]:
            refuse(op, "the heads of a row must lie together", x)

    def _caches(self, op: str, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[int, int]:
        """Heads and head size of the cache."""
        good = keys.ndim == 4 and values.shape == keys.shape and keys.dtype == values.dtype == dtype
        if not good or not keys.is_contiguous() or not values.is_contiguous() or not self._is_here(keys):
            refuse(
                op, "keys and values must be contiguous [num_blocks, block_size, K, D], activation dtype", keys, values
            )
        if keys.shape[3] % 2 or not keys.shape[3]:
            refuse(op, "D must be even", keys)
        return keys.shape[2], keys.shape[3]

    def _dense(self, op: str, name: str, x: Tensor, axes: int) -> None:
        if x.ndim != axes or x.dtype not in DTYPES or not x.is_contiguous() or not self._is_here(x):
            refuse(op, f"{name} must be contiguous on {self.device}, {axes} axes, float32, bfloat16 or float16", x)

    # ---- ops -------------------------------------------------------------------------------------------------------
    def patch_embed(self, pixels: Tensor, weight: PackedPatches, patch_size: int) -> Tensor:
        from ..kernels.patch_embed import patch_embed

        op = "patch_embed"
        self._dense(op, "pixels", pixels, 4)
        _, channels, height, width = pixels.shape
        fits = channels == weight.channels and patch_size == weight.patch_size and pixels.dtype == weight.matrix.dtype
        if not fits or height != width or height % patch_size:
            rule = f"[B, {weight.channels}, S, S] {weight.matrix.dtype}, S a multiple of {weight.patch_size}"
            refuse(op, f"for patches of {patch_size} pixels must be {rule}", pixels)
        return patch_embed(pixels, weight.matrix, patch_size)

    def conv_downsample(self, x: Tensor, neck: Neck, eps: float) -> Tensor:
        from ..kernels.conv_downsample import conv_downsample

        self._dense("conv_downsample", "x", x, 4)
        channels = neck.conv1.shape[3]
        if x.shape[1] != x.shape[2] or x.shape[3] != channels or x.dtype != neck.conv1.dtype:
            refuse("conv_downsample", f"x must be [B, G, G, {channels}] {neck.conv1.dtype}", x)
        return conv_downsample(x, neck, eps)

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
        from ..kernels.window_attention import window_attention

        op = "window_attention"
        self._dense(op, "qkv", qkv, 4)
        grid = qkv.shape[1]
        if grid != qkv.shape[2] or window < 0:
            refuse(op, f"qkv must be [B, G, G, 3*C] and the window, {window}, 0 or more", qkv)
        head_dim, size = self._head_dim(op, qkv, num_heads), window or grid
        for table in (rel_h, rel_w):
            good = table.shape == (2 * size - 1, head_dim) and table.dtype == torch.float32 and table.is_contiguous()
            if not good or not self._is_here(table):
                rule = f"[{2 * size - 1}, {head_dim}] float32"
                refuse(op, f"for windows of {size} the tables must be contiguous {rule}", table)
        self._vector(op, "pad_qkv", pad_qkv, qkv.shape[3], qkv.dtype)
        self._result(op, qkv, out)
        return window_attention(qkv, pad_qkv, rel_h, rel_w, num_heads, window, out)

    def attention(self, qkv: Tensor, num_heads: int, out: Tensor | None = None) -> Tensor:
        from ..kernels.attention import attention

        self._dense("attention", "qkv", qkv, 3)
        self._head_dim("attention", qkv, num_heads)
        self._result("attention", qkv, out)
        return attention(qkv, num_heads, out)

    def _result(self, op: str, qkv: Tensor, out: Tensor | None) -> None:
        shape = (*qkv.shape[:-1], qkv.shape[-1] // 3)
        if out is not None and (out.shape != shape or out.dtype != qkv.dtype or not out.is_contiguous()):
            refuse(op, f"out must be contiguous {list(shape)} in qkv's dtype", out, qkv)

    @staticmethod
    def _head_dim(op: str, qkv: Tensor, num_heads: int) -> int:
        if num_heads < 1 or not qkv.shape[-1] or qkv.shape[-1] % (3 * num_heads):
            refuse(op, f"the last axis of qkv must be three times a multiple of {num_heads} heads", qkv)
        return int(qkv.shape[-1]) // (3 * num_heads)
