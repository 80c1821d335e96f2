"""Worker: OpenVINO's runtime on a stateful model that optimum-intel exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino

from .protocol import serve
from .timing import time_once, time_steps


class OpenVino:
    """spec: model (a folder with openvino_model.xml), threads."""

    def __init__(self, spec: dict[str, Any]) -> None:
        settings = {"INFERENCE_NUM_THREADS": spec["threads"], "PERFORMANCE_HINT": "LATENCY"}
        self._model = openvino.Core().compile_model(Path(spec["model"]) / "openvino_model.xml", "CPU", settings)
        self._request = self._model.create_infer_request()
        self._names = [port.get_any_name() for port in self._model.inputs]
        self._vocab = int(self._model.output(0).partial_shape[-1].get_length())
        self._draw = np.random.default_rng(1)
        self._filled = 0
        self._states: dict[int, list[np.ndarray]] = {}

    def describe(self) -> dict[str, Any]:
        found = {
            name: str(self._model.get_property(name))
            for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        }
        settings = ", ".join(f"{name.lower()} {value}" for name, value in found.items())
        return {"engine": f"OpenVINO {openvino.__version__.split('-')[0]}", "settings": settings}

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """As ours.py."""
        op = request["op"]
        if op == "prepare":
            self._put_at(request["depth"])
            return {}
        if op == "decode":
            self._put_at(request["depth"])
            return {"seconds": time_steps(lambda: self._run(self._tokens(1)), request["steps"])}
        if op == "prefill":
            self._put_at(0)
            ids = self._tokens(request["tokens"])
            return {"seconds": time_once(lambda: self._run(ids))}
        if op == "logits":
            self._put_at(0)
            rows = [self._run(np.array([[token]]))[0, -1].copy() for token in request["ids"]]
            np.save(request["file"], np.stack(rows))
            return {}
        raise ValueError(f"unknown op {op!r}")

    def _put_at(self, depth: int) -> None:
        """A cache of `depth` tokens: noise (its values cost no time), the same each time."""
        self._request.reset_state()
        self._filled = 0
        if not depth:
            return
        if depth not in self._states:
            self._states = {depth: self._noise(depth)}
            self._request.reset_state()
        for state, values in zip(self._request.query_state(), self._states[depth], strict=True):
            state.state = openvino.Tensor(values)
        self._filled = depth

    def _noise(self, depth: int) -> list[np.ndarray]:
        """A state for each of the model's, with `depth` where two tokens make a 2."""
        self._run(self._tokens(2))
        found = []
        for state in self._request.query_state():
            values = state.state.data
            if values.shape.count(2) != 1:
                raise RuntimeError(f"a state of shape {values.shape} has no axis of tokens")
            shape = [depth if size == 2 else size for size in values.shape]
            found.append(self._draw.standard_normal(shape, dtype=np.float32).astype(values.dtype))
        return found

    def _run(self, ids: np.ndarray) -> np.ndarray:
        count = ids.shape[1]
        values = {
            "input_ids": ids,
            "attention_mask": np.ones((1, self._filled + count), np.int64),
            "position_ids": np.arange(self._filled, self._filled + count)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._request.infer({name: values[name] for name in self._names})
        self._filled += count
        return self._request.get_output_tensor(0).data

    def _tokens(self, count: int) -> np.ndarray:
        return self._draw.integers(0, self._vocab, (1, count))


if __name__ == "__main__":
    serve(OpenVino)
