"""What several kernels share: a tile of x W^T for every format of weights, activations, SwiGLU, exact products."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_fp8(bits):
    """Bits of float8_e4m3fn -> float16, exactly: the exponent's bias is 8 smaller. Works on targets without float8."""
    wide = bits.to(tl.int16)
    magnitude = wide & 0x7F
    value = ((magnitude << 7) | ((wide & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def round_to_even(x):
    """float32 of magnitude below 2^22 -> the nearest whole number, ties to even."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: above it float32 has no fraction left


@triton.jit
def round_to_e4m3(x):
    """float32 in -448..448 -> the nearest number of float8_e4m3fn, ties to even, as float32."""
    exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    exponent = tl.maximum(exponent, -6) - 3
    step = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return round_to_even(x * inverse) * step


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """None, "gelu" (erf), "quick_gelu" or "silu" of float32."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def swiglu(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[M, N] float32 with gate and up in turns -> silu(gate) * up [M, N/2]. Neighbours lie in one thread."""
    gate, up = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_N // 2, 2)))
    return gate * tl.sigmoid(gate) * up


@triton.jit
def dot_exact(x, table, acc):
    """acc + x @ table for a float32 table: of 16-bit x, by two products with the table's halves of 8 bits each."""
    if x.dtype == tl.float32:
        return tl.dot(x, table, acc, input_precision="ieee")
    high = table.to(x.dtype)
    low = (table - high.to(tl.float32)).to(x.dtype)
    return tl.dot(x, low, tl.dot(x, high, acc))


@triton.jit
def dense_tile(
    x_rows,
    W,
    cols,
    first,
    last,
    K,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum over K blocks first .. last-1 of x W^T [BLOCK_M, BLOCK_N] float32.

    x_rows  pointers [BLOCK_M, 1] to the rows of x; cols [BLOCK_N]: rows of W [N, K], all inside it
    EVEN    K is a multiple of BLOCK_K
    """
    inner = tl.arange(0, BLOCK_K)
    w_rows = W + cols.to(tl.int64)[:, None] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(first, last):
        k = block * BLOCK_K + inner
        if EVEN:
            x = tl.load(x_rows + k[None, :])
            w = tl.load(w_rows + k[None, :])
        else:
            x = tl.load(x_rows + k[None, :], mask=k[None, :] < K, other=0.0)
            w = tl.load(w_rows + k[None, :], mask=k[None, :] < K, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def quantized_tile(
    x_rows,
    x_scales,
    W,
    SCALES,
    ZEROS,
    ORDER,
    cols,
    first,
    last,
    N,
    K,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    W_GROUPED: tl.constexpr,
    X_GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same of a quantised W (see matrix.py), scales applied.

    x_scales  pointers [BLOCK_M, 1] to the scales of the rows of x, or None
    Values are whole numbers of at most 9 bits or float8: exact in any activation dtype, so that W counts as it is
    defined; a scale multiplies the sum of a group, in float32. The loop is flat over blocks of K, a whole number of
    which make a group (so that it is pipelined); BLOCK_K is 32 for int4.
    """
    per_group: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K
    half: tl.constexpr = BLOCK_K // 2
    inner = tl.arange(0, BLOCK_K)
    nibble = tl.arange(0, half)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(first, last):
        group = block // per_group
        if FORMAT == "int4":
            packed = tl.load(W + (block * N + cols).to(tl.int64)[:, None] * half + nibble[None, :])
            place = (block % per_group) * BLOCK_K + nibble
            low = ((packed << 4) >> 4).to(tl.int16)
            high = (packed >> 4).to(tl.int16)
            if ZEROS is not None:
                zero = tl.load(ZEROS + (group * W_GROUPED) * N + cols)
                low = low - zero[:, None]
                high = high - zero[:, None]
            x = load_inputs(x_rows, ORDER, group * GROUP, place, K, GROUP)
            part = tl.dot(x, tl.trans(low.to(x.dtype)), input_precision="ieee")
            x = load_inputs(x_rows, ORDER, group * GROUP, place + half, K, GROUP)
            part = tl.dot(x, tl.trans(high.to(x.dtype)), part, input_precision="ieee")
        else:
            place = (block % per_group) * BLOCK_K + inner
            k = group * GROUP + place
            inside = (place < GROUP) & (k < K)
            raw = tl.load(W + cols.to(tl.int64)[:, None] * K + k[None, :], mask=inside[None, :], other=0)
            x = load_inputs(x_rows, ORDER, group * GROUP, place, K, GROUP)
            if FORMAT == "fp8":
                value = decode_fp8(raw)
            else:
                value = raw.to(tl.int16)
                if ZEROS is not None:
                    value = value - tl.load(ZEROS + (group * W_GROUPED) * N + cols)[:, None]
            part = tl.dot(x, tl.trans(value.to(x.dtype)), input_precision="ieee")
        if W_GROUPED:
            part = part * tl.load(SCALES + group * N + cols).to(tl.float32)[None, :]
        if X_GROUPED:
            part = part * tl.load(x_scales + group)
        acc += part
    if not W_GROUPED:
        acc = acc * tl.load(SCALES + cols).to(tl.float32)[None, :]
    if x_scales is not None and not X_GROUPED:
        acc = acc * tl.load(x_scales)
    return acc


@triton.jit
def load_inputs(x_rows, ORDER, start, place, K, GROUP: tl.constexpr):
    """Inputs start + place of the rows, in the order of a weight that has one; 0 behind the group or the row."""
    k = start + place
    inside = (place < GROUP) & (k < K)
    if ORDER is not None:
        k = tl.load(ORDER + k, mask=inside, other=0)
    return tl.load(x_rows + k[None, :], mask=inside[None, :], other=0.0)
