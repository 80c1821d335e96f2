"""Whether the CUDA C++ kernels are there, and which ops run on them: cuda before triton where docs/gpu-kernels.md has a
reason, otherwise as asked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from ..config import CUDA_OPS, parse_cuda_ops
from ..errors import UnsupportedError

BY_DEFAULT = ("moe_ffn",)  # the reasons: docs/gpu-kernels.md
OPS_VARIABLE = "PAGELENS_CUDA_OPS"
# What a choice brings along: the parts of a mixture of experts read each other's results and packed weights.
WITH = {"moe_ffn": ("moe_routing", "grouped_gemm")}
IN_CUDA = frozenset((*CUDA_OPS, *WITH["moe_ffn"]))


def load_kernels(name: str) -> ModuleType:
    """pagelens._cuda or pagelens._cuda_sim. Raises UnsupportedError in one line if it is not built."""
    package = __name__.split(".")[0]
    try:
        return import_module(f"{package}.{name}")
    except ImportError as error:
        how = "PAGELENS_CUDA=1" if name == "_cuda" else "PAGELENS_CUDA=sim"
        raise UnsupportedError(
            f"the CUDA C++ kernels are not built ({error}); {how} pip install . builds them"
        ) from None


def describe_kernels() -> str:
    """One line for doctor: built or not, and what devices the built module sees."""
    try:
        kernels = load_kernels("_cuda")
    except UnsupportedError as error:
        return str(error)
    return f"built; {kernels.devices()[1]}"


def choose_cuda_ops(asked: str | None, default: Sequence[str]) -> tuple[frozenset[str], bool]:
    """The ops to run on CUDA kernels, and whether they were asked for by name (then a refusal is an error).

    asked  the option cuda_ops; None: the variable PAGELENS_CUDA_OPS, and without it `default`
    """
    value = os.environ.get(OPS_VARIABLE) if asked is None else asked
    names = tuple(default) if value is None else parse_cuda_ops(value, OPS_VARIABLE if asked is None else "cuda_ops")
    return frozenset((*names, *(part for name in names for part in WITH.get(name, ())))), value not in (None, "all")
