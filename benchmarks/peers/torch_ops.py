"""Worker: torch's own ops, in the layouts that serve them best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import op_inputs
from .protocol import serve
from .timing import time_calls

Call = Callable[[], Tensor]


def linear(dtype: str) -> Call:
    x, weight = op_inputs.linear(dtype)
    return lambda: functional.linear(x, weight)


def attention(batch: int, tokens: int) -> Call:
    """Scaled dot product attention that gets its bias (relative positions, added up) ready made."""
    shape = (batch, op_inputs.HEADS, tokens, op_inputs.HEAD_DIM)
    q, k, v = (op_inputs.noise(name, shape, "bf16") for name in ("q", "k", "v"))
    bias = op_inputs.noise("bias", (*shape[:2], tokens, tokens), "bf16")
    return lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def neck(channels_last: bool) -> Call:
    x, weights = op_inputs.neck("bf16")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    pixels = x.permute(0, 3, 1, 2).contiguous(memory_format=layout)
    one, two, three, four = (
        weights[name].contiguous(memory_format=layout) for name in ("conv1", "conv2", "down1", "down2")
    )

    def normed(y: Tensor, i: int) -> Tensor:
        weight, bias = weights[f"norm{i}_weight"], weights[f"norm{i}_bias"]
        rows = functional.layer_norm(y.permute(0, 2, 3, 1), (op_inputs.NECK,), weight, bias, 1e-6)
        return rows.permute(0, 3, 1, 2)

    def run() -> Tensor:
        y = normed(functional.conv2d(pixels, one), 1)
        y = normed(functional.conv2d(y, two, padding=1), 2)
        return functional.conv2d(functional.conv2d(y, three, stride=2, padding=1), four, stride=2, padding=1)

    return run


CALLS: dict[str, Callable[[], Call]] = {
    "linear-bf16": lambda: linear("bf16"),
    "linear-fp32": lambda: linear("fp32"),
    "window-attention": lambda: attention(op_inputs.WINDOWS, op_inputs.WINDOW**2),
    "global-attention": lambda: attention(1, op_inputs.GRID**2),
    "neck": lambda: neck(channels_last=False),
    "neck, channels last": lambda: neck(channels_last=True),
}


class TorchOps:
    """spec: threads."""

    def __init__(self, spec: dict[str, Any]) -> None:
        torch.set_num_threads(spec["threads"])
        torch.set_grad_enabled(False)
        self._name = ""
        self._call: Call | None = None

    def describe(self) -> dict[str, Any]:
        return {"engine": f"torch {torch.__version__}", "settings": f"{torch.get_num_threads()} threads"}

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """prepare: make the inputs of request["name"]; call: median seconds of a call."""
        if request["name"] != self._name:
            self._call = None  # free the inputs of another op first
            self._name, self._call = request["name"], CALLS[request["name"]]()
        if request["op"] == "prepare" or self._call is None:
            return {}
        return {"seconds": time_calls(self._call)}


if __name__ == "__main__":
    serve(TorchOps)
