"""Sizes of the decoders that are compared, and the bytes and operations that their work needs at least.

Standard library only. The floors of docs/performance.md are these numbers over what the probes measured.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of a weight as pagelens holds it: int4 has a bfloat16 scale for 32 weights, int8 a float32 scale a row.
INT4_BYTES = 0.5 + 2 / 32
ROW_SCALE_BYTES = 4


@dataclass(frozen=True)
class DecoderSizes:
    """A decoder; `experts` of `expert` inputs each are used for a token, beside `shared` (0: none)."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    dense_layers: int
    experts: int = 0
    num_experts: int = 0
    expert: int = 0
    shared: int = 0

    def active(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of every quantised matrix that one token is multiplied with, the head left out."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(q + 2 * kv, self.hidden), (self.hidden, q)]
        return [
            *attention * self.layers,
            *ffn(self.hidden, self.inner) * self.dense_layers,
            *ffn(self.hidden, self.expert) * self.experts * (self.layers - self.dense_layers),
            *(ffn(self.hidden, self.shared) * (self.layers - self.dense_layers) if self.shared else []),
        ]

    @property
    def routers(self) -> int:
        """Values of the routers, which stay in bfloat16."""
        return (self.layers - self.dense_layers) * self.num_experts * self.hidden

    def decode_bytes(self, width: str, depth: int) -> float:
        """Bytes that one token must read: the active weights, the head, and the keys and values of `depth` tokens."""
        head = (self.vocab, self.hidden)
        # The head of an int4 model has 8 bits.
        weights = matrix_bytes(self.active(), width) + matrix_bytes([head], "int8" if width == "int4" else width)
        cache = 2 * 2 * self.layers * self.kv_heads * self.head_dim * depth
        return weights + 2 * self.routers + cache

    def prefill_flops(self, tokens: int) -> tuple[float, float]:
        """Operations of the products with weights (head: one row), and of causal attention."""
        body = sum(n * k for n, k in self.active()) + self.routers
        products = 2.0 * body * tokens + 2.0 * self.vocab * self.hidden
        return products, 2.0 * self.layers * tokens**2 * self.heads * self.head_dim


def ffn(width: int, inner: int) -> list[tuple[int, int]]:
    return [(2 * inner, width), (width, inner)]


def matrix_bytes(shapes: list[tuple[int, int]], width: str) -> float:
    if width == "bf16":
        return sum(2.0 * n * k for n, k in shapes)
    if width == "int8":
        return sum(float(n * k + ROW_SCALE_BYTES * n) for n, k in shapes)
    if width == "int4":
        return sum(INT4_BYTES * n * k for n, k in shapes)
    raise ValueError(f"unknown weight width {width!r}; known: bf16, int8, int4")


QWEN3 = DecoderSizes("qwen3-0.6b", 28, 1024, 16, 8, 128, 3072, 151936, dense_layers=28)
OCR = DecoderSizes(
    "deepseek-ocr", 12, 1280, 10, 10, 128, 6848, 129280, 1, experts=6, num_experts=64, expert=896, shared=1792
)
QWEN3_30B = DecoderSizes("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 6144, 151936, 0, experts=8, num_experts=128, expert=768)


def encoder_flops() -> float:
    """Operations of the encoder at 1024 x 1024: SAM, its neck, CLIP and the projector, padding of windows counted."""

    def linear(tokens: int, into: int, out: int) -> float:
        return 2.0 * tokens * into * out

    mlp = 2 * linear(4096, 768, 3072)
    windows = linear(4096, 768, 2304) + linear(4096, 768, 768) + window_flops()
    whole = linear(4096, 768, 2304) + linear(4096, 768, 768) + global_flops()
    neck = linear(4096, 768, 256) + linear(4096, 256 * 9, 256)
    down = linear(1024, 256 * 9, 512) + linear(256, 512 * 9, 1024)
    clip = 24 * (3 * linear(257, 1024, 1024) + linear(257, 1024, 1024) + 2 * linear(257, 1024, 4096))
    clip += 24 * 4.0 * 257**2 * 1024
    patches = linear(4096, 768, 768)
    return 8 * (mlp + windows) + 4 * (mlp + whole) + patches + neck + down + clip + linear(256, 2048, 1280)


def window_flops() -> float:
    return 4.0 * 25 * 12 * 196**2 * 64


def global_flops() -> float:
    return 4.0 * 12 * 4096**2 * 64
