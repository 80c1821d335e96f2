"""Which tensors make up one quantised matrix, and of what shape and dtype they must be: from headers alone.

A module P.weight [N, K] is stored as tensors P.ROLE. Source: qwen3.md section 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import WeightsError
from .compressed_config import CompressedScheme
from .config_reader import MAX_SIZE
from .quantized_config import AwqScheme, Fp8Scheme, GptqScheme
from .strict_json import shown
from .weights import FLOAT_DTYPES

Scheme = Fp8Scheme | GptqScheme | AwqScheme | CompressedScheme
Shape = tuple[int, ...]

PACKED_ROLES = frozenset({"qweight", "qzeros", "scales", "g_idx"})
COMPRESSED_ROLES = frozenset({"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"})
FP8_ROLES = frozenset({"weight_scale_inv"})


@dataclass(frozen=True, slots=True)
class Header:
    """Shape and dtype of one tensor of the file."""

    shape: Shape
    dtype: str


@dataclass(frozen=True, slots=True)
class Part:
    """What a tensor must be: one of some shapes and dtypes. Parts that are not required may be absent."""

    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    required: bool = True


@dataclass(frozen=True, slots=True)
class Layout:
    """A matrix [N, K] = shape with a scale for every `group_size` inputs, and the parts that it is made of by role."""

    scheme: Scheme
    shape: tuple[int, int]
    group_size: int
    parts: Mapping[str, Part]


def main_role(scheme: Scheme) -> str:
    """The role of the tensor that holds the values."""
    if isinstance(scheme, (GptqScheme, AwqScheme)):
        return "qweight"
    return "weight_packed" if isinstance(scheme, CompressedScheme) and scheme.packed else "weight"


def layout_of(module: str, scheme: Scheme, headers: Mapping[str, Header]) -> Layout:
    """The layout of a module whose tensors have these headers by role.

    Raises WeightsError, one sentence, naming the first tensor that is missing, superfluous or of a wrong shape or
    dtype, with what was found and what is needed.
    """
    role = main_role(scheme)
    if role not in headers:
        raise WeightsError(f"{shown(f'{module}.{role}')} is missing (there is {', '.join(sorted(headers))})")
    main = headers[role].shape
    if len(main) != 2 or not all(main):
        raise WeightsError(f"{shown(f'{module}.{role}')} is {list(main)}, needs two dimensions, neither of them 0")
    if isinstance(scheme, GptqScheme):
        layout = _gptq(module, scheme, main)
    elif isinstance(scheme, AwqScheme):
        layout = _awq(module, scheme, main)
    elif isinstance(scheme, Fp8Scheme):
        layout = _fp8(scheme, main)
    else:
        layout = _compressed(module, scheme, headers)
    if max(layout.shape) > MAX_SIZE:
        raise WeightsError(f"{shown(module)} is a matrix {list(layout.shape)}; the limit is {MAX_SIZE} a dimension")
    _check(module, layout, headers)
    return layout


def _check(module: str, layout: Layout, headers: Mapping[str, Header]) -> None:
    for role, header in headers.items():
        part = layout.parts.get(role)
        name = shown(f"{module}.{role}")
        if part is None:
            raise WeightsError(f"{name} has no meaning beside {module}.{main_role(layout.scheme)} in this format")
        if header.shape not in part.shapes:
            wanted = " or ".join(str(list(shape)) for shape in part.shapes)
            raise WeightsError(f"{name} is {list(header.shape)}, needs {wanted} for a matrix {list(layout.shape)}")
        if header.dtype not in part.dtypes:
            raise WeightsError(f"{name} is {header.dtype}, needs {' or '.join(part.dtypes)}")
    for role, part in layout.parts.items():
        if part.required and role not in headers:
            raise WeightsError(f"{shown(f'{module}.{role}')} is missing")


def _groups(module: str, k: int, group_size: int) -> tuple[int, int]:
    """Group size (that of one group over everything: K) and the number of groups, which must fill K."""
    size = k if group_size == -1 else group_size
    if size > k or k % size:
        raise WeightsError(
            f"{shown(module)} has {k} inputs, which group_size={size} does not divide; the file and its "
            "quantization_config do not belong together"
        )
    return size, k // size


def _gptq(module: str, scheme: GptqScheme, main: Shape) -> Layout:
    per_word = 32 // scheme.bits
    k, n = main[0] * per_word, main[1]
    if n % per_word:
        raise WeightsError(
            f"{shown(module)} has {n} outputs, needs a multiple of {per_word}: zeros are packed in words"
        )
    size, groups = _groups(module, k, scheme.group_size)
    parts = {
        "qweight": Part((main,), ("I32",)),
        "qzeros": Part(((groups, n // per_word),), ("I32",)),
        "scales": Part(((groups, n),), FLOAT_DTYPES),
        "g_idx": Part(((k,),), ("I32",), required=scheme.act_order),
    }
    return Layout(scheme, (n, k), size, parts)


def _awq(module: str, scheme: AwqScheme, main: Shape) -> Layout:
    k, n = main[0], main[1] * 8
    size, groups = _groups(module, k, scheme.group_size)
    parts = {
        "qweight": Part((main,), ("I32",)),
        "qzeros": Part(((groups, main[1]),), ("I32",), required=scheme.has_zeros),
        "scales": Part(((groups, n),), FLOAT_DTYPES),
    }
    return Layout(scheme, (n, k), size, parts)


def _fp8(scheme: Fp8Scheme, main: Shape) -> Layout:
    n, k = main
    parts = {
        "weight": Part((main,), ("F8_E4M3",)),
        "weight_scale_inv": Part((_block_grid((n, k), scheme.block),), FLOAT_DTYPES),
    }
    return Layout(scheme, (n, k), min(scheme.block[1], k), parts)


def _block_grid(shape: tuple[int, int], block: tuple[int, int]) -> Shape:
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def _compressed(module: str, scheme: CompressedScheme, headers: Mapping[str, Header]) -> Layout:
    main = headers[main_role(scheme)].shape
    n, k = main
    per_word = 32 // scheme.bits
    grids: tuple[Shape, ...]
    if scheme.packed:
        k = _packed_inputs(module, scheme, headers, k * per_word)
    if scheme.strategy == "block":
        size, grids = min(scheme.block[1], k), (_block_grid((n, k), scheme.block),)
    elif scheme.strategy == "tensor":
        size, grids = k, ((1,), (), (1, 1))
    else:
        size, groups = _groups(module, k, scheme.group_size)
        grids = ((n, groups), (n,)) if scheme.strategy == "channel" else ((n, groups),)
    parts = {"weight_scale": Part(grids, FLOAT_DTYPES)}
    if not scheme.packed:
        parts["weight"] = Part((main,), ("F8_E4M3",) if scheme.kind == "fp8" else ("I8",))
        if not scheme.symmetric:
            parts["weight_zero_point"] = Part(grids, ("I8",))
        return Layout(scheme, (n, k), size, parts)
    parts["weight_packed"] = Part(((n, -(-k // per_word)),), ("I32",))
    parts["weight_shape"] = Part(((2,),), ("I64", "I32"))
    if not scheme.symmetric:
        parts["weight_zero_point"] = Part(((-(-n // per_word), k // size),), ("I32",))
    if scheme.strategy == "group":
        parts["weight_g_idx"] = Part(((k,),), ("I32", "I64"), required=scheme.needs_order)
    return Layout(scheme, (n, k), size, parts)


def _packed_inputs(module: str, scheme: CompressedScheme, headers: Mapping[str, Header], most: int) -> int:
    """K: a packed row ends with a whole word, so only the number of groups says how many of its values count."""
    scale = headers.get("weight_scale")
    if scheme.strategy != "group" or scale is None or len(scale.shape) != 2:
        return most
    k = scale.shape[1] * scheme.group_size
    if not most - 32 // scheme.bits < k <= most:
        raise WeightsError(
            f"{shown(f'{module}.weight_packed')} holds up to {most} inputs a row, but {module}.weight_scale has "
            f"{scale.shape[1]} groups of {scheme.group_size}"
        )
    return k
