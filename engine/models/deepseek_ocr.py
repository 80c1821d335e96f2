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
from ..loading.packed import PackedSource
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
from .workspace import Workspace

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


class TowerWeights(Protocol):
    """Weights of the towers and the projector that are not always in memory."""

    def load(self) -> Mapping[str, Any]:
        """Their packed parts."""

    def release(self) -> None:
        """Give back what the packed parts took, after the last of them has gone."""


def is_tower(target: str) -> bool:
    """Whether a part is needed only while images are encoded."""
    return target.startswith(("sam.", "clip.", "projector"))


class SourceTowers:
    """TowerWeights from an open checkpoint."""

    def __init__(self, opened: OpenedParts, dtype: torch.dtype, ops: Ops, quantize_to: QuantizeTo | None) -> None:
        self._opened, self._dtype, self._ops, self._quantize_to = opened, dtype, ops, quantize_to

    def load(self) -> Mapping[str, Any]:
        return load_parts(self._opened, self._dtype, self._ops, self._quantize_to, wanted=is_tower)

    def release(self) -> None:
        source = self._opened.source
        if isinstance(source, PackedSource):
            for part in self._opened.parts:
                if is_tower(part.spec.target):
                    source.release_packed(part.spec.target)


class NewlineLayout:
    """DeepSeek-OCR's layout: a newline vector after every row of features, one separator at the end."""

    def __init__(self, newline: Tensor, separator: Tensor) -> None:
        self._newline, self._separator = newline, separator

    def __call__(self, global_features: Tensor, local_features: Tensor | None, plan: TilePlan) -> Tensor:
        return build_rows(global_features, local_features, self._newline, self._separator, plan)


class DeepseekOcr:
    """The whole network. Not re-entrant: one call at a time.

    towers  None: `packed` has all parts. Else the towers' are asked of it when an image comes, kept until
            `free_encoder`, and the tiles of a page are encoded one by one (the same bits in less memory).
    """

    UNUSED = clip.UNUSED

    def __init__(
        self,
        config: DeepseekOcrConfig,
        packed: Mapping[str, Any],
        dtype: torch.dtype,
        ops: Ops,
        towers: TowerWeights | None = None,
    ) -> None:
        self.config, self.dtype, self.ops = config, dtype, ops
        self._towers = towers
        self._scratch = Workspace()
        self._encoder = self._new_encoder(packed) if towers is None else None
        self.layout: Layout = NewlineLayout(packed["image_newline"], packed["view_separator"])
        self.decoder = Decoder(config.decoder, packed, ops)

    @property
    def encoder(self) -> DeepEncoder:
        if self._encoder is None:
            # Without `towers` there is always an encoder.
            self._encoder = self._new_encoder(self._towers.load() if self._towers else {})
        return self._encoder

    def _new_encoder(self, packed: Mapping[str, Any]) -> DeepEncoder:
        sam = SamTower(self.config.sam, packed, self.ops, self._scratch)
        last = self.config.sam.downsample_channels[1]
        second = ClipTower(self.config.clip, last, packed, self.ops, self._scratch)
        return DeepEncoder(sam, second, packed["projector"], self.ops)

    @property
    def has_encoder(self) -> bool:
        """Whether the towers' weights are in memory."""
        return self._encoder is not None

    def free_encoder(self) -> None:
        """Free the towers until the next image, if they can be loaded again."""
        if self._towers is not None and self._encoder is not None:
            self._encoder = None
            self._towers.release()

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
        low_memory: bool = False,
    ) -> DeepseekOcr:
        """Pack every tensor as it is read; see load_parts. Raises WeightsError listing what does not fit.

        low_memory  the towers are loaded when an image comes: the checkpoint must stay open
        """
        opened = cls.open_parts(checkpoint, config)
        if not low_memory:
            return cls(config, load_parts(opened, dtype, ops, quantize_to), dtype, ops)
        packed = load_parts(opened, dtype, ops, quantize_to, wanted=lambda target: not is_tower(target))
        return cls(config, packed, dtype, ops, SourceTowers(opened, dtype, ops, quantize_to))

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

        All tiles go through the encoder as one batch, together with the global view if they have its size; one by one
        if the towers come and go. The buffers of the encoder are freed.
        """
        try:
            return self._encode(views, plan, stages)
        finally:
            self._scratch.clear()

    def _encode(self, views: Views, plan: TilePlan, stages: Stages | None) -> Tensor:
        page, tiles = views.global_view, views.tiles
        if (0 if tiles is None else tiles.shape[0]) != plan.num_tiles:
            raise ShapeError(f"the page has {0 if tiles is None else tiles.shape[0]} tiles, its plan {plan.num_tiles}")
        page = page.to(self.ops.device, self.dtype)
        if self._towers is not None and tiles is not None:
            placed = (tile[None].to(self.ops.device, self.dtype) for tile in tiles)
            one_by_one = [self.encoder.encode_views(tile, stages) for tile in placed]
            return self.layout(self.encoder.encode_views(page, stages)[0], torch.cat(one_by_one), plan)
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
