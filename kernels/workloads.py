"""The work that configurations are chosen for: each kernel on the sizes of the real models, one call each.

A workload runs on any device: on "meta" (no data) to record its launches, on a card to be timed. `key` is the kernel's
name in configs/<target>.json and `when` the limits of the rule that the workload decides; the workloads of a key stand
in the order of its rules, the one without limits last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .matrix import Matrix, units_of

Call = Callable[[], Any]
BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32


@dataclass(frozen=True)
class Workload:
    """One call of a kernel's function on one set of sizes.

    bytes     read and written at least once; flops: of the products; products: must run on tensor cores
    rows      a block of BLOCK_M rows reads row_operand bytes (weights, or keys and values); cols and col_operand the
              same of BLOCK_N columns (activations). 0 where that means nothing
    """

    key: str
    name: str
    make: Callable[[torch.device], Call]
    bytes: int
    flops: int
    when: dict[str, int] = field(default_factory=dict)
    products: bool = True
    rows: int = 0
    row_operand: int = 0
    cols: int = 0
    col_operand: int = 0


def dense(n: int, k: int, device: torch.device, experts: int = 1) -> Matrix:
    values = torch.zeros((experts, n, k), dtype=BF16, device=device)
    return Matrix(values, n, k, BF16, group=k)


def quantized(n: int, k: int, kind: str, device: torch.device) -> Matrix:
    """int8 with a scale a row, int4 and fp8 with one for 128 inputs; "fp8 of fp8": of activations rounded to it."""
    if kind == "fp8 of fp8":
        return replace(quantized(n, k, "fp8", device), rounding="fp8", rounded_in_groups=True)
    group = k if kind == "int8" else 128
    scales = torch.ones((1, k // group, n), dtype=F32, device=device)
    if kind == "int4":
        values = torch.zeros((1, units_of(k, group), n, 16), dtype=torch.int8, device=device)
    else:
        values = torch.zeros((1, n, k), dtype=torch.uint8 if kind == "fp8" else torch.int8, device=device)
    return Matrix(values, n, k, BF16, kind, scales, group=group)  # type: ignore[arg-type]


def linear_work(rows: int, k: int, n: int, when: dict[str, int], kind: str = "dense") -> Workload:
    def make(device: torch.device) -> Call:
        from .linear import linear

        x = torch.zeros((rows, k), dtype=BF16, device=device)
        weight = dense(n, k, device) if kind == "dense" else quantized(n, k, kind, device)
        return lambda: linear(x, weight)

    per_weight = {"dense": 2.0, "int8": 1.0, "fp8": 1.0 + 4 / 128, "int4": 0.5 + 4 / 128}[kind.split()[0]]
    moved = int(n * k * per_weight) + 2 * rows * (n + k)
    key = "linear" if kind == "dense" else f"linear_{kind.split()[0]}"
    name = "linear" if kind == "dense" else f"linear_{kind}"
    operands = {"rows": rows, "row_operand": int(n * k * per_weight), "cols": n, "col_operand": 2 * rows * k}
    return Workload(key, f"{name} {rows}x{k}x{n}", make, moved, 2 * rows * n * k, when, **operands)


def attention_work() -> Workload:
    views, tokens, heads, d = 1, 257, 16, 64

    def make(device: torch.device) -> Call:
        from .attention import attention

        qkv = torch.zeros((views, tokens, 3 * heads * d), dtype=BF16, device=device)
        return lambda: attention(qkv, heads)

    moved, flops = 8 * tokens * heads * d, 4 * tokens**2 * heads * d
    return Workload(
        "attention", "attention 257x16x64", make, moved, flops, rows=tokens, row_operand=4 * tokens * heads * d
    )


def window_work(window: int, when: dict[str, int]) -> Workload:
    grid, heads, d = 64, 12, 64
    size = window or grid

    def make(device: torch.device) -> Call:
        from .window_attention import window_attention

        qkv = torch.zeros((1, grid, grid, 3 * heads * d), dtype=BF16, device=device)
        pad = torch.zeros(3 * heads * d, dtype=BF16, device=device)
        tables = [torch.zeros((2 * size - 1, d), dtype=F32, device=device) for _ in range(2)]
        return lambda: window_attention(qkv, pad, tables[0], tables[1], heads, window)

    padded = -(-grid // size) * size
    flops = 4 * padded**2 * size**2 * heads * d + 4 * padded**2 * 2 * (2 * size - 1) * heads * d
    name = f"window_attention {grid} window {window}"
    moved, operand = 8 * grid**2 * heads * d, 4 * padded**2 * heads * d
    return Workload("window_attention", name, make, moved, flops, when, rows=size**2, row_operand=operand)


def conv_work(grid: int, channels: int, outs: int, size: int, stride: int, when: dict[str, int]) -> Workload:
    """The convolutions of stride 1 end in a LayerNorm."""

    def make(device: torch.device) -> Call:
        from .conv_downsample import convolve

        x = torch.zeros((1, grid, grid, channels), dtype=BF16, device=device)
        weight = torch.zeros((outs, size, size, channels), dtype=BF16, device=device)
        norm = tuple(torch.ones(outs, dtype=F32, device=device) for _ in range(2)) if stride == 1 else None
        return lambda: convolve(x, weight, stride, norm, 1e-6)  # type: ignore[arg-type]

    side = -(-grid // stride)
    moved = 2 * (grid**2 * channels + outs * size**2 * channels + side**2 * outs)
    flops = 2 * side**2 * outs * size**2 * channels
    key = "conv_norm" if stride == 1 else "conv"
    row_operand, col_operand = (2 * size**2 * channels * count for count in (outs, side**2))
    operands = {"rows": side**2, "row_operand": row_operand, "cols": outs, "col_operand": col_operand}
    return Workload(key, f"{key} {grid} {size}x{size} {channels}-{outs}", make, moved, flops, when, **operands)


def patch_work() -> Workload:
    side, patch, width = 1024, 16, 768

    def make(device: torch.device) -> Call:
        from .patch_embed import patch_embed

        pixels = torch.zeros((1, 3, side, side), dtype=BF16, device=device)
        weight = replace(dense(width, 3 * patch**2, device), bias=torch.zeros(width, dtype=F32, device=device))
        return lambda: patch_embed(pixels, weight, patch)

    rows, k = (side // patch) ** 2, 3 * patch**2
    moved = 2 * (3 * side**2 + width * k + rows * width)
    operands = {"rows": rows, "row_operand": 2 * width * k, "cols": width, "col_operand": 2 * rows * k}
    return Workload("patch_embed", f"patch_embed {side}", make, moved, 2 * rows * k * width, **operands)


def paged_tensors(sequences: int, context: int, kv_heads: int, d: int, device: torch.device) -> tuple[Tensor, ...]:
    block, per = 16, -(-context // 16)
    cache = torch.zeros((2, sequences * per, block, kv_heads, d), dtype=BF16, device=device)
    tables = torch.arange(sequences * per, dtype=I32, device=device).view(sequences, per)
    return cache[0], cache[1], tables


def paged_work(rows: int, context: int, heads: int, kv_heads: int, decodes: bool) -> Workload:
    """decodes: one sequence with one row; else one sequence of `rows` rows, all of its context."""
    d = 128
    new = 1 if decodes else rows

    def make(device: torch.device) -> Call:
        from .paged_attention import paged_attention

        keys, values, tables = paged_tensors(1, context, kv_heads, d, device)
        q = torch.zeros((new, heads, d), dtype=BF16, device=device)
        starts = torch.tensor([0, new], dtype=I32).to(device)
        lengths = torch.full((1,), context, dtype=I32, device=device)
        return lambda: paged_attention(q, keys, values, tables, starts, lengths, d**-0.5)

    pairs = context if decodes else rows * (rows + 1) // 2
    moved = 2 * (2 * context * kv_heads * d + 2 * new * heads * d)
    key = "paged_attention_decode" if decodes else "paged_attention"
    when = {"group": 1} if heads == kv_heads else {}
    operands = {"rows": new * heads // kv_heads, "row_operand": 4 * pairs // new * kv_heads * d}
    name = f"{key} {context} {heads}of{kv_heads}x{d}"
    return Workload(key, name, make, moved, 4 * pairs * heads * d, when, **operands)


def routing_work(tokens: int, experts: int, top_k: int, when: dict[str, int]) -> Workload:
    def make(device: torch.device) -> Call:
        from .moe_routing import moe_routing

        logits = torch.zeros((tokens, experts), dtype=F32, device=device)
        return lambda: moe_routing(logits, top_k, True, 1.0)

    moved = 4 * tokens * experts + 12 * tokens * top_k
    name = f"moe_routing {tokens}x{experts} top {top_k}"
    return Workload("moe_routing", name, make, moved, 0, when, products=False)


def experts_work(tokens: int, when: dict[str, int]) -> Workload:
    """DeepSeek-OCR's layer: 64 experts of 896, 6 a token, 1,280 wide. Routing spreads the tokens evenly."""
    width, inner, count, top_k = 1280, 896, 64, 6

    def make(device: torch.device) -> Call:
        from .grouped_gemm import Experts, grouped_gemm

        experts = Experts(dense(2 * inner, width, device, count), dense(width, inner, device, count))
        x = torch.zeros((tokens, width), dtype=BF16, device=device)
        weights = torch.ones((tokens, top_k), dtype=F32, device=device)
        chosen = (torch.arange(tokens * top_k) * 11 % count).to(I32)
        order = chosen.argsort(stable=True).to(I32).to(device)
        counts = torch.bincount(chosen, minlength=count)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(I32).to(device)
        return lambda: grouped_gemm(x, experts, weights, offsets, order)

    used = min(tokens * top_k, count)
    moved = 2 * used * 3 * width * inner + 2 * tokens * top_k * (width + 2 * inner) + 8 * tokens * top_k * width
    name = f"grouped_gemm {tokens} tokens, {count} experts, top {top_k}"
    flops = 6 * tokens * top_k * width * inner
    operands = {"rows": -(-tokens * top_k // used), "row_operand": 6 * used * width * inner}
    return Workload("grouped_gemm", name, make, moved, flops, when, **operands)


def rope_work() -> Workload:
    heads, kv_heads, d, tokens = 32, 4, 128, 1

    def make(device: torch.device) -> Call:
        from .qk_norm_rope_store import qk_norm_rope_store

        keys, values, _ = paged_tensors(1, 64, kv_heads, d, device)
        qkv = torch.zeros((tokens, (heads + 2 * kv_heads) * d), dtype=BF16, device=device)
        places = torch.zeros(tokens, dtype=I32, device=device)
        cos, sin = (torch.zeros((64, d // 2), dtype=F32, device=device) for _ in range(2))
        norm = torch.ones(d, dtype=BF16, device=device)
        return lambda: qk_norm_rope_store(qkv, places, places, cos, sin, keys, values, heads, norm, norm)

    moved = 4 * tokens * (heads + 2 * kv_heads) * d
    name = f"qk_norm_rope_store {tokens}x{heads}of{kv_heads}x{d}"
    return Workload("qk_norm_rope_store", name, make, moved, 0, products=False)


def norm_work(rows: int, width: int, layer: bool) -> Workload:
    def make(device: torch.device) -> Call:
        from .layer_norm import layer_norm
        from .rms_norm import rms_norm

        x = torch.zeros((rows, width), dtype=BF16, device=device)
        weight = torch.ones(width, dtype=BF16, device=device)
        return lambda: layer_norm(x, weight, weight, 1e-6) if layer else rms_norm(x, weight, 1e-6)

    key = "layer_norm" if layer else "rms_norm"
    return Workload(key, f"{key} {rows}x{width}", make, 4 * rows * width + 4 * width, 0, products=False)


def sample_work(vocab: int) -> Workload:
    """Greedy reads a row twice; what drawing reads is in sample.py."""

    def make(device: torch.device) -> Call:
        from .sample import mask_ngrams, sample

        logits = torch.zeros((1, vocab), dtype=F32, device=device)
        zero, one = (torch.full((1,), value, dtype=F32, device=device) for value in (0.0, 1.0))
        history = torch.zeros((1, 1024), dtype=I32, device=device)
        length, size = (torch.full((1,), value, dtype=I32, device=device) for value in (1024, 20))
        allowed = torch.full((1, 2), -1, dtype=I32, device=device)
        none = torch.zeros(1, dtype=I32, device=device)

        def call() -> object:
            mask_ngrams(logits, history, length, size, allowed)
            return sample(logits, zero, none, one, zero, zero)

        return call

    return Workload("sample", f"sample {vocab} with n-gram mask", make, 4 * vocab, 0, products=False)


def embedding_work() -> Workload:
    width, vocab = 1280, 129280

    def make(device: torch.device) -> Call:
        from .embedding import embedding

        table = torch.zeros((vocab, width), dtype=BF16, device=device)
        ids = torch.zeros(1, dtype=I32, device=device)
        return lambda: embedding(ids, table)

    return Workload("embedding", f"embedding 1x{width}", make, 4 * width, 0, products=False)


# DeepSeek-OCR (1,280 wide, 10 heads of 128) and Qwen3-30B-A3B (2,048 wide, 32 heads of 128 over 4).
WORKLOADS = (
    linear_work(1, 1280, 3840, {"rows": 16}),
    linear_work(64, 1280, 3840, {"rows": 64}),
    linear_work(1024, 1280, 3840, {}),
    linear_work(1, 2048, 4096, {"rows": 16}, "int8"),
    linear_work(1, 2048, 4096, {"rows": 16}, "int4"),
    linear_work(1, 2048, 4096, {"rows": 16}, "fp8"),
    linear_work(64, 2048, 4096, {}, "fp8 of fp8"),
    attention_work(),
    window_work(14, {"window": 14}),
    window_work(0, {}),
    conv_work(64, 768, 256, 1, 1, {}),
    conv_work(64, 256, 256, 3, 1, {}),
    conv_work(64, 256, 512, 3, 2, {"inner": 256}),
    conv_work(32, 512, 1024, 3, 2, {}),
    patch_work(),
    paged_work(1, 1024, 10, 10, True),
    paged_work(1, 4096, 32, 4, True),
    paged_work(1024, 1024, 10, 10, False),
    paged_work(1024, 1024, 32, 4, False),
    routing_work(1, 128, 8, {}),
    routing_work(1024, 64, 6, {}),
    experts_work(1, {"rows": 16}),
    experts_work(1024, {}),
    rope_work(),
    norm_work(1, 1280, False),
    norm_work(4096, 768, True),
    embedding_work(),
    sample_work(129280),
)
