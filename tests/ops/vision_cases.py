"""Cases of the vision ops; see cases.py for what a case is and where tolerances come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ops.cases import BF16, F32, UNIT, Case, Run, both, element_bytes, noise
from torch import Tensor


@dataclass(frozen=True)
class SequenceAttentionCase(Case):
    """`attention`. In bfloat16 the weights of the softmax may be rounded to bfloat16, each by up to 2^-9 of itself: the
    errors add up like noise, to about 2^-9 / sqrt(3) of a typical value and five times that in the worst of a million,
    which is less than 2^-8 of the largest. Most results then round differently.
    """

    op: ClassVar[str] = "attention"
    batch: int = 1
    tokens: int = 257
    heads: int = 2
    head_dim: int = 16
    sharp: float = 1.0  # a factor on qkv: large ones make the softmax nearly one-hot
    max_flips: ClassVar[float] = 0.75

    @property
    def terms(self) -> int:
        return self.head_dim + self.tokens

    def absolute(self) -> float:
        # Scores grow with the square of `sharp`, and an error of a score is a relative one of its weight.
        rounded = UNIT[self.dtype] / 2
        return super().absolute() * max(1.0, 4 * self.sharp**2) + rounded

    def label(self) -> str:
        return f"{self.batch}x{self.tokens}-{self.heads}x{self.head_dim}-sharp{self.sharp:g}"

    def sizes(self) -> tuple[tuple[str, int], ...]:
        return (("num_heads", self.heads), ("head_dim", self.head_dim))

    def tensors(self) -> tuple[Tensor, ...]:
        shape = (self.batch, self.tokens, 3 * self.heads * self.head_dim)
        return (noise(self.generator(), shape, self.dtype, self.sharp),)

    def bind(self, ops: Any) -> Run:
        (qkv,) = self.tensors()
        return lambda: ops.attention(qkv, self.heads)

    def bytes(self) -> int:
        return 4 * element_bytes(self.dtype) * self.batch * self.tokens * self.heads * self.head_dim

    def flops(self) -> int:
        return 4 * self.batch * self.tokens**2 * self.heads * self.head_dim


@dataclass(frozen=True)
class WindowAttentionCase(SequenceAttentionCase):
    """`tokens` is not used. `native_tables`: the relative tables hold bfloat16 values, as a checkpoint's own do;
    resized ones do not.
    """

    op: ClassVar[str] = "window_attention"
    grid: int = 14
    window: int = 0
    native_tables: bool = False

    @property
    def size(self) -> int:
        return self.window or self.grid

    @property
    def terms(self) -> int:
        return 3 * self.head_dim + self.size**2

    def label(self) -> str:
        name = f"{self.batch}x{self.grid}-window{self.window}-{self.heads}x{self.head_dim}-sharp{self.sharp:g}"
        return name + ("-native" if self.native_tables else "")

    def sizes(self) -> tuple[tuple[str, int], ...]:
        return (*super().sizes(), ("window", self.window))

    def tensors(self) -> tuple[Tensor, ...]:
        g, width = self.generator(), 3 * self.heads * self.head_dim
        qkv = noise(g, (self.batch, self.grid, self.grid, width), self.dtype, self.sharp)
        pad = noise(g, (width,), self.dtype, self.sharp)
        tables = (noise(g, (2 * self.size - 1, self.head_dim), F32, 0.2) for _ in range(2))
        return qkv, pad, *(table.bfloat16().float() if self.native_tables else table for table in tables)

    def bind(self, ops: Any) -> Run:
        qkv, pad, rel_h, rel_w = self.tensors()
        return lambda: ops.window_attention(qkv, pad, rel_h, rel_w, self.heads, self.window)

    def bytes(self) -> int:
        return 4 * element_bytes(self.dtype) * self.batch * self.grid**2 * self.heads * self.head_dim

    def flops(self) -> int:
        return 4 * self.batch * self.grid**2 * self.size**2 * self.heads * self.head_dim


@dataclass(frozen=True)
class PatchEmbedCase(Case):
    op: ClassVar[str] = "patch_embed"
    batch: int = 1
    side: int = 32
    patch: int = 16
    width: int = 64

    @property
    def terms(self) -> int:
        return 3 * self.patch**2

    def label(self) -> str:
        return f"{self.batch}x{self.side}-patch{self.patch}-{self.width}"

    def sizes(self) -> tuple[tuple[str, int], ...]:
        return (("width", self.width), ("patch_size", self.patch))

    def call(self, ops: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        g = self.generator()
        pixels = noise(g, (self.batch, 3, self.side, self.side), self.dtype)
        weight = noise(g, (self.width, 3, self.patch, self.patch), self.dtype, self.terms**-0.5)
        packed = ops.pack_patch_embed(weight, noise(g, (self.width,), self.dtype))
        return pixels, lambda views: ops.patch_embed(views, packed, self.patch)

    def bind(self, ops: Any) -> Run:
        pixels, run = self.call(ops)
        return lambda: run(pixels)

    def bytes(self) -> int:
        pixels, patches = self.batch * 3 * self.side**2, self.batch * (self.side // self.patch) ** 2
        return element_bytes(self.dtype) * (pixels + (patches + self.terms) * self.width)

    def flops(self) -> int:
        return 2 * self.batch * (self.side // self.patch) ** 2 * self.width * self.terms


@dataclass(frozen=True)
class ConvDownsampleCase(Case):
    """The result of a stage may be rounded to bfloat16 on the way: three times noise of up to 2^-9 of a value, which a
    convolution of unit gain passes on as such noise. Together it is 2^-9 of a typical value, five times that in the
    worst of a million, where the largest value is five times the typical one too: 2^-8 would do there, and 2^-7 also
    covers results of a few hundred values.
    """

    op: ClassVar[str] = "conv_downsample"
    batch: int = 1
    grid: int = 8
    width: int = 48
    neck: int = 32
    down: tuple[int, int] = (40, 64)
    max_flips: ClassVar[float] = 0.75

    @property
    def terms(self) -> int:
        return self.width + 9 * (2 * self.neck + self.down[0])

    def absolute(self) -> float:
        return super().absolute() + UNIT[self.dtype]

    def label(self) -> str:
        return f"{self.batch}x{self.grid}x{self.width}-{self.neck}-{self.down[0]}-{self.down[1]}"

    def sizes(self) -> tuple[tuple[str, int], ...]:
        return (("width", self.width), ("neck", self.neck))

    def call(self, ops: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        g, f, (f2, f3) = self.generator(), self.neck, self.down
        x = noise(g, (self.batch, self.grid, self.grid, self.width), self.dtype)
        shapes = {
            "conv1": (f, self.width, 1, 1),
            "conv2": (f, f, 3, 3),
            "down1": (f2, f, 3, 3),
            "down2": (f3, f2, 3, 3),
        }
        weights = {
            name: noise(g, shape, self.dtype, (shape[1] * shape[2] * shape[3]) ** -0.5)
            for name, shape in shapes.items()
        }
        for i in (1, 2):
            weights[f"norm{i}_weight"] = noise(g, (f,), self.dtype)
            weights[f"norm{i}_bias"] = noise(g, (f,), self.dtype)
        packed = ops.pack_conv_downsample(weights)
        return x, lambda views: ops.conv_downsample(views, packed, 1e-6)

    def bind(self, ops: Any) -> Run:
        x, run = self.call(ops)
        return lambda: run(x)

    def _products(self) -> tuple[int, int]:
        """Multiply-adds of a view, and weights."""
        f, (f2, f3), half, quarter = self.neck, self.down, -(-self.grid // 2), -(-self.grid // 4)
        stages = [(self.grid, f, self.width), (self.grid, f, 9 * f), (half, f2, 9 * f), (quarter, f3, 9 * f2)]
        return sum(side**2 * n * k for side, n, k in stages), sum(n * k for _, n, k in stages)

    def bytes(self) -> int:
        values = self.batch * (self.grid**2 * self.width + (-(-self.grid // 4)) ** 2 * self.down[1])
        return element_bytes(self.dtype) * (values + self._products()[1])

    def flops(self) -> int:
        return 2 * self.batch * self._products()[0]


SMALL_VISION = both(
    *(
        SequenceAttentionCase(batch=b, tokens=t, heads=h, head_dim=d)
        for b, t, h, d in ((0, 5, 1, 4), (1, 1, 1, 4), (2, 10, 3, 6), (1, 33, 2, 16), (2, 131, 1, 64), (1, 300, 1, 68))
    ),
    SequenceAttentionCase(tokens=70, sharp=6.0),  # scores of some hundred: the top of the softmax must move
    *(
        WindowAttentionCase(batch=b, grid=g, window=w, heads=h, head_dim=d)
        # no padding; padding on two sides; a window larger than the grid; odd windows; the whole grid, odd and one row
        for b, g, w, h, d in (
            (2, 6, 3, 2, 8),
            (1, 9, 4, 3, 6),
            (1, 3, 5, 1, 16),
            (1, 10, 7, 2, 16),
            (1, 20, 14, 1, 64),
            (2, 9, 0, 1, 16),
            (1, 1, 0, 1, 4),
            (1, 24, 0, 1, 80),
        )
    ),
    WindowAttentionCase(grid=10, window=7, heads=1, head_dim=64, native_tables=True),
    WindowAttentionCase(grid=10, window=7, heads=2, head_dim=16, sharp=6.0),
    WindowAttentionCase(grid=20, heads=1, head_dim=32, sharp=6.0),
    *(
        PatchEmbedCase(batch=b, side=s, patch=p, width=c)
        for b, s, p, c in ((0, 8, 4, 5), (2, 15, 5, 33), (1, 64, 16, 70))
    ),
    *(ConvDownsampleCase(batch=b, grid=g) for b, g in ((0, 4), (2, 8), (1, 5), (1, 1), (1, 22))),
    ConvDownsampleCase(batch=1, grid=6, width=13, neck=7, down=(5, 9)),
)
# DeepSeek-OCR: SAM 768 wide with 12 heads of 64 in windows of 14, CLIP 1024 wide with 16 heads of 64.
REAL_VISION = both(
    SequenceAttentionCase(batch=1, tokens=257, heads=4, head_dim=64, kind="real"),
    SequenceAttentionCase(batch=1, tokens=401, heads=2, head_dim=64, kind="real"),
    WindowAttentionCase(grid=64, window=14, heads=1, head_dim=64, native_tables=True, kind="real"),
    WindowAttentionCase(grid=40, heads=1, head_dim=64, kind="real"),
    PatchEmbedCase(side=512, width=768, kind="real"),
    ConvDownsampleCase(grid=32, width=768, neck=256, down=(512, 1024), kind="real"),
)
LARGE_VISION: list[Case] = [
    SequenceAttentionCase(tokens=257, heads=16, head_dim=64, dtype=BF16, kind="large"),
    WindowAttentionCase(
        batch=25, grid=14, window=14, heads=12, head_dim=64, native_tables=True, dtype=BF16, kind="large"
    ),
    WindowAttentionCase(grid=64, window=14, heads=12, head_dim=64, native_tables=True, dtype=BF16, kind="large"),
    WindowAttentionCase(grid=64, heads=12, head_dim=64, native_tables=True, dtype=BF16, kind="large"),
    WindowAttentionCase(grid=80, heads=2, head_dim=64, dtype=BF16, kind="large"),
    PatchEmbedCase(side=1024, width=768, dtype=BF16, kind="large"),
    ConvDownsampleCase(grid=64, width=768, neck=256, down=(512, 1024), dtype=BF16, kind="large"),
]
