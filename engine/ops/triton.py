"""Adapter of the Triton kernels: checks shapes and dtypes, calls, and does nothing else.

Everything stays on the device: tensors that come from the host are copied there by the caller, results are device
tensors. Nothing is read back, so that an id, slot or position outside its table cannot raise here: such a row is left
out (its embedding is 0, its key and value are not stored). The engine's own batches hold no such rows.

On a CPU the kernels run in Triton's interpreter, for tests only: thousands of times slower than a device.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..errors import ShapeError, UnsupportedError
from . import Activation, OpCase, RopeTable, Routing
from .triton_graphs import GraphMemory, GraphProgram
from .triton_packing import DTYPES, PackedLinear, PackedMoe, PackedSwiglu, refuse
from .triton_sampling import DeviceSampling
from .triton_vision import TritonVision

ACTIVATIONS = (None, "gelu", "quick_gelu", "silu")
MAX_EXPERTS = 1024
INTERPRETED = (
    "backend triton runs its kernels in Triton's interpreter on the CPU: for tests, thousands of times slower than on "
    "a GPU"
)


def refuse_int8_cache(op: str, *scales: Tensor | None) -> None:
    """Raises ShapeError if an int8 cache was given, which the kernels do not read."""
    if any(s is not None for s in scales):
        raise ShapeError(f"{op}: backend triton has no int8 KV-cache; use kv_cache_dtype='auto'")


class TritonOps(TritonVision):
    """The ops of the contract by the kernels in kernels/.

    device  a CUDA device (NVIDIA, or AMD with a ROCm build of torch), or "cpu": interpreted; a RuntimeWarning says so
    Raises UnsupportedError if triton cannot be imported here.
    """

    name = "triton"

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)
        self.sampling = DeviceSampling(self.device)
        self._graph_memory = GraphMemory()
        try:
            if self.device.type == "cpu":
                from ..kernels.interpreter import import_triton

                import_triton()
                warnings.warn(INTERPRETED, RuntimeWarning, stacklevel=2)
            else:
                import triton  # noqa: F401
        except ImportError as error:
            raise UnsupportedError(f"triton cannot be imported ({error}); pip install 'pagelens[gpu]'") from None
        except RuntimeError as error:
            raise UnsupportedError(f"backend triton on a CPU: {error}") from None

    def close(self) -> None:
        """Nothing to release: torch owns the device's memory."""

    def new_program(self) -> GraphProgram | None:
        """A CUDA graph; None where there are none (interpreted)."""
        return None if self.device.type == "cpu" else GraphProgram(self._graph_memory)

    def supports(self, case: OpCase) -> str | None:
        """None if this case can run, else one sentence that says why not."""
        if case.dtype not in DTYPES:
            return f"triton runs float32, bfloat16 and float16, not {str(case.dtype).removeprefix('torch.')}"
        sizes = dict(case.sizes)
        if sizes.get("head_dim", 2) % 2 or sizes.get("head_dim", 2) > 256:
            return f"triton needs an even head_dim of at most 256, not {sizes['head_dim']}"
        if sizes.get("num_experts", 1) > MAX_EXPERTS:
            return f"triton routes to at most {MAX_EXPERTS} experts, not {sizes['num_experts']}"
        return None

    # ---- rows ------------------------------------------------------------------------------------------------------
    def embedding(self, token_ids: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
        from ..kernels.embedding import embedding

        self._vector("embedding", "token_ids", token_ids, token_ids.numel(), torch.int32)
        self._rows("embedding", table, table.shape[-1], table.dtype)
        self._like("embedding", "out", out, (token_ids.shape[0], table.shape[1]), table.dtype)
        return embedding(token_ids, table, out)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        from ..kernels.rms_norm import rms_norm

        rows, target = self._norm_rows("rms_norm", x, out, weight)
        result = rms_norm(rows, weight, eps, out=target)
        return result.view(x.shape) if out is None else out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        from ..kernels.layer_norm import layer_norm

        rows, target = self._norm_rows("layer_norm", x, out, weight, bias)
        result = layer_norm(rows, weight, bias, eps, out=target)
        return result.view(x.shape) if out is None else out

    def _norm_rows(self, op: str, x: Tensor, out: Tensor | None, *weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [..., C] and out as [rows, C]."""
        for weight in weights:
            self._vector(op, "weight", weight, x.shape[-1], x.dtype)
        if out is not None and (out.shape != x.shape or out.dtype != x.dtype or not self._is_here(out)):
            refuse(op, f"out must be like x, on {self.device}", out, x)
        if x.ndim != 2 and not (x.is_contiguous() and (out is None or out.is_contiguous())):
            refuse(op, "x and out must be contiguous unless they have two axes", x)
        width = x.shape[-1]
        rows = x if x.ndim == 2 else x.view(-1, width)
        self._rows(op, rows, width, x.dtype)
        return rows, None if out is None else (out if out.ndim == 2 else out.view(-1, width))

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
        from ..kernels.qk_norm_rope_store import qk_norm_rope_store

        op, tokens = "qk_norm_rope_store", qkv.shape[0]
        refuse_int8_cache(op, key_scales, value_scales)
        num_kv_heads, head_dim = self._caches(op, keys, values, qkv.dtype)
        self._rows(op, qkv, (num_heads + 2 * num_kv_heads) * head_dim, qkv.dtype)
        self._vector(op, "positions", positions, tokens, torch.int32)
        self._vector(op, "slots", slots, tokens, torch.int32)
        for norm in (q_norm, k_norm):
            if norm is not None:
                self._vector(op, "a norm", norm, head_dim, qkv.dtype)
        for table in (rope.cos, rope.sin):
            good = table.shape == (rope.cos.shape[0], head_dim // 2) and table.is_contiguous()
            if not good or table.dtype != torch.float32 or not self._is_here(table):
                refuse(op, f"rope tables must be contiguous [P, {head_dim // 2}] float32 on {self.device}", table)
        self._heads(op, out, (tokens, num_heads, head_dim), qkv.dtype)
        return qk_norm_rope_store(
            qkv, positions, slots, rope.cos, rope.sin, keys, values, num_heads, q_norm, k_norm, eps, out
        )

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
        from ..kernels.paged_attention import paged_attention

        op, sequences = "paged_attention", context_lens.shape[0]
        refuse_int8_cache(op, key_scales, value_scales)
        num_kv_heads, head_dim = self._caches(op, keys, values, q.dtype)
        if q.ndim != 3 or q.shape[2] != head_dim or not num_kv_heads or q.shape[1] % num_kv_heads:
            refuse(op, "q must be [N, H, D] with the cache's D and H a multiple of its K", q, keys)
        self._heads(op, q, tuple(q.shape), q.dtype)
        self._heads(op, out, tuple(q.shape), q.dtype)
        self._vector(op, "query_starts", query_starts, sequences + 1, torch.int32)
        self._vector(op, "context_lens", context_lens, sequences, torch.int32)
        if block_tables.ndim != 2 or block_tables.shape[0] != sequences or block_tables.dtype != torch.int32:
            refuse(op, "block_tables must be [S, M] int32", block_tables, context_lens)
        return paged_attention(q, keys, values, block_tables, query_starts, context_lens, scale, out)

    # ---- products --------------------------------------------------------------------------------------------------
    def linear(
        self,
        x: Tensor,
        weight: PackedLinear,
        activation: Activation | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        from ..kernels.linear import linear

        self._rows("linear", x, weight.in_features, weight.dtype)
        if activation not in ACTIVATIONS:
            raise ShapeError(f"linear: unknown activation {activation!r}; known: gelu, quick_gelu, silu")
        if out_dtype not in (None, x.dtype, torch.float32):
            raise ShapeError(f"linear: out_dtype must be x's {x.dtype} or float32, got {out_dtype}")
        self._like("linear", "residual", residual, (x.shape[0], weight.out_features), x.dtype)
        self._like("linear", "out", out, (x.shape[0], weight.out_features), out_dtype or x.dtype)
        if out is not None and out.numel() and out.data_ptr() == x.data_ptr() != 0:  # 0: a tensor without memory
            refuse("linear", "out must not be x", x, out)
        return linear(x, weight.matrix, activation, residual, out, out_dtype)

    def swiglu_ffn(
        self, x: Tensor, ffn: PackedSwiglu, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        from ..kernels.linear import linear

        self._rows("swiglu_ffn", x, ffn.width, ffn.dtype)
        self._like("swiglu_ffn", "residual", residual, tuple(x.shape), x.dtype)
        self._like("swiglu_ffn", "out", out, tuple(x.shape), x.dtype)
        return linear(linear(x, ffn.gate_up, "swiglu"), ffn.down, None, residual, out)

    def swiglu_float32(self, x: Tensor, ffn: PackedSwiglu) -> Tensor:
        """swiglu_ffn without its last rounding: float32 [N, C]."""
        from ..kernels.linear import linear

        self._rows("swiglu_ffn", x, ffn.width, ffn.dtype)
        return linear(linear(x, ffn.gate_up, "swiglu"), ffn.down, out_dtype=torch.float32)

    def moe_routing(self, logits: Tensor, top_k: int, renormalize: bool, scale: float) -> Routing:
        from ..kernels.moe_routing import moe_routing

        self._rows("moe_routing", logits, logits.shape[-1], torch.float32)
        if not 1 <= top_k <= logits.shape[1]:
            refuse("moe_routing", f"logits must be [N, E] with 1 <= top_k={top_k} <= E", logits)
        return Routing(*moe_routing(logits, top_k, renormalize, scale))

    def grouped_gemm(self, x: Tensor, moe: PackedMoe, routing: Routing) -> Tensor:
        from ..kernels.grouped_gemm import grouped_gemm

        self._rows("grouped_gemm", x, moe.width, moe.dtype)
        if routing.weights.ndim != 2 or routing.weights.shape[0] != x.shape[0]:
            refuse("grouped_gemm", "routing must be of the N tokens of x [N, C]", x, routing.weights)
        return grouped_gemm(x, moe.experts, routing.weights, routing.offsets, routing.permutation)

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
        from ..kernels.moe_ffn import moe_ffn

        self._rows("moe_ffn", x, moe.width, moe.dtype)
        if not 1 <= top_k <= moe.router.n:
            refuse("moe_ffn", f"top_k={top_k} must be between 1 and {moe.router.n}", x)
        self._like("moe_ffn", "residual", residual, tuple(x.shape), x.dtype)
        self._like("moe_ffn", "out", out, tuple(x.shape), x.dtype)
        shared = None if moe.shared is None else (moe.shared.gate_up, moe.shared.down)
        return moe_ffn(x, moe.router, moe.experts, shared, top_k, renormalize, scale, residual, out)
