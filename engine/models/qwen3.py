"""Text models that are a decoder and nothing else: Qwen3, Qwen3-MoE and Llama.

The three differ by data alone (TextModelConfig: QK-norm, experts, tied embeddings, rotary table); the network is
decoder.py. Source: qwen3.md sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import TextModelConfig
from ..loading.packed import PackedSource
from ..loading.qwen3_config import read_text_config
from ..loading.renamed import HEAD, prefixed_names, with_prefix
from ..loading.weights import TensorSource, WeightSpec
from ..ops import OpCase, Ops
from ..quantization import Weight, take_rows
from ..types import ForwardBatch, KVCacheView
from .decoder import Decoder, decoder_cases, decoder_parts
from .load_parts import load_parts
from .weight_map import HEAD_PART, OpenedParts, Part, QuantizeTo, pack_parts

Stages = Callable[[str, Tensor], None]
STACKED_EXPERTS = ".mlp.experts.gate_up_proj"


class TextModel:
    """The whole network. Not re-entrant: one call at a time."""

    def __init__(self, config: TextModelConfig, packed: Mapping[str, Any], dtype: torch.dtype, ops: Ops) -> None:
        self.config, self.dtype, self.ops = config, dtype, ops
        self.decoder = Decoder(config.decoder, packed, ops)

    @staticmethod
    def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> TextModelConfig:
        """The configuration from the objects in config.json and generation_config.json."""
        return read_text_config(raw, generation)

    # ---- weights ---------------------------------------------------------------------------------------------------
    @staticmethod
    def parts(config: TextModelConfig, stacked_experts: bool = False, has_head: bool = True) -> list[Part]:
        """The weight map of this configuration; experts one by one, or stacked as transformers 5 holds them.

        has_head  False: there is no lm_head, as in embedding models; such a model has hidden states only
        """
        return decoder_parts(config.decoder, stacked_experts=stacked_experts, has_head=has_head)

    @classmethod
    def weight_specs(cls, config: TextModelConfig, stacked_experts: bool = False) -> list[WeightSpec]:
        """Every checkpoint tensor that is used, with its shape; `unused` names those that may be there and are not."""
        return [p.spec for p in cls.parts(config, stacked_experts)]

    @staticmethod
    def unused(config: TextModelConfig) -> list[str]:
        """A copy of the tied head, and the rotary frequencies that old converters stored."""
        layers = range(config.decoder.num_layers)
        names = ["model.rotary_emb.inv_freq", *(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in layers)]
        return ["lm_head.weight", *names] if config.decoder.tie_word_embeddings else names

    @staticmethod
    def op_cases(config: TextModelConfig, dtype: torch.dtype) -> list[OpCase]:
        """What this configuration asks of the ops, for registry.resolve_ops."""
        return decoder_cases(config.decoder, dtype)

    @classmethod
    def load(
        cls,
        checkpoint: TensorSource,
        config: TextModelConfig,
        dtype: torch.dtype,
        ops: Ops,
        quantize_to: QuantizeTo | None = None,
        low_memory: bool = False,
    ) -> TextModel:
        """Pack every tensor as it is read; see load_parts. Raises WeightsError listing what does not fit.

        low_memory  must be False: all parts are needed for every token
        """
        return cls(config, load_parts(cls.open_parts(checkpoint, config), dtype, ops, quantize_to), dtype, ops)

    @classmethod
    def open_parts(cls, checkpoint: TensorSource, config: TextModelConfig) -> OpenedParts:
        """The weight map for a checkpoint. Its tensors' names may lack `model.`, and the head may be absent."""
        source = with_prefix(checkpoint)
        stacked, has_head = _variant(source.names())
        if isinstance(source, PackedSource):
            has_head = HEAD_PART in source.folder.parts
        return OpenedParts(source, cls.parts(config, stacked, has_head), cls.unused(config))

    @classmethod
    def from_tensors(
        cls,
        config: TextModelConfig,
        tensors: Mapping[str, Weight],
        dtype: torch.dtype,
        ops: Ops,
        quantize_to: QuantizeTo | None = None,
    ) -> TextModel:
        """The same from tensors in memory, by checkpoint name. Raises WeightsError listing what does not fit."""
        unused = set(cls.unused(config))
        named = {new: tensors[old] for new, old in prefixed_names(tensors.keys()).items()}
        used = {name: tensor for name, tensor in named.items() if name not in unused}
        parts = cls.parts(config, *_variant(used))
        return cls(config, pack_parts(parts, used, dtype, ops, quantize_to), dtype, ops)

    @staticmethod
    def head_rows(
        checkpoint: TensorSource, config: TextModelConfig, tokens: Sequence[int], dtype: torch.dtype
    ) -> Tensor | None:
        """Rows [len(tokens), C] float32 of the output head, rounded to `dtype`; None if there is no such head or row.

        Read beside the packed head, which keeps no rows: with a checkpoint on disk only the pages of these rows are.
        """
        checkpoint = with_prefix(checkpoint)
        name = "model.embed_tokens.weight" if config.decoder.tie_word_embeddings else f"{HEAD}weight"
        if name not in checkpoint.names() or not all(token < checkpoint.shape(name)[0] for token in tokens):
            return None
        head = checkpoint.tensor(name)
        if isinstance(head, Tensor):
            rows = head[list(tokens)]
        else:
            rows = torch.cat([take_rows(head, token, token + 1).float() for token in tokens])
        checkpoint.release(name)
        return rows.to(dtype).float()

    # ---- forward ---------------------------------------------------------------------------------------------------
    def forward(self, batch: ForwardBatch, kv: KVCacheView, stages: Stages | None = None) -> Tensor:
        """Logits [L, V] float32 of batch.logit_rows; see Decoder.forward."""
        return self.decoder.forward(batch, kv, stages)

    def forward_pooled(self, batch: ForwardBatch, kv: KVCacheView) -> tuple[Tensor, Tensor]:
        """Logits, and the final hidden states [P, C] float32 of batch.pooled_rows; see Decoder.forward_pooled."""
        return self.decoder.forward_pooled(batch, kv)

    @property
    def has_head(self) -> bool:
        """Whether the model has logits; one without can only embed."""
        return self.decoder.has_head


def _variant(names: Collection[str]) -> tuple[bool, bool]:
    """Whether the experts are stacked, and whether there is a head."""
    return any(name.endswith(STACKED_EXPERTS) for name in names), any(name.startswith(HEAD) for name in names)
