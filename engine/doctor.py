"""What this machine offers and which kernel each op would get: the report behind `pagelens doctor`.

Collects plain data; printing is the front end's business. Loads torch and the native extension, opens no model.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """versions and machine as text by name; `ops` rows are op, backend, chosen, reason."""

    versions: dict[str, str]
    machine: dict[str, str]
    ops: tuple[dict[str, Any], ...]
    extras: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def memory_bytes() -> int | None:
    """Physical memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.lower().startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """CPUs this process may run on (its affinity); hyperthreads count."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_num_threads() -> int:
    """Threads that the native kernels use where num_threads is None."""
    from .ops.threads import default_num_threads as count

    return count()


def native_facts() -> dict[str, str]:
    try:
        from . import _native
    except ImportError as error:
        return {"native extension": f"missing ({error}); build it with `pip install .`"}
    return {
        "native extension": "built",
        "instruction sets": f"{_native.isa()} in use; this CPU runs {', '.join(_native.supported_isas())}; "
        f"compiled in: {', '.join(_native.compiled_isas())}",
    }


def installed(module: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return "not installed"


def gpu_fact(torch: Any) -> str:
    if not torch.cuda.is_available():
        return "no GPU that torch can use (GPU backends do not exist yet)"
    return f"{torch.cuda.get_device_name(0)} (GPU backends do not exist yet; the CPU is used)"


def examine(backend: Literal["auto", "reference", "native"] = "auto") -> DoctorReport:
    """Look at the machine. Raises UnsupportedError if a forced backend or instruction set cannot run here."""
    import torch

    from . import __version__
    from .ops.registry import resolve_ops

    memory = memory_bytes()
    table = resolve_ops(backend)
    choices = table.explain()
    table.close()
    return DoctorReport(
        versions={
            "pagelens": __version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "numpy": installed("numpy"),
            "pillow": installed("pillow"),
            "tokenizers": installed("tokenizers"),
        },
        machine={
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu": cpu_model(),
            "cpus": f"{usable_cpus()} usable of {os.cpu_count()}",
            "threads": f"{default_num_threads()} for native kernels (one a physical core), {torch.get_num_threads()} "
            "for torch",
            "memory": f"{memory / 2**30:.1f} GiB" if memory else "unknown",
            **native_facts(),
            "gpu": gpu_fact(torch),
        },
        ops=tuple(asdict(choice) for choice in choices),
        extras={name: installed(name) for name in ("huggingface_hub", "pypdfium2", "triton", "matplotlib")},
    )
