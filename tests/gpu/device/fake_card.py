"""A card that is not there: tensors without memory, launches counted, graphs that start nothing, a fixed token.

What is faked is what torch and Triton would ask the driver for; everything above it is the engine's own code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

NOWHERE = torch.device("meta")
TOKEN = 7


class FakeGraph:
    """torch.cuda.CUDAGraph, and with `capturing` torch.cuda.graph."""

    def __init__(self) -> None:
        self.is_captured = False

    def replay(self) -> None:
        assert self.is_captured, "a graph is started that was not captured"


@contextmanager
def capturing(graph: FakeGraph, pool: object = None, **options: Any) -> Iterator[None]:
    assert pool is not None
    yield
    graph.is_captured = True


@contextmanager
def fake_card() -> Iterator[Any]:
    """device="cuda" runs on the fake meanwhile; gives the LaunchCounter."""
    from pagelens.kernels.launch import Launch, LaunchCounter, replaced_runner
    from pagelens.kernels.tuning import forced_target
    from pagelens.ops import registry
    from pagelens.ops.triton_sampling import DeviceSampling

    def move(self: DeviceSampling, x: Tensor) -> Tensor:
        return x.to(NOWHERE)

    def choose(self: DeviceSampling, logits: Tensor, rows: Sequence[Any], num_tokens: int | None) -> list[int]:
        return [TOKEN] * self.launch(logits, rows, num_tokens).shape[0]

    counter = LaunchCounter()

    def start(launch: Launch) -> None:
        strays = [i for i, x in enumerate(launch.args) if isinstance(x, Tensor) and x.device != NOWHERE]
        assert not strays, f"{launch.name}: arguments {strays} do not lie on the device"
        counter(launch)

    with pytest.MonkeyPatch.context() as patch, replaced_runner(start), forced_target("sm_90"):
        patch.setattr(registry, "find_device", lambda name: NOWHERE)
        patch.setattr(DeviceSampling, "_move", move)
        patch.setattr(DeviceSampling, "choose", choose)
        patch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        patch.setattr(torch.cuda, "graph", capturing)
        patch.setattr(torch.cuda, "graph_pool_handle", object)
        patch.setattr(torch.cuda, "Stream", object)
        yield counter
