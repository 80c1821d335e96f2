"""Ahead-of-time compilation of recorded launches. Needs triton imported without TRITON_INTERPRET, and no GPU."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pagelens.kernels.launch import Launch

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "triton-cache"
READ = ROOT / "build" / "gpu-resources"
Result = TypeVar("Result")
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


@dataclass(frozen=True)
class Compiled:
    """asm: text or bytes by stage (ptx, cubin, amdgcn, ...); shared: bytes of dynamic shared memory a program."""

    name: str
    target: str
    asm: dict[str, Any]
    num_warps: int
    shared: int
    scratch: int  # bytes of global scratch memory a program


class CompileError(Exception):
    """The compiler refused a launch: too much shared memory, for example."""


def setup() -> Any:
    """triton, with its cache in build/ and the fusing of multiplications and additions as on a device."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton

    if hasattr(triton.language.max, "rewrite"):
        raise RuntimeError("triton interprets kernels in this process; compile in one without TRITON_INTERPRET")
    return triton


@cache
def gpu_target(name: str) -> Any:
    setup()
    from triton.backends.compiler import GPUTarget

    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def bind(launch: Launch, target: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """What triton.compile needs (source, options), and the arguments that stay arguments, by name.

    Specialised as a launch on a device is: integers that are 1 become constants, and pointers and integers that are
    multiples of 16 are known to be (which is what lets the compiler copy 16 bytes at once).
    """
    setup()
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(gpu_target(target))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = {**launch.constants, **launch.options}
    bound, specialization, options = binder(*launch.args, **keywords)
    parsed, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    kept = {name: bound[name] for name, kind in signature.items() if kind != "constexpr"}
    return source, parsed.__dict__, kept


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Raises CompileError with the compiler's last line."""
    triton = setup()
    source, options, _ = bind(launch, target)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernel = triton.compile(source, target=gpu_target(target), options=options)
    except Exception as error:
        # Triton raises many kinds: of its own passes, of LLVM, of ptxas.
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        raise CompileError(
            f"{launch.name} for {target}: {type(error).__name__} {lines[-1] if lines else ''}"
        ) from error
    meta = kernel.metadata
    scratch = int(getattr(meta, "global_scratch_size", 0) or 0)
    asm = {stage: kernel.asm[stage] for stage in ("ttgir", "ptx", "cubin", "amdgcn") if stage in kernel.asm}
    return Compiled(launch.name, target, asm, int(meta.num_warps), int(meta.shared), scratch)


def fingerprint(launch: Launch, target: str) -> str:
    """Equal for launches that compile to the same code."""
    source, options, _ = bind(launch, target)
    backend_options = sorted((k, str(v)) for k, v in options.items())
    return hashlib.sha256(pickle.dumps((source.hash(), target, backend_options))).hexdigest()


_jobs: list[tuple[Launch, str, str, Any]] = []


def _work(index: int) -> Any:
    launch, target, key, read = _jobs[index]
    path = READ / f"{key}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    try:
        found = asdict(read(compile_launch(launch, target)))
    except CompileError as error:
        return str(error)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")
    return found


def compile_all(
    jobs: Sequence[tuple[Launch, str]], read: Callable[[Compiled], Result], kind: type[Result], processes: int = 0
) -> list[Result | CompileError]:
    """read(Compiled) of every job, a dataclass `kind`, or its CompileError; in as many processes as there are CPUs.

    Jobs that would compile to the same code are compiled once, and what was read is kept in build/gpu-resources.
    """
    global _jobs
    version = f"{setup().__version__}{(Path(__file__).parent / 'assembly.py').read_text(encoding='utf-8')}"
    keys = [hashlib.sha256((fingerprint(*job) + version).encode()).hexdigest() for job in jobs]
    first = {key: at for at, key in reversed(list(enumerate(keys)))}
    _jobs = [(*jobs[at], key, read) for key, at in first.items()]
    processes = min(processes or os.cpu_count() or 1, max(len(_jobs), 1))
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        results = dict(zip(first, pool.map(_work, range(len(_jobs)), chunksize=1)))
    return [CompileError(r) if isinstance(r, str) else kind(**r) for r in (results[key] for key in keys)]
