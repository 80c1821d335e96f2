"""One list of cases for the ops that have more than one backend: tests check them, benchmarks check and time them.

A case makes its inputs from its seed, binds them to a backend, and says what a correct result may differ by. Kinds:
`small` runs everywhere and on every instruction set, `real` has the sizes of a real model and runs on every instruction
set too, `large` is for benchmarks and for one test on the chosen instruction set.

Tolerances come from the arithmetic, not from what was seen. Both sides sum in float32, in different orders: a sum of n
terms of like size wanders by about 2^-24 * sqrt(n) of its largest partial sum; 8 of these are allowed, relative to the
largest value of the result. A bfloat16 result is rounded once on both sides, so where that wandering crosses a rounding
boundary it may be one unit (2^-7 of the value) off, but rarely: `max_flips` is the share of elements
that may differ at all. float16, which GPUs run too, is the same with 2^-10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from ops.kv_layout import from_backend, to_backend
from torch import Tensor

from pagelens.ops import OpCase, RopeTable
from pagelens.ops.reference import quantize_rows

Run = Callable[[], Any]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHORT = {F32: "f32", BF16: "bf16", F16: "f16"}
UNIT = {F32: 0.0, BF16: 2.0**-7, F16: 2.0**-10}  # of a rounded result, relative; float32 results are not rounded


def noise(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def strided_rows(x: Tensor) -> Tensor:
    """The same values, rows 3 elements further apart than they are wide."""
    wide = torch.full((x.shape[0], x.shape[1] + 3), math.nan, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def element_bytes(dtype: torch.dtype) -> int:
    return 4 if dtype == F32 else 2


@dataclass(frozen=True)
class Case:
    """What all cases share. `terms` is the length of the longest sum."""

    op: ClassVar[str]
    dtype: torch.dtype = F32
    kind: str = "small"
    seed: int = 0
    max_flips: ClassVar[float] = 0.01

    @property
    def id(self) -> str:
        return f"{self.op}[{self.label()}-{SHORT[self.dtype]}]"

    @property
    def terms(self) -> int:
        raise NotImplementedError

    def label(self) -> str:
        raise NotImplementedError

    def sizes(self) -> tuple[tuple[str, int], ...]:
        return ()

    def op_case(self) -> OpCase:
        return OpCase(self.op, self.dtype, self.sizes())

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def bind(self, ops: Any) -> Run:
        """Pack the weights for `ops` and return a call that may be repeated and returns the same result each time."""
        raise NotImplementedError

    def timed(self, ops: Any) -> Run:
        """What a benchmark times: the op alone, where `bind` does more."""
        return self.bind(ops)

    def absolute(self) -> float:
        """Allowed difference, relative to the largest value of the expected result."""
        return 8 * 2.0**-24 * math.sqrt(max(self.terms, 1))

    def bytes(self) -> int:
        """Bytes that must be read and written once."""
        raise NotImplementedError

    def flops(self) -> int:
        raise NotImplementedError


def difference(result: Tensor, expected: Tensor, case: Case) -> str | None:
    """None if `result` is right, else a sentence with the worst element."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return f"{case.id}: {list(result.shape)} {result.dtype} instead of {list(expected.shape)} {expected.dtype}"
    if not expected.numel():
        return None
    if not torch.equal(result.isnan(), expected.isnan()):
        return f"{case.id}: NaN in {int(result.isnan().sum())} places instead of {int(expected.isnan().sum())}"
    a, b = result.double().nan_to_num(), expected.double().nan_to_num()
    once = UNIT[expected.dtype]
    excess = (a - b).abs() - once * b.abs() - case.absolute() * float(b.abs().max())
    worst = int(excess.argmax())
    if float(excess.max()) > 0:
        found, wanted = float(a.flatten()[worst]), float(b.flatten()[worst])
        return f"{case.id}: element {worst} is {found!r} instead of {wanted!r} (largest {float(b.abs().max()):.4g})"
    flips = float((a != b).double().mean())
    if once and flips > max(case.max_flips, 2 / a.numel()):
        return f"{case.id}: {flips:.2%} of the elements differ, at most {case.max_flips:.2%} may"
    return None


@dataclass(frozen=True)
class LinearCase(Case):
    op: ClassVar[str] = "linear"
    rows: int = 1
    width: int = 192
    out: int = 192
    bias: bool = False
    activation: str | None = None
    residual: bool = False
    alias: bool = False  # out is the residual
    out_dtype: torch.dtype | None = None
    strided: bool = False

    @property
    def terms(self) -> int:
        return self.width

    def label(self) -> str:
        extra = [self.activation or ""] + [n for n in ("bias", "residual", "alias", "strided") if getattr(self, n)]
        extra += ["f32out"] if self.out_dtype else []
        return "-".join([f"{self.rows}x{self.width}x{self.out}", *filter(None, extra)])

    def sizes(self) -> tuple[tuple[str, int], ...]:
        return (("in_features", self.width), ("out_features", self.out))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        g = self.generator()
        x = noise(g, (self.rows, self.width), self.dtype)
        weight = noise(g, (self.out, self.width), self.dtype, max(self.width, 1) ** -0.5)
        bias = noise(g, (self.out,), self.dtype) if self.bias else None
        residual = noise(g, (self.rows, self.out), self.dtype) if self.residual else None
        return strided_rows(x) if self.strided else x, weight, bias, residual

    def bind(self, ops: Any) -> Run:
        x, weight, bias, residual = self.tensors()
        packed = ops.pack_linear(weight, bias)
        if self.alias and residual is not None:
            kept = residual.clone()
            return lambda: ops.linear(x, packed, self.activation, residual=residual.copy_(kept), out=residual)
        out = torch.empty(self.rows, self.out, dtype=self.out_dtype or self.dtype)
        return lambda: ops.linear(x, packed, self.activation, residual, out=out, out_dtype=self.out_dtype)

    def bytes(self) -> int:
        return element_bytes(self.dtype) * (self.out * self.width + self.rows * (self.out + self.width))

    def flops(self) -> int:
        return 2 * self.rows * self.width * self.out


@dataclass(frozen=True)
class NormCase(Case):
    op: ClassVar[str] = "rms_norm"
    rows: int = 1
    width: int = 192
    layer: bool = False
    alias: bool = False
    strided: bool = False

    def __post_init__(self) -> None:
        if self.layer:
            object.__setattr__(self, "op", "layer_norm")

    @property
    def terms(self) -> int:
        return self.width

    def label(self) -> str:
        extra = [n for n in ("alias", "strided") if getattr(self, n)]
        return "-".join([f"{self.rows}x{self.width}", *extra])

    def bind(self, ops: Any) -> Run:
        g = self.generator()
        x = noise(g, (self.rows, self.width), self.dtype, 3.0)
        weight, bias = noise(g, (self.width,), self.dtype), noise(g, (self.width,), self.dtype)
        x = strided_rows(x) if self.strided else x
        kept, out = x.clone(), x if self.alias else torch.empty_like(x)

        def run() -> Tensor:
            source = x.copy_(kept) if self.alias else x
            if self.layer:
                return ops.layer_norm(source, weight, bias, 1e-5, out=out)
            return ops.rms_norm(source, weight, 1e-6, out=out)

        return run

    def bytes(self) -> int:
        return element_bytes(self.dtype) * (2 * self.rows + 1) * self.width

    def flops(self) -> int:
        return 4 * self.rows * self.width


@dataclass(frozen=True)
class EmbeddingCase(Case):
    op: ClassVar[str] = "embedding"
    rows: int = 1
    width: int = 192
    vocab: int = 384
    max_flips: ClassVar[float] = 0.0

    @property
    def terms(self) -> int:
        return 0

    def absolute(self) -> float:
        return 0.0  # a copy

    def label(self) -> str:
        return f"{self.rows}x{self.width}of{self.vocab}"

    def bind(self, ops: Any) -> Run:
        g = self.generator()
        table = noise(g, (self.vocab, self.width), self.dtype)
        ids = torch.randint(0, self.vocab, (self.rows,), generator=g, dtype=torch.int32)
        return lambda: ops.embedding(ids, table)

    def bytes(self) -> int:
        return 2 * element_bytes(self.dtype) * self.rows * self.width

    def flops(self) -> int:
        return 0


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


@dataclass(frozen=True)
class SwigluCase(Case):
    op: ClassVar[str] = "swiglu_ffn"
    rows: int = 1
    width: int = 192
    inner: int = 96
    alias: bool = False
    max_flips: ClassVar[float] = 0.05  # the product is rounded in between: its flips move a whole row a little

    @property
    def terms(self) -> int:
        return self.width + self.inner

    def absolute(self) -> float:
        rounded = UNIT[self.dtype] / math.sqrt(self.inner)  # one flip of the product
        return super().absolute() + rounded

    def label(self) -> str:
        return f"{self.rows}x{self.width}x{self.inner}" + ("-alias" if self.alias else "")

    def bind(self, ops: Any) -> Run:
        g = self.generator()
        x = noise(g, (self.rows, self.width), self.dtype)
        gate, up = (noise(g, (self.inner, self.width), self.dtype, self.width**-0.5) for _ in range(2))
        down = noise(g, (self.width, self.inner), self.dtype, self.inner**-0.5)
        packed, kept = ops.pack_swiglu(gate, up, down), noise(g, (self.rows, self.width), self.dtype)
        residual = kept.clone()
        if self.alias:
            return lambda: ops.swiglu_ffn(x, packed, residual=residual.copy_(kept), out=residual)
        return lambda: ops.swiglu_ffn(x, packed)

    def bytes(self) -> int:
        return element_bytes(self.dtype) * (3 * self.width * self.inner + 2 * self.rows * self.width)

    def flops(self) -> int:
        return 6 * self.rows * self.width * self.inner


@dataclass(frozen=True)
class MoeCase(SwigluCase):
    op: ClassVar[str] = "moe_ffn"
    experts: int = 8
    top_k: int = 2
    shared: int = 192
    renormalize: bool = False
    scale: float = 1.0

    def label(self) -> str:
        name = f"{self.rows}x{self.width}x{self.inner}-{self.experts}top{self.top_k}-shared{self.shared}"
        return name + ("-renorm" if self.renormalize else "") + ("-alias" if self.alias else "")

    def sizes(self) -> tuple[tuple[str, int], ...]:
        names = {"width": self.width, "intermediate": self.inner, "num_experts": self.experts, "top_k": self.top_k}
        return tuple(names.items())

    def weights(self, g: torch.Generator) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Router, and (gate, up, down) of each expert: windows of one random buffer, all different, cheap to make."""
        count, step = self.inner * self.width, 8 * 37
        pool = noise(g, (3 * count + self.experts * step,), self.dtype, self.width**-0.5)
        shapes = [(self.inner, self.width)] * 2 + [(self.width, self.inner)]
        experts = [
            tuple(pool[i * count + e * step :][:count].view(shape) for i, shape in enumerate(shapes))
            for e in range(self.experts)
        ]
        return noise(g, (self.experts, self.width), self.dtype, self.width**-0.5), experts

    def bind(self, ops: Any) -> Run:
        g = self.generator()
        x = noise(g, (self.rows, self.width), self.dtype)
        router, experts = self.weights(g)
        shared = None
        if self.shared:
            inner, scale = self.shared, self.width**-0.5
            pairs = [noise(g, (inner, self.width), self.dtype, scale) for _ in range(2)]
            shared = ops.pack_swiglu(*pairs, noise(g, (self.width, inner), self.dtype, inner**-0.5))
        packed = ops.pack_moe(router, experts, shared)
        kept = noise(g, (self.rows, self.width), self.dtype)
        residual, options = kept.clone(), (self.top_k, self.renormalize, self.scale)
        if self.alias:
            return lambda: ops.moe_ffn(x, packed, *options, residual=residual.copy_(kept), out=residual)
        return lambda: ops.moe_ffn(x, packed, *options, residual=kept)

    def used_experts(self) -> float:
        """How many experts a batch of random tokens reads."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** self.rows)

    def bytes(self) -> int:
        inner = self.used_experts() * self.inner + self.shared
        words = 3 * self.width * inner + 2 * self.rows * self.width
        return int(element_bytes(self.dtype) * words + 4 * self.experts * self.width)

    def flops(self) -> int:
        inner = self.top_k * self.inner + self.shared
        return 2 * self.rows * self.width * (3 * inner + self.experts)


def both(*cases: Case) -> list[Case]:
    return [replace(case, dtype=dtype) for case in cases for dtype in (F32, BF16)]


SMALL = both(
    *(
        LinearCase(rows=m, width=c, out=n)
        for m, c, n in ((0, 32, 32), (1, 1, 1), (1, 192, 384), (3, 5, 7), (2, 193, 31))
    ),
    # every tile height, and one more than the highest
    *(LinearCase(rows=m, width=66, out=65, bias=True, seed=m) for m in (4, 6, 7, 9, 11, 13, 14, 15, 29)),
    *(LinearCase(rows=37, width=193, out=77, bias=True, activation=a) for a in (None, "gelu", "quick_gelu", "silu")),
    LinearCase(rows=200, width=1281, out=70, strided=True, residual=True),  # two row blocks, K in two passes
    LinearCase(rows=37, width=193, out=77, residual=True, alias=True, activation="gelu"),
    LinearCase(rows=1, width=193, out=1000, bias=True, residual=True, alias=True),
    LinearCase(rows=5, width=192, out=384, out_dtype=F32, activation="silu"),
    *(
        NormCase(rows=m, width=c, layer=layer)
        for layer in (False, True)
        for m, c in ((0, 64), (1, 1), (3, 77), (300, 193))
    ),
    *(NormCase(rows=5, width=192, layer=layer, strided=True, alias=True) for layer in (False, True)),
    EmbeddingCase(rows=0),
    EmbeddingCase(rows=33, width=193),
    *(
        RopeCase(batch=Paged(batch), heads=h, kv_heads=k, head_dim=d, norm=norm)
        for norm in (False, True)
        for batch in (((1, 40),), ((7, 7), (1, 20), (3, 19)))
        for h, k, d in ((6, 6, 32), (4, 2, 22))
    ),
    RopeCase(batch=Paged(())),
    *(
        AttentionCase(batch=Paged(batch, block), heads=h, kv_heads=k, head_dim=d)
        for h, k, d in ((6, 6, 32), (4, 2, 22))
        for batch, block in (
            (((1, 1),), 16),
            (((1, 100),), 16),
            (((70, 70),), 5),
            (((33, 64), (1, 33), (2, 2), (0, 0), (5, 37)), 16),
            ((), 16),
        )
    ),
    AttentionCase(batch=Paged(((20, 90),)), sharp=30.0),
    *(
        AttentionCase(
            batch=Paged(((1, 300), (2, 129), (0, 0), (140, 257), (1, 1)), block), heads=h, kv_heads=k, head_dim=d
        )
        for h, k, d, block in ((3, 3, 64, 16), (4, 2, 128, 32), (6, 2, 64, 7), (8, 1, 96, 16))
    ),
    AttentionCase(batch=Paged(((1, 200), (20, 150))), heads=4, kv_heads=2, head_dim=128, sharp=30.0),
    *(
        kind(batch=Paged(((1, 40), (7, 7), (1, 20), (3, 19)), block), heads=4, kv_heads=2, head_dim=d)
        for d, block in ((32, 16), (20, 7))
        for kind in (RopeCase, Int8RopeCase)
    ),
    Int8RopeCase(batch=Paged(((3, 30),), 32), heads=2, kv_heads=1, head_dim=128, norm=True),
    *(
        Int8AttentionCase(batch=Paged(batch, block), heads=h, kv_heads=k, head_dim=d)
        for h, k, d, block in ((4, 2, 128, 16), (3, 3, 64, 7), (8, 1, 96, 48), (4, 2, 20, 16))
        for batch in (((1, 300), (2, 129), (0, 0), (140, 257), (1, 1)), ((4, 140), (33, 64), (1, 17)), ())
    ),
    Int8AttentionCase(batch=Paged(((1, 200), (20, 150))), heads=4, kv_heads=2, head_dim=64, sharp=30.0),
    *(SwigluCase(rows=m, width=c, inner=i) for m, c, i in ((0, 32, 16), (1, 192, 192), (37, 193, 99), (3, 7, 5))),
    SwigluCase(rows=9, width=192, inner=96, alias=True),
    *(MoeCase(rows=m, seed=m) for m in (0, 1, 2, 37, 130)),
    MoeCase(rows=19, width=77, inner=33, shared=0, renormalize=True, scale=2.5, experts=5, top_k=5),
    MoeCase(rows=33, width=64, inner=24, shared=0, renormalize=True, experts=128, top_k=8, alias=True, seed=5),
)
# DeepSeek-OCR: hidden 1280, 10 heads of 128, dense 6848, 64 experts of 896 top-6, shared 1792. Qwen3: 16/8 heads.
REAL = both(
    LinearCase(rows=1, width=1280, out=6848, kind="real"),
    LinearCase(rows=3, width=6848, out=1280, kind="real", residual=True),
    NormCase(rows=2, width=1280, kind="real"),
    RopeCase(batch=Paged(((1, 300), (2, 900))), heads=10, kv_heads=10, head_dim=128, kind="real"),
    RopeCase(batch=Paged(((1, 300), (2, 900))), heads=16, kv_heads=8, head_dim=128, norm=True, kind="real"),
    AttentionCase(batch=Paged(((1, 903), (40, 300))), heads=10, kv_heads=10, head_dim=128, kind="real"),
    AttentionCase(batch=Paged(((1, 1000), (33, 77))), heads=16, kv_heads=8, head_dim=128, kind="real"),
    Int8AttentionCase(batch=Paged(((1, 1000), (33, 77), (4, 300))), heads=16, kv_heads=8, head_dim=128, kind="real"),
    SwigluCase(rows=2, width=1280, inner=6848, kind="real"),
)
LARGE: list[Case] = [
    LinearCase(rows=1, width=6848, out=1280, dtype=BF16, kind="large"),
    LinearCase(rows=1, width=1280, out=6848, dtype=BF16, kind="large", seed=1),
    LinearCase(rows=1, width=1280, out=129280, dtype=BF16, out_dtype=F32, kind="large"),
    LinearCase(rows=256, width=1280, out=6848, dtype=BF16, kind="large"),
    LinearCase(rows=256, width=1280, out=6848, dtype=F32, kind="large"),
    # The encoder's widest layer as torch runs it, and as the engine does
    *both(LinearCase(rows=4096, width=768, out=3072, kind="large")),
    LinearCase(rows=4096, width=768, out=3072, dtype=BF16, kind="large", bias=True, activation="gelu"),
    LinearCase(rows=4096, width=3072, out=768, dtype=BF16, kind="large", bias=True, residual=True, alias=True),
    LinearCase(rows=512, width=1024, out=3072, dtype=BF16, kind="large"),
    AttentionCase(batch=Paged(((1, 2000),)), heads=10, kv_heads=10, head_dim=128, dtype=BF16, kind="large"),
    AttentionCase(batch=Paged(((1, 4096),)), heads=16, kv_heads=8, head_dim=128, dtype=BF16, kind="large"),
    Int8AttentionCase(batch=Paged(((1, 4096),)), heads=16, kv_heads=8, head_dim=128, dtype=BF16, kind="large"),
    AttentionCase(batch=Paged(((903, 903),)), heads=10, kv_heads=10, head_dim=128, dtype=BF16, kind="large"),
    MoeCase(rows=1, width=1280, inner=896, experts=64, top_k=6, shared=1792, dtype=BF16, kind="large"),
    MoeCase(rows=64, width=1280, inner=896, experts=64, top_k=6, shared=1792, dtype=BF16, kind="large", seed=2),
]
CASES = [*SMALL, *REAL, *LARGE]
