"""Decode steps as CUDA graphs: captured once, started by one call.

A graph starts the same kernels on the same addresses. What a step allocates while it is captured comes from a pool that
belongs to the graphs; everything else (weights, cache, the batch's buffer, the workspace) never moves.
"""

from __future__ import annotations

from typing import Any

import torch


class GraphMemory:
    """What the graphs of one model share: a pool of memory (only one runs at a time, and no result stands in it when
    the next begins), and the stream they are captured on, both made with the first of them.
    """

    def __init__(self) -> None:
        self._made: tuple[Any, Any] | None = None

    def get(self) -> tuple[Any, Any]:
        """The pool's handle and the stream, of the current device."""
        if self._made is None:
            self._made = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return self._made


class GraphProgram:
    """A Program (see ops/__init__.py) that does not run what it records: the caller replays it.

    The recorded calls must have run before, so that their kernels are compiled and their memory is there.
    """

    runs_while_recording = False

    def __init__(self, memory: GraphMemory) -> None:
        self._memory = memory
        self._graph = torch.cuda.CUDAGraph()
        self._capture: Any = None

    def begin(self) -> None:
        pool, stream = self._memory.get()
        # Another thread may allocate meanwhile (a second model, the host's own work): it does not break the capture.
        self._capture = torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        self._capture.__enter__()

    def end(self) -> None:
        capture, self._capture = self._capture, None
        capture.__exit__(None, None, None)

    def replay(self) -> int:
        """Start the graph on the current stream. A device cannot say what it stumbled over: always -1."""
        self._graph.replay()
        return -1
