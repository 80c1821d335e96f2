"""What this machine offers and which kernel each op would get: the report behind `pagelens doctor`.

Collects plain data; printing is the front end's business. Loads torch and the native extension, opens no model.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .config import Backend


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
    from .ops.devices import describe_missing_gpu

    missing = describe_missing_gpu()
    return missing or f"{torch.cuda.get_device_name(0)}; device='cuda' uses it, by the Triton and CUDA kernels"


@dataclass(frozen=True, slots=True)
class ModeReport:
    """One mode on one page size: `grid` is columns x rows of tiles, 1 x 1 without tiles."""

    name: str
    description: str
    grid: tuple[int, int]
    image_tokens: int
    experimental: bool


def examine_modes(model: str | None, width: int, height: int) -> list[ModeReport]:
    """The modes of a checkpoint or preset (None: the published DeepSeek-OCR), with a page's cost in each.

    Reads config.json only. Raises ConfigError or ImageError.
    """
    from .config import DeepseekOcrConfig, ProcessorConfig
    from .errors import ConfigError
    from .loading.presets import find_description
    from .models.registry import class_of
    from .vision.modes import available_modes
    from .vision.tiling import plan_tiles

    processor = ProcessorConfig()
    if model is not None:
        description = find_description(model, random_weights=True)
        config = class_of(description.config).read_config(description.config, description.generation)
        if not isinstance(config, DeepseekOcrConfig):
            raise ConfigError(f"{model}: a text model has no page modes; name a DeepSeek-OCR checkpoint")
        processor = config.processor
    reports = []
    for mode in available_modes(processor).values():
        plan = plan_tiles(width, height, mode)
        grid = (plan.columns, plan.rows)
        reports.append(ModeReport(mode.name, mode.description, grid, plan.num_image_tokens, mode.experimental))
    return reports


def reads_pages(model: str, random_weights: bool) -> bool:
    """Whether a checkpoint (with random_weights: a preset too) takes images. Reads config.json only."""
    from .config import DeepseekOcrConfig
    from .loading.presets import find_description
    from .models.registry import class_of

    description = find_description(model, random_weights=random_weights)
    config = class_of(description.config).read_config(description.config, description.generation)
    return isinstance(config, DeepseekOcrConfig)


def is_preset(model: str) -> bool:
    """Whether a name is that of a preset, which has sizes only: neither weights nor a tokenizer."""
    from .loading.presets import find_description

    return find_description(model, random_weights=True).folder is None


def examine(backend: Backend = "auto", device: Literal["cpu", "cuda"] = "cpu") -> DoctorReport:
    """Look at the machine, with the backend that PAGELENS_BACKEND names if it is "auto".

    Raises UnsupportedError if a forced backend or instruction set cannot run here.
    """
    import torch

    from . import __version__
    from .config import EngineConfig
    from .ops.cuda_choice import describe_kernels
    from .ops.registry import resolve_ops

    memory = memory_bytes()
    chosen = EngineConfig("", backend=backend, device=device).resolve().backend
    table = resolve_ops(chosen, device=device)
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
            "CUDA C++ kernels": describe_kernels(),
        },
        ops=tuple(asdict(choice) for choice in choices),
        extras={name: installed(name) for name in ("huggingface_hub", "pypdfium2", "triton", "matplotlib")},
    )
