"""Adapter of the C++ kernels: checks shapes and dtypes, passes addresses, sizes and strides, and does nothing else.

The kernels run on the calling thread and on this object's own pool; no parallel torch op is called and no setting of
the process is changed. One call at a time: a second thread waits for the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import _native
from ..errors import ConfigError, EngineClosedError, ShapeError, UnsupportedError
from . import Activation, OpCase, RopeTable, Routing, SamplingCut
from .mapping import NativeMapping
from .native_vision import NativeVision
from .packing import DTYPES, PackedLinear, PackedMoe, PackedSwiglu, refuse, vector
from .threads import MAX_THREADS, default_num_threads

_ACTIVATIONS = {None: 0, "gelu": 1, "quick_gelu": 2, "silu": 3}
_NO_MATRIX = (0, 0, 0, 0, 0)
MAX_HEAD_DIM = 512  # kMaxHeadDim in csrc/cpu/qk_norm_rope_store.cpp
INT8_CACHE_MULTIPLE = 4  # elements of a word, csrc/cpu/kv_layout.h

_Matrix = tuple[int, int, int, int, int]


def _matrix(op: str, name: str, x: Tensor) -> _Matrix:
    """A 2-D tensor as the kernels take it."""
    code = DTYPES.get(x.dtype)
    if x.ndim != 2 or code is None or (x.shape[1] > 1 and x.stride(1) != 1) or x.device.type != "cpu":
        refuse(op, f"{name} must be a CPU tensor of two axes, float32 or bfloat16, last axis contiguous", x)
    rows, cols = x.shape
    return x.data_ptr(), rows, cols, x.stride(0), code


def _result(op: str, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype)
    if out.shape != shape or out.dtype != dtype:
        refuse(op, f"out must be {list(shape)} {str(dtype).removeprefix('torch.')}", out)
    return out


def _residual(op: str, residual: Tensor | None, x: Tensor, shape: tuple[int, int]) -> _Matrix:
    if residual is None:
        return _NO_MATRIX
    if residual.shape != shape or residual.dtype != x.dtype:
        refuse(op, f"residual must be {list(shape)} in x's dtype", residual, x)
    return _matrix(op, "residual", residual)


def _rows(op: str, name: str, x: Tensor) -> Tensor:
    """x [..., C] as [rows, C] without a copy."""
    if x.ndim == 2:
        return x
    if x.ndim < 1 or not x.is_contiguous():
        refuse(op, f"{name} must be contiguous unless it has two axes", x)
    return x.view(-1, x.shape[-1]) if x.numel() else x.view(0, x.shape[-1])


class NativeOps(NativeVision, NativeMapping):
    """The ops of IMPLEMENTED, as ops/__init__.py describes them. `num_threads` None: one a physical core.

    Raises UnsupportedError if PAGELENS_CPU_ISA asks for an instruction set that cannot be used here, ConfigError for a
    number of threads outside 1 to MAX_THREADS.
    After `close()`, or in a child process after a fork, every op raises EngineClosedError.
    """

    name = "native"
    device = torch.device("cpu")
    IMPLEMENTED = frozenset(
        {
            "embedding",
            "linear",
            "rms_norm",
            "layer_norm",
            "qk_norm_rope_store",
            "paged_attention",
            "swiglu_ffn",
            "moe_routing",
            "grouped_gemm",
            "moe_ffn",
            "window_attention",
            "attention",
            "patch_embed",
            "conv_downsample",
            "sample",
        }
    )

    def __init__(self, num_threads: int | None = None) -> None:
        try:
            self.isa: str = _native.isa()
        except ValueError as error:
            raise UnsupportedError(str(error)) from None
        if num_threads is not None and not 1 <= num_threads <= MAX_THREADS:
            raise ConfigError(f"num_threads={num_threads} must be between 1 and {MAX_THREADS}")
        self._pool = _native.ThreadPool(default_num_threads() if num_threads is None else num_threads)

    @property
    def num_threads(self) -> int:
        return self._pool.num_threads

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory held now; it grows to what the largest call needs and is freed by `close()`."""
        return self._pool.scratch_bytes

    def close(self) -> None:
        """End the threads and free the scratch memory. Idempotent."""
        self._pool.close()

    def new_program(self) -> _native.Program:
        return _native.Program(self._pool)

    def supports(self, case: OpCase) -> str | None:
        """None if this case can run, else one sentence that says why not."""
        if case.op not in self.IMPLEMENTED:
            return f"native does not implement {case.op}"
        if case.dtype not in DTYPES:
            return f"native runs float32 and bfloat16, not {str(case.dtype).removeprefix('torch.')}"
        head_dim = dict(case.sizes).get("head_dim", 2)
        if head_dim % 2 or head_dim > MAX_HEAD_DIM:
            return f"native needs an even head_dim of at most {MAX_HEAD_DIM}, not {head_dim}"
        return None

    # ---- rows ------------------------------------------------------------------------------------------------------
    def embedding(self, token_ids: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
        source = _matrix("embedding", "table", table)
        ids = vector("embedding", "token_ids", token_ids, token_ids.numel(), torch.int32)
        out = _result("embedding", (token_ids.shape[0], table.shape[1]), table.dtype, out)
        bad = _native.embedding(self._pool, ids, source, _matrix("embedding", "out", out))
        if bad >= 0:
            raise ShapeError(
                f"embedding: token id {int(token_ids[bad])} in row {bad} is outside the vocabulary "
                f"0..{table.shape[0] - 1}"
            )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        out = _result("rms_norm", tuple(x.shape), x.dtype, out)
        source = _matrix("rms_norm", "x", _rows("rms_norm", "x", x))
        address = vector("rms_norm", "weight", weight, x.shape[-1], x.dtype)
        _native.rms_norm(self._pool, source, address, eps, _matrix("rms_norm", "out", _rows("rms_norm", "out", out)))
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        out = _result("layer_norm", tuple(x.shape), x.dtype, out)
        source = _matrix("layer_norm", "x", _rows("layer_norm", "x", x))
        scale = vector("layer_norm", "weight", weight, x.shape[-1], x.dtype)
        shift = vector("layer_norm", "bias", bias, x.shape[-1], x.dtype)
        target = _matrix("layer_norm", "out", _rows("layer_norm", "out", out))
        _native.layer_norm(self._pool, source, scale, shift, eps, target)
        return out

    # ---- attention -------------------------------------------------------------------------------------------------
    @staticmethod
    def _cache(
        op: str, keys: Tensor, values: Tensor, key_scales: Tensor | None, value_scales: Tensor | None, like: Tensor
    ) -> _native.Cache:
        """A layer of the cache as the kernels take it; `like` is of the activations' dtype."""
        dtype = like.dtype if key_scales is None else torch.uint8
        good = keys.ndim == 4 and values.shape == keys.shape and keys.dtype == values.dtype == dtype
        if not good or not keys.is_contiguous() or not values.is_contiguous():
            refuse(op, f"keys and values must be contiguous [num_blocks, block_size, K, D] {dtype}", keys, values)
        num_blocks, block_size, num_kv_heads, head_dim = keys.shape
        if head_dim % 2 or not 0 < head_dim <= MAX_HEAD_DIM:
            refuse(op, f"D must be even and at most {MAX_HEAD_DIM}", keys)
        scales = [0, 0]
        if key_scales is not None:
            if head_dim % INT8_CACHE_MULTIPLE:
                refuse(op, f"D must be a multiple of {INT8_CACHE_MULTIPLE} in an int8 cache", keys)
            shape = (num_blocks, num_kv_heads, block_size)
            for i, (name, x) in enumerate((("key_scales", key_scales), ("value_scales", value_scales))):
                if x is None or x.shape != shape or x.dtype != torch.float32 or not x.is_contiguous():
                    refuse(op, f"{name} must be contiguous {list(shape)} float32", keys, *([] if x is None else [x]))
                scales[i] = x.data_ptr()
        addresses = (keys.data_ptr(), values.data_ptr(), scales[0], scales[1])
        return (*addresses, num_blocks, block_size, num_kv_heads, head_dim)

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
        op = "qk_norm_rope_store"
        source = _matrix(op, "qkv", qkv)
        cache = self._cache(op, keys, values, key_scales, value_scales, qkv)
        num_blocks, block_size, num_kv_heads, head_dim = keys.shape
        tokens, width = qkv.shape
        if width != (num_heads + 2 * num_kv_heads) * head_dim:
            refuse(op, f"qkv must be [N, ({num_heads} + 2*{num_kv_heads}) * {head_dim}]", qkv)
        num_positions = rope.cos.shape[0]
        for name, table in (("cos", rope.cos), ("sin", rope.sin)):
            if (
                table.shape != (num_positions, head_dim // 2)
                or table.dtype != torch.float32
                or not table.is_contiguous()
            ):
                refuse(op, f"rope.{name} must be contiguous [P, {head_dim // 2}] float32", table)
        out = _result(op, (tokens, num_heads, head_dim), qkv.dtype, out)
        bad = _native.qk_norm_rope_store(
            self._pool,
            source,
            vector(op, "positions", positions, tokens, torch.int32),
            vector(op, "slots", slots, tokens, torch.int32),
            rope.cos.data_ptr(),
            rope.sin.data_ptr(),
            num_positions,
            cache,
            num_heads,
            0 if q_norm is None else vector(op, "q_norm", q_norm, head_dim, qkv.dtype),
            0 if k_norm is None else vector(op, "k_norm", k_norm, head_dim, qkv.dtype),
            eps,
            _matrix(op, "out", self._flat_heads(op, "out", out)),
        )
        if bad >= 0:
            raise ShapeError(
                f"{op}: row {bad} has position {int(positions[bad])} of {num_positions}, "
                f"slot {int(slots[bad])} of {num_blocks * block_size}"
            )
        return out

    @staticmethod
    def _flat_heads(op: str, name: str, x: Tensor) -> Tensor:
        """[N, H, D] as [N, H*D]: heads must lie together, rows may be strided."""
        if x.ndim != 3 or x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != x.shape[2]):
            refuse(op, f"{name} must be [N, H, D] with contiguous rows", x)
        return x.as_strided((x.shape[0], x.shape[1] * x.shape[2]), (x.stride(0), 1))

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
        op = "paged_attention"
        source = _matrix(op, "q", self._flat_heads(op, "q", q))
        cache = self._cache(op, keys, values, key_scales, value_scales, q)
        num_blocks, block_size, num_kv_heads, head_dim = keys.shape
        tokens, num_heads, own_dim = q.shape
        if own_dim != head_dim or not num_kv_heads or num_heads % num_kv_heads:
            refuse(op, "q must be [N, H, D] with the cache's D and H a multiple of its K", q, keys)
        sequences = context_lens.shape[0]
        if block_tables.ndim != 2 or block_tables.shape[0] != sequences or block_tables.dtype != torch.int32:
            refuse(op, "block_tables must be [S, M] int32", block_tables, context_lens)
        if not block_tables.is_contiguous():
            refuse(op, "block_tables must be contiguous", block_tables)
        starts = vector(op, "query_starts", query_starts, sequences + 1, torch.int32)
        contexts = vector(op, "context_lens", context_lens, sequences, torch.int32)
        if int(query_starts[0]) != 0 or int(query_starts[-1]) != tokens:
            refuse(op, f"query_starts must run from 0 to N={tokens}, not to {int(query_starts[-1])}", q)
        out = _result(op, (tokens, num_heads, head_dim), q.dtype, out)
        bad = _native.paged_attention(
            self._pool,
            source,
            cache,
            num_heads,
            block_tables.data_ptr(),
            block_tables.shape[1],
            starts,
            contexts,
            sequences,
            scale,
            _matrix(op, "out", self._flat_heads(op, "out", out)),
        )
        if bad >= 0:
            raise ShapeError(
                f"{op}: sequence {bad} has {int(query_starts[bad + 1] - query_starts[bad])} new tokens of "
                f"{int(context_lens[bad])}, and its table names {block_tables.shape[1]} blocks of {block_size} "
                f"out of {num_blocks}: too few, or one that does not exist"
            )
        return out

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
        source = _matrix("linear", "x", x)
        if x.shape[1] != weight.in_features or x.dtype != weight.dtype:
            refuse("linear", f"x must be [N, {weight.in_features}] {weight.dtype}", x)
        if activation not in _ACTIVATIONS:
            raise ShapeError(f"linear: unknown activation {activation!r}; known: gelu, quick_gelu, silu")
        if out_dtype not in (None, x.dtype, torch.float32):
            raise ShapeError(f"linear: out_dtype must be x's {x.dtype} or float32, got {out_dtype}")
        shape = (x.shape[0], weight.out_features)
        added = _residual("linear", residual, x, shape)
        out = _result("linear", shape, out_dtype or x.dtype, out)
        target = _matrix("linear", "out", out)
        if target[0] == source[0] and x.numel() and out.numel():
            refuse("linear", "out must not be x", x, out)
        _native.linear(self._pool, source, weight.handle, _ACTIVATIONS[activation], added, target)
        return out

    def swiglu_ffn(
        self, x: Tensor, ffn: PackedSwiglu, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        source = self._ffn_input("swiglu_ffn", x, ffn)
        added = _residual("swiglu_ffn", residual, x, (x.shape[0], ffn.width))
        out = _result("swiglu_ffn", (x.shape[0], ffn.width), x.dtype, out)
        _native.swiglu_ffn(self._pool, source, ffn.handle, added, _matrix("swiglu_ffn", "out", out))
        return out

    @staticmethod
    def _ffn_input(op: str, x: Tensor, ffn: PackedSwiglu | PackedMoe) -> _Matrix:
        source = _matrix(op, "x", x)
        if x.shape[1] != ffn.width or x.dtype != ffn.dtype:
            refuse(op, f"x must be [N, {ffn.width}] {ffn.dtype}", x)
        return source

    def moe_routing(self, logits: Tensor, top_k: int, renormalize: bool, scale: float) -> Routing:
        source = _matrix("moe_routing", "logits", logits)
        tokens, experts = logits.shape
        if logits.dtype != torch.float32 or not 1 <= top_k <= experts:
            refuse("moe_routing", f"logits must be [N, E] float32 with 1 <= top_k={top_k} <= E", logits)
        routing = Routing(
            expert_ids=torch.empty((tokens, top_k), dtype=torch.int32),
            weights=torch.empty((tokens, top_k), dtype=torch.float32),
            offsets=torch.empty(experts + 1, dtype=torch.int32),
            permutation=torch.empty(tokens * top_k, dtype=torch.int32),
        )
        addresses = (routing.expert_ids, routing.weights, routing.offsets, routing.permutation)
        _native.moe_routing(self._pool, source, top_k, renormalize, scale, *(t.data_ptr() for t in addresses))
        return routing

    def grouped_gemm(self, x: Tensor, moe: PackedMoe, routing: Routing) -> Tensor:
        op = "grouped_gemm"
        source = self._ffn_input(op, x, moe)
        tokens, top_k = routing.expert_ids.shape
        if tokens != x.shape[0] or top_k < 1 or routing.weights.shape != routing.expert_ids.shape:
            refuse(
                op,
                "routing must have expert_ids and weights [N, k] for x [N, C]",
                x,
                routing.expert_ids,
                routing.weights,
            )
        out = torch.empty((tokens, moe.width), dtype=torch.float32)
        bad = _native.grouped_gemm(
            self._pool,
            source,
            moe.handle,
            top_k,
            vector(op, "expert_ids", routing.expert_ids.view(-1), tokens * top_k, torch.int32),
            vector(op, "offsets", routing.offsets, moe.num_experts + 1, torch.int32),
            vector(op, "permutation", routing.permutation, tokens * top_k, torch.int32),
            vector(op, "weights", routing.weights.view(-1), tokens * top_k, torch.float32),
            _matrix(op, "out", out),
        )
        if bad >= 0:
            raise ShapeError(f"{op}: the routing is not sorted by expert and token at permutation[{bad}]")
        return out

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
        source = self._ffn_input("moe_ffn", x, moe)
        if not 1 <= top_k <= moe.num_experts:
            refuse("moe_ffn", f"top_k={top_k} must be between 1 and {moe.num_experts}", x)
        shape = (x.shape[0], moe.width)
        added = _residual("moe_ffn", residual, x, shape)
        out = _result("moe_ffn", shape, x.dtype, out)
        _native.moe_ffn(
            self._pool, source, moe.handle, top_k, renormalize, scale, added, _matrix("moe_ffn", "out", out)
        )
        return out

    # ---- the next token --------------------------------------------------------------------------------------------
    def sample(self, logits: Tensor, cuts: Sequence[SamplingCut]) -> list[int]:
        source = _matrix("sample", "logits", logits)
        if logits.dtype != torch.float32 or not logits.shape[1] or len(cuts) != logits.shape[0]:
            refuse("sample", f"logits must be [{len(cuts)}, V] float32 with V >= 1, a row for each cut", logits)
        values = np.array(cuts, np.float64)
        tokens = np.empty(len(cuts), np.int32)
        _native.sample(self._pool, source, values.ctypes.data, tokens.ctypes.data)
        chosen: list[int] = tokens.tolist()
        return chosen


# What a closed or forked pool raises, so that no call pays for a translation.
_native.set_closed_error(EngineClosedError)
