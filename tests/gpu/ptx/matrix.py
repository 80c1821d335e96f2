"""Matrix fragments: ldmatrix, movmatrix and mma.

With g = lane / 4 and t = lane % 4, and e elements in a 32-bit register (2 of 16 bits, 4 of 8, 1 of tf32), element i of
register r holds (PTX ISA, "Matrix fragments for mma"):
    A (16 x k)  row g + 8 * (r % 2),  column e * t + i + 4e * (r / 2)
    B (k x 8)   row e * t + i + 4e * r,  column g
    C, D        row g + 8 * (r / 2),  column 2t + r % 2   (32-bit elements)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .bits import Array, bf16_to_f32, halves, join_halves, to_bits
from .decode import Decoder, Run, opcode
from .machine import WARP, Machine, Mask
from .syntax import Vector

LANE = np.arange(WARP)
G, T = LANE // 4, LANE % 4


def items(d: Decoder, index: int, count: int) -> tuple:
    operand = d.operands[index]
    found = operand.items if isinstance(operand, Vector) else (operand,)
    if len(found) != count:
        raise d.unknown(f"{len(found)} registers where {count} belong")
    return found


def whole_warps(m: Machine, mask: Mask) -> Array:
    """Numbers of the warps that execute; all their lanes do (the machine gathered them)."""
    return np.arange(m.lanes // WARP) if mask is None else np.flatnonzero(mask.reshape(-1, WARP).all(1))


def per_warp(m: Machine, value: Array, warps: Array) -> Array:
    return m.wide(value).reshape(-1, WARP)[warps]


def spread(m: Machine, values: Array, warps: Array, mask: Mask) -> Array:
    """[warps, 32] -> [lanes]."""
    if mask is None:
        return np.ascontiguousarray(values).reshape(-1)
    full = np.zeros((m.lanes // WARP, WARP), values.dtype)
    full[warps] = values
    return full.reshape(-1)


@opcode("ldmatrix")
def load_matrix(d: Decoder) -> Run:
    d.type("b16")
    d.need("sync")
    d.need("aligned")
    d.scope, d.aligned = "warp", True
    d.need("m8n8")
    count = int(d.need("x1", "x2", "x4")[1:])
    transposed = d.flag("trans")
    d.need("shared", "shared::cta")
    d.count(2)
    sinks = [d.sink_of(item, 32) for item in items(d, 0, count)]
    address = d.address(1, "shared")

    def run(m: Machine, mask: Mask) -> None:
        warps = whole_warps(m, mask)
        lanes = (warps[:, None] * WARP + LANE[: 8 * count]).reshape(-1)
        rows = m.shared.load(lanes, m.of(address(m), lanes), 16, 8).reshape(warps.size, count, 8, 8)
        for at, sink in enumerate(sinks):
            matrix = rows[:, at].transpose(0, 2, 1) if transposed else rows[:, at]
            pairs = np.ascontiguousarray(matrix).reshape(-1, WARP, 2)  # lane: row lane / 4, columns 2t and 2t + 1
            sink(m, spread(m, join_halves(pairs), warps, mask), mask)

    return run


@opcode("movmatrix")
def move_matrix(d: Decoder) -> Run:
    d.type("b16")
    for word in ("sync", "aligned", "m8n8", "trans"):
        d.need(word)
    d.scope, d.aligned = "warp", True
    d.count(2)
    sink, source = d.sink(0, 32), d.source(1, 32)

    def run(m: Machine, mask: Mask) -> None:
        warps = whole_warps(m, mask)
        matrix = halves(per_warp(m, source(m), warps)).reshape(-1, 8, 8).transpose(0, 2, 1)
        pairs = np.ascontiguousarray(matrix).reshape(-1, WARP, 2)
        sink(m, spread(m, join_halves(pairs), warps, mask), mask)

    return run


def tf32_to_f32(raw: Array) -> Array:
    return (raw & np.uint32(0xFFFFE000)).view(np.float32)


# type of A and B -> bits of an element, k sizes, type of the sums, registers (raw uint of its width) -> values
Decode = Callable[[Array], Array]
FORMATS: dict[str, tuple[int, tuple[int, ...], str, Decode]] = {
    "bf16": (16, (8, 16), "f32", bf16_to_f32),
    "f16": (16, (8, 16), "f32", lambda raw: raw.view(np.float16).astype(np.float32)),
    "tf32": (32, (4, 8), "f32", tf32_to_f32),
    "s8": (8, (16, 32), "s32", lambda raw: raw.view(np.int8).astype(np.float64)),
    "u8": (8, (16, 32), "s32", lambda raw: raw.astype(np.float64)),
}


def elements(registers: list[Array], bits: int) -> Array:
    """Registers, each [warps, 32] uint32 -> [warps, 32, registers, 32 / bits] raw elements."""
    stacked = np.stack(registers, -1)
    kind = {8: np.uint8, 16: np.uint16, 32: np.uint32}[bits]
    return np.ascontiguousarray(stacked).view(kind).reshape(*stacked.shape, 32 // bits)


def a_places(bits: int, registers: int) -> tuple[Array, Array]:
    """Row and column of each element, [32, registers, 32 / bits]."""
    e = 32 // bits
    r, i = np.arange(registers)[None, :, None], np.arange(e)[None, None, :]
    g, t = G[:, None, None], T[:, None, None]
    return g + 8 * (r % 2) + 0 * i, e * t + i + 4 * e * (r // 2)


def b_places(bits: int, registers: int) -> tuple[Array, Array]:
    e = 32 // bits
    r, i = np.arange(registers)[None, :, None], np.arange(e)[None, None, :]
    return e * T[:, None, None] + i + 4 * e * r, G[:, None, None] + 0 * (r + i)


def c_places() -> tuple[Array, Array]:
    r = np.arange(4)[None, :]
    return G[:, None] + 8 * (r // 2), 2 * T[:, None] + r % 2


@opcode("mma")
def multiply_accumulate(d: Decoder) -> Run:
    """D = A B + C; the products of one instruction are summed in float32 (int32 exactly), then added to C."""
    d.scope, d.aligned = "warp", True
    d.need("sync")
    d.need("aligned")
    kinds = [d.type("f32", "f16", "s32"), d.type(*FORMATS), d.type(*FORMATS), d.type("f32", "f16", "s32")]
    c_kind, b_kind, a_kind, d_kind = kinds
    bits, sizes, sums, decode_a = FORMATS[a_kind]
    decode_b = FORMATS[b_kind][3]
    k = int(d.need(*(f"m16n8k{size}" for size in sizes)).removeprefix("m16n8k"))
    d.need("row")
    d.need("col")
    if sums == "s32":
        d.flag("satfinite")
    half = a_kind == "f16" and c_kind == d_kind == "f16"
    if not half and (c_kind != sums or d_kind != sums):
        raise d.unknown(f"sums of .{c_kind} and .{d_kind}")
    if b_kind != a_kind and {a_kind, b_kind} != {"s8", "u8"}:
        raise d.unknown(f"factors .{a_kind} and .{b_kind}")
    d.count(4)
    wide = 2 if half else 4
    a_in = [d.source_of(item, 32) for item in items(d, 1, k * bits // 64)]
    b_in = [d.source_of(item, 32) for item in items(d, 2, k * bits // 128)]
    c_in = [d.source_of(item, 32) for item in items(d, 3, wide)]
    out = [d.sink_of(item, 32) for item in items(d, 0, wide)]
    a_at, b_at, c_at = a_places(bits, len(a_in)), b_places(bits, len(b_in)), c_places()
    view = np.dtype(np.int32 if sums == "s32" else np.float32)

    def run(m: Machine, mask: Mask) -> None:
        warps = whole_warps(m, mask)
        a_part = decode_a(elements([per_warp(m, s(m), warps) for s in a_in], bits))
        b_part = decode_b(elements([per_warp(m, s(m), warps) for s in b_in], bits))
        a = np.zeros((warps.size, 16, k), a_part.dtype)
        b = np.zeros((warps.size, k, 8), b_part.dtype)
        a[:, a_at[0], a_at[1]], b[:, b_at[0], b_at[1]] = a_part, b_part
        product = (a @ b)[:, c_at[0], c_at[1]]  # [warps, 32, 4]
        sums_in = [per_warp(m, s(m), warps) for s in c_in]
        if half:
            before = elements(sums_in, 16).reshape(warps.size, WARP, 4).view(np.float16).astype(np.float32)
            results = list(np.moveaxis(elements_back(to_bits(product + before, "f16")), -1, 0))
        else:
            before = np.stack(sums_in, -1).view(view)
            total = before + (product.astype(np.int64).astype(np.int32) if sums == "s32" else product)
            results = list(np.moveaxis(total.view(np.uint32), -1, 0))
        for sink, value in zip(out, results):
            sink(m, spread(m, value, warps, mask), mask)

    return run


def elements_back(raw: Array) -> Array:
    """[warps, 32, 4] of 16 bits -> [warps, 32, 2] registers."""
    return np.ascontiguousarray(raw).view(np.uint32)
