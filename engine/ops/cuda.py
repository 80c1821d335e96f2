"""Adapter of the CUDA C++ kernels: check, call, nothing else. The same class drives two builds of one source.

`pagelens._cuda` (nvcc) runs on a card, beside the Triton kernels, which have the other ops. `pagelens._cuda_sim` (g++
and csrc/simt) runs the kernels on a CPU for the tests, beside the reference, as backend `cuda-sim`: thousands of times
slower than a card. Which ops run here is chosen in cuda_choice.py.

As with Triton, nothing is read back from the device: a token whose position or slot is outside its table is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from . import OpCase, RopeTable, Routing
from .cuda_packing import Expert, PackedExperts, aligned, pack_experts
from .cuda_vision import VISION_HEAD_DIMS, CudaVision
from .reference import finish, refuse

HEAD_DIMS = (16, 32, 64, 96, 128)
MAX_ROPE_DIM = 256
MAX_EXPERTS, MAX_TOP_K = 256, 32  # kernels.h


def refuse_int8_cache(op: str, *scales: Tensor | None) -> None:
    """Raises ShapeError if an int8 cache was given, which the kernels do not read."""
    if any(s is not None for s in scales):
        raise ShapeError(f"{op}: the CUDA kernels have no int8 KV-cache; use kv_cache_dtype='auto'")


class CudaOps(CudaVision):
    """The ops that have a CUDA kernel; see ops/__init__.py for formulas and shapes.

    kernels  pagelens._cuda or pagelens._cuda_sim
    base     the backend of the other ops, on the same device; its caches have this one's layout. It packs and runs
             what a mixture of experts has besides its experts, and mixtures whose weights the kernels do not take
    """

    IMPLEMENTED = frozenset(
        {
            "moe_routing",
            "grouped_gemm",
            "moe_ffn",
            "qk_norm_rope_store",
            "paged_attention",
            "window_attention",
            "conv_downsample",
        }
    )

    def __init__(self, kernels: ModuleType, name: str, base: Any, device: torch.device) -> None:
        self.kernels = kernels
        self.name = name
        self.base = base
        self.device = device

    def close(self) -> None:
        """Nothing to release: torch owns the device's memory."""

    def supports(self, case: OpCase) -> str | None:
        """None if this case can run, else one sentence that says why not."""
        sizes = dict(case.sizes)
        if case.op != "moe_routing" and case.dtype != torch.bfloat16:
            return f"the CUDA kernels take bfloat16, not {str(case.dtype).removeprefix('torch.')}"
        if case.op == "paged_attention" and sizes.get("head_dim", 128) not in HEAD_DIMS:
            return f"head_dim {sizes['head_dim']} is not one of {', '.join(map(str, HEAD_DIMS))}"
        if case.op == "window_attention" and sizes.get("head_dim", 64) not in VISION_HEAD_DIMS:
            return f"head_dim {sizes['head_dim']} is not one of {', '.join(map(str, VISION_HEAD_DIMS))}"
        head_dim = sizes.get("head_dim", 128)
        if case.op == "qk_norm_rope_store" and (head_dim % 4 or head_dim > MAX_ROPE_DIM):
            return f"head_dim {head_dim} is not a multiple of 4 up to {MAX_ROPE_DIM}"
        if sizes.get("num_experts", 1) > MAX_EXPERTS or sizes.get("top_k", 1) > MAX_TOP_K:
            return f"it takes up to {MAX_EXPERTS} experts and top_k up to {MAX_TOP_K}"
        for name in ("width", "intermediate", "neck"):
            if sizes.get(name, 8) % 8:
                return f"{name} {sizes[name]} is not a multiple of 8"
        return None

    # ---- attention -------------------------------------------------------------------------------------------------
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
        op, tokens = "qk_norm_rope_store", qkv.shape[0]
        refuse_int8_cache(op, key_scales, value_scales)
        num_blocks, block_size, num_kv_heads, head_dim = keys.shape
        width = (num_heads + 2 * num_kv_heads) * head_dim
        if qkv.ndim != 2 or qkv.shape[1] != width or qkv.dtype != torch.bfloat16 or qkv.stride(1) != 1:
            refuse(op, f"qkv must be [N, {width}] bfloat16 with contiguous rows", qkv)
        for name, cache in (("keys", keys), ("values", values)):
            self._dense(op, name, cache, tuple(keys.shape), torch.bfloat16)
        for name, index in (("positions", positions), ("slots", slots)):
            self._dense(op, name, index, (tokens,), torch.int32)
        for table in (rope.cos, rope.sin):
            self._dense(op, "rope tables", table, (rope.cos.shape[0], head_dim // 2), torch.float32)
        for norm in (q_norm, k_norm):
            if norm is not None:
                self._dense(op, "norms", norm, (head_dim,), torch.bfloat16)
        if out is None:
            out = torch.empty(tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
        self._dense(op, "out", out, (tokens, num_heads, head_dim), torch.bfloat16)
        self._pairs(op, qkv=qkv, keys=keys, values=values, out=out)
        if qkv.stride(0) % 2:
            refuse(op, f"rows of qkv must be an even number of values apart, not {qkv.stride(0)}", qkv)
        if tokens:
            self.kernels.qk_norm_rope_store(
                qkv.data_ptr(),
                qkv.stride(0),
                tokens,
                num_heads,
                num_kv_heads,
                head_dim,
                rope.cos.shape[0],
                num_blocks * block_size,
                positions.data_ptr(),
                slots.data_ptr(),
                rope.cos.data_ptr(),
                rope.sin.data_ptr(),
                0 if q_norm is None else q_norm.data_ptr(),
                0 if k_norm is None else k_norm.data_ptr(),
                eps,
                keys.data_ptr(),
                values.data_ptr(),
                out.data_ptr(),
                self._stream(),
            )
        return out

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
        op, sequences = "paged_attention", context_lens.shape[0]
        refuse_int8_cache(op, key_scales, value_scales)
        block_size, num_kv_heads, head_dim = keys.shape[1:]
        if q.ndim != 3 or q.shape[2] != head_dim or not num_kv_heads or q.shape[1] % num_kv_heads:
            refuse(op, "q must be [N, H, D] with the cache's D and H a multiple of its K", q, keys)
        self._dense(op, "q", q, tuple(q.shape), torch.bfloat16)
        self._pairs(op, q=q)
        for name, cache in (("keys", keys), ("values", values)):
            self._dense(op, name, cache, tuple(keys.shape), torch.bfloat16)
            if cache.data_ptr() % 16:
                refuse(op, f"{name} must start at a multiple of 16 bytes", cache)
        self._dense(op, "query_starts", query_starts, (sequences + 1,), torch.int32)
        self._dense(op, "context_lens", context_lens, (sequences,), torch.int32)
        self._dense(op, "block_tables", block_tables, (sequences, block_tables.shape[-1]), torch.int32)
        if out is None:
            out = torch.empty_like(q)
        self._dense(op, "out", out, tuple(q.shape), torch.bfloat16)
        if not q.shape[0]:
            return out
        args = self.kernels.PagedAttentionArgs(
            q=q.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            heads=q.shape[1],
            kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            block_tables=block_tables.data_ptr(),
            query_starts=query_starts.data_ptr(),
            context_lens=context_lens.data_ptr(),
            sequences=sequences,
            table_width=block_tables.shape[1],
            tokens=q.shape[0],
            longest_context=block_tables.shape[1] * block_size,  # a bound that is known without asking the device
            scale=scale,
            out=out.data_ptr(),
        )
        scratch = torch.empty(self.kernels.paged_attention_scratch(args), dtype=torch.float32, device=q.device)
        self.kernels.paged_attention(args, scratch.data_ptr(), self._stream())
        return out

    # ---- mixture of experts ----------------------------------------------------------------------------------------
    def pack_moe(self, router: Tensor, experts: Iterable[Expert], shared: Any | None) -> Any:
        return pack_experts(router, experts, shared, self.base, self.device)

    def moe_routing(self, logits: Tensor, top_k: int, renormalize: bool, scale: float) -> Routing:
        op = "moe_routing"
        if logits.ndim != 2 or not 1 <= top_k <= logits.shape[1]:
            refuse(op, f"logits must be [N, E] with 1 <= top_k={top_k} <= E", logits)
        tokens, experts = logits.shape
        if experts > MAX_EXPERTS or top_k > MAX_TOP_K:
            refuse(op, f"at most {MAX_EXPERTS} experts and top_k {MAX_TOP_K}, got top_k={top_k}", logits)
        self._dense(op, "logits", logits, (tokens, experts), torch.float32)
        ids, permutation = (
            torch.empty(shape, dtype=torch.int32, device=logits.device)
            for shape in ((tokens, top_k), (tokens * top_k,))
        )
        offsets = torch.empty(experts + 1, dtype=torch.int32, device=logits.device)
        weights = torch.empty(tokens, top_k, device=logits.device)
        self.kernels.moe_routing(
            logits.data_ptr(),
            tokens,
            experts,
            top_k,
            renormalize,
            scale,
            ids.data_ptr(),
            weights.data_ptr(),
            offsets.data_ptr(),
            permutation.data_ptr(),
            self._stream(),
        )
        return Routing(ids, weights, offsets, permutation)

    def grouped_gemm(self, x: Tensor, moe: Any, routing: Routing) -> Tensor:
        if not isinstance(moe, PackedExperts):
            result: Tensor = self.base.grouped_gemm(x, moe, routing)
            return result
        op, (tokens, top_k) = "grouped_gemm", routing.weights.shape
        self._dense(op, "x", x, (tokens, moe.width), torch.bfloat16)
        for name, index, size in (
            ("offsets", routing.offsets, moe.num_experts + 1),
            ("permutation", routing.permutation, tokens * top_k),
        ):
            self._dense(op, name, index, (size,), torch.int32)
        self._dense(op, "weights", routing.weights, (tokens, top_k), torch.float32)
        x = aligned(x)
        hidden = torch.empty(tokens * top_k, moe.inner, dtype=torch.bfloat16, device=x.device)
        parts = torch.empty(tokens * top_k, moe.width, device=x.device)
        y = torch.empty(tokens, moe.width, device=x.device)
        self.kernels.grouped_gemm(
            x.data_ptr(),
            tokens,
            moe.width,
            moe.inner,
            moe.num_experts,
            top_k,
            moe.kind,
            moe.gate_up.data_ptr(),
            moe.down.data_ptr(),
            0 if moe.gate_up_scales is None else moe.gate_up_scales.data_ptr(),
            0 if moe.down_scales is None else moe.down_scales.data_ptr(),
            routing.offsets.data_ptr(),
            routing.permutation.data_ptr(),
            routing.weights.data_ptr(),
            hidden.data_ptr(),
            parts.data_ptr(),
            y.data_ptr(),
            self._stream(),
        )
        return y

    def moe_ffn(
        self,
        x: Tensor,
        moe: Any,
        top_k: int,
        renormalize: bool,
        scale: float,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        result: Any
        if not isinstance(moe, PackedExperts):
            result = self.base.moe_ffn(x, moe, top_k, renormalize, scale, residual, out)
            return result  # type: ignore[no-any-return]
        x = x.contiguous()
        logits = self.base.linear(x.to(moe.router_dtype), moe.router, out_dtype=torch.float32)
        result = self.grouped_gemm(x, moe, self.moe_routing(logits, top_k, renormalize, scale))
        if moe.shared is not None:
            result += self.base.swiglu_float32(x, moe.shared)
        if residual is not None:
            result += residual
        return finish(result, x.dtype, out)
