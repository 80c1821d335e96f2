"""A weight in the layout of the kernels: bfloat16, float16 or float32 as it is, or 8 or 4 bits with scales."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Format = Literal["dense", "int4", "int8", "fp8"]
UNIT = 32  # int4: inputs whose 16 bytes lie together


@dataclass(frozen=True, slots=True)
class Matrix:
    """E matrices [N, K] (E is 1 for a linear layer) that multiply activations of `dtype`: y = x W^T + bias.

    W[n, order[k]] = (value[n, k] - zero[g, n]) * scale[g, n],  g = k // group;  dense: W[n, k] = values[n, k]

    values   dense: [E, N, K] in `dtype`; int8: [E, N, K] int8; fp8: [E, N, K] uint8, the bits of float8_e4m3fn;
             int4: [E, U, N, 16] int8. A group is a whole number of units of 32 inputs, the last of them padded;
             byte j of unit u holds input 32u + j in its low half and 32u + 16 + j in its high half, so that neither
             half needs a shuffle, and a tile of the kernel is one piece of memory
    scales   [E, G, N] float32, bfloat16 or float16, or [E, 1, N] where a row has one; zeros the same in int16, or None
    order    [K] int32 or None
    bias     [N] float32 or None (E = 1 only)
    group    inputs that are summed up before a scale (of the weight, or of rounded activations) is applied; K if none
    rounding  "int8" or "fp8": x is first rounded to that grid, each row with one scale, or one for each group of it
             (`rounded_in_groups`)
    """

    values: Tensor
    n: int
    k: int
    dtype: torch.dtype
    format: Format = "dense"
    scales: Tensor | None = None
    zeros: Tensor | None = None
    order: Tensor | None = None
    bias: Tensor | None = None
    group: int = 0
    rounding: Literal["int8", "fp8"] | None = None
    rounded_in_groups: bool = False

    @property
    def experts(self) -> int:
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def with_values(self, **tensors: Tensor | None) -> Matrix:
        """The same matrix with other tensors: an expert of many, or many for one."""
        return replace(self, **tensors)  # type: ignore[arg-type]


def units_of(k: int, group: int) -> int:
    """Units of 32 inputs that int4 matrices have."""
    return (-(-k // group) if k else 0) * -(-group // UNIT)


def pack_int4(values: Tensor, group: int) -> Tensor:
    """values [N, K] int8 in -8..7 -> [U, N, 16] int8; see Matrix. Padding is 0."""
    n, k = values.shape
    groups, per_group = (-(-k // group) if k else 0), -(-group // UNIT)
    padded = values.new_zeros(n, groups, per_group * UNIT)
    whole = torch.nn.functional.pad(values, (0, groups * group - k)).view(n, groups, group)
    padded[:, :, :group] = whole
    halves = padded.view(n, groups * per_group, 2, UNIT // 2).view(torch.uint8)
    return ((halves[:, :, 0] & 15) | (halves[:, :, 1] << 4)).view(torch.int8).transpose(0, 1).contiguous()
