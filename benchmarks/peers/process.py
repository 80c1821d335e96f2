"""A worker seen from run.py."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

START_LIMIT_S = 900.0
ASK_LIMIT_S = 300.0
ROOT = Path(__file__).resolve().parents[2]


class WorkerError(RuntimeError):
    """A worker ended, took too long, or reported an error."""


class WorkerProcess:
    """`python -m benchmarks.peers.MODULE SPEC`, in a session of its own.

    `start` returns at once, so that several workers load together; `wait_ready` returns what the worker says of itself.
    """

    def __init__(self, python: Path, module: str, spec: dict[str, Any], log: Path) -> None:
        self.module = module
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.update({name: str(spec["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", f"benchmarks.peers.{module}", json.dumps(spec)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self._pending = b""

    def wait_ready(self) -> dict[str, Any]:
        ready: dict[str, Any] = self._read(START_LIMIT_S)["ready"]
        return ready

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises WorkerError."""
        if self._process.stdin is None or self._process.stdin.closed:
            raise WorkerError(f"{self.module} was stopped")
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._complaint("ended")) from None
        return self._read(ASK_LIMIT_S)

    def stop(self) -> None:
        """End the process; its memory is free when this returns."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, limit_s: float) -> dict[str, Any]:
        if self._process.stdout is None:
            raise WorkerError(f"{self.module}: no output")
        end = time.monotonic() + limit_s
        while b"\n" not in self._pending:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self._process.kill()
                raise WorkerError(self._complaint(f"did not answer within {limit_s:.0f} s"))
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise WorkerError(self._complaint("ended"))
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.module}: {answer['error'].strip().splitlines()[-1]} (see {self._log})")
        return answer

    def _complaint(self, what: str) -> str:
        tail = self._log.read_text(errors="replace").strip().splitlines()[-3:]
        return f"{self.module} {what}: {' | '.join(tail)} (see {self._log})"
