"""Weights into the layout of the CUDA kernels (csrc/cuda/gemm_tile.h), once at load, on the device of the backend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ShapeError, UnsupportedError
from ..quantization import QuantizedWeight, Weight

GROUPS = {"int8": 64, "int4": 32}  # inputs that share a scale in the kernels
DEPTH = 64  # rows of quantised weights are filled up to a multiple of it
Expert = tuple[Weight, Weight, Weight]  # gate [I, C], up [I, C], down [C, I]


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """A mixture of experts as grouped_gemm wants it.

    router          [E, C] as pack_linear of the backend that runs `linear` has it; router_dtype: of its inputs
    shared          a pack_swiglu result of the same backend, or None
    kind            "bfloat16", "int8" or "int4"
    gate_up, down   [E, 2I, C] with rows gate 0, up 0, gate 1, up 1, ..., and [E, C, I]; bfloat16, or bytes of pack_rows
    gate_up_scales, down_scales  [E, rows, groups] float32, or None
    """

    router: Any
    router_dtype: torch.dtype
    shared: Any
    kind: str
    num_experts: int
    width: int
    inner: int
    gate_up: Tensor
    down: Tensor
    gate_up_scales: Tensor | None
    down_scales: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


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
    columns = columns.to(weight.scales.device)
    return values.reshape(n, -1).view(torch.uint8).contiguous(), weight.scales.float()[:, columns].contiguous()


def two_parts(table: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as the sum of two bfloat16, to 2^-17 of a value: how a table enters a product of the tensor cores."""
    high = table.bfloat16().contiguous()
    return high, (table.float() - high.float()).bfloat16().contiguous()


def aligned(x: Tensor) -> Tensor:
    """x, copied if it does not start at a multiple of 16 bytes, as the kernels copy it (a mapped file's may not)."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def taps_first(kernel: Tensor) -> Tensor:
    """[F, C, h, w] -> [F, h * w * C]: how an implicit GEMM walks over a kernel."""
    return kernel.permute(0, 2, 3, 1).flatten(1).contiguous()


def refusal(weight: Weight) -> str | None:
    """Why grouped_gemm does not take this weight, or None."""
    if any(size % 8 for size in weight.shape):
        return "widths must be multiples of 8"
    if not isinstance(weight, QuantizedWeight):
        return None if weight.dtype == torch.bfloat16 else "weights must be bfloat16, int8 or int4"
    if weight.kind not in GROUPS or weight.zeros is not None or weight.input_order is not None:
        return "quantised weights must be int8 or int4 without zeros and act-order"
    if weight.activation is not None or weight.dtype != torch.bfloat16:
        return "activations must stay bfloat16"
    if weight.scales.shape[1] > 1 and weight.group_size % GROUPS[weight.kind]:
        return f"groups of {weight.group_size} inputs; they must be multiples of {GROUPS[weight.kind]}"
    return None


def kind_of(weight: Weight) -> str:
    return weight.kind if isinstance(weight, QuantizedWeight) else "bfloat16"


def pack_experts(
    router: Tensor, experts: Iterable[Expert], shared: Any, base: Any, device: torch.device
) -> PackedExperts | Any:
    """PackedExperts on `device`, or what `base` packs if grouped_gemm does not take the weights of expert 0.

    Experts are taken one by one into one piece of memory. Raises ShapeError if they do not fit the router [E, C], and
    UnsupportedError if one is quantised in another way than expert 0.
    """
    rest = iter(experts)
    first = next(rest, None)
    if first is None or any(refusal(part) for part in first) or len({kind_of(part) for part in first}) != 1:
        return base.pack_moe(router, rest if first is None else chain([first], rest), shared)
    kind, (inner, width), count = kind_of(first[0]), first[0].shape, router.shape[0]
    room: list[Tensor] = []
    found = 0
    for found, rows in enumerate(_checked_rows(chain([first], rest), kind, inner, router), 1):
        if not room:
            room = [part.new_empty((count, *part.shape), device=device) for part in rows]
        for whole, part in zip(room, rows):
            whole[found - 1].copy_(part)
    if found != count:
        raise ShapeError(f"pack_moe: {found} experts for a router {list(router.shape)}")
    kept = router if router.dtype == torch.bfloat16 else router.float()
    gate_up, gate_up_scales, down, down_scales = (*room,) if kind in GROUPS else (room[0], None, room[1], None)
    return PackedExperts(
        base.pack_linear(kept),
        kept.dtype,
        shared,
        kind,
        count,
        width,
        inner,
        gate_up,
        down,
        gate_up_scales,
        down_scales,
    )


def _checked_rows(experts: Iterable[Expert], kind: str, inner: int, router: Tensor) -> Iterator[list[Tensor]]:
    """Of each expert: gate and up in turns, their scales if quantised, then the same of down."""
    count, width = router.shape
    for index, parts in enumerate(experts):
        shapes = [tuple(part.shape) for part in parts]
        if index == count or shapes != [(inner, width), (inner, width), (width, inner)]:
            raise ShapeError(f"pack_moe: expert {index} is {shapes}, for a router {[count, width]} and {inner} values")
        why = next((why for part in parts if (why := refusal(part))), None)
        if why or any(kind_of(part) != kind for part in parts):
            raise UnsupportedError(
                f"pack_moe: expert {index} is quantised in another way than expert 0 ({why or kind}), and the CUDA "
                "kernels run all in one way; leave moe_ffn out of cuda_ops"
            )
        gate, up, down = (pack_rows(w) if isinstance(w, QuantizedWeight) else (w,) for w in parts)
        in_turns = [torch.stack([a, b], 1).flatten(0, 1) for a, b in zip(gate, up)]
        yield [*in_turns, *down]
