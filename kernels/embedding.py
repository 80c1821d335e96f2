"""embedding: out[n] = table[ids[n]];  ids [N] int32, table [V, C] -> [N, C]. A copy.

An id outside 0..V-1 gives zeros: the device cannot raise. Tiling: a program a row and a block of columns. Bytes: 2 N C.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, start
from .tuning import choose

DEFAULT = Config.make(num_warps=4, num_stages=1, BLOCK=1024)


@triton.jit
def embedding_kernel(IDS, TABLE, OUT, V, C, stride_table, stride_out, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    id_ = tl.load(IDS + row).to(tl.int64)
    mask = (c < C) & (id_ >= 0) & (id_ < V)
    value = tl.load(TABLE + id_ * stride_table + c, mask=mask, other=0.0)
    tl.store(OUT + row * stride_out + c, value, mask=c < C)


def embedding(ids: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """See the module. Rows contiguous."""
    width = table.shape[1]
    if out is None:
        out = torch.empty((ids.shape[0], width), dtype=table.dtype, device=table.device)
    config = choose("embedding", table.device, DEFAULT, inner=width)
    start(
        embedding_kernel,
        (ids.shape[0], -(-width // config.sizes["BLOCK"])),
        (ids, table, out, table.shape[0], width, table.stride(0), out.stride(0)),
        {},
        config,
    )
    return out
