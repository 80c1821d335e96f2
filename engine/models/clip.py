"""The second vision tower: a CLIP-L stack that reads SAM features instead of pixels.

Source: deepseek-ocr.md 2.2, 3.3, 3.4. Its patch embedding is in the checkpoint and is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import ClipConfig
from ..errors import ConfigError
from ..ops import OpCase, Ops
from .sam import resize_grid
from .weight_map import Norm, Part, linear_part, norm_part, tensor_part
from .workspace import Workspace

Stages = Callable[[str, Tensor], None]
PREFIX = "model.vision_model"
UNUSED = (f"{PREFIX}.embeddings.patch_embedding.weight",)


def clip_parts(config: ClipConfig) -> list[Part]:
    """The tower's weight map."""
    c, hidden = config.width, int(config.width * config.mlp_ratio)
    positions = (config.image_size // config.patch_size) ** 2 + 1
    parts = [
        tensor_part("clip.class_embedding", f"{PREFIX}.embeddings.class_embedding", (c,)),
        tensor_part("clip.positions", f"{PREFIX}.embeddings.position_embedding.weight", (positions, c)),
        norm_part("clip.pre_norm", f"{PREFIX}.pre_layrnorm", c),  # spelt so in the checkpoint
    ]
    for i in range(config.layers):
        to, of = f"clip.{i}", f"{PREFIX}.transformer.layers.{i}"
        parts += [
            norm_part(f"{to}.norm1", f"{of}.layer_norm1", c),
            norm_part(f"{to}.norm2", f"{of}.layer_norm2", c),
            linear_part(f"{to}.qkv", f"{of}.self_attn.qkv_proj", 3 * c, c, bias=True),
            linear_part(f"{to}.out", f"{of}.self_attn.out_proj", c, c, bias=True),
            linear_part(f"{to}.fc1", f"{of}.mlp.fc1", hidden, c, bias=True),
            linear_part(f"{to}.fc2", f"{of}.mlp.fc2", c, hidden, bias=True),
        ]
    return parts


def clip_cases(config: ClipConfig, dtype: torch.dtype) -> list[OpCase]:
    c, hidden = config.width, int(config.width * config.mlp_ratio)
    shapes = [(3 * c, c), (c, c), (hidden, c), (c, hidden)]
    cases = [OpCase("linear", dtype, (("in_features", i), ("out_features", o))) for o, i in shapes]
    cases.append(OpCase("layer_norm", dtype, (("width", c),)))
    cases.append(OpCase("attention", dtype, (("num_heads", config.heads), ("head_dim", c // config.heads))))
    return cases


class ClipTower:
    """A second tower (see deepseek_ocr.SecondTower): its rows are [clip output | SAM features], class token dropped."""

    def __init__(
        self, config: ClipConfig, sam_channels: int, packed: Mapping[str, Any], ops: Ops, scratch: Workspace
    ) -> None:
        if sam_channels != config.width:
            raise ConfigError(f"clip width {config.width} must equal SAM's last downsample channel {sam_channels}")
        self.config = config
        self._ops, self._scratch = ops, scratch
        self._packed = packed
        self._class: Tensor = packed["clip.class_embedding"]
        self._table: Tensor = packed["clip.positions"]
        self._pre_norm: Norm = packed["clip.pre_norm"]
        self._positions: dict[int, Tensor] = {}

    def rows(self, features: Tensor, stages: Stages | None = None) -> Tensor:
        """features [B, q, q, C] -> [B, q*q, 2*C]."""
        batch, q, _, width = features.shape
        flat = features.view(batch, q * q, width)
        x = torch.empty(batch, q * q + 1, width, dtype=features.dtype, device=features.device)
        x[:, 0] = self._class
        x[:, 1:] = flat
        x += self._position(q)
        norm = self._pre_norm
        self._ops.layer_norm(x, norm.weight, norm.bias, self.config.layer_norm_eps, out=x)
        for i in range(self.config.layers):
            self._layer(i, x)
            if stages:
                stages(f"clip.layer.{i}", x)
        rows = torch.cat([x[:, 1:], flat], dim=-1)
        if stages:
            stages("clip", rows)
        return rows

    def _layer(self, index: int, x: Tensor) -> None:
        """x [B, T, C] is replaced by the layer's output."""
        ops, eps, take = self._ops, self.config.layer_norm_eps, self._scratch.take
        at = f"clip.{index}"
        norm1: Norm = self._packed[f"{at}.norm1"]
        norm2: Norm = self._packed[f"{at}.norm2"]
        batch, tokens, width = x.shape
        rows = x.view(-1, width)
        count, inner = rows.shape[0], int(width * self.config.mlp_ratio)
        normed = take("normed", (count, width), x.dtype)
        ops.layer_norm(rows, norm1.weight, norm1.bias, eps, out=normed)
        qkv = ops.linear(normed, self._packed[f"{at}.qkv"], out=take("wide", (count, 3 * width), x.dtype))
        # What `normed` held is in qkv.
        ops.attention(qkv.view(batch, tokens, -1), self.config.heads, out=normed.view(batch, tokens, width))
        ops.linear(normed, self._packed[f"{at}.out"], residual=rows, out=rows)
        ops.layer_norm(rows, norm2.weight, norm2.bias, eps, out=normed)
        wide = take("wide", (count, inner), x.dtype)
        hidden = ops.linear(normed, self._packed[f"{at}.fc1"], activation="quick_gelu", out=wide)
        ops.linear(hidden, self._packed[f"{at}.fc2"], residual=rows, out=rows)

    def _position(self, q: int) -> Tensor:
        """[q*q+1, C]: row 0 belongs to the class token and is used as it is, the grid is resized if need be."""
        if q not in self._positions:
            side = self.config.image_size // self.config.patch_size
            grid = resize_grid(self._table[1:].view(side, side, -1), q).reshape(q * q, -1)
            self._positions[q] = torch.cat([self._table[:1], grid.to(self._table.dtype)])
        return self._positions[q]
