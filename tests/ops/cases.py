"""One list of cases for the ops that have more than one backend: tests check them, benchmarks check and time them.

A case makes its inputs from its seed, binds them to a backend, and says what a correct result may differ by. Kinds:
`small` runs everywhere and on every instruction set, `real` has the sizes of a real model and runs on every instruction
set too, `large` is for benchmarks and for one test on the chosen instruction set.

What a case is, and where tolerances come from: case.py. Cases over a KV-cache: cache_cases.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from ops.cache_cases import AttentionCase, Int8AttentionCase, Int8RopeCase, Paged, RopeCase
from ops.case import BF16, F32, UNIT, Case, Run, element_bytes, noise, strided_rows
from torch import Tensor


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
