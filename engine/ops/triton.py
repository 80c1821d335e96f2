"""Adapter of the Triton kernels: checks shapes and dtypes, calls, and does nothing else.

Everything stays on the device: tensors that come from the host are copied there, results are device tensors. Nothing
is read back, so that an id, slot or position outside its table cannot raise here: such a row is left out (its result
is undefined for an embedding, its key and value are not stored). The engine's own batches hold no such rows.

On a CPU the kernels run in Triton's interpreter, for tests only: thousands of times slower than a device.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError, UnsupportedError
from . import Activation, OpCase, RopeTable, Routing
from .triton_packing import DTYPES, PackedLinear, PackedMoe, PackedSwiglu, TritonPacking, refuse

ACTIVATIONS = (None, "gelu", "quick_gelu", "silu")
INTERPRETED = "backend triton runs its kernels in Triton's interpreter on the CPU: for tests, thousands of times slower than a GPU"


class TritonOps(TritonPacking):
    """The ops of the contract by the kernels in kernels/.

    device  a CUDA device (NVIDIA, or AMD with a ROCm build of torch), or "cpu": interpreted, which a RuntimeWarning says
    Raises UnsupportedError if triton cannot be imported here.
    """

    name = "triton"

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)
        self.is_interpreted = self.device.type == "cpu"
        try:
            if self.is_interpreted:
                from ..kernels.interpreter import import_triton

                import_triton()
                warnings.warn(INTERPRETED, RuntimeWarning, stacklevel=2)
            else:
                import triton  # noqa: F401
        except ImportError as error:
            raise UnsupportedError(f"triton cannot be imported ({error}); pip install 'pagelens[gpu]'") from None
        except RuntimeError as error:
            raise UnsupportedError(f"backend triton on a CPU: {error}") from None

    def close(self) -> None:
        """Nothing to release: torch owns the device's memory."""

    def new_program(self) -> None:
        """Nothing is recorded."""

    def supports(self, case: OpCase) -> str | None:
        """None if this case can run, else one sentence that says why not."""
        if case.dtype not in DTYPES:
            return f"triton runs float32, bfloat16 and float16, not {str(case.dtype).removeprefix('torch.')}"
        return None

    def linear(
        self,
        x: Tensor,
        weight: PackedLinear,
        activation: Activation | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        from ..kernels.linear import linear

        self._rows("linear", x, weight.in_features, weight.dtype)
        if activation not in ACTIVATIONS:
            raise ShapeError(f"linear: unknown activation {activation!r}; known: gelu, quick_gelu, silu")
        if out_dtype not in (None, x.dtype, torch.float32):
            raise ShapeError(f"linear: out_dtype must be x's {x.dtype} or float32, got {out_dtype}")
        self._like("linear", "residual", residual, (x.shape[0], weight.out_features), x.dtype)
        self._like("linear", "out", out, (x.shape[0], weight.out_features), out_dtype or x.dtype)
        return linear(x, weight.matrix, activation, residual, out, out_dtype)

    def _rows(self, op: str, x: Tensor, width: int, dtype: torch.dtype) -> None:
        if x.ndim != 2 or x.shape[1] != width or x.dtype != dtype or (width > 1 and x.stride(1) != 1):
            refuse(op, f"x must be [N, {width}] {dtype} with contiguous rows", x)
        if x.device != self.device and x.device.type != self.device.type:
            refuse(op, f"x must be on {self.device}, not on {x.device}", x)

    @staticmethod
    def _like(op: str, name: str, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if x is None:
            return
        if x.shape != shape or x.dtype != dtype or (shape[-1] > 1 and x.stride(-1) != 1):
            refuse(op, f"{name} must be {list(shape)} {str(dtype).removeprefix('torch.')}, last axis contiguous", x)
