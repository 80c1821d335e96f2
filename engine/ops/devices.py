"""Which device the ops run on, and the one sentence that says why a GPU cannot be had."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

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


OLDEST = (8, 0)  # compute capability: what Triton compiles for, and the first with bfloat16 and asynchronous copies


def find_device(name: str) -> torch.device:
    """ "cpu", or "cuda": the current CUDA or ROCm device.

    Raises UnsupportedError in one line if there is none, or an NVIDIA card older than Ampere.
    """
    if name == "cpu":
        return torch.device("cpu")
    missing = describe_missing_gpu()
    if missing is not None:
        raise UnsupportedError(f"device={name!r}: {missing}")
    device = torch.device("cuda", torch.cuda.current_device())
    if not torch.version.hip and torch.cuda.get_device_capability(device) < OLDEST:
        major, minor = torch.cuda.get_device_capability(device)
        raise UnsupportedError(
            f"device={name!r}: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and the "
            f"kernels need {OLDEST[0]}.{OLDEST[1]} or later (Ampere); use device='cpu'"
        )
    return device


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU this thread's current one, which launches and streams refer to. A new thread begins with GPU 0."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def new_event(device: torch.device) -> Any:
    """An event of a GPU, to be recorded and waited for; None where work is done when a call returns."""
    return torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what this thread gave it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
