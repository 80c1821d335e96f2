"""Bits of a quantised matrix -> QuantizedWeight. Knows layouts, no names of models; nothing is rounded.

A word of 32 bits holds its values little end first; a file is little-endian, as is every machine this runs on, so the
bytes of a word in memory are in the same order. Source: qwen3.md section 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..errors import WeightsError
from ..quantization import QuantizedWeight
from .compressed_config import CompressedScheme
from .quantized_config import AwqScheme, Fp8Scheme, GptqScheme
from .quantized_layouts import Layout
from .strict_json import shown

# The nibble, from the little end, in which AutoAWQ puts column 8c + n of word c: shifts 0, 16, 4, 20, 8, 24, 12, 28.
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
FP8_NAN = 0x7F
PIECE = 1 << 22


def unpack(module: str, layout: Layout, parts: Mapping[str, Tensor]) -> QuantizedWeight:
    """The weight of a module from its tensors by role, whose shapes and dtypes are those of the layout.

    Takes memory for the result, once more for words that are turned around, and a few MiB: rows are unpacked PIECE
    values at a time.
    Raises WeightsError naming the tensor if scales or 8-bit floats are not finite, if weight_shape is another, or if
    the groups of g_idx are not of the group size.
    """
    scheme = layout.scheme
    for role in ("scales", "weight_scale", "weight_scale_inv"):
        if role in parts and not bool(parts[role].isfinite().all()):
            raise WeightsError(f"{shown(f'{module}.{role}')} holds NaN or infinity; the checkpoint is damaged")
    if isinstance(scheme, GptqScheme):
        return _gptq(module, layout, scheme, parts)
    if isinstance(scheme, AwqScheme):
        return _awq(layout, parts)
    if isinstance(scheme, Fp8Scheme):
        values = _checked_fp8(module, parts["weight"])
        scales = _expand_rows(parts["weight_scale_inv"], scheme.block[0], layout.shape[0])
        return QuantizedWeight("fp8", values, scales, layout.group_size)
    return _compressed(module, layout, scheme, parts)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """words [R, C] int32 of any strides -> values [R, C * 32 / bits] uint8, those of a word from its little end."""
    # Flat first: the stride of an axis of length 1 may be anything, and then the words have no bytes to view.
    data = words.contiguous().view(-1).view(torch.uint8).view(len(words), -1)
    if bits == 8:
        return data
    # A byte becomes two: its low half and, eight bits up, its high half. Whole tensors, so that the loops are vectors.
    pairs = data.to(torch.int16)
    pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F)
    return pairs.view(torch.uint8)


def _centred(values: Tensor, bits: int) -> Tensor:
    """uint8 0..15 or 0..255 -> int8, less 8 or 128. Those of 4 bits are changed in place: `unpack_words` made them."""
    # Less 128 modulo 256 is the highest bit inverted. Here `values` may be the file itself.
    return values.view(torch.int8).sub_(8) if bits == 4 else (values ^ 128).view(torch.int8)


def _pieces(n: int, k: int) -> Iterator[slice]:
    """Slices of the rows of a matrix [n, k], each of about PIECE values."""
    rows = max(1, PIECE // k)
    return (slice(first, min(first + rows, n)) for first in range(0, n, rows))


def _by_rows(shape: tuple[int, int], piece: Callable[[slice], Tensor], order: Tensor | None) -> Tensor:
    """The matrix [N, K] int8 whose rows a slice at a time are piece(slice), its columns in this order."""
    values = torch.empty(shape, dtype=torch.int8)
    for rows in _pieces(*shape):
        found = piece(rows)
        # gather takes a quarter of the time of found[:, order].
        values[rows] = found if order is None else found.gather(1, order.expand(len(found), -1))
    return values


def _zeros_or_none(zeros: Tensor) -> Tensor | None:
    """zeros as int16; None where all are 0, which kernels need not subtract."""
    return zeros.to(torch.int16).contiguous() if bool(zeros.any()) else None


def _gptq(module: str, layout: Layout, scheme: GptqScheme, parts: Mapping[str, Tensor]) -> QuantizedWeight:
    words = parts["qweight"].t().contiguous()
    order = _input_order(f"{module}.g_idx", parts["g_idx"], layout) if scheme.act_order else None
    values = _by_rows(layout.shape, lambda rows: _centred(unpack_words(words[rows], scheme.bits), scheme.bits), order)
    # int16 first: a stored 15 (or 255) plus 1 is 16 (256), not 0.
    stored = unpack_words(parts["qzeros"], scheme.bits).to(torch.int16)
    zeros = _zeros_or_none(stored.t() + (scheme.zero_offset - (8 if scheme.bits == 4 else 128)))
    return QuantizedWeight(scheme.kind, values, parts["scales"].t().contiguous(), layout.group_size, zeros, order)


def _awq(layout: Layout, parts: Mapping[str, Tensor]) -> QuantizedWeight:
    values = _awq_rows(parts["qweight"])
    zeros = _zeros_or_none(_awq_rows(parts["qzeros"])) if "qzeros" in parts else None
    return QuantizedWeight("int4", values, parts["scales"].t().contiguous(), layout.group_size, zeros)


def _awq_rows(words: Tensor) -> Tensor:
    """[K, N/8] int32 -> [N, K] int8, less 8."""
    words = words.t().contiguous()
    rows, k = words.shape
    values = torch.empty(rows, 8, k, dtype=torch.int8)
    # One of the eight columns of all words at a time: their bits come to the end, and rows of the result are whole.
    for column, nibble in enumerate(AWQ_NIBBLES):
        for piece in _pieces(rows, k):
            values[piece, column] = (words[piece] >> (4 * nibble)).bitwise_and_(15).sub_(8)
    return values.view(8 * rows, k)


def _compressed(module: str, layout: Layout, scheme: CompressedScheme, parts: Mapping[str, Tensor]) -> QuantizedWeight:
    n, k = layout.shape
    order, zeros = None, parts.get("weight_zero_point")
    if scheme.packed:
        _check_shape(module, layout, parts["weight_shape"])
        if zeros is not None:
            zeros = _centred(unpack_words(zeros.t(), scheme.bits), scheme.bits)[:, :n].t()
        if "weight_g_idx" in parts:
            order = _input_order(f"{module}.weight_g_idx", parts["weight_g_idx"], layout)
        words = parts["weight_packed"]
        values = _by_rows(
            (n, k), lambda rows: _centred(unpack_words(words[rows], scheme.bits), scheme.bits)[:, :k], order
        )
    else:
        values = _checked_fp8(module, parts["weight"]) if scheme.kind == "fp8" else parts["weight"]
    return QuantizedWeight(
        scheme.kind,
        values,
        _as_groups(parts["weight_scale"], layout, scheme),
        layout.group_size,
        None if zeros is None else _zeros_or_none(_as_groups(zeros, layout, scheme)),
        order,
        scheme.activation,
    )


def _as_groups(grid: Tensor, layout: Layout, scheme: CompressedScheme) -> Tensor:
    """A scale or zero for each group [N, G] from one for the tensor, for each row, group or block."""
    n = layout.shape[0]
    if scheme.strategy == "tensor":
        return grid.reshape(1, 1).expand(n, 1).contiguous()
    if scheme.strategy == "block":
        return _expand_rows(grid, scheme.block[0], n)
    return grid.reshape(n, -1)


def _expand_rows(grid: Tensor, rows: int, n: int) -> Tensor:
    """[ceil(N / rows), G] -> [N, G]."""
    return grid.repeat_interleave(min(rows, n), 0)[:n].contiguous()


def _checked_fp8(module: str, values: Tensor) -> Tensor:
    data = values.view(torch.uint8)
    if any(int((data[rows] & FP8_NAN).max()) == FP8_NAN for rows in _pieces(*data.shape)):
        raise WeightsError(f"{shown(f'{module}.weight')} holds NaN (byte 0x7F or 0xFF); the checkpoint is damaged")
    return values


def _check_shape(module: str, layout: Layout, said: Tensor) -> None:
    if said.tolist() != list(layout.shape):
        raise WeightsError(
            f"{shown(f'{module}.weight_shape')} says {said.tolist()}, but the packed words and the scales are those of "
            f"{list(layout.shape)}; the number of inputs must be a multiple of the group size or of a word's values"
        )


def _input_order(name: str, group_of: Tensor, layout: Layout) -> Tensor | None:
    """[K] int64: the inputs sorted by their group, in a group as they were; None if they are in that order already.

    group_of  [K] the group of each input; all -1, which compressed-tensors leaves where nothing was ordered, is None
    """
    k, size = layout.shape[1], layout.group_size
    groups = k // size
    low, high = int(group_of.min()), int(group_of.max())
    if low == high == -1:
        return None
    if low < 0 or high >= groups:
        raise WeightsError(f"{shown(name)} holds groups {low} to {high}; there are groups 0 to {groups - 1}")
    counts = torch.bincount(group_of, minlength=groups)
    if bool((counts != size).any()):
        worst = int((counts != size).nonzero()[0])
        raise WeightsError(
            f"{shown(name)} gives group {worst} {int(counts[worst])} inputs, needs {size} in every group; quantise it "
            "again with equal groups"
        )
    order = torch.argsort(group_of, stable=True)
    return None if bool((order[1:] > order[:-1]).all()) else order
