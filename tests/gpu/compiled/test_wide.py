"""What no workload has fits a device too: float32, heads of 256, SAM's grid of 80 (1280 pixels).

On the targets with the least shared memory. A launch that does not fit is refused on the card, and not before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_static.assembly import Resources, read
from gpu_static.compiled import CompileError, compile_all, setup
from gpu_static.occupancy import DEVICES

from pagelens.kernels.launch import Launch, replaced_runner
from pagelens.kernels.matrix import Matrix
from pagelens.kernels.tuning import forced_target

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32
TARGETS = ("sm_89", "gfx942")
# Both halves of a table of 256 positions, 64 KiB, stand in shared memory beside the queries.
TOO_LARGE = ("window_attention, grid 80", "gfx942")


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def window(grid: int, dtype: torch.dtype) -> None:
    from pagelens.kernels.window_attention import window_attention

    tables = [empty(2 * grid - 1, 64, dtype=F32) for _ in range(2)]
    window_attention(empty(1, grid, grid, 576, dtype=dtype), empty(576, dtype=dtype), *tables, 3, 0)


def clip(head_dim: int, dtype: torch.dtype) -> None:
    from pagelens.kernels.attention import attention

    attention(empty(1, 257, 6 * head_dim, dtype=dtype), 2)


def paged(rows: int, head_dim: int, dtype: torch.dtype, group: int = 4) -> None:
    from pagelens.kernels.paged_attention import paged_attention

    cache, q = empty(64, 16, 2, head_dim, dtype=dtype), empty(rows, 2 * group, head_dim, dtype=dtype)
    paged_attention(q, cache, cache, empty(1, 64, dtype=I32), empty(2, dtype=I32), empty(1, dtype=I32), 1.0)


def linear(rows: int) -> None:
    from pagelens.kernels.linear import linear

    linear(empty(rows, 1280, dtype=F32), Matrix(empty(1, 3840, 1280, dtype=F32), 3840, 1280, F32, group=1280))


def convolution(grid: int, inner: int, outs: int, size: int, stride: int) -> None:
    from pagelens.kernels.conv_downsample import convolve

    norm = (empty(outs, dtype=F32), empty(outs, dtype=F32)) if stride == 1 else None
    weight = empty(outs, size, size, inner, dtype=F32)
    convolve(empty(1, grid, grid, inner, dtype=F32), weight, stride, norm, 1e-6)


CALLS: dict[str, Callable[[], Any]] = {
    "window_attention, grid 80": lambda: window(80, BF16),
    "window_attention, grid 80, float32": lambda: window(80, F32),
    "window_attention, grid 64, float32": lambda: window(64, F32),
    "attention, heads of 256": lambda: clip(256, BF16),
    "attention, float32": lambda: clip(64, F32),
    "prefill, heads of 256": lambda: paged(64, 256, BF16),
    "prefill, heads of 256, no groups": lambda: paged(64, 256, BF16, 1),
    "prefill, float32": lambda: paged(64, 128, F32),
    "prefill, heads of 256, float32": lambda: paged(64, 256, F32),
    "decode, heads of 256": lambda: paged(1, 256, BF16),
    "decode, float32": lambda: paged(1, 128, F32),
    **{f"linear, {rows} rows, float32": lambda rows=rows: linear(rows) for rows in (1, 64, 1024)},
    "neck 1x1, float32": lambda: convolution(64, 768, 256, 1, 1),
    "neck 3x3, float32": lambda: convolution(64, 256, 256, 3, 1),
    "first of stride 2, float32": lambda: convolution(64, 256, 512, 3, 2),
    "second of stride 2, float32": lambda: convolution(32, 512, 1024, 3, 2),
}


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], Resources | CompileError]:
    """Of the first launch of each call on each target; the others join its parts."""
    setup()
    jobs: dict[tuple[str, str], Launch] = {}
    for target in TARGETS:
        for name, call in CALLS.items():
            launches: list[Launch] = []
            with replaced_runner(launches.append), forced_target(target):
                call()
            jobs[name, target] = launches[0]
    results = compile_all([(launch, target) for (_, target), launch in jobs.items()], read, Resources)
    return dict(zip(jobs, results))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CALLS)
def test_it_fits(name: str, target: str, found: dict[tuple[str, str], Resources | CompileError]) -> None:
    resources = found[name, target]
    assert isinstance(resources, Resources), resources
    if (name, target) == TOO_LARGE:  # fails once it fits: then take it out here and from docs/gpu-kernels.md
        assert resources.shared > DEVICES[target].shared_of_program
        return
    assert 0 < resources.shared <= DEVICES[target].shared_of_program
