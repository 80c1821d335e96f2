"""Worker: a pagelens engine, driven step by step as `pagelens bench` drives it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import pagelens
from pagelens import _native
from pagelens.config import EngineConfig
from pagelens.core import Engine, build_engine
from pagelens.types import ForwardBatch, SamplingParams

from .protocol import serve
from .timing import time_once, time_steps

SAMPLING = {"ignore_eos": True, "detect_repetition": False}
ROOM = 64  # tokens that a sample may decode behind its depth


class Ours:
    """spec: model (a folder, or a preset with random_weights), weights, kv_cache_dtype, threads, max_depth, batch."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.engine: Engine = build_engine(
            EngineConfig(
                spec["model"],
                dtype=spec.get("dtype", "bfloat16"),
                weights=spec.get("weights", "auto"),
                kv_cache_dtype=spec.get("kv_cache_dtype", "auto"),
                num_threads=spec["threads"],
                max_model_len=max(spec.get("max_depth", 0), 512) + ROOM,
                # Room for two depths: a sample at one must not push the other out of the cache.
                max_num_seqs=max(spec.get("batch", 1), 2),
                random_weights=spec.get("random_weights", False),
                # A prompt that was there before is found again, so that each sample begins at the same depth.
                prefix_cache=True,
            )
        )
        self._spec = spec
        self._draw = random.Random(1)

    def describe(self) -> dict[str, Any]:
        settings = f"weights {self._spec.get('weights', 'auto')}, {self._spec.get('dtype', 'bfloat16')}"
        return {"engine": f"pagelens {pagelens.__version__}", "settings": f"{settings}, {_native.isa()}"}

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """prepare: compute a prompt of `depth` tokens; decode: seconds a step behind it; prefill: seconds of a prompt
        that was not there before; logits: those of `ids`, into a file; encode: seconds of a view, features into a file.
        """
        op = request["op"]
        if op == "prepare":
            self._cancel(self._start(self._prompts(request["depth"], request.get("batch", 1))))
            return {}
        if op == "decode":
            return self._decode(request)
        if op == "prefill":
            return self._prefill(request)
        if op == "logits":
            np.save(request["file"], self._logits(request["ids"]).numpy())
            return {}
        if op == "encode":
            return self._encode(request)
        raise ValueError(f"unknown op {op!r}")

    @contextmanager
    def running(self, depth: int, batch: int) -> Iterator[Callable[[], object]]:
        """A call that decodes a token of each of `batch` sequences behind `depth` tokens; at most ROOM - 4 times."""
        states = self._start(self._prompts(depth, batch))
        yield self.engine.step
        self._cancel(states)

    def _decode(self, request: dict[str, Any]) -> dict[str, Any]:
        with self.running(request["depth"], request.get("batch", 1)) as step:
            return {"seconds": time_steps(step, request["steps"])}

    def _prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        prompt = [self._draw.randrange(self.engine.inputs.vocab_size) for _ in range(request["tokens"])]
        running: list[Any] = []
        seconds = time_once(lambda: running.extend(self._start([prompt])))
        self._cancel(running)
        return {"seconds": seconds}

    def _encode(self, request: dict[str, Any]) -> dict[str, Any]:
        model: Any = self.engine.runner.model
        pixels, results = torch.from_numpy(np.load(request["pixels"])).to(model.dtype), []
        with torch.inference_mode():
            seconds = time_once(lambda: results.append(model.encoder.encode_views(pixels)))
        if request.get("file"):
            np.save(request["file"], results[0].flatten(0, 2).float().numpy())
        return {"seconds": seconds}

    def _prompts(self, depth: int, batch: int) -> list[list[int]]:
        """The same prompts whenever they are asked for."""
        draw = random.Random(depth * 1000 + batch)
        return [[draw.randrange(self.engine.inputs.vocab_size) for _ in range(max(depth, 1))] for _ in range(batch)]

    def _start(self, prompts: list[list[int]]) -> list[Any]:
        """Requests that each have their first token."""
        engine, sampling = self.engine, SamplingParams(max_tokens=ROOM - 2, **SAMPLING)  # type: ignore[arg-type]
        states = [engine.add_request(engine.inputs.build(prompt, sampling, str(i))) for i, prompt in enumerate(prompts)]
        while any(state.answers[0].sequence.num_generated == 0 for state in states):
            engine.step()
        return states

    def _cancel(self, states: list[Any]) -> None:
        for state in states:
            self.engine.cancel(state)

    def _logits(self, ids: list[int]) -> torch.Tensor:
        """Logits of every position, as a fresh sequence in the cache's first blocks; the engine must be idle."""
        self.engine.clear_prefix_cache()
        count, kv = len(ids), self.engine.runner.kv
        places = torch.arange(count, dtype=torch.int32)
        batch = ForwardBatch(
            token_ids=torch.tensor(ids, dtype=torch.int32),
            positions=places,
            slots=places,
            query_starts=torch.tensor([0, count], dtype=torch.int32),
            context_lens=torch.tensor([count], dtype=torch.int32),
            block_tables=torch.arange(-(-count // kv.block_size), dtype=torch.int32).unsqueeze(0),
            logit_rows=places,
        )
        with torch.inference_mode():
            logits: torch.Tensor = self.engine.runner.model.forward(batch, kv)
        return logits


if __name__ == "__main__":
    serve(Ours)
