"""Configurations that are worth trying for a workload. What the compiler or the card says decides among them."""

from __future__ import annotations

from .launch import Config
from .workloads import Workload


def _tiles(*rows: tuple[int, ...]) -> list[Config]:
    """Of (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages), and SPLIT_K if there is a sixth number."""
    made = []
    for m, n, k, warps, stages, *split in rows:
        sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, **({"SPLIT_K": split[0]} if split else {})}
        made.append(Config.make(num_warps=warps, num_stages=stages, **sizes))
    return made


def _keys(*rows: tuple[int, ...]) -> list[Config]:
    """Of (BLOCK_M, BLOCK_N, num_warps, num_stages), and SPLITS if there is a fifth number."""
    made = []
    for m, n, warps, stages, *splits in rows:
        sizes = {"BLOCK_M": m, "BLOCK_N": n, **({"SPLITS": splits[0]} if splits else {})}
        made.append(Config.make(num_warps=warps, num_stages=stages, **sizes))
    return made


FEW_ROWS = _tiles((16, 32, 128, 4, 4, 1), (16, 64, 64, 4, 4, 2), (16, 32, 128, 4, 3, 2))
SOME_ROWS = _tiles((32, 64, 64, 4, 4, 1), (64, 64, 64, 4, 3, 1), (64, 32, 128, 4, 3, 1))
MANY_ROWS = _tiles((64, 64, 64, 4, 3, 1), (64, 128, 64, 4, 3, 1), (128, 128, 64, 8, 3, 1))
EIGHT_BITS = _tiles((16, 64, 64, 4, 3, 1), (16, 32, 128, 4, 3, 2))
# 128 rows of 16 bytes for four warps, 64 for two: a copy of 16 bytes for each thread.
FOUR_BITS = _tiles((16, 128, 32, 4, 4, 1), (16, 128, 32, 4, 4, 2), (16, 64, 32, 2, 4, 2))
EXPERTS_FEW = _tiles((16, 64, 64, 4, 3), (16, 32, 128, 4, 4))
EXPERTS_MANY = _tiles((64, 64, 64, 4, 3), (64, 128, 64, 4, 3), (128, 128, 64, 8, 3))
SCORES = _keys((64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2))
DECODE = _keys((16, 64, 4, 3, 8), (16, 64, 4, 3, 16), (16, 32, 4, 4, 16))


def candidates(workload: Workload) -> list[Config]:
    """None for kernels whose only choice is the default beside them."""
    if workload.key == "linear":
        return FEW_ROWS if workload.rows <= 16 else SOME_ROWS if workload.rows <= 64 else MANY_ROWS
    if workload.key == "grouped_gemm":
        return EXPERTS_FEW if workload.when else EXPERTS_MANY
    if workload.key == "linear_fp8" and not workload.when:
        return SOME_ROWS
    return {
        "linear_int8": EIGHT_BITS,
        "linear_fp8": EIGHT_BITS,
        "linear_int4": FOUR_BITS,
        "attention": SCORES,
        "window_attention": SCORES,
        "paged_attention": [Config({**c.sizes, "SPLITS": 1}, c.options) for c in SCORES],
        "paged_attention_decode": DECODE,
        "conv": _tiles((64, 64, 64, 4, 3), (64, 128, 64, 4, 3), (32, 64, 64, 4, 4)),
        "conv_norm": _tiles((32, 256, 32, 8, 2), (64, 256, 32, 8, 3), (32, 256, 64, 8, 3)),
        "patch_embed": _tiles((64, 64, 64, 4, 3), (128, 64, 64, 4, 3)),
    }.get(workload.key, [])
