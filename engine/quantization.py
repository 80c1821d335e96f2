"""Quantised weights between a checkpoint and the kernels' layout, and the two quantisers of this project.

A QuantizedWeight is what every format becomes when it is read: whole numbers (or 8-bit floats), scales in groups of
inputs, optional zeros, an optional order of the inputs. Nothing is quantised a second time: the values and the scales
are those of the file. Sources: qwen3.md section 7; GPTQ (arXiv 2210.17323), AWQ (arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .errors import ShapeError

Kind = Literal["int4", "int8", "fp8"]
KINDS: tuple[str, ...] = ("int4", "int8", "fp8")
VALUE_DTYPES = {"int4": torch.int8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROW_BYTES = 64 << 20  # a quantiser works on so many bytes of float32 at a time
INT4_GROUP = 32
# Inputs with one scale, of weights that this project quantises. One scale a row is too coarse (docs/log.md).
ACTIVATION_GROUPS = {"int8": 64, "int4": INT4_GROUP}
MAX_ACTIVATION_GROUP = 65536  # sums of a group of products of 8 bits fit into 32
FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [N, K] as values [N, K], scales [N, G] and optionally zeros [N, G]; group g is columns g*s .. g*s+s-1.

    W[n, input_order[k]] = (values[n, k] - zeros[n, g]) * scales[n, g],  g = k // group_size

    kind         "int4": values -8..7 as int8; "int8": -128..127; "fp8": float8_e4m3fn
    scales       float32, bfloat16 or float16, as in the file
    zeros        int16 on the same scale as the values (a file's 0..15 less 8, 0..255 less 128); None: all 0
    input_order  [K] int64: column k of `values` belongs to this input (act-order); None: to input k
    group_size   inputs that share a scale; K where there is one scale a row; the last group may be shorter
    activation   how the inputs are to be quantised, row by row, where the format asks for it: "int8", "fp8", or None
    activation_group  inputs of a row that are quantised with one scale (the last group may be shorter); None: all.
                 Only for "int8" inputs of int4 or int8 weights without zeros and input_order, a multiple of 8 up to
                 MAX_ACTIVATION_GROUP, and where the weight has more than one group, its group_size
    dtype        of the activations it is to be multiplied with: float32 or bfloat16
    Raises ShapeError if the parts do not fit each other.
    """

    kind: Kind
    values: Tensor
    scales: Tensor
    group_size: int
    zeros: Tensor | None = None
    input_order: Tensor | None = None
    activation: Literal["int8", "fp8"] | None = None
    dtype: torch.dtype = torch.bfloat16
    activation_group: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.values.ndim != 2 or self.values.dtype != VALUE_DTYPES[self.kind]:
            self._refuse("kind must be int4, int8 or fp8, values [N, K] int8 (fp8: float8_e4m3fn)")
        n, k = self.values.shape
        if self.group_size < 1:
            self._refuse("group_size must be at least 1")
        groups = (n, -(-k // self.group_size))
        if tuple(self.scales.shape) != groups or self.scales.dtype not in SCALE_DTYPES:
            self._refuse(f"scales must be {list(groups)}, a floating type of 16 or 32 bits")
        if self.zeros is not None and (tuple(self.zeros.shape) != groups or self.zeros.dtype != torch.int16):
            self._refuse(f"zeros must be {list(groups)} int16")
        if self.input_order is not None and (
            self.input_order.shape != (k,) or not torch.equal(self.input_order.sort().values, torch.arange(k))
        ):
            self._refuse(f"input_order must hold each of 0..{k - 1} once")
        if self.activation_group is not None and not self._can_group_activations(self.activation_group):
            self._refuse(f"activation_group {self.activation_group} does not go with the rest, {self.activation}")

    def _can_group_activations(self, size: int) -> bool:
        plain = self.zeros is None and self.input_order is None and self.kind != "fp8" and self.activation == "int8"
        same_groups = self.group_size == size or self.scales.shape[1] <= 1
        return plain and same_groups and size % 8 == 0 and 8 <= size <= MAX_ACTIVATION_GROUP

    def _refuse(self, rule: str) -> None:
        parts = {"values": self.values, "scales": self.scales, "zeros": self.zeros, "input_order": self.input_order}
        found = ", ".join(f"{n} {list(t.shape)} {t.dtype}" for n, t in parts.items() if t is not None)
        raise ShapeError(f"QuantizedWeight: {rule}; got {self.kind} of group_size {self.group_size}: {found}")

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return 2

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes packed: values, scales and zeros."""
        bits = 4.0 if self.kind == "int4" else 8.0
        extra = self.scales.numel() * self.scales.element_size() + (0 if self.zeros is None else 2 * self.zeros.numel())
        return bits + 8.0 * extra / max(self.values.numel(), 1)

    def to(self, dtype: torch.dtype) -> QuantizedWeight:
        """The same weight for activations of another dtype."""
        return self if dtype == self.dtype else replace(self, dtype=dtype)

    def float(self) -> Tensor:
        """The weight [N, K] in float32. Exact: an integer of 9 bits or a float of 4 times a scale of 16 bits fits."""
        n, k = self.shape
        groups, size = self.scales.shape[1], self.group_size
        values = self.values.float()
        if k < groups * size:
            values = torch.nn.functional.pad(values, (0, groups * size - k))
        values = values.view(n, groups, size)
        if self.zeros is not None:
            values = values - self.zeros.float()[..., None]
        weight = (values * self.scales.float()[..., None]).view(n, groups * size)[:, :k]
        if self.input_order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.input_order, weight)

    def quantize_input(self, x: Tensor) -> Tensor:
        """x [M, K] in float32 as the format wants its inputs: rounded to its grid, still in units of x."""
        x = x.float()
        if self.activation is None or not x.numel():
            return x
        if self.activation_group is not None:
            return self._quantize_groups(x, self.activation_group)
        return self._round_input(x)

    def _quantize_groups(self, x: Tensor, size: int) -> Tensor:
        rows, k = x.shape
        groups = -(-k // size)
        grouped = torch.nn.functional.pad(x, (0, groups * size - k)).view(rows, groups, size)
        return self._round_input(grouped).view(rows, groups * size)[:, :k]

    def _round_input(self, x: Tensor) -> Tensor:
        """x with one scale along its last axis. Where that would be subnormal the numbers count as 0."""
        most = 127.0 if self.activation == "int8" else FP8_MAX
        largest = x.abs().amax(-1, keepdim=True)
        scale = largest / most
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
        scaled = (x / scale).clamp(-most, most)
        on_grid = scaled.round() if self.activation == "int8" else scaled.to(torch.float8_e4m3fn).float()
        return on_grid * scale


Weight = Tensor | QuantizedWeight


def stack_rows(weights: Sequence[Weight]) -> Weight | None:
    """The weights above each other as one, for a layer that multiplies the same input by all of them.

    None if they are of different kinds, groups, input orders or activations: then they cannot be one.
    """
    first = weights[0]
    if isinstance(first, Tensor):
        return torch.cat([w for w in weights if isinstance(w, Tensor)]) if _all_plain(weights) else None
    if not all(isinstance(w, QuantizedWeight) and are_alike(first, w) for w in weights):
        return None
    quantized = [w for w in weights if isinstance(w, QuantizedWeight)]
    return replace(
        first,
        values=torch.cat([w.values.view(torch.int8) for w in quantized]).view(first.values.dtype),
        scales=torch.cat([w.scales for w in quantized]),
        zeros=None if first.zeros is None else torch.cat([w.zeros for w in quantized if w.zeros is not None]),
    )


def take_rows(weight: QuantizedWeight, start: int, end: int) -> QuantizedWeight:
    """Rows start to end - 1, as views."""
    zeros = None if weight.zeros is None else weight.zeros[start:end]
    return replace(weight, values=weight.values[start:end], scales=weight.scales[start:end], zeros=zeros)


def _all_plain(weights: Sequence[Weight]) -> bool:
    return all(isinstance(w, Tensor) and w.dtype == weights[0].dtype for w in weights)


def are_alike(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Whether a kernel can treat rows of both alike."""
    same_order = (
        a.input_order is b.input_order
        if a.input_order is None or b.input_order is None
        else torch.equal(a.input_order, b.input_order)
    )
    return (
        same_order
        and (a.kind, a.group_size, a.activation, a.dtype) == (b.kind, b.group_size, b.activation, b.dtype)
        and a.activation_group == b.activation_group
        and a.shape[1] == b.shape[1]
        and a.scales.dtype == b.scales.dtype
        and (a.zeros is None) == (b.zeros is None)
    )


# ---- the quantisers of this project --------------------------------------------------------------------------------
def quantize(weight: Tensor, kind: Literal["int8", "int4"]) -> QuantizedWeight:
    """weight [N, K] rounded to 8 bits (a scale a row) or 4 bits (a scale for 32 inputs), symmetric.

    Its inputs are to be rounded to int8, with a scale for ACTIVATION_GROUPS of them: products are of whole numbers.
    The scale of an int8 row is max|w| / 127. The scale of an int4 group is the one of a few candidates that leaves the
    smallest sum of squared errors: the largest magnitude on -8 (llama.cpp's Q4_0), on 7, and places about these.
    Scales are bfloat16 (int8: float32), values are rounded to the scale that is kept.
    Raises ShapeError if the weight is not [N, K] floating point, or holds NaN or infinity.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or kind not in ("int8", "int4"):
        raise ShapeError(
            f"quantize: weight must be [N, K] floating point and kind int8 or int4, got {list(weight.shape)} "
            f"{weight.dtype} and {kind!r}"
        )
    n, k = weight.shape
    size = max(k, 1) if kind == "int8" else min(INT4_GROUP, max(k, 1))
    groups = -(-k // size)
    values = torch.empty(n, k, dtype=torch.int8)
    scales = torch.empty(n, groups, dtype=torch.float32 if kind == "int8" else torch.bfloat16)
    rows = max(1, ROW_BYTES // (4 * max(k, 1)))
    for first in range(0, n, rows):
        piece = weight[first : first + rows].float()
        if not bool(piece.isfinite().all()):
            raise ShapeError("quantize: the weight holds NaN or infinity; the checkpoint is damaged")
        grouped = torch.nn.functional.pad(piece, (0, groups * size - k)).view(len(piece), groups, size)
        found = _int8_scales(grouped) if kind == "int8" else _int4_scales(grouped)
        low, high = (-127, 127) if kind == "int8" else (-8, 7)
        scales[first : first + rows] = found
        whole = _round_to(grouped, scales[first : first + rows].float(), low, high)
        values[first : first + rows] = whole.view(len(piece), groups * size)[:, :k].to(torch.int8)
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.bfloat16) else torch.float32
    return own_weight(kind, values, scales, size, dtype)


def own_weight(
    kind: Literal["int8", "int4"], values: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype
) -> QuantizedWeight:
    """A weight as `quantize` makes it."""
    group = ACTIVATION_GROUPS[kind]
    return QuantizedWeight(kind, values, scales, group_size, activation="int8", dtype=dtype, activation_group=group)


def _round_to(grouped: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """grouped [N, G, S] in units of scales [N, G], whole, within the range; 0 where the scale has no finite inverse."""
    inverse = 1.0 / scales
    inverse = torch.where(inverse.isfinite(), inverse, 0.0)
    return (grouped * inverse[..., None]).round_().clamp_(low, high)


def _int8_scales(grouped: Tensor) -> Tensor:
    return grouped.abs().amax(-1) / 127.0


# Where the largest value of a group is put, on the scale of the whole numbers; a negative scale turns 8 around. More
# places than these gain little (docs/log.md). csrc/cpu/quantize.cpp has the same list.
INT4_PLACES = (-8.0, 7.0, -8.5, 7.5, -9.0, 8.0, -7.0, -7.5, -8.25, -7.75, -8.75, 7.25, 7.75)


def _int4_scales(grouped: Tensor) -> Tensor:
    """[N, G] float32, already rounded to bfloat16."""
    index = grouped.abs().argmax(-1, keepdim=True)
    extreme = grouped.gather(-1, index)[..., 0]
    best = torch.zeros_like(extreme)
    least = torch.full_like(extreme, torch.inf, dtype=torch.float64)
    for place in INT4_PLACES:
        scales = (extreme / place).to(torch.bfloat16).float()
        # In double precision, so that the order of the sum does not decide between two candidates.
        error = (_round_to(grouped, scales, -8, 7) * scales[..., None] - grouped).double().square_().sum(-1)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best
