"""The ops contract in clear torch: complete, on any device, and the oracle that every other backend is tested against.

Inputs are raised to float32 first and a result is rounded once at the end, also for bfloat16; speed comes second.
Knows no model and no file. Vision ops are in reference_vision.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ShapeError, UnsupportedError
from ..loading.packed import PackedEntry
from ..quantization import QuantizedWeight, Weight, quantize
from . import Activation, OpCase, RopeTable, Routing
from .reference_sampling import ReferenceSampling
from .reference_vision import ReferenceVisionOps

SCORE_BYTES = 64 << 20  # paged_attention scores at most this much of a score matrix at a time
ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """weight [O, C] as it came, bias [O] float32 or None."""

    weight: Weight
    bias: Tensor | None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype


@dataclass(frozen=True, slots=True)
class PackedSwiglu:
    """gate, up [I, C] and down [C, I] as they came."""

    gate: Weight
    up: Weight
    down: Weight


@dataclass(frozen=True, slots=True)
class PackedMoe:
    """router [E, C], one PackedSwiglu an expert, and the shared one or None."""

    router: Tensor
    experts: tuple[PackedSwiglu, ...]
    shared: PackedSwiglu | None


def refuse(op: str, rule: str, *tensors: Weight) -> NoReturn:
    got = ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)
    raise ShapeError(f"{op}: {rule}; got {got}")


def finish(result: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """The one rounding at the end of an op. `result` is float32 and owned by the caller."""
    if out is None:
        return result.to(dtype)
    if out.shape != result.shape or out.dtype != dtype:
        refuse("out", f"must be {list(result.shape)} {str(dtype).removeprefix('torch.')}", out)
    return out.copy_(result)


def activate(x: Tensor, activation: Activation | None) -> Tensor:
    if activation is None:
        return x
    if activation == "gelu":
        return functional.gelu(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "silu":
        return functional.silu(x)
    raise ShapeError(f"linear: unknown activation {activation!r}; known: gelu, quick_gelu, silu")


def swiglu_float32(x: Tensor, ffn: PackedSwiglu) -> Tensor:
    """down(silu(gate(x)) * up(x)) of x [n, C] in its own dtype; the product is rounded to it, the result is not."""
    product = functional.silu(multiply(x, ffn.gate)) * multiply(x, ffn.up)
    return multiply(product.to(x.dtype), ffn.down)


def multiply(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in float32, x rounded first where the weight's format asks for it."""
    raised = weight.quantize_input(x) if isinstance(weight, QuantizedWeight) else x.float()
    return functional.linear(raised, weight.float(), bias)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, heads, D] float32; cos, sin [N, D/2]; pairs are (i, i + D/2)."""
    low, high = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def normalise_heads(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] as int8 and its scales [...] float32: an int8 cache's rounding (see Ops.qk_norm_rope_store)."""
    raised = x.float()
    finite = raised.isfinite().all(-1)
    largest = raised.nan_to_num(0.0, 0.0, 0.0).abs().amax(-1)
    usable = finite & (largest >= 1e-30)
    # A true division: torch makes number / tensor of a reciprocal.
    inverse = torch.where(usable, torch.full_like(largest, 127.0) / largest.clamp_min(1e-30), 0.0)
    whole = (torch.where(usable[..., None], raised, 0.0) * inverse[..., None]).round().to(torch.int8)
    scales = torch.where(usable, largest / 127.0, 0.0)
    return whole, torch.where(finite, scales, torch.nan)


def read_rows(cache: Tensor, scales: Tensor | None, blocks: Tensor) -> Tensor:
    """The rows [tokens, K, D] float32 of some blocks of keys or values."""
    rows = cache[blocks]
    if scales is None:
        return rows.flatten(0, 1).float()
    return (rows.view(torch.int8).float() * scales[blocks].transpose(1, 2)[..., None]).flatten(0, 1)


def check_cache(
    op: str,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Raises ShapeError unless keys, values and scales are a cache of activations of `dtype`, or an int8 one."""
    wanted = dtype if key_scales is None else torch.uint8
    if keys.ndim != 4 or values.shape != keys.shape or not keys.dtype == values.dtype == wanted:
        refuse(op, f"keys and values must be [num_blocks, block_size, K, D] {wanted}", keys, values)
    shape = (keys.shape[0], keys.shape[2], keys.shape[1])
    for scales in (key_scales, value_scales):
        if (scales is None) != (key_scales is None) or (scales is not None and scales.shape != shape):
            raise ShapeError(f"{op}: an int8 cache needs key_scales and value_scales, both {list(shape)}")


class ReferenceOps(ReferenceVisionOps, ReferenceSampling):
    """Every op of the contract (see ops/__init__.py for formulas, shapes and errors)."""

    name = "reference"
    device = torch.device("cpu")

    def supports(self, case: OpCase) -> str | None:
        """None: every case is supported."""
        return None

    def close(self) -> None:
        """Nothing to release."""

    def quantize(self, weight: Tensor, kind: Literal["int8", "int4"]) -> QuantizedWeight:
        return quantize(weight, kind)

    def packed_memory(self, packed: Any) -> None:
        """Nothing here has the layout of the native kernels."""

    def map_packed(self, entry: PackedEntry, tensors: list[Tensor], copied: bool = False) -> Any:
        raise UnsupportedError(
            "the folder holds weights in the layout of the native kernels, which backend reference cannot read; use "
            "backend='native', or the checkpoint that it was made from"
        )

    def new_program(self) -> None:
        """Nothing is recorded."""

    # ---- packing ---------------------------------------------------------------------------------------------------
    def pack_linear(self, weight: Weight, bias: Tensor | None = None) -> PackedLinear:
        if weight.ndim != 2 or weight.dtype not in ACTIVATION_DTYPES:
            refuse("pack_linear", "weight must be [O, C] float32, bfloat16 or float16", weight)
        if bias is not None and bias.shape != weight.shape[:1]:
            refuse("pack_linear", "bias must be [O]", weight, bias)
        return PackedLinear(weight, None if bias is None else bias.float())

    def pack_swiglu(self, gate: Weight, up: Weight, down: Weight) -> PackedSwiglu:
        if gate.ndim != 2 or up.shape != gate.shape or tuple(down.shape) != tuple(gate.shape)[::-1]:
            refuse("pack_swiglu", "gate and up must be [I, C], down [C, I]", gate, up, down)
        if not gate.dtype == up.dtype == down.dtype or gate.dtype not in ACTIVATION_DTYPES:
            refuse("pack_swiglu", "gate, up and down must share a dtype, float32, bfloat16 or float16", gate, up, down)
        return PackedSwiglu(gate, up, down)

    def pack_moe(
        self, router: Tensor, experts: Iterable[tuple[Weight, Weight, Weight]], shared: PackedSwiglu | None
    ) -> PackedMoe:
        packed = tuple(self.pack_swiglu(*parts) for parts in experts)
        if router.ndim != 2 or len(packed) != router.shape[0]:
            refuse("pack_moe", f"router must be [E, C] with E experts, got {len(packed)} of them", router)
        for expert in packed:
            if expert.gate.shape != packed[0].gate.shape or expert.gate.shape[1] != router.shape[1]:
                refuse("pack_moe", "all experts must be [I, C] with the router's C", router, expert.gate)
        return PackedMoe(router, packed, shared)

    # ---- decoder ---------------------------------------------------------------------------------------------------
    def embedding(self, token_ids: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
        if token_ids.ndim != 1 or table.ndim != 2:
            refuse("embedding", "token_ids must be [N], table [V, C]", token_ids, table)
        if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < table.shape[0]:
            ids = f"{int(token_ids.min())}..{int(token_ids.max())}"
            raise ShapeError(f"embedding: token ids {ids} are outside the vocabulary 0..{table.shape[0] - 1}")
        rows = table.index_select(0, token_ids.long())
        return rows if out is None else out.copy_(rows)

    def linear(
        self,
        x: Tensor,
        weight: PackedLinear,
        activation: Activation | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if x.ndim != 2 or x.shape[1] != weight.in_features or x.dtype != weight.dtype:
            refuse("linear", "x must be [N, C] in the weight's dtype", x, weight.weight)
        result = activate(multiply(x, weight.weight, weight.bias), activation)
        if residual is not None:
            if residual.shape != result.shape or residual.dtype != x.dtype:
                refuse("linear", "residual must be [N, O] in x's dtype", x, residual)
            result = result + residual
        return finish(result, out_dtype or x.dtype, out)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        if weight.shape != x.shape[-1:]:
            refuse("rms_norm", "weight must be [C]", x, weight)
        raised = x.float()
        scale = torch.rsqrt(raised.square().mean(-1, keepdim=True) + eps)
        return finish(raised * scale * weight.float(), x.dtype, out)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        if weight.shape != x.shape[-1:] or bias.shape != weight.shape:
            refuse("layer_norm", "weight and bias must be [C]", x, weight, bias)
        result = functional.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps)
        return finish(result, x.dtype, out)

    def qk_norm_rope_store(
        self,
        qkv: Tensor,
        positions: Tensor,
        slots: Tensor,
        rope: RopeTable,
        keys: Tensor,
        values: Tensor,
        num_heads: int,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
        out: Tensor | None = None,
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
    ) -> Tensor:
        num_blocks, block_size, num_kv_heads, head_dim = keys.shape
        width = (num_heads + 2 * num_kv_heads) * head_dim
        if qkv.ndim != 2 or qkv.shape[1] != width:
            refuse("qk_norm_rope_store", f"qkv must be [N, {width}]", qkv)
        check_cache("qk_norm_rope_store", keys, values, key_scales, value_scales, qkv.dtype)
        self._check_indices("positions", positions, qkv.shape[0], rope.cos.shape[0])
        self._check_indices("slots", slots, qkv.shape[0], num_blocks * block_size)
        heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = heads[:, :num_heads], heads[:, num_heads:-num_kv_heads], heads[:, -num_kv_heads:]
        cos, sin = rope.cos[positions.long()], rope.sin[positions.long()]
        rotated = rotate_half(normalise_heads(k.float(), k_norm, eps), cos, sin)
        for cache, scales, rows in ((keys, key_scales, rotated), (values, value_scales, v)):
            if scales is None:
                cache.view(-1, num_kv_heads, head_dim)[slots.long()] = rows.to(cache.dtype)
            else:
                whole, factors = quantize_rows(rows)
                cache.view(torch.int8).view(-1, num_kv_heads, head_dim)[slots.long()] = whole
                scales[slots.long() // block_size, :, slots.long() % block_size] = factors
        return finish(rotate_half(normalise_heads(q.float(), q_norm, eps), cos, sin), qkv.dtype, out)

    @staticmethod
    def _check_indices(what: str, indices: Tensor, count: int, limit: int) -> None:
        if indices.shape != (count,):
            refuse("qk_norm_rope_store", f"{what} must be [{count}]", indices)
        if count and not 0 <= int(indices.min()) <= int(indices.max()) < limit:
            found = f"{int(indices.min())}..{int(indices.max())}"
            raise ShapeError(f"qk_norm_rope_store: {what} {found} are outside their table of {limit}")

    def paged_attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        block_tables: Tensor,
        query_starts: Tensor,
        context_lens: Tensor,
        scale: float,
        out: Tensor | None = None,
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
    ) -> Tensor:
        num_kv_heads, head_dim = keys.shape[2:]
        if q.ndim != 3 or q.shape[2] != head_dim or q.shape[1] % num_kv_heads:
            refuse("paged_attention", "q must be [N, H, D] with H a multiple of K", q, keys)
        check_cache("paged_attention", keys, values, key_scales, value_scales, q.dtype)
        starts, contexts = query_starts.tolist(), context_lens.tolist()
        if len(starts) != len(contexts) + 1 or block_tables.shape[0] != len(contexts) or starts[-1] != q.shape[0]:
            refuse("paged_attention", "query_starts [S+1] must end at N", query_starts, context_lens, block_tables, q)
        result = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        for s, context in enumerate(contexts):
            blocks = block_tables[s].long()
            num_blocks = -(-context // keys.shape[1])
            if not starts[s + 1] - starts[s] <= context <= blocks.numel() * keys.shape[1]:
                raise ShapeError(
                    f"paged_attention: sequence {s} has {starts[s + 1] - starts[s]} new tokens of {context}, "
                    f"and blocks for {blocks.numel() * keys.shape[1]}"
                )
            k = read_rows(keys, key_scales, blocks[:num_blocks])[:context]
            v = read_rows(values, value_scales, blocks[:num_blocks])[:context]
            rows = slice(starts[s], starts[s + 1])
            result[rows] = self._causal_attention(q[rows].float(), k, v, scale)
        return finish(result, q.dtype, out)

    @staticmethod
    def _causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [n, H, D] are the last n of the context's positions; k, v [context, K, D]; float32 -> [n, H, D]."""
        n, num_heads, head_dim = q.shape
        context, num_kv_heads = k.shape[:2]
        group = num_heads // num_kv_heads
        q = q.view(n, num_kv_heads, group, head_dim)
        k, v = k.permute(1, 2, 0), v.transpose(0, 1)
        step = max(1, SCORE_BYTES // (4 * context * num_heads)) if context else 1
        parts = []
        for first in range(0, n, step):
            piece = q[first : first + step].permute(1, 0, 2, 3)  # [K, rows, group, D]
            rows = piece.shape[1]
            scores = (piece.reshape(num_kv_heads, rows * group, head_dim) @ k).view(num_kv_heads, rows, group, context)
            own = torch.arange(context - n + first, context - n + first + rows, device=q.device)
            hidden = torch.arange(context, device=q.device) > own[:, None]
            scores = (scores * scale).masked_fill(hidden[None, :, None], -torch.inf)
            seen = scores.softmax(-1).view(num_kv_heads, rows * group, context) @ v
            parts.append(
                seen.view(num_kv_heads, rows, group, head_dim).transpose(0, 1).reshape(rows, num_heads, head_dim)
            )
        return torch.cat(parts) if parts else q.reshape(n, num_heads, head_dim)

    def swiglu_float32(self, x: Tensor, ffn: PackedSwiglu) -> Tensor:
        """swiglu_ffn without its last rounding: float32 [N, C]."""
        return swiglu_float32(x, ffn)

    def swiglu_ffn(
        self, x: Tensor, ffn: PackedSwiglu, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        if x.ndim != 2 or x.shape[1] != ffn.gate.shape[1] or x.dtype != ffn.gate.dtype:
            refuse("swiglu_ffn", "x must be [N, C] in the weight's dtype", x, ffn.gate)
        result = swiglu_float32(x, ffn)
        if residual is not None:
            result = result + residual
        return finish(result, x.dtype, out)

    def moe_routing(self, logits: Tensor, top_k: int, renormalize: bool, scale: float) -> Routing:
        if logits.ndim != 2 or not 1 <= top_k <= logits.shape[1]:
            refuse("moe_routing", f"logits must be [N, E] with 1 <= top_k={top_k} <= E", logits)
        num_experts = logits.shape[1]
        # A stable descending sort gives the lowest id first among equal scores; topk promises no order.
        scores, order = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
        weights, expert_ids = scores[:, :top_k], order[:, :top_k]
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        flat = expert_ids.flatten()
        counts = torch.bincount(flat, minlength=num_experts)
        offsets = functional.pad(counts.cumsum(0), (1, 0))
        return Routing(expert_ids.int(), (weights * scale).contiguous(), offsets.int(), flat.argsort(stable=True).int())

    def grouped_gemm(self, x: Tensor, moe: PackedMoe, routing: Routing) -> Tensor:
        if x.ndim != 2 or x.shape[1] != moe.router.shape[1] or routing.expert_ids.shape[0] != x.shape[0]:
            refuse("grouped_gemm", "x must be [N, C], routing of N tokens", x, moe.router, routing.expert_ids)
        top_k = routing.expert_ids.shape[1]
        terms = torch.empty(x.shape[0] * top_k, x.shape[1], dtype=torch.float32, device=x.device)
        offsets = routing.offsets.tolist()
        for expert, ffn in enumerate(moe.experts):
            flat = routing.permutation[offsets[expert] : offsets[expert + 1]].long()
            if flat.numel():
                terms[flat] = swiglu_float32(x[flat // top_k], ffn)
        terms = terms.view(x.shape[0], top_k, x.shape[1]) * routing.weights[..., None]
        result = terms[:, 0].clone()
        for j in range(1, top_k):  # in this order, so that a row's bits depend on that row alone
            result += terms[:, j]
        return result

    def moe_ffn(
        self,
        x: Tensor,
        moe: PackedMoe,
        top_k: int,
        renormalize: bool,
        scale: float,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        logits = x.float() @ moe.router.float().T
        result = self.grouped_gemm(x, moe, self.moe_routing(logits, top_k, renormalize, scale))
        if moe.shared is not None:
            result += swiglu_float32(x, moe.shared)
        if residual is not None:
            result += residual
        return finish(result, x.dtype, out)
