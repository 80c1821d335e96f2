"""What a worker process speaks with run.py: a JSON object a line in, one out. Standard library only: every environment
runs this.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol

TOP_NICE = -20


class Worker(Protocol):
    """An engine with a model loaded."""

    def describe(self) -> dict[str, Any]:
        """Versions and settings that belong beside its figures."""

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what request["op"] says and return what run.py needs of it."""


def raise_priority() -> bool:
    """Ask for the highest scheduling priority; False if the system refuses.

    Linux shares the cores among sessions first (autogroup), so nice alone does not help against another session.
    """
    try:
        with open("/proc/self/autogroup", "w", encoding="ascii") as file:
            file.write(str(TOP_NICE))
    except OSError:
        pass  # a system without autogroups needs no more than the next line
    try:
        os.setpriority(os.PRIO_PROCESS, 0, TOP_NICE)
    except OSError:
        return False
    return True


def serve(make: Callable[[dict[str, Any]], Worker]) -> None:
    """The main function of a worker: argv[1] is the JSON object that `make` gets; ends with standard input.

    What libraries print goes to standard error: the answers have standard output to themselves.
    """
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        top_priority = raise_priority() if spec.get("top_priority") else False
        worker = make(spec)
        answer({"ready": {**worker.describe(), "top_priority": top_priority}})
    except Exception:
        answer({"error": traceback.format_exc()})
        return
    for line in sys.stdin:
        try:
            answer(worker.handle(json.loads(line)))
        except Exception:
            answer({"error": traceback.format_exc()})
