"""The vision half of the adapter of the C++ kernels; see native.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .packing import DTYPES, refuse, vector


class NativeVision:
    """The ops window_attention and attention of the contract."""

    _pool: _native.ThreadPool

    def window_attention(
        self, qkv: Tensor, pad_qkv: Tensor, rel_h: Tensor, rel_w: Tensor, num_heads: int, window: int
    ) -> Tensor:
        op = "window_attention"
        if qkv.ndim != 4 or qkv.shape[1] != qkv.shape[2] or window < 0:
            refuse(op, f"qkv must be [B, G, G, 3*C] and window={window} at least 0", qkv)
        head_dim = self._head_dim(op, qkv, num_heads)
        batch, grid, _, width = qkv.shape
        size = window or grid
        for table in (rel_h, rel_w):
            good = table.shape == (2 * size - 1, head_dim) and table.dtype == torch.float32 and table.is_contiguous()
            if not good or table.device.type != "cpu":
                refuse(op, f"for windows of {size} the tables must be contiguous [{2 * size - 1}, {head_dim}]", table)
        pad = vector(op, "pad_qkv", pad_qkv, width, qkv.dtype)
        relative = rel_h.data_ptr(), rel_w.data_ptr()
        return self._attend(qkv, (batch, grid, grid, size, size), num_heads, head_dim, pad, *relative)

    def attention(self, qkv: Tensor, num_heads: int) -> Tensor:
        if qkv.ndim != 3:
            refuse("attention", "qkv must be [B, T, 3*C]", qkv)
        head_dim = self._head_dim("attention", qkv, num_heads)
        batch, tokens, _ = qkv.shape
        return self._attend(qkv, (batch, 1, tokens, 1, tokens), num_heads, head_dim, 0, 0, 0)

    @staticmethod
    def _head_dim(op: str, qkv: Tensor, num_heads: int) -> int:
        if qkv.dtype not in DTYPES or not qkv.is_contiguous() or qkv.device.type != "cpu":
            refuse(op, "qkv must be a contiguous CPU tensor, float32 or bfloat16", qkv)
        if num_heads < 1 or not qkv.shape[-1] or qkv.shape[-1] % (3 * num_heads):
            refuse(op, f"the width of qkv must be three times {num_heads} heads", qkv)
        return qkv.shape[-1] // (3 * num_heads)

    def _attend(
        self,
        qkv: Tensor,
        sizes: tuple[int, int, int, int, int],
        num_heads: int,
        head_dim: int,
        pad: int,
        rel_h: int,
        rel_w: int,
    ) -> Tensor:
        """sizes: batch, rows and columns of the grid, rows and columns of a window."""
        width, code = num_heads * head_dim, DTYPES[qkv.dtype]
        out = torch.empty((*qkv.shape[:-1], width), dtype=qkv.dtype)
        if out.numel():
            rows = out.numel() // width
            source, target = (qkv.data_ptr(), rows, 3 * width, 3 * width, code), (out.data_ptr(), rows, width, width, code)
            _native.window_attention(self._pool, source, *sizes, num_heads, head_dim, pad, rel_h, rel_w, target)
        return out
