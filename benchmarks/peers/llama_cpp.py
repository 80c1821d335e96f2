"""Worker: llama.cpp through its C interface (llama-cpp-python), one context with flash attention and one without."""

from __future__ import annotations

import ctypes
import random
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp as library
import numpy as np

from .protocol import serve
from .timing import time_once, time_steps

UBATCH = 512
ROOM = 128


@library.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    """llama.cpp's log, which fills pages, is dropped."""


class Context:
    """A sequence of random tokens in a context of its own."""

    def __init__(self, model: Any, spec: dict[str, Any], flash_attention: bool) -> None:
        params = library.llama_context_default_params()
        params.n_ctx = max(spec.get("max_depth", 0), UBATCH) + ROOM
        params.n_batch = params.n_ubatch = UBATCH
        params.n_threads = params.n_threads_batch = spec["threads"]
        params.flash_attn_type = int(flash_attention)
        self._context = library.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._memory = library.llama_get_memory(self._context)
        self._vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        self._filled = 0
        self._draw = random.Random(1)
        # The cache is float16 whatever the weights are: one file serves a model in every format.
        file = Path(spec["model"])
        name = f"state-{file.name.rpartition('-')[0]}-{'with' if flash_attention else 'without'}-flash"
        self._saved = file.with_name(name)

    def put_at(self, depth: int) -> None:
        """Cut the sequence to `depth` tokens, or prefill until it has them (a long one is kept in a file)."""
        if self._filled > depth:
            library.llama_memory_seq_rm(self._memory, 0, depth, -1)
            self._filled = depth
        saved = Path(f"{self._saved}-{depth}.bin")
        if self._filled < depth and saved.exists():
            self._load(saved, depth)
        missing = depth - self._filled
        while self._filled < depth:
            self.decode(self._tokens(min(UBATCH, depth - self._filled)))
        if missing > UBATCH:
            tokens = (library.llama_token * depth)()
            library.llama_state_seq_save_file(self._context, str(saved).encode(), 0, tokens, depth)

    def _load(self, saved: Path, depth: int) -> None:
        library.llama_memory_clear(self._memory, True)
        tokens, count = (library.llama_token * depth)(), ctypes.c_size_t()
        arguments = (self._context, str(saved).encode(), 0, tokens, depth, ctypes.byref(count))
        if not library.llama_state_seq_load_file(*arguments) or count.value != depth:
            raise RuntimeError(f"llama.cpp cannot load {saved}; delete it")
        self._filled = depth

    def decode(self, ids: list[int]) -> None:
        """One pass over tokens behind the sequence; logits of the last are computed."""
        tokens = (library.llama_token * len(ids))(*ids)
        status = library.llama_decode(self._context, library.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        library.llama_synchronize(self._context)
        self._filled += len(ids)

    def decode_random(self, count: int) -> None:
        self.decode(self._tokens(count))

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits [n, V] of every position of a fresh sequence."""
        self.put_at(0)
        rows = []
        for token in ids:
            self.decode([token])
            row = library.llama_get_logits_ith(self._context, -1)
            rows.append(np.ctypeslib.as_array(row, (self._vocab,)).copy())
        return np.stack(rows)

    def _tokens(self, count: int) -> list[int]:
        return [self._draw.randrange(self._vocab) for _ in range(count)]


class LlamaCpp:
    """spec: model (a GGUF file), threads, max_depth."""

    def __init__(self, spec: dict[str, Any]) -> None:
        library.llama_log_set(_quiet, ctypes.c_void_p(0))
        library.llama_backend_init()
        params = library.llama_model_default_params()
        self._model = library.llama_model_load_from_file(spec["model"].encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {spec['model']}")
        self._contexts = [Context(self._model, spec, flash_attention=on) for on in (False, True)]

    def describe(self) -> dict[str, Any]:
        features = library.llama_print_system_info().decode().strip()
        return {
            "engine": f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})",
            "settings": f"flash attention off and on, ubatch {UBATCH}, float16 cache; {features}",
        }

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """As ours.py; request["flash_attention"] chooses the context."""
        context = self._contexts[bool(request.get("flash_attention", False))]
        op = request["op"]
        if op == "prepare":
            context.put_at(request["depth"])
            return {}
        if op == "decode":
            context.put_at(request["depth"])
            return {"seconds": time_steps(lambda: context.decode_random(1), request["steps"])}
        if op == "prefill":
            context.put_at(0)
            return {"seconds": time_once(lambda: context.decode_random(request["tokens"]))}
        if op == "logits":
            np.save(request["file"], context.logits(request["ids"]))
            return {}
        raise ValueError(f"unknown op {op!r}")


if __name__ == "__main__":
    serve(LlamaCpp)
