"""A request on its way: what `LLM.submit` returns, to be iterated, waited for or cancelled from any thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .errors import EngineClosedError, EngineError
from .inputs import Request
from .runtime.state import RequestState
from .types import RequestOutput

if TYPE_CHECKING:
    from .llm import LLM


class RequestHandle:
    """A request on its way. Any thread may iterate it, wait for it or cancel it."""

    def __init__(self, llm: LLM, request: Request) -> None:
        self.request = request
        self.request_id = request.request_id
        self.error: Exception | None = None
        self._llm = llm
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._output: RequestOutput | None = None
        self._version = 0
        self._is_watched = False
        self._done = False
        self._state: RequestState | None = None  # belongs to the engine's thread

    @property
    def done(self) -> bool:
        return self._done

    def cancel(self) -> None:
        """Ask the request to end with finish_reason "abort"; what it has so far stays. Harmless if it has ended."""
        self._check_process()
        self._llm._cancel(self)

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end. Raises the error that ended the request, or TimeoutError after `timeout` seconds."""
        self._check_process()
        if not self._wait(timeout):
            raise TimeoutError(f"request {self.request_id} did not end within {timeout} s; it goes on")
        return self._finished_output()

    def __iter__(self) -> Iterator[RequestOutput]:
        """Snapshots with the text so far; one that comes late sees the newest only. The last has `finished` True.

        Of several answers (SamplingParams.n) every snapshot has all, in their order, and some may have ended before.
        Raises the error that ended the request, after the last snapshot.
        """
        self._check_process()
        seen = 0
        while True:
            with self._changed:
                self._is_watched = True
                while not self._done and self._version == seen:
                    self._changed.wait()
                is_new = self._version != seen
                output, seen, done = self._output, self._version, self._done
            if is_new and output is not None:
                yield output
            if done:
                self._finished_output()
                return

    def stream_text(self, index: int = 0) -> Iterator[str]:
        """The pieces by which the text of answer `index` grows; joined they are its text in the result.

        Ends with the request, which of several answers may be later than that answer's own end. Raises IndexError if
        the request has no such answer.
        """
        if not 0 <= index < self.request.sampling.n:
            raise IndexError(f"there is no answer {index}; the request has n={self.request.sampling.n}, counted from 0")
        return self._stream_text(index)

    def _stream_text(self, index: int) -> Iterator[str]:
        length = 0
        for output in self:
            text = output.outputs[index].text
            if len(text) > length:
                yield text[length:]
                length = len(text)

    def _wait(self, timeout: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._done, timeout)

    def _finished_output(self) -> RequestOutput:
        if self.error is not None:
            raise self.error
        if self._output is None:
            raise EngineError(f"request {self.request_id} ended without a result")
        return self._output

    def _publish(self, state: RequestState) -> None:
        """Called by the engine's thread when the request has moved on. Copies it only if somebody looks."""
        with self._changed:
            if not (self._is_watched or state.finished):
                return
            self._output = state.output()
            self._version += 1
            if state.finished:
                self.error = state.error
                self._done = True
            self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        with self._changed:
            if not self._done:
                self.error = error
                self._done = True
                self._changed.notify_all()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise EngineClosedError(forked_message(self._pid))


def forked_message(pid: int) -> str:
    return (
        f"this engine belongs to process {pid} and cannot be used in its fork {os.getpid()}; "
        "make the engine after the fork, or start processes with the method 'spawn'"
    )
