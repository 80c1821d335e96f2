"""The first vision tower: windowed and global attention with decomposed relative positions, then 16x downsampling.

Source: deepseek-ocr.md sections 2.1, 3.1, 3.2 (the traps: padding after the norm is not masked, the position table is
resized with antialiasing, the relative tables without).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..config import SamConfig
from ..errors import ShapeError
from ..ops import OpCase, Ops
from .weight_map import Norm, Part, Shape, linear_part, norm_part, part, tensor_part
from .workspace import Workspace

Stages = Callable[[str, Tensor], None]
PREFIX = "model.sam_model"
NECK = {
    "conv1": "neck.0.weight",
    "norm1_weight": "neck.1.weight",
    "norm1_bias": "neck.1.bias",
    "conv2": "neck.2.weight",
    "norm2_weight": "neck.3.weight",
    "norm2_bias": "neck.3.bias",
    "down1": "net_2.weight",
    "down2": "net_3.weight",
}


def sam_parts(config: SamConfig) -> list[Part]:
    """The tower's weight map."""
    c, p, grid = config.width, config.patch_size, config.image_size // config.patch_size
    hidden, head_dim = int(c * config.mlp_ratio), c // config.heads
    patch: dict[str, Shape] = {f"{PREFIX}.patch_embed.proj.weight": (c, 3, p, p)}
    patch[f"{PREFIX}.patch_embed.proj.bias"] = (c,)
    parts = [
        tensor_part("sam.pos_embed", f"{PREFIX}.pos_embed", (1, grid, grid, c)),
        part("sam.patch_embed", patch, lambda ops, tensors: ops.pack_patch_embed(*tensors)),
    ]
    for i in range(config.layers):
        to, of = f"sam.{i}", f"{PREFIX}.blocks.{i}"
        size = grid if i in config.global_attn_indexes else config.window_size
        parts += [
            norm_part(f"{to}.norm1", f"{of}.norm1", c),
            norm_part(f"{to}.norm2", f"{of}.norm2", c),
            linear_part(f"{to}.qkv", f"{of}.attn.qkv", 3 * c, c, bias=True),
            tensor_part(f"{to}.qkv_bias", f"{of}.attn.qkv.bias", (3 * c,)),  # what the padding of a window holds
            linear_part(f"{to}.proj", f"{of}.attn.proj", c, c, bias=True),
            tensor_part(f"{to}.rel_h", f"{of}.attn.rel_pos_h", (2 * size - 1, head_dim)),
            tensor_part(f"{to}.rel_w", f"{of}.attn.rel_pos_w", (2 * size - 1, head_dim)),
            linear_part(f"{to}.lin1", f"{of}.mlp.lin1", hidden, c, bias=True),
            linear_part(f"{to}.lin2", f"{of}.mlp.lin2", c, hidden, bias=True),
        ]
    f, (f2, f3) = config.out_channels, config.downsample_channels
    shapes = [(f, c, 1, 1), (f,), (f,), (f, f, 3, 3), (f,), (f,), (f2, f, 3, 3), (f3, f2, 3, 3)]
    neck: dict[str, Shape] = {f"{PREFIX}.{name}": shape for name, shape in zip(NECK.values(), shapes)}
    parts.append(part("sam.neck", neck, lambda ops, tensors: ops.pack_conv_downsample(dict(zip(NECK, tensors)))))
    return parts


def sam_cases(config: SamConfig, dtype: torch.dtype) -> list[OpCase]:
    c, hidden = config.width, int(config.width * config.mlp_ratio)
    shapes = [(3 * c, c), (c, c), (hidden, c), (c, hidden)]
    heads = (("num_heads", config.heads), ("head_dim", c // config.heads))
    cases = [OpCase("linear", dtype, (("in_features", i), ("out_features", o))) for o, i in shapes]
    cases += [
        OpCase("patch_embed", dtype, (("width", c), ("patch_size", config.patch_size))),
        OpCase("layer_norm", dtype, (("width", c),)),
        OpCase("window_attention", dtype, (*heads, ("window", config.window_size))),
        OpCase("conv_downsample", dtype, (("width", c), ("neck", config.out_channels))),
    ]
    if config.global_attn_indexes:
        cases.append(OpCase("window_attention", dtype, (*heads, ("window", 0))))
    return cases


def resize_grid(table: Tensor, size: int) -> Tensor:
    """[g, g, C] -> [size, size, C] float32 by bicubic interpolation with antialiasing (cubic kernel at a = -0.5).

    Antialiasing changes the kernel also when enlarging: the plain one (a = -0.75) is a different table.
    """
    table = table.float()
    if table.shape[0] == size:
        return table
    grid = table.permute(2, 0, 1)[None]
    resized = functional.interpolate(grid, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0)


def resize_relative(table: Tensor, size: int) -> Tensor:
    """[L, D] -> [2*size-1, D] float32, linear between half-pixel centres, no antialiasing."""
    table = table.float()
    if table.shape[0] == 2 * size - 1:
        return table
    return functional.interpolate(table.T[None], size=2 * size - 1, mode="linear", align_corners=False)[
        0
    ].T.contiguous()


class SamBlock:
    """x + attention(norm(x)), then x + mlp(norm(x)), in place."""

    def __init__(self, config: SamConfig, index: int, packed: Mapping[str, Any], ops: Ops, scratch: Workspace) -> None:
        def get(name: str) -> Any:
            return packed[f"sam.{index}.{name}"]

        self._config, self._ops, self._scratch = config, ops, scratch
        self._window = 0 if index in config.global_attn_indexes else config.window_size
        self._norm1: Norm = get("norm1")
        self._norm2: Norm = get("norm2")
        self._qkv, self._proj, self._lin1, self._lin2 = get("qkv"), get("proj"), get("lin1"), get("lin2")
        self._qkv_bias: Tensor = get("qkv_bias")
        self._rel = (get("rel_h"), get("rel_w"))
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> None:
        """x [B, g, g, C] is replaced by the block's output."""
        ops, eps, take = self._ops, self._config.layer_norm_eps, self._scratch.take
        batch, grid, _, width = x.shape
        rows = x.view(-1, width)
        count, inner = rows.shape[0], int(width * self._config.mlp_ratio)
        normed = take("normed", (count, width), x.dtype)
        ops.layer_norm(rows, self._norm1.weight, self._norm1.bias, eps, out=normed)
        qkv = ops.linear(normed, self._qkv, out=take("wide", (count, 3 * width), x.dtype))
        qkv = qkv.view(batch, grid, grid, 3 * width)
        rel_h, rel_w = self._relative(self._window or grid)
        seen = normed.view(batch, grid, grid, width)  # what it held is in qkv
        ops.window_attention(qkv, self._qkv_bias, rel_h, rel_w, self._config.heads, self._window, out=seen)
        ops.linear(normed, self._proj, residual=rows, out=rows)
        ops.layer_norm(rows, self._norm2.weight, self._norm2.bias, eps, out=normed)
        hidden = ops.linear(normed, self._lin1, activation="gelu", out=take("wide", (count, inner), x.dtype))
        ops.linear(hidden, self._lin2, residual=rows, out=rows)

    def _relative(self, size: int) -> tuple[Tensor, Tensor]:
        if size not in self._tables:
            self._tables[size] = (resize_relative(self._rel[0], size), resize_relative(self._rel[1], size))
        return self._tables[size]


class SamTower:
    """Pixels [B, 3, S, S] -> features [B, q, q, F] with q = S/64, channels last. Tables that depend on S are kept."""

    def __init__(self, config: SamConfig, packed: Mapping[str, Any], ops: Ops, scratch: Workspace) -> None:
        self.config = config
        self._ops = ops
        self._patch = packed["sam.patch_embed"]
        self._pos_embed: Tensor = packed["sam.pos_embed"]
        self._neck = packed["sam.neck"]
        self._blocks = [SamBlock(config, i, packed, ops, scratch) for i in range(config.layers)]
        self._positions: dict[int, Tensor] = {}

    def forward(self, pixels: Tensor, stages: Stages | None = None) -> Tensor:
        """pixels in the activation dtype. Raises ShapeError if S is not a multiple of four patches."""
        step = 4 * self.config.patch_size
        if pixels.ndim != 4 or pixels.shape[2] != pixels.shape[3] or pixels.shape[2] % step:
            raise ShapeError(f"views must be [B, 3, S, S] with S a multiple of {step}, got {list(pixels.shape)}")
        x = self._ops.patch_embed(pixels, self._patch, self.config.patch_size)
        x += self._position(x.shape[1])
        if stages:
            stages("sam.patch_embed", x)
        for i, block in enumerate(self._blocks):
            block.forward(x)
            if stages:
                stages(f"sam.block.{i}", x)
        features = self._ops.conv_downsample(x, self._neck, self.config.layer_norm_eps)
        if stages:
            stages("sam", features)
        return features

    def _position(self, grid: int) -> Tensor:
        if grid not in self._positions:
            self._positions[grid] = resize_grid(self._pos_embed[0], grid).to(self._pos_embed.dtype)
        return self._positions[grid]
