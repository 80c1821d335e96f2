"""Worker: pagelens' native ops, each compared with the reference before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pagelens
from pagelens.ops.native import NativeOps
from pagelens.ops.reference import ReferenceOps

from . import op_inputs
from .protocol import serve
from .timing import time_calls

Call = Callable[[], Tensor]
# Norm of the difference from the reference in float32, over the reference's norm: roundings of bfloat16 stay below it.
MOST_ERROR = 2e-2


def linear(ops: Any, dtype: str) -> Call:
    x, weight = op_inputs.linear(dtype)
    packed = ops.pack_linear(weight, None)
    out = torch.empty((op_inputs.TOKENS, op_inputs.OUT), dtype=x.dtype)
    return lambda: ops.linear(x, packed, out=out)


def attention(ops: Any, batch: int, grid: int, window: int, dtype: str) -> Call:
    width = 3 * op_inputs.HEADS * op_inputs.HEAD_DIM
    qkv = op_inputs.noise("qkv", (batch, grid, grid, width), dtype)
    pad = op_inputs.noise("pad", (width,), dtype)
    rel_h, rel_w = (
        op_inputs.noise(name, (2 * grid - 1, op_inputs.HEAD_DIM), "bf16", 0.2).float() for name in ("rel_h", "rel_w")
    )
    return lambda: ops.window_attention(qkv, pad, rel_h, rel_w, op_inputs.HEADS, window)


def neck(ops: Any, dtype: str) -> Call:
    x, weights = op_inputs.neck(dtype)
    packed = ops.pack_conv_downsample(weights)
    return lambda: ops.conv_downsample(x, packed, 1e-6)


# name -> its call; exact: in float32 on the numbers that the timed one has in bfloat16, for the reference
CALLS: dict[str, Callable[[Any, bool], Call]] = {
    "linear-bf16": lambda ops, exact: linear(ops, "exact" if exact else "bf16"),
    "linear-fp32": lambda ops, exact: linear(ops, "fp32"),
    "window-attention": lambda ops, exact: attention(
        ops, op_inputs.WINDOWS, op_inputs.WINDOW, op_inputs.WINDOW, "exact" if exact else "bf16"
    ),
    "global-attention": lambda ops, exact: attention(ops, 1, op_inputs.GRID, 0, "exact" if exact else "bf16"),
    "neck": lambda ops, exact: neck(ops, "exact" if exact else "bf16"),
}


class OurOps:
    """spec: threads."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._ops = NativeOps(spec["threads"])
        self._name, self._error = "", 0.0
        self._call: Call | None = None

    def describe(self) -> dict[str, Any]:
        return {"engine": f"pagelens {pagelens.__version__}", "settings": self._ops.isa}

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """prepare: make the inputs of request["name"] and compare; call: median seconds of a call."""
        if request["name"] != self._name:
            self._call = None
            make = CALLS[request["name"]]
            call = make(self._ops, False)
            self._error = relative_error(call(), make(ReferenceOps(), True)())
            if self._error > MOST_ERROR:
                raise RuntimeError(f"{request['name']} differs from the reference by {self._error:.2e}")
            self._name, self._call = request["name"], call
        if request["op"] == "prepare" or self._call is None:
            return {"error_norm": self._error}
        return {"seconds": time_calls(self._call)}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    difference = (found.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm())


if __name__ == "__main__":
    serve(OurOps)
