"""The decoder shared by all families: RMSNorm, attention over the paged cache, dense or mixture-of-experts SwiGLU.

Families differ only by declared data (DecoderConfig: QK-norm, grouped heads, which layers are dense, tied embeddings)
and by where their tensors are named. Source: deepseek-ocr.md sections 2.4 and 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import DecoderConfig, MoeConfig
from ..errors import ConfigError, ShapeError
from ..ops import OpCase, Ops, RopeTable
from ..quantization import Weight, take_rows
from ..types import ForwardBatch, KVCacheView
from . import traffic
from .rope import rope_table
from .step_programs import StepPrograms
from .weight_map import HEAD_PART, Part, fused_linear_part, linear_part, part, plain, swiglu_shapes, tensor_part
from .workspace import Workspace

Stages = Callable[[str, Tensor], None]


def decoder_parts(
    config: DecoderConfig, prefix: str = "model", stacked_experts: bool = False, has_head: bool = True
) -> list[Part]:
    """The decoder's weight map; `prefix` is what stands before `.layers` (lm_head has none).

    stacked_experts  the file holds the experts of a layer as two stacked tensors, not three tensors an expert
    has_head         False: the file has no lm_head, though the head is not tied
    """
    c, d, vocab = config.hidden_size, config.head_dim, config.vocab_size
    parts = [
        tensor_part("decoder.embed", f"{prefix}.embed_tokens.weight", (vocab, c)),
        tensor_part("decoder.norm", f"{prefix}.norm.weight", (c,)),
    ]
    if has_head or config.tie_word_embeddings:
        # A tied head is packed from the table's tensor: the table itself stays as it is for look-ups.
        head = f"{prefix}.embed_tokens" if config.tie_word_embeddings else "lm_head"
        parts.append(linear_part(HEAD_PART, head, vocab, c, bias=False))
    outs = [config.num_heads * d, config.num_kv_heads * d, config.num_kv_heads * d]
    for i in range(config.num_layers):
        to, of = f"decoder.{i}", f"{prefix}.layers.{i}"
        names = [f"{of}.self_attn.{n}_proj" for n in "qkv"]
        parts += [
            tensor_part(f"{to}.input_norm", f"{of}.input_layernorm.weight", (c,)),
            tensor_part(f"{to}.post_norm", f"{of}.post_attention_layernorm.weight", (c,)),
            fused_linear_part(f"{to}.qkv", names, outs, c),
            linear_part(f"{to}.o", f"{of}.self_attn.o_proj", c, config.num_heads * d, bias=False),
        ]
        if config.qk_norm:
            parts.append(tensor_part(f"{to}.q_norm", f"{of}.self_attn.q_norm.weight", (d,)))
            parts.append(tensor_part(f"{to}.k_norm", f"{of}.self_attn.k_norm.weight", (d,)))
        if is_moe(config, i):
            make = stacked_moe_part if stacked_experts else moe_part
            parts.append(make(f"{to}.ffn", f"{of}.mlp", c, config.moe))
        else:
            shapes = swiglu_shapes(f"{of}.mlp", c, config.intermediate_size)
            parts.append(part(f"{to}.ffn", shapes, lambda ops, tensors: ops.pack_swiglu(*tensors), linear=shapes))
    return parts


def is_moe(config: DecoderConfig, layer: int) -> bool:
    return config.moe is not None and layer not in config.moe.dense_layers


def moe_part(target: str, prefix: str, width: int, moe: MoeConfig | None) -> Part:
    """Router, experts and shared expert of one layer, packed together."""
    if moe is None:
        raise ShapeError(f"{target}: the configuration has no experts")
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.gate.weight": (moe.num_experts, width)}
    for e in range(moe.num_experts):
        shapes |= swiglu_shapes(f"{prefix}.experts.{e}", width, moe.intermediate_size)
    if moe.shared_intermediate_size:
        shapes |= swiglu_shapes(f"{prefix}.shared_experts", width, moe.shared_intermediate_size)
    end = 1 + 3 * moe.num_experts

    def pack(ops: Ops, tensors: Sequence[Weight]) -> Any:
        shared = ops.pack_swiglu(*tensors[end:]) if len(tensors) > end else None
        # Read as they are packed: a layer's experts never lie in memory all at once.
        experts = ((tensors[i], tensors[i + 1], tensors[i + 2]) for i in range(1, end, 3))
        return ops.pack_moe(plain(tensors[0]), experts, shared)

    # A router decides between experts: it is never quantised here, but a file may hold a quantised one.
    return part(target, shapes, pack, linear=shapes, kept=[f"{prefix}.gate.weight"])


def stacked_moe_part(target: str, prefix: str, width: int, moe: MoeConfig | None) -> Part:
    """Router and experts of one layer from transformers' stacked tensors: gate rows above up rows, then down."""
    if moe is None or moe.shared_intermediate_size:
        raise ShapeError(f"{target}: stacked experts are known without a shared expert only")
    experts, inner = moe.num_experts, moe.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.gate.weight": (experts, width),
        f"{prefix}.experts.gate_up_proj": (experts, 2 * inner, width),
        f"{prefix}.experts.down_proj": (experts, width, inner),
    }

    def pack(ops: Ops, tensors: Sequence[Weight]) -> Any:
        gate_up, down = tensors[1], tensors[2]
        gates = (_rows_of(gate_up, e, experts, 0, inner) for e in range(experts))
        ups = (_rows_of(gate_up, e, experts, inner, 2 * inner) for e in range(experts))
        downs = (_rows_of(down, e, experts, 0, width) for e in range(experts))
        return ops.pack_moe(plain(tensors[0]), zip(gates, ups, downs), None)

    return part(target, shapes, pack, linear=shapes, kept=[f"{prefix}.gate.weight"])


def _rows_of(weight: Weight, expert: int, experts: int, start: int, end: int) -> Weight:
    """Rows of one expert's matrix in a stacked tensor [E, R, C]; quantised on load that is [E * R, C]."""
    if isinstance(weight, Tensor):
        return weight[expert, start:end]
    first = expert * (weight.shape[0] // experts)
    return take_rows(weight, first + start, first + end)


def decoder_cases(config: DecoderConfig, dtype: torch.dtype) -> list[OpCase]:
    """What the decoder asks of the ops."""
    c, d = config.hidden_size, config.head_dim
    heads = (("num_heads", config.num_heads), ("num_kv_heads", config.num_kv_heads), ("head_dim", d))
    qkv = (config.num_heads + 2 * config.num_kv_heads) * d
    shapes = [(qkv, c), (c, config.num_heads * d), (config.vocab_size, c)]
    cases = [OpCase("linear", dtype, (("in_features", i), ("out_features", o))) for o, i in shapes]
    cases += [
        OpCase("embedding", dtype, (("width", c),)),
        OpCase("rms_norm", dtype, (("width", c),)),
        OpCase("qk_norm_rope_store", dtype, heads),
        OpCase("paged_attention", dtype, heads),
    ]
    moe = config.moe
    if moe is None or moe.dense_layers:
        cases.append(OpCase("swiglu_ffn", dtype, (("width", c), ("intermediate", config.intermediate_size))))
    if moe is not None:
        experts = (("num_experts", moe.num_experts), ("top_k", moe.top_k))
        sizes = (("width", c), ("intermediate", moe.intermediate_size), *experts)
        cases += [OpCase("moe_routing", dtype, experts), OpCase("grouped_gemm", dtype, sizes)]
        cases.append(OpCase("moe_ffn", dtype, sizes))
        if moe.shared_intermediate_size:
            shared = (("width", c), ("intermediate", moe.shared_intermediate_size))
            cases.append(OpCase("swiglu_ffn", dtype, shared))
    return cases


class DecoderLayer:
    """h = x + attention(norm(x)); x = h + ffn(norm(h)), the residual stream updated in place."""

    def __init__(self, config: DecoderConfig, index: int, packed: Mapping[str, Any], ops: Ops) -> None:
        def get(name: str) -> Any:
            return packed[f"decoder.{index}.{name}"]

        self._config, self._ops, self._index = config, ops, index
        self._input_norm, self._post_norm = get("input_norm"), get("post_norm")
        self._qkv, self._o, self._ffn = get("qkv"), get("o"), get("ffn")
        self._q_norm = get("q_norm") if config.qk_norm else None
        self._k_norm = get("k_norm") if config.qk_norm else None
        self._moe = config.moe if is_moe(config, index) else None
        self._scale = config.head_dim**-0.5

    def packed_parts(self) -> Iterator[Any]:
        yield from self._qkv.packed
        yield self._o
        yield self._ffn

    def forward(self, x: Tensor, batch: ForwardBatch, kv: KVCacheView, rope: RopeTable, scratch: Workspace) -> None:
        """x [N, C] is replaced by the layer's output; this layer's keys and values go to the cache."""
        self._attend(x, batch, kv, rope, scratch)
        cfg, ops = self._config, self._ops
        normed = scratch.take("normed", (x.shape[0], cfg.hidden_size), x.dtype)
        ops.rms_norm(x, self._post_norm, cfg.rms_norm_eps, out=normed)
        if self._moe is None:
            ops.swiglu_ffn(normed, self._ffn, residual=x, out=x)
        else:
            moe = self._moe
            ops.moe_ffn(normed, self._ffn, moe.top_k, moe.renormalize, moe.routed_scale, residual=x, out=x)

    def _attend(self, x: Tensor, batch: ForwardBatch, kv: KVCacheView, rope: RopeTable, scratch: Workspace) -> None:
        cfg, ops, n = self._config, self._ops, x.shape[0]
        keys, values = kv.keys[self._index], kv.values[self._index]
        key_scales, value_scales = kv.scales(self._index)
        heads = (n, cfg.num_heads, cfg.head_dim)
        normed = scratch.take("normed", (n, cfg.hidden_size), x.dtype)
        ops.rms_norm(x, self._input_norm, cfg.rms_norm_eps, out=normed)
        width = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
        qkv = self._qkv.apply(ops, normed, scratch.take("qkv", (n, width), x.dtype))
        q = ops.qk_norm_rope_store(
            qkv,
            batch.positions,
            batch.slots,
            rope,
            keys,
            values,
            cfg.num_heads,
            self._q_norm,
            self._k_norm,
            cfg.rms_norm_eps,
            out=scratch.take("q", heads, x.dtype),
            key_scales=key_scales,
            value_scales=value_scales,
        )
        seen = ops.paged_attention(
            q,
            keys,
            values,
            batch.block_tables,
            batch.query_starts,
            batch.context_lens,
            self._scale,
            out=scratch.take("seen", heads, x.dtype),
            key_scales=key_scales,
            value_scales=value_scales,
        )
        ops.linear(seen.view(n, -1), self._o, residual=x, out=x)


class Decoder:
    """Token ids and image rows in; logits, final hidden states or both out. Not re-entrant: one pass at a time.

    Without a head (a checkpoint of an embedding model) there are hidden states only.
    """

    def __init__(self, config: DecoderConfig, packed: Mapping[str, Any], ops: Ops) -> None:
        self.config = config
        self._ops = ops
        self._embed: Tensor = packed["decoder.embed"]
        self._norm: Tensor = packed["decoder.norm"]
        self._lm_head = packed.get(HEAD_PART)
        self._layers = [DecoderLayer(config, i, packed, ops) for i in range(config.num_layers)]
        self._rope = rope_table(config, self._embed.device)
        self._scratch = Workspace(self._embed.device)
        self._steps = StepPrograms(ops, self._scratch)
        self._whole_steps = StepPrograms(ops, self._scratch)  # with the last norm

    @property
    def dtype(self) -> torch.dtype:
        return self._embed.dtype

    def token_bytes(self) -> int | None:
        """Bytes of weights that a step of one token reads, without the cache; None if the backend does not tell."""
        return traffic.token_bytes(self._ops, self._packed_parts(), self.config.moe.top_k if self.config.moe else 0)

    @property
    def rounds_inputs(self) -> bool:
        """Whether the linear layers multiply 8-bit integers."""
        return traffic.rounds_inputs(self._ops, self._packed_parts())

    def _packed_parts(self) -> Iterator[Any]:
        for layer in self._layers:
            yield from layer.packed_parts()
        if self._lm_head is not None:
            yield self._lm_head

    @property
    def has_head(self) -> bool:
        return self._lm_head is not None

    def forward(self, batch: ForwardBatch, kv: KVCacheView, stages: Stages | None = None) -> Tensor:
        """Logits [L, V] float32, new memory, of batch.logit_rows; the cache gets the new keys and values.

        Rows batch.image_index of the embeddings are replaced by batch.image_rows. `stages`, if given, is called with
        the residual stream after the embeddings ("embed") and after every layer ("layer.3"); it must not keep it.
        Raises ShapeError if ids, slots or positions are out of range or the batch's tensors disagree; ConfigError if
        logits are asked of a model without a head.
        """
        rows = batch.logit_rows
        if stages is not None or self._embed.device.type != "cpu":
            return self._logits(self._final(self._run(batch, kv, stages), rows))
        # The last norm is recorded, too: after all weights have gone through the caches a call from Python begins in
        # memory. A device would have to record each number of rows.
        self._check_cache(kv)
        final = self._whole_steps.run(batch, kv, lambda: self._final(self._layers_of(batch, kv, None), rows), rows)
        return self._logits(final)

    def forward_pooled(self, batch: ForwardBatch, kv: KVCacheView) -> tuple[Tensor, Tensor]:
        """What `forward` returns, and the hidden states [P, C] float32 of batch.pooled_rows after the final norm.

        Both are new memory. A row has the bits that its logits would be computed from. Raises as `forward`.
        """
        if batch.pooled_rows is None:
            raise ShapeError("forward_pooled needs a batch with pooled_rows; use forward")
        x = self._run(batch, kv)
        # Copied before the next use of the scratch memory that the rows stand in.
        hidden = self._final(x, batch.pooled_rows).to(torch.float32, copy=True)
        return self._logits(self._final(x, batch.logit_rows)), hidden

    def _run(self, batch: ForwardBatch, kv: KVCacheView, stages: Stages | None = None) -> Tensor:
        """The residual stream [N, C] after the last layer, in scratch memory."""
        self._check_cache(kv)
        if stages is None:
            return self._steps.run(batch, kv, lambda: self._layers_of(batch, kv, None))
        return self._layers_of(batch, kv, stages)

    def _check_cache(self, kv: KVCacheView) -> None:
        if len(kv.keys) != self.config.num_layers or len(kv.values) != self.config.num_layers:
            raise ShapeError(f"the cache has {len(kv.keys)} layers, the model {self.config.num_layers}")

    def _layers_of(self, batch: ForwardBatch, kv: KVCacheView, stages: Stages | None) -> Tensor:
        n, width = batch.token_ids.shape[0], self.config.hidden_size
        x = self._scratch.take("x", (n, width), self.dtype)
        self._embed_batch(batch, x)
        if stages:
            stages("embed", x)
        for i, layer in enumerate(self._layers):
            layer.forward(x, batch, kv, self._rope, self._scratch)
            if stages:
                stages(f"layer.{i}", x)
        return x

    def _final(self, x: Tensor, rows: Tensor) -> Tensor:
        """Some rows of the residual stream after the final norm, in scratch memory."""
        # A gather of rows is an embedding lookup, so that a decode step stays within the ops.
        final = self._scratch.take("rows", (rows.shape[0], self.config.hidden_size), self.dtype)
        self._ops.embedding(rows, x, out=final)
        return self._ops.rms_norm(final, self._norm, self.config.rms_norm_eps, out=final)

    def _logits(self, final: Tensor) -> Tensor:
        if self._lm_head is None:
            if final.shape[0]:
                raise ConfigError("the model has no output head, so there are no logits")
            return torch.empty((0, self.config.vocab_size), dtype=torch.float32, device=final.device)
        return self._ops.linear(final, self._lm_head, out_dtype=torch.float32)

    def _embed_batch(self, batch: ForwardBatch, x: Tensor) -> None:
        self._ops.embedding(batch.token_ids, self._embed, out=x)
        if batch.image_index is None:
            return
        rows = batch.image_rows
        if rows is None or rows.shape != (batch.image_index.shape[0], x.shape[1]) or rows.dtype != x.dtype:
            found = None if rows is None else f"{list(rows.shape)} {rows.dtype}"
            raise ShapeError(f"image_rows must be [{batch.image_index.shape[0]}, {x.shape[1]}] {x.dtype}, got {found}")
        x.index_copy_(0, batch.image_index.long(), rows)
