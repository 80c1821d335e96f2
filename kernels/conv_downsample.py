"""conv_downsample: SAM's neck and two stride-2 convolutions, 16 times fewer positions.

    conv1x1, LayerNorm over channels, conv3x3, LayerNorm, conv3x3 stride 2, conv3x3 stride 2 (padding 1, no bias)
    x [B, G, G, C] -> [B, G/4, G/4, F3], channels last throughout

Tiling. Each convolution is one launch, an implicit product: a program has BLOCK_M output positions and BLOCK_N output
channels and walks over the taps, and within a tap over blocks of channels; nothing is unfolded in memory. A LayerNorm
needs all channels of a position: there BLOCK_N is F rounded up to a power of two (256), and the norm is an epilogue.

The maps between the four launches (2 MB at most for a 64 x 64 grid of 256 channels in 16 bits) do not fit into shared
memory, and a 3x3 convolution would compute its halo again: they go through L2 (40 MB on an A100, 50 on an H100),
rounded to x's dtype.

FLOPs: 2 B (G^2 F C + 9 G^2 F^2 + 9/4 G^2 F F2 + 9/16 G^2 F2 F3): 11.3 G for a page of 1024 pixels, against about 25 MB
of weights and maps: bound by the tensor cores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, start
from .tuning import choose

DEFAULT = Config.make(num_warps=4, num_stages=3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)
DEFAULT_NORM = Config.make(num_warps=8, num_stages=2, BLOCK_M=32, BLOCK_N=256, BLOCK_K=32)


class Neck(NamedTuple):
    """Convolutions [out, rows, columns, in]; norms' weights and biases [F] float32."""

    conv1: Tensor
    conv2: Tensor
    down1: Tensor
    down2: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor


@triton.jit
def conv_kernel(
    X,
    W,
    NORM_WEIGHT,
    NORM_BIAS,
    OUT,
    M,
    N,
    C,
    G,
    G_OUT,
    eps,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """X [B, G, G, C], W [N, SIZE, SIZE, C] -> OUT [B, G_OUT, G_OUT, N], padding SIZE // 2; with a norm if given one."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    view = m // (G_OUT * G_OUT)
    top = (m // G_OUT) % G_OUT * STRIDE - SIZE // 2
    left = m % G_OUT * STRIDE - SIZE // 2
    w_rows = W + tl.minimum(n, N - 1).to(tl.int64)[:, None] * (SIZE * SIZE * C)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    blocks = tl.cdiv(C, BLOCK_K)
    for step in range(SIZE * SIZE * blocks):
        tap = step // blocks
        c = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        y = top + tap // SIZE
        x = left + tap % SIZE
        inside = (m < M) & (y >= 0) & (y < G) & (x >= 0) & (x < G)
        at = ((view * G + y) * G + x).to(tl.int64) * C
        pixels = tl.load(X + at[:, None] + c[None, :], mask=inside[:, None] & (c[None, :] < C), other=0.0)
        w = tl.load(w_rows + (tap * C + c)[None, :], mask=c[None, :] < C, other=0.0)
        acc = tl.dot(pixels, tl.trans(w), acc, input_precision="ieee")
    if NORM_WEIGHT is not None:
        inner = n < N
        mean = tl.sum(tl.where(inner[None, :], acc, 0.0), 1) / N
        centred = tl.where(inner[None, :], acc - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, 1) / N
        weight = tl.load(NORM_WEIGHT + n, mask=inner, other=0.0)
        bias = tl.load(NORM_BIAS + n, mask=inner, other=0.0)
        acc = centred * tl.rsqrt(variance + eps)[:, None] * weight[None, :] + bias[None, :]
    at_out = OUT + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at_out, acc.to(OUT.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def convolve(x: Tensor, weight: Tensor, stride: int, norm: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """One convolution, with the LayerNorm behind it if there is one."""
    batch, grid, _, channels = x.shape
    outs, size = weight.shape[:2]
    side = -(-grid // stride)
    out = torch.empty((batch, side, side, outs), dtype=x.dtype, device=x.device)
    rows = batch * side * side
    kernel, default = ("conv", DEFAULT) if norm is None else ("conv_norm", DEFAULT_NORM)
    config = choose(kernel, x.device, default, rows=rows, out=outs, inner=channels)
    block_n = config.sizes["BLOCK_N"] if norm is None else max(16, triton.next_power_of_2(outs))
    start(
        conv_kernel,
        (-(-rows // config.sizes["BLOCK_M"]), -(-outs // block_n)),
        (x, weight, *(norm or (None, None)), out, rows, outs, channels, grid, side, eps),
        {"SIZE": size, "STRIDE": stride},
        Config({**config.sizes, "BLOCK_N": block_n}, config.options),
    )
    return out


def conv_downsample(x: Tensor, neck: Neck, eps: float) -> Tensor:
    """See the module. x contiguous."""
    y = convolve(x, neck.conv1, 1, (neck.norm1_weight, neck.norm1_bias), eps)
    y = convolve(y, neck.conv2, 1, (neck.norm2_weight, neck.norm2_bias), eps)
    return convolve(convolve(y, neck.down1, 2, None, eps), neck.down2, 2, None, eps)
