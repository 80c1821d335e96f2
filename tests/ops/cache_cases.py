"""Cases of the ops that write and read the KV-cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from ops.case import Case, Run, element_bytes, noise
from ops.kv_layout import from_backend, to_backend
from torch import Tensor

from pagelens.ops import RopeTable
from pagelens.ops.reference import quantize_rows


def rope_table(positions: int, head_dim: int) -> RopeTable:
    powers = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * powers
    return RopeTable(angles.cos().float(), angles.sin().float())


@dataclass(frozen=True)
class Paged:
    """Sequences of a batch: (new tokens, tokens in the cache afterwards), blocks dealt in a shuffled order."""

    sequences: tuple[tuple[int, int], ...]
    block_size: int = 16

    @property
    def new(self) -> int:
        return sum(n for n, _ in self.sequences)

    def tables(self, g: torch.Generator) -> tuple[int, Tensor, Tensor, Tensor]:
        """num_blocks, block_tables, query_starts, context_lens."""
        counts = [-(-context // self.block_size) for _, context in self.sequences]
        order = torch.randperm(sum(counts) + 2, generator=g, dtype=torch.int32)
        tables = torch.zeros(len(counts), max([*counts, 1]), dtype=torch.int32)
        at = 0
        for s, count in enumerate(counts):
            tables[s, :count] = order[at : at + count]
            at += count
        starts = torch.tensor([0, *(n for n, _ in self.sequences)], dtype=torch.int32).cumsum(0).int()
        return sum(counts) + 2, tables, starts, torch.tensor([c for _, c in self.sequences], dtype=torch.int32)

    def places(self, tables: Tensor) -> tuple[Tensor, Tensor]:
        """positions, slots of the new tokens."""
        positions, slots = [], []
        for s, (n, context) in enumerate(self.sequences):
            for p in range(context - n, context):
                positions.append(p)
                slots.append(int(tables[s, p // self.block_size]) * self.block_size + p % self.block_size)
        return torch.tensor(positions, dtype=torch.int32), torch.tensor(slots, dtype=torch.int32)


@dataclass(frozen=True)
class RopeCase(Case):
    op: ClassVar[str] = "qk_norm_rope_store"
    batch: Paged = field(default_factory=lambda: Paged(((1, 1),)))
    heads: int = 6
    kv_heads: int = 6
    head_dim: int = 32
    norm: bool = False

    @property
    def terms(self) -> int:
        return self.head_dim

    def label(self) -> str:
        return f"{self.batch.new}x{self.heads}of{self.kv_heads}x{self.head_dim}" + ("-norm" if self.norm else "")

    def sizes(self) -> tuple[tuple[str, int], ...]:
        return (("num_heads", self.heads), ("num_kv_heads", self.kv_heads), ("head_dim", self.head_dim))

    def bind(self, ops: Any) -> Run:
        store, cache, _ = self.store(ops)
        return lambda: torch.cat([store().flatten(), *(from_backend(ops, cache[i], i == 1).flatten() for i in (0, 1))])

    def timed(self, ops: Any) -> Run:
        return self.store(ops)[0]

    def store(self, ops: Any) -> tuple[Run, Tensor, Tensor | None]:
        """The call, the caches of keys and values that it fills, and their scales."""
        g = self.generator()
        blocks, tables, _, contexts = self.batch.tables(g)
        positions, slots = self.batch.places(tables)
        qkv = noise(g, (self.batch.new, (self.heads + 2 * self.kv_heads) * self.head_dim), self.dtype)
        cache, scales = self.empty_cache(blocks)
        named = {} if scales is None else {"key_scales": scales[0], "value_scales": scales[1]}
        rope = rope_table(max([*contexts.tolist(), 1]), self.head_dim)
        norms = [noise(g, (self.head_dim,), self.dtype) if self.norm else None for _ in range(2)]
        run = lambda: ops.qk_norm_rope_store(  # noqa: E731
            qkv, positions, slots, rope, cache[0], cache[1], self.heads, *norms, **named
        )
        return run, cache, scales

    def empty_cache(self, blocks: int) -> tuple[Tensor, Tensor | None]:
        shape = (2, blocks, self.batch.block_size, self.kv_heads, self.head_dim)
        return torch.zeros(shape, dtype=self.dtype), None

    def bytes(self) -> int:
        return 2 * element_bytes(self.dtype) * self.batch.new * (self.heads + 2 * self.kv_heads) * self.head_dim

    def flops(self) -> int:
        return 6 * self.batch.new * (self.heads + self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class Int8RopeCase(RopeCase):
    """The same into an int8 cache. The result: queries, whole numbers of keys and of values, scales."""

    def label(self) -> str:
        return super().label() + "-int8"

    def absolute(self) -> float:
        return 1.0 / 127  # a key that lies between two whole numbers may go to either

    def empty_cache(self, blocks: int) -> tuple[Tensor, Tensor | None]:
        shape = (2, blocks, self.batch.block_size, self.kv_heads, self.head_dim)
        scales = torch.zeros(2, blocks, self.kv_heads, self.batch.block_size)
        return torch.zeros(shape, dtype=torch.int8).view(torch.uint8), scales

    def bind(self, ops: Any) -> Run:
        store, cache, scales = self.store(ops)
        assert scales is not None

        def run() -> Tensor:
            q = store().float().flatten()
            written = (scales != 0).transpose(2, 3)[..., None]  # what other slots hold differs
            whole = [from_backend(ops, cache[i], i == 1).float() * written[i] for i in (0, 1)]
            return torch.cat([q, whole[0].flatten(), whole[1].flatten(), scales.flatten()])

        return run


@dataclass(frozen=True)
class AttentionCase(Case):
    op: ClassVar[str] = "paged_attention"
    batch: Paged = field(default_factory=lambda: Paged(((1, 1),)))
    heads: int = 6
    kv_heads: int = 6
    head_dim: int = 32
    sharp: float = 1.0  # a factor on q: large ones make the softmax nearly one-hot

    @property
    def terms(self) -> int:
        return self.head_dim + max([c for _, c in self.batch.sequences], default=0)

    def absolute(self) -> float:
        # A score of size s has an error of s * 2^-24 * sqrt(D), which the exponential makes a relative one.
        return super().absolute() * max(1.0, 4 * self.sharp)

    def label(self) -> str:
        seqs = "+".join(f"{n}of{c}" for n, c in self.batch.sequences[:3])
        return f"{seqs}-block{self.batch.block_size}-{self.heads}of{self.kv_heads}x{self.head_dim}-sharp{self.sharp:g}"

    sizes = RopeCase.sizes

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, keys, values, block_tables, query_starts, context_lens. Slots that hold no token are NaN."""
        g = self.generator()
        blocks, tables, starts, contexts = self.batch.tables(g)
        cache = torch.full((2, blocks, self.batch.block_size, self.kv_heads, self.head_dim), math.nan, dtype=self.dtype)
        everything = replace(self.batch, sequences=tuple((c, c) for _, c in self.batch.sequences))
        _, slots = everything.places(tables)
        rows = noise(g, (2, slots.numel(), self.kv_heads, self.head_dim), self.dtype)
        cache.view(2, -1, self.kv_heads, self.head_dim)[:, slots.long()] = rows
        q = noise(g, (self.batch.new, self.heads, self.head_dim), self.dtype, self.sharp)
        return q, cache[0], cache[1], tables, starts, contexts

    def inputs(self, ops: Any, tensors: tuple[Tensor, ...] | None = None) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What `ops` is called with, its cache in the form that it keeps; `tensors` replace those of `tensors()`."""
        q, keys, values, *others = tensors or self.tensors()
        return [q, to_backend(ops, keys, False), to_backend(ops, values, True), *others], {}

    def bind(self, ops: Any) -> Run:
        (tensors, named), scale = self.inputs(ops), self.head_dim**-0.5
        out = torch.empty_like(tensors[0])
        return lambda: ops.paged_attention(*tensors, scale, out=out, **named)

    def bytes(self) -> int:
        cached = sum(c for _, c in self.batch.sequences) * self.kv_heads
        return 2 * element_bytes(self.dtype) * self.head_dim * (cached + self.batch.new * self.heads)

    def flops(self) -> int:
        pairs = sum(n * (c - n) + n * (n + 1) // 2 for n, c in self.batch.sequences)
        return 4 * pairs * self.heads * self.head_dim


@dataclass(frozen=True)
class Int8AttentionCase(AttentionCase):
    """Over an int8 cache; both sides read the same whole numbers.

    Native rounds a query's elements to 2^-15 of its largest, of about 4 for D of unit size: a score of D^-0.5 times D
    such errors is wrong by 2^-15 * 4 / sqrt(12), and by four times that at worst; the weights' rounding is less.
    """

    @property
    def max_flips(self) -> float:  # type: ignore[override]
        return min(1.0, 0.05 * max(1.0, self.sharp))

    def label(self) -> str:
        return super().label() + "-int8"

    def absolute(self) -> float:
        return super().absolute() + 2.0**-12.5 * max(1.0, self.sharp)

    def inputs(self, ops: Any, tensors: tuple[Tensor, ...] | None = None) -> tuple[list[Tensor], dict[str, Tensor]]:
        q, keys, values, *others = tensors or self.tensors()
        caches, scales = [], []
        for rows, is_values in ((keys, False), (values, True)):
            whole, factors = quantize_rows(rows)
            caches.append(to_backend(ops, whole, is_values))
            scales.append(factors.transpose(1, 2).contiguous())
        return [q, *caches, *others], {"key_scales": scales[0], "value_scales": scales[1]}

    def bytes(self) -> int:
        rows = sum(c for _, c in self.batch.sequences) * self.kv_heads
        return (
            2 * rows * (self.head_dim + 4) + 2 * element_bytes(self.dtype) * self.batch.new * self.heads * self.head_dim
        )
