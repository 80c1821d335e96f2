"""Decode steps as CUDA graphs: captured once, started by one call.

A graph starts the same kernels on the same addresses. What a step allocates while it is captured comes from a pool that
belongs to the graphs; everything else (weights, cache, the batch's buffer, the workspace) never moves.
"""

from __future__ import annotations

from typing import Any

import torch


class GraphProgram:
    """A Program (see ops/__init__.py) that does not run what it records: the caller replays it.

    The recorded calls must have run before, so that their kernels are compiled and their memory is there.
    """

    runs_while_recording = False
    _pool: Any = None  # shared by all graphs: only one runs at a time, and a result is read before the next

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._capture: Any = None

    def begin(self) -> None:
        if GraphProgram._pool is None:
            GraphProgram._pool = torch.cuda.graph_pool_handle()
        self._capture = torch.cuda.graph(self._graph, pool=GraphProgram._pool)
        self._capture.__enter__()

    def end(self) -> None:
        capture, self._capture = self._capture, None
        capture.__exit__(None, None, None)

    def replay(self) -> int:
        """Start the graph on the current stream. A device cannot say what it stumbled over: always -1."""
        self._graph.replay()
        return -1
