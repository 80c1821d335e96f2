"""Adapter of the CUDA C++ kernels: check, call, nothing else. The same class drives two builds of one source.

`pagelens._cuda` (nvcc) runs on a card. `pagelens._cuda_sim` (g++ and csrc/simt) runs the kernels on a CPU for the
tests, as backend `cuda-sim`; it is thousands of times slower than a card. Ops without a CUDA kernel, and cases that
`supports` refuses, run on the reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ShapeError
from ..quantization import QuantizedWeight, Weight
from . import OpCase, RopeTable, Routing
from .reference import PackedMoe, PackedSwiglu, ReferenceOps, finish, refuse, swiglu_float32
from .reference_vision import PackedConvDownsample

HEAD_DIMS = (16, 32, 64, 96, 128)
VISION_HEAD_DIMS = (16, 32, 64, 80)
MAX_WINDOW = 128
CONV_ORDER = (  # of the weights in kernels.h
    "conv1",
    "norm1_weight",
    "norm1_bias",
    "conv2",
    "norm2_weight",
    "norm2_bias",
    "down1",
    "down2",
)
MAX_EXPERTS, MAX_TOP_K = 256, 32  # kernels.h
GROUPS = {"int8": 64, "int4": 32}  # inputs that share a scale in the kernels: gemm_tile.h
DEPTH = 64  # rows of quantised weights are filled up to a multiple of it


@dataclass(frozen=True, slots=True)
class PackedExperts(PackedMoe):
    """A mixture of experts as grouped_gemm wants it; `experts` stays empty, the weights are here.

    kind            "bfloat16", "int8" or "int4"
    gate_up, down   [E, 2I, C] with rows gate 0, up 0, gate 1, up 1, ..., and [E, C, I]; bfloat16, or bytes of pack_rows
    gate_up_scales, down_scales  [E, rows, groups] float32, or None
    """

    kind: str
    inner: int
    gate_up: Tensor
    down: Tensor
    gate_up_scales: Tensor | None
    down_scales: Tensor | None


def pack_rows(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Bytes [N, B] in the order in which the lanes of mma want them, and float32 scales [N, groups].

    Of 16 inputs, lane t of a quad takes 2t, 2t+1, 2t+8, 2t+9: these stand together. int8: 64 bytes hold 64 inputs.
    int4: a byte holds value + 8 of the same place of two such steps of 16, the first in its low half: 32 bytes hold 64
    inputs.
    """
    n, k = weight.shape
    padded = -(-k // DEPTH) * DEPTH
    values = functional.pad(weight.values.to(torch.int8), (0, padded - k)).view(n, padded // 16, 2, 4, 2)
    values = values.transpose(2, 3).reshape(n, padded // 16, 16)  # [t][half][pair]
    if weight.kind == "int4":
        steps = (values + 8).to(torch.uint8).view(n, padded // 32, 2, 16)
        values = steps[:, :, 0] | steps[:, :, 1] << 4
    size = GROUPS[weight.kind]
    columns = torch.arange(0, padded, size).clamp(max=max(k - 1, 0)) // weight.group_size
    return values.reshape(n, -1).view(torch.uint8).contiguous(), weight.scales.float()[:, columns].contiguous()


def two_parts(table: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as the sum of two bfloat16, to 2^-17 of a value: how a table enters a product of the tensor cores."""
    high = table.bfloat16().contiguous()
    return high, (table.float() - high.float()).bfloat16().contiguous()


def taps_first(kernel: Tensor) -> Tensor:
    """[F, C, h, w] -> [F, h * w * C]: how an implicit GEMM walks over a kernel."""
    return kernel.permute(0, 2, 3, 1).flatten(1).contiguous()


def refusal(weight: Weight) -> str | None:
    """Why grouped_gemm does not take this weight, or None."""
    if not isinstance(weight, QuantizedWeight):
        return None if weight.dtype == torch.bfloat16 else "weights must be bfloat16, int8 or int4"
    if weight.kind not in GROUPS or weight.zeros is not None or weight.input_order is not None:
        return "quantised weights must be int8 or int4 without zeros and act-order"
    if weight.activation is not None or weight.dtype != torch.bfloat16:
        return "activations must stay bfloat16"
    if weight.scales.shape[1] > 1 and weight.group_size % GROUPS[weight.kind]:
        return f"groups of {weight.group_size} inputs; they must be multiples of {GROUPS[weight.kind]}"
    return None


def refuse_int8_cache(op: str, *scales: Tensor | None) -> None:
    """Raises ShapeError if an int8 cache was given, which the kernels do not read."""
    if any(s is not None for s in scales):
        raise ShapeError(f"{op}: the CUDA kernels have no int8 KV-cache; use kv_cache_dtype='auto'")


class CudaOps(ReferenceOps):
    """The ops that have a CUDA kernel; see ops/__init__.py for formulas and shapes."""

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

    def __init__(self, kernels: ModuleType, name: str) -> None:
        """kernels: pagelens._cuda or pagelens._cuda_sim."""
        self.kernels = kernels
        self.name = name

    def supports(self, case: OpCase) -> str | None:
        """None, or the sentence that says why a case runs on the reference."""
        if case.op not in self.IMPLEMENTED:
            return None
        sizes = dict(case.sizes)
        if case.op != "moe_routing" and case.dtype != torch.bfloat16:
            return f"the CUDA kernels take bfloat16, not {str(case.dtype).removeprefix('torch.')}"
        if case.op == "paged_attention" and sizes.get("head_dim", 128) not in HEAD_DIMS:
            return f"head_dim {sizes['head_dim']} is not one of {', '.join(map(str, HEAD_DIMS))}"
        if case.op == "window_attention" and sizes.get("head_dim", 64) not in VISION_HEAD_DIMS:
            return f"head_dim {sizes['head_dim']} is not one of {', '.join(map(str, VISION_HEAD_DIMS))}"
        if case.op == "qk_norm_rope_store" and (sizes.get("head_dim", 128) % 4 or sizes.get("head_dim", 128) > 256):
            return f"head_dim {sizes['head_dim']} is not a multiple of 4 up to 256"
        if sizes.get("num_experts", 1) > MAX_EXPERTS or sizes.get("top_k", 1) > MAX_TOP_K:
            return f"it takes up to {MAX_EXPERTS} experts and top_k up to {MAX_TOP_K}"
        for name in ("width", "intermediate", "neck"):
            if sizes.get(name, 8) % 8:
                return f"{name} {sizes[name]} is not a multiple of 8"
        return None

    @staticmethod
    def _stream() -> int:
        return torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0

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
        refuse_int8_cache("qk_norm_rope_store", key_scales, value_scales)
        num_blocks, block_size, num_kv_heads, head_dim = keys.shape
        width = (num_heads + 2 * num_kv_heads) * head_dim
        if qkv.ndim != 2 or qkv.shape[1] != width or values.shape != keys.shape or qkv.dtype != torch.bfloat16:
            refuse("qk_norm_rope_store", f"qkv must be [N, {width}] bfloat16, caches alike", qkv, keys, values)
        if keys.dtype != qkv.dtype or not (keys.is_contiguous() and values.is_contiguous()):
            refuse("qk_norm_rope_store", "the caches must be contiguous, in qkv's dtype", keys, values)
        if not qkv.is_cuda:  # on a card this would wait for it; the scheduler made both
            self._check_indices("positions", positions, qkv.shape[0], rope.cos.shape[0])
            self._check_indices("slots", slots, qkv.shape[0], num_blocks * block_size)
        if out is None:
            out = torch.empty(qkv.shape[0], num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
        if qkv.shape[0]:
            self.kernels.qk_norm_rope_store(
                qkv.data_ptr(),
                qkv.stride(0),
                qkv.shape[0],
                num_heads,
                num_kv_heads,
                head_dim,
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
        refuse_int8_cache("paged_attention", key_scales, value_scales)
        num_kv_heads, head_dim = keys.shape[2:]
        if q.ndim != 3 or q.shape[2] != head_dim or q.shape[1] % num_kv_heads or q.dtype != torch.bfloat16:
            refuse("paged_attention", "q must be [N, H, D] bfloat16 with H a multiple of K", q, keys)
        if out is None:
            out = torch.empty_like(q)
        if not q.shape[0]:
            return out
        # The scheduler knows these without asking the card; here they are read from tensors that lie on the CPU.
        longest = int((query_starts[1:] - query_starts[:-1]).max()), int(context_lens.max())
        args = self.kernels.PagedAttentionArgs(
            q=q.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            heads=q.shape[1],
            kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=keys.shape[1],
            block_tables=block_tables.data_ptr(),
            query_starts=query_starts.data_ptr(),
            context_lens=context_lens.data_ptr(),
            sequences=context_lens.shape[0],
            table_width=block_tables.shape[1],
            tokens=q.shape[0],
            longest_query=longest[0],
            longest_context=longest[1],
            scale=scale,
            out=out.data_ptr(),
        )
        scratch = torch.empty(self.kernels.paged_attention_scratch(args), dtype=torch.float32, device=q.device)
        self.kernels.paged_attention(args, scratch.data_ptr(), self._stream())
        return out

    def window_attention(
        self,
        qkv: Tensor,
        pad_qkv: Tensor,
        rel_h: Tensor,
        rel_w: Tensor,
        num_heads: int,
        window: int,
        out: Tensor | None = None,
    ) -> Tensor:
        views, grid, _, width = qkv.shape
        size, head_dim = window or grid, width // (3 * num_heads)
        if rel_h.shape != (2 * size - 1, head_dim) or rel_w.shape != rel_h.shape or qkv.dtype != torch.bfloat16:
            refuse("window_attention", f"tables must be [{2 * size - 1}, {head_dim}], qkv bfloat16", qkv, rel_h, rel_w)
        if head_dim not in VISION_HEAD_DIMS or size > MAX_WINDOW:
            refuse("window_attention", f"head_dim must be one of {VISION_HEAD_DIMS}, windows up to {MAX_WINDOW}", qkv)
        qkv, pad_qkv = qkv.contiguous(), pad_qkv.to(qkv.dtype).contiguous()
        tables = [part for table in (rel_h, rel_w) for part in two_parts(table)]
        shape = (views, grid, grid, width // 3)
        if out is None:
            out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
        elif out.shape != shape or out.dtype != qkv.dtype or not out.is_contiguous():
            refuse("window_attention", f"out must be contiguous {list(shape)} in qkv's dtype", out)
        self.kernels.window_attention(
            qkv.data_ptr(),
            pad_qkv.data_ptr(),
            *(table.data_ptr() for table in tables),
            views=views,
            grid=grid,
            size=size,
            across=-(-grid // size),
            heads=num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            out=out.data_ptr(),
            stream=self._stream(),
        )
        return out

    def pack_conv_downsample(self, weights: dict[str, Tensor]) -> PackedConvDownsample:
        """The 3x3 kernels [F, C, 3, 3] become [F, 9 * C], the channels of a tap together; the rest stays."""
        flat = {name: taps_first(w) if w.ndim == 4 else w.contiguous() for name, w in weights.items()}
        return PackedConvDownsample(**flat)

    def conv_downsample(self, x: Tensor, neck: PackedConvDownsample, eps: float) -> Tensor:
        parts = [getattr(neck, name) for name in CONV_ORDER]
        views, side, _, width = x.shape
        channels, down1, down2 = (w.shape[0] for w in (neck.conv1, neck.down1, neck.down2))
        if width != neck.conv1.shape[1] or x.dtype != torch.bfloat16 or any(w.dtype != x.dtype for w in parts):
            refuse("conv_downsample", f"x must be [B, G, G, {neck.conv1.shape[1]}] bfloat16, weights alike", x)
        if any(size % 8 for size in (width, channels, down1)):
            refuse("conv_downsample", "channels must be multiples of 8", x, neck.conv2)
        half, quarter = (side + 1) // 2, ((side + 1) // 2 + 1) // 2
        x = x.contiguous()
        sums = torch.empty(views, side, side, channels, device=x.device)
        made = [(side, channels), (half, down1), (quarter, down2)]
        maps = [torch.empty(views, s, s, c, dtype=x.dtype, device=x.device) for s, c in made]
        self.kernels.conv_downsample(
            x.data_ptr(),
            views,
            side,
            width,
            channels,
            down1,
            down2,
            [w.data_ptr() for w in parts],
            eps,
            sums.data_ptr(),
            *(m.data_ptr() for m in maps),
            self._stream(),
        )
        return maps[-1]

    # ---- mixture of experts ----------------------------------------------------------------------------------------
    def pack_moe(
        self, router: Tensor, experts: Iterable[tuple[Weight, Weight, Weight]], shared: PackedSwiglu | None
    ) -> PackedMoe:
        moe = super().pack_moe(router, experts, shared)
        parts = [part for e in moe.experts for part in (e.gate, e.up, e.down)]
        kinds = {part.kind if isinstance(part, QuantizedWeight) else str(part.dtype) for part in parts}
        if len(kinds) != 1 or any(refusal(part) for part in parts) or any(size % 8 for size in parts[0].shape):
            return moe
        inner = moe.experts[0].gate.shape[0]
        rows = [[self._rows(part) for part in (e.gate, e.up, e.down)] for e in moe.experts]
        gate_up, gate_up_scales = (
            torch.stack([torch.stack([gate[i], up[i]], 1).flatten(0, 1) for gate, up, _ in rows]) for i in (0, 1)
        )
        down, down_scales = (torch.stack([expert[2][i] for expert in rows]) for i in (0, 1))
        kind = kinds.pop()
        if kind not in GROUPS:
            return PackedExperts(router, (), shared, "bfloat16", inner, gate_up, down, None, None)
        return PackedExperts(router, (), shared, kind, inner, gate_up, down, gate_up_scales, down_scales)

    @staticmethod
    def _rows(weight: Weight) -> tuple[Tensor, Tensor]:
        """The rows as the kernel reads them, and their scales (none for bfloat16)."""
        return pack_rows(weight) if isinstance(weight, QuantizedWeight) else (weight, torch.empty(weight.shape[0], 0))

    def moe_routing(self, logits: Tensor, top_k: int, renormalize: bool, scale: float) -> Routing:
        if logits.ndim != 2 or logits.dtype != torch.float32 or not 1 <= top_k <= logits.shape[1]:
            refuse("moe_routing", f"logits must be [N, E] float32 with 1 <= top_k={top_k} <= E", logits)
        tokens, experts = logits.shape
        if experts > MAX_EXPERTS or top_k > MAX_TOP_K:
            refuse("moe_routing", f"at most {MAX_EXPERTS} experts and top_k {MAX_TOP_K}, got top_k={top_k}", logits)
        logits = logits.contiguous()
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

    def grouped_gemm(self, x: Tensor, moe: PackedMoe, routing: Routing) -> Tensor:
        if not isinstance(moe, PackedExperts):
            return super().grouped_gemm(x, moe, routing)
        width, experts = moe.router.shape[1], moe.router.shape[0]
        if x.ndim != 2 or x.shape[1] != width or x.dtype != torch.bfloat16:
            refuse("grouped_gemm", f"x must be [N, {width}] bfloat16", x)
        x, (tokens, top_k) = x.contiguous(), routing.expert_ids.shape
        hidden = torch.empty(tokens * top_k, moe.inner, dtype=torch.bfloat16, device=x.device)
        parts = torch.empty(tokens * top_k, width, device=x.device)
        y = torch.empty(tokens, width, device=x.device)
        self.kernels.grouped_gemm(
            x.data_ptr(),
            tokens,
            width,
            moe.inner,
            experts,
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
        moe: PackedMoe,
        top_k: int,
        renormalize: bool,
        scale: float,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        logits = x.float() @ moe.router.float().T
        result: Any = self.grouped_gemm(x, moe, self.moe_routing(logits, top_k, renormalize, scale))
        if moe.shared is not None:
            result += swiglu_float32(x, moe.shared)
        if residual is not None:
            result += residual
        return finish(result, x.dtype, out)
