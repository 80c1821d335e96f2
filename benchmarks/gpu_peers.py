"""The same work as a workload of the GPU kernels by torch, flash-attn, vLLM and SGLang, for bench_gpu.py.

A peer is imported only where it is installed, when its first call is made. None of them was at hand when this was
written: the calls follow the interfaces of flash-attn 2, vLLM 0.10 and sgl-kernel 0.3, and what another version refuses
is reported, not hidden. SGLang's fused experts are left out: they want the state of its server.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Sizes = dict[str, int]
Maker = Callable[[Sizes, torch.device], Callable[[], Any]]
BF16 = torch.bfloat16
EPS = 1e-6
PAGE = 256  # flash-attn's smallest page


def zeros(device: torch.device, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def whole(device: torch.device, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device)


@dataclass(frozen=True)
class Peer:
    """name: as its distribution is called; module: what must be importable; calls: by the key of a workload."""

    name: str
    module: str
    calls: dict[str, Maker]

    @property
    def version(self) -> str | None:
        """None if it is not installed."""
        try:
            if find_spec(self.module) is None:
                return None
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return "of unknown version"
        except (ImportError, ValueError):
            return None


# ---- torch ---------------------------------------------------------------------------------------------------------
def torch_linear(s: Sizes, device: torch.device) -> Callable[[], Any]:
    x, weight = zeros(device, s["rows"], s["k"]), zeros(device, s["n"], s["k"])
    return lambda: functional.linear(x, weight)


def torch_attention(s: Sizes, device: torch.device) -> Callable[[], Any]:
    q, k, v = zeros(device, 3, 1, s["heads"], s["tokens"], s["d"])
    return lambda: functional.scaled_dot_product_attention(q, k, v)


def torch_window_attention(s: Sizes, device: torch.device) -> Callable[[], Any]:
    """With the bias finished: making it, cutting windows and joining them is not counted."""
    side = s["window"] or s["grid"]
    windows, tokens = (-(-s["grid"] // side)) ** 2, side**2
    q, k, v = zeros(device, 3, windows, s["heads"], tokens, s["d"])
    bias = zeros(device, windows, s["heads"], tokens, tokens)
    return lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def torch_conv(s: Sizes, device: torch.device) -> Callable[[], Any]:
    """Channels last; with stride 1 the LayerNorm behind it."""
    x = zeros(device, 1, s["channels"], s["grid"], s["grid"]).to(memory_format=torch.channels_last)
    shape = s["outs"], s["channels"], s["size"], s["size"]
    weight = zeros(device, *shape).to(memory_format=torch.channels_last)
    gain = zeros(device, s["outs"])

    def call() -> Tensor:
        y = functional.conv2d(x, weight, stride=s["stride"], padding=s["size"] // 2).permute(0, 2, 3, 1)
        return functional.layer_norm(y, (s["outs"],), gain, gain, EPS) if s["stride"] == 1 else y

    return call


def torch_patch_embed(s: Sizes, device: torch.device) -> Callable[[], Any]:
    pixels, weight = zeros(device, 1, 3, s["side"], s["side"]), zeros(device, s["width"], 3, s["patch"], s["patch"])
    bias = zeros(device, s["width"])
    return lambda: functional.conv2d(pixels, weight, bias, stride=s["patch"])


def torch_paged_attention(s: Sizes, device: torch.device) -> Callable[[], Any]:
    """Of contiguous keys and values: torch has no pages."""
    q = zeros(device, 1, s["heads"], s["new"], s["d"])
    k, v = zeros(device, 2, 1, s["kv_heads"], s["context"], s["d"])
    causal, grouped = s["new"] > 1, s["heads"] != s["kv_heads"]
    return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def torch_moe_routing(s: Sizes, device: torch.device) -> Callable[[], Any]:
    """The choice alone, without counts, offsets and permutation."""
    logits = zeros(device, s["tokens"], s["experts"], dtype=torch.float32)
    return lambda: logits.softmax(-1).topk(s["top_k"])


def torch_rms_norm(s: Sizes, device: torch.device) -> Callable[[], Any]:
    x, weight = zeros(device, s["rows"], s["width"]), zeros(device, s["width"])
    return lambda: functional.rms_norm(x, (s["width"],), weight, EPS)


def torch_layer_norm(s: Sizes, device: torch.device) -> Callable[[], Any]:
    x, weight = zeros(device, s["rows"], s["width"]), zeros(device, s["width"])
    return lambda: functional.layer_norm(x, (s["width"],), weight, weight, EPS)


def torch_embedding(s: Sizes, device: torch.device) -> Callable[[], Any]:
    table, ids = zeros(device, s["vocab"], s["width"]), whole(device, 0)
    return lambda: functional.embedding(ids, table)


# ---- flash-attn ----------------------------------------------------------------------------------------------------
def flash_attention(s: Sizes, device: torch.device) -> Callable[[], Any]:
    from flash_attn import flash_attn_func

    q, k, v = zeros(device, 3, 1, s["tokens"], s["heads"], s["d"])
    return lambda: flash_attn_func(q, k, v)


def flash_prefill(s: Sizes, device: torch.device) -> Callable[[], Any]:
    from flash_attn import flash_attn_varlen_func

    q = zeros(device, s["new"], s["heads"], s["d"])
    k, v = zeros(device, 2, s["context"], s["kv_heads"], s["d"])
    starts, ends = whole(device, 0, s["new"]), whole(device, 0, s["context"])
    return lambda: flash_attn_varlen_func(q, k, v, starts, ends, s["new"], s["context"], causal=True)


def pages(s: Sizes, device: torch.device, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and the page table of one sequence."""
    count = -(-s["context"] // size)
    k, v = zeros(device, 2, count, size, s["kv_heads"], s["d"])
    return k, v, torch.arange(count, dtype=torch.int32, device=device)[None]


def flash_decode(s: Sizes, device: torch.device) -> Callable[[], Any]:
    from flash_attn import flash_attn_with_kvcache

    q, (k, v, table) = zeros(device, 1, 1, s["heads"], s["d"]), pages(s, device, PAGE)
    lengths = whole(device, s["context"])
    return lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, block_table=table, causal=True)


# ---- vLLM ----------------------------------------------------------------------------------------------------------
def vllm_paged_attention(s: Sizes, device: torch.device) -> Callable[[], Any]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    q, (k, v, table) = zeros(device, s["new"], s["heads"], s["d"]), pages(s, device, 16)
    starts, lengths = whole(device, 0, s["new"]), whole(device, s["context"])
    return lambda: flash_attn_varlen_func(
        q=q, k=k, v=v, cu_seqlens_q=starts, max_seqlen_q=s["new"], seqused_k=lengths, max_seqlen_k=s["context"],
        block_table=table, causal=True,
    )  # fmt: skip


def vllm_rms_norm(s: Sizes, device: torch.device) -> Callable[[], Any]:
    from vllm import _custom_ops

    x, weight = zeros(device, s["rows"], s["width"]), zeros(device, s["width"])
    out = torch.empty_like(x)
    return lambda: _custom_ops.rms_norm(out, x, weight, EPS)


def vllm_experts(s: Sizes, device: torch.device) -> Callable[[], Any]:
    from vllm.model_executor.layers.fused_moe import fused_experts

    x = zeros(device, s["tokens"], s["width"])
    gate_up = zeros(device, s["experts"], 2 * s["inner"], s["width"])
    down = zeros(device, s["experts"], s["width"], s["inner"])
    weights = zeros(device, s["tokens"], s["top_k"], dtype=torch.float32)
    chosen = (torch.arange(s["tokens"] * s["top_k"], dtype=torch.int32) * 11 % s["experts"]).to(device)
    ids = chosen.view(s["tokens"], s["top_k"])  # spread as the workload spreads them
    return lambda: fused_experts(x, gate_up, down, weights, ids)


# ---- SGLang --------------------------------------------------------------------------------------------------------
def sglang_paged_attention(s: Sizes, device: torch.device) -> Callable[[], Any]:
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    q, (k, v, table) = zeros(device, s["new"], s["heads"], s["d"]), pages(s, device, 16)
    starts, lengths = whole(device, 0, s["new"]), whole(device, s["context"])
    return lambda: flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, page_table=table, cu_seqlens_q=starts, max_seqlen_q=s["new"], causal=True
    )


def sglang_rms_norm(s: Sizes, device: torch.device) -> Callable[[], Any]:
    from sgl_kernel import rmsnorm

    x, weight = zeros(device, s["rows"], s["width"]), zeros(device, s["width"])
    return lambda: rmsnorm(x, weight, EPS)


PEERS = (
    Peer(
        "torch",
        "torch",
        {
            "linear": torch_linear,
            "attention": torch_attention,
            "window_attention": torch_window_attention,
            "conv": torch_conv,
            "conv_norm": torch_conv,
            "patch_embed": torch_patch_embed,
            "paged_attention": torch_paged_attention,
            "paged_attention_decode": torch_paged_attention,
            "moe_routing": torch_moe_routing,
            "rms_norm": torch_rms_norm,
            "layer_norm": torch_layer_norm,
            "embedding": torch_embedding,
        },
    ),
    Peer(
        "flash-attn",
        "flash_attn",
        {"attention": flash_attention, "paged_attention": flash_prefill, "paged_attention_decode": flash_decode},
    ),
    Peer(
        "vllm",
        "vllm",
        {
            "paged_attention": vllm_paged_attention,
            "paged_attention_decode": vllm_paged_attention,
            "rms_norm": vllm_rms_norm,
            "grouped_gemm": vllm_experts,
        },
    ),
    Peer(
        "sgl-kernel",
        "sgl_kernel",
        {
            "paged_attention": sglang_paged_attention,
            "paged_attention_decode": sglang_paged_attention,
            "rms_norm": sglang_rms_norm,
        },
    ),
)
