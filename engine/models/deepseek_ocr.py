"""DeepSeek-OCR: page views -> SAM tower -> second tower -> projector -> rows in the prompt -> decoder.

The second tower and the layout of the rows are pieces (`SecondTower`, `Layout`): DeepSeek-OCR-2 brings another tower
and no newlines, Unlimited-OCR other limits. Source: deepseek-ocr.md sections 2, 3, 4.2, 7, 10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..config import DeepseekOcrConfig
from ..errors import ShapeError
from ..loading.model_config import read_model_config
from ..loading.weights import TensorSource, WeightSpec
from ..ops import OpCase, Ops
from ..quantization import Weight
from ..types import ForwardBatch, KVCacheView
from ..vision.layout import build_rows
from . import clip
from .clip import ClipTower, clip_cases, clip_parts
from .decoder import Decoder, decoder_cases, decoder_parts
from .load_parts import load_parts
from .sam import SamTower, sam_cases, sam_parts
from .weight_map import OpenedParts, Part, QuantizeTo, linear_part, pack_parts, tensor_part

if TYPE_CHECKING:
    from ..vision.tiling import TilePlan

Stages = Callable[[str, Tensor], None]


class Views(Protocol):
    """A preprocessed page: float32 pixels, normalised. `tiles` is None if the page has no tiles."""

    @property
    def global_view(self) -> Tensor:
        """[1, 3, S, S]"""

    @property
    def tiles(self) -> Tensor | None:
        """[n, 3, T, T], row-major"""


class SecondTower(Protocol):
    """What stands between SAM and the projector."""

    def rows(self, features: Tensor, stages: Stages | None = None) -> Tensor:
        """features [B, q, q, F] -> the projector's input [B, rows a view, in_features]."""


class Layout(Protocol):
    """Puts the projected features of one page's views in prompt order."""

    def __call__(self, global_features: Tensor, local_features: Tensor | None, plan: TilePlan) -> Tensor:
        """[q_g, q_g, C] and [n, q_l, q_l, C] or None -> [plan.num_image_tokens, C]."""


class DeepEncoder:
    """Views of one size in, projected features out."""

    def __init__(self, sam: SamTower, second: SecondTower, projector: Any, ops: Ops) -> None:
        self._sam, self._second, self._projector, self._ops = sam, second, projector, ops

    def encode_views(self, views: Tensor, stages: Stages | None = None) -> Tensor:
        """views [B, 3, S, S] in the activation dtype -> [B, q, q, C], all B in one batch.

        `stages`, if given, is called at the end of each stage with its name and result: sam.patch_embed, sam.block.i,
        sam, clip.layer.i, clip, projector. A result is valid during the call only (later stages work in place).
        """
        features = self._sam.forward(views, stages)
        rows = self._second.rows(features, stages)
        batch, count, width = rows.shape
        projected = self._ops.linear(rows.view(-1, width), self._projector).view(batch, count, -1)
        if stages:
            stages("projector", projected)
        q = features.shape[1]
        return projected.view(batch, q, q, -1)


class NewlineLayout:
    """DeepSeek-OCR's layout: a newline vector after every row of features, one separator at the end."""

    def __init__(self, newline: Tensor, separator: Tensor) -> None:
        self._newline, self._separator = newline, separator

    def __call__(self, global_features: Tensor, local_features: Tensor | None, plan: TilePlan) -> Tensor:
        return build_rows(global_features, local_features, self._newline, self._separator, plan)


class DeepseekOcr:
    """The whole network. Not re-entrant: one call at a time."""

    UNUSED = clip.UNUSED

    def __init__(self, config: DeepseekOcrConfig, packed: Mapping[str, Any], dtype: torch.dtype, ops: Ops) -> None:
        self.config, self.dtype, self.ops = config, dtype, ops
        sam = SamTower(config.sam, packed, ops)
        second = ClipTower(config.clip, config.sam.downsample_channels[1], packed, ops)
        self.encoder = DeepEncoder(sam, second, packed["projector"], ops)
        self.layout: Layout = NewlineLayout(packed["image_newline"], packed["view_separator"])
        self.decoder = Decoder(config.decoder, packed, ops)

    @staticmethod
    def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> DeepseekOcrConfig:
        """The configuration from config.json's object; generation_config.json adds nothing here."""
        return read_model_config(raw)

    # ---- weights ---------------------------------------------------------------------------------------------------
    @staticmethod
    def parts(config: DeepseekOcrConfig) -> list[Part]:
        """The weight map of this configuration."""
        width, inner = config.decoder.hidden_size, config.clip.width + config.sam.downsample_channels[1]
        bridge = [
            linear_part("projector", "model.projector.layers", width, inner, bias=True),
            tensor_part("image_newline", "model.image_newline", (width,)),
            tensor_part("view_separator", "model.view_seperator", (width,)),  # spelt so in the checkpoint
        ]
        return [*sam_parts(config.sam), *clip_parts(config.clip), *bridge, *decoder_parts(config.decoder)]

    @classmethod
    def weight_specs(cls, config: DeepseekOcrConfig) -> list[WeightSpec]:
        """Every checkpoint tensor that is used, with its shape; UNUSED names those that may be there and are not."""
        return [p.spec for p in cls.parts(config)]

    @staticmethod
    def op_cases(config: DeepseekOcrConfig, dtype: torch.dtype) -> list[OpCase]:
        """What this configuration asks of the ops, for registry.resolve_ops."""
        width, inner = config.decoder.hidden_size, config.clip.width + config.sam.downsample_channels[1]
        projector = OpCase("linear", dtype, (("in_features", inner), ("out_features", width)))
        cases = [*sam_cases(config.sam, dtype), *clip_cases(config.clip, dtype), projector]
        return [*cases, *decoder_cases(config.decoder, dtype)]

    @classmethod
    def load(
        cls,
        checkpoint: TensorSource,
        config: DeepseekOcrConfig,
        dtype: torch.dtype,
        ops: Ops,
        quantize_to: QuantizeTo | None = None,
    ) -> DeepseekOcr:
        """Pack every tensor as it is read; see load_parts. Raises WeightsError listing what does not fit."""
        return cls(config, load_parts(cls.open_parts(checkpoint, config), dtype, ops, quantize_to), dtype, ops)

    @classmethod
    def open_parts(cls, checkpoint: TensorSource, config: DeepseekOcrConfig) -> OpenedParts:
        """The weight map for a checkpoint."""
        return OpenedParts(checkpoint, cls.parts(config), list(cls.UNUSED))

    @classmethod
    def from_tensors(
        cls,
        config: DeepseekOcrConfig,
        tensors: Mapping[str, Weight],
        dtype: torch.dtype,
        ops: Ops,
        quantize_to: QuantizeTo | None = None,
    ) -> DeepseekOcr:
        """The same from tensors in memory, by checkpoint name. Raises WeightsError listing what does not fit."""
        used = {name: tensor for name, tensor in tensors.items() if name not in cls.UNUSED}
        return cls(config, pack_parts(cls.parts(config), used, dtype, ops, quantize_to), dtype, ops)

    # ---- forward ---------------------------------------------------------------------------------------------------
    def encode_image(self, views: Views, plan: TilePlan, stages: Stages | None = None) -> Tensor:
        """One page's rows [plan.num_image_tokens, C] in prompt order, new memory.

        All tiles go through the encoder as one batch, together with the global view if they have its size.
        """
        page, tiles = views.global_view, views.tiles
        if (0 if tiles is None else tiles.shape[0]) != plan.num_tiles:
            raise ShapeError(f"the page has {0 if tiles is None else tiles.shape[0]} tiles, its plan {plan.num_tiles}")
        page = page.to(self.ops.device, self.dtype)
        if tiles is None:
            return self.layout(self.encoder.encode_views(page, stages)[0], None, plan)
        tiles = tiles.to(self.ops.device, self.dtype)
        if tiles.shape[2:] == page.shape[2:]:
            features = self.encoder.encode_views(torch.cat([tiles, page]), stages)
            return self.layout(features[-1], features[:-1], plan)
        local_features = self.encoder.encode_views(tiles, stages)
        return self.layout(self.encoder.encode_views(page, stages)[0], local_features, plan)

    def forward(self, batch: ForwardBatch, kv: KVCacheView, stages: Stages | None = None) -> Tensor:
        """Logits [L, V] float32 of batch.logit_rows; see Decoder.forward."""
        return self.decoder.forward(batch, kv, stages)
