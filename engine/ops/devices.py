"""Which device the ops run on, and the one sentence that says why a GPU cannot be had."""

from __future__ import annotations

import torch

from ..errors import UnsupportedError


def describe_missing_gpu() -> str | None:
    """None if torch sees a GPU; else what was tried, and the remedy."""
    if torch.cuda.is_available():
        return None
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU only"
    built = f"for ROCm {torch.version.hip}" if torch.version.hip else built
    remedy = (
        "check that the driver sees a GPU (nvidia-smi, rocm-smi)"
        if torch.version.cuda or torch.version.hip
        else "install a build of torch for CUDA or ROCm"
    )
    return f"no GPU: torch {torch.__version__} is built {built} and finds none; {remedy}, or use device='cpu'"


def find_device(name: str) -> torch.device:
    """ "cpu", or "cuda": the current CUDA or ROCm device. Raises UnsupportedError in one line if there is none."""
    if name == "cpu":
        return torch.device("cpu")
    missing = describe_missing_gpu()
    if missing is not None:
        raise UnsupportedError(f"device={name!r}: {missing}")
    return torch.device("cuda", torch.cuda.current_device())
