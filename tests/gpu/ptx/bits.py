"""Number formats: raw bits in unsigned numpy arrays, and the float32 values they stand for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import UnknownPtx

Array = NDArray  # of any dtype: registers hold raw bits, and views of them are typed at the point of use
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
SMALLEST_NORMAL = np.float32(2.0**-126)


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: Array) -> Array:
    """Round to nearest, ties to even; a NaN becomes 0x7fff, as cvt makes it."""
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def flush(values: Array) -> Array:
    """Subnormal float32 values become zero of the same sign (.ftz)."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


def to_values(bits: Array, kind: str) -> Array:
    """Raw bits of type f16, bf16, f32 or f64 -> values: float64 of f64, float32 of the others."""
    if kind == "bf16":
        return bf16_to_f32(bits)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float32 if kind == "f32" else np.float64)


def to_bits(values: Array, kind: str) -> Array:
    """The inverse of `to_values`, rounded to nearest even."""
    if kind == "bf16":
        return f32_to_bf16(values.astype(np.float32))
    wide = {"f16": 16, "f32": 32, "f64": 64}.get(kind)
    if wide is None:
        raise UnknownPtx(f"type .{kind} where a float type belongs")
    return np.ascontiguousarray(values, FLOAT[wide]).view(UNSIGNED[wide])


def halves(bits: Array) -> Array:
    """32-bit registers -> [..., 2] 16-bit parts, the low one first."""
    return np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2)


def join_halves(parts: Array) -> Array:
    return np.ascontiguousarray(parts).view(np.uint32)[..., 0]
