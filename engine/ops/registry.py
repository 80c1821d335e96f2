"""Chooses a backend for every op, once, when a model is built.

`auto` takes native for an op when it implements it and supports all of the model's cases of it, otherwise reference. A
forced backend raises UnsupportedError for an op that it implements but cannot run; ops that native has not got yet run
on reference and are reported so. On a GPU every op runs on triton, or on cuda where that is
chosen (cuda_choice.py). Nothing is chosen again later: there is no silent fallback.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from ..config import BACKENDS, CUDA_OPS, Backend
from ..errors import ConfigError, UnsupportedError
from . import OP_NAMES, OpCase, Ops
from .cuda_choice import BY_DEFAULT, IN_CUDA, WITH, choose_cuda_ops, load_kernels
from .devices import find_device
from .reference import ReferenceOps

if TYPE_CHECKING:
    from .cuda import CudaOps

PACKED_BY = {
    "quantize": "linear",
    "packed_memory": "linear",
    "map_packed": "linear",
    "pack_linear": "linear",
    "pack_swiglu": "swiglu_ffn",
    "pack_moe": "moe_ffn",
    "pack_patch_embed": "patch_embed",
    "pack_conv_downsample": "conv_downsample",
}
DECODER_OPS = (
    "embedding",
    "linear",
    "rms_norm",
    "qk_norm_rope_store",
    "paged_attention",
    "swiglu_ffn",
    "moe_ffn",
)
# Each op of a group reads what another one's backend made (the shared expert is a swiglu_ffn): one backend for all.
SAME_BACKEND = {
    "packed weights": ("moe_ffn", "swiglu_ffn", "grouped_gemm"),
    "the KV-cache": ("qk_norm_rope_store", "paged_attention"),
}


@dataclass(frozen=True, slots=True)
class OpChoice:
    """One line of `explain`: whether `backend` runs `op`, and why or why not."""

    op: str
    backend: str
    chosen: bool
    reason: str


class _NativeBackend(Protocol):
    """What the registry asks of an adapter besides the ops themselves."""

    IMPLEMENTED: frozenset[str]

    def supports(self, case: OpCase) -> str | None: ...

    def close(self) -> None: ...


class OpsTable:
    """An `Ops` whose every method is the chosen backend's own bound method, so that a call costs nothing more."""

    def __init__(
        self,
        backends: dict[str, Any],
        choices: list[OpChoice],
        owned: Sequence[Any],
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        self.device = device
        self.sampling = getattr(backends["linear"], "sampling", None)
        self.backend_of = {op: backend.name for op, backend in backends.items()}
        self.name = "+".join(sorted({name for op, name in self.backend_of.items() if op != "sample"}))
        self._choices = choices
        self._owned = tuple(owned)
        for op, backend in backends.items():
            setattr(self, op, getattr(backend, op))
        for pack, op in PACKED_BY.items():
            setattr(self, pack, getattr(backends[op], pack))
        # A program holds the calls of one backend: a step that crosses backends cannot be recorded. cuda launches on
        # triton's stream, and is recorded with it.
        decoders = {"triton" if name == "cuda" else name for name in (self.backend_of[op] for op in DECODER_OPS)}
        self.new_program = backends["linear"].new_program if len(decoders) == 1 else lambda: None

    def explain(self) -> list[OpChoice]:
        """Op by op, every backend: chosen or not, with the reason."""
        return list(self._choices)

    def close(self) -> None:
        """Release the backends' threads and memory. Packed weights must not be used afterwards. Idempotent."""
        for backend in self._owned:
            backend.close()
        self._owned = ()


def _load_native(num_threads: int | None) -> tuple[_NativeBackend | None, str]:
    """The native backend, or None and the sentence that says why it is not there.

    A wrong PAGELENS_CPU_ISA is no reason to fall back: the UnsupportedError is passed on.
    """
    try:
        from .native import NativeOps
    except ImportError as error:
        return None, f"the native extension is not built ({error}); run `pip install -e .`"
    return cast(_NativeBackend, NativeOps(num_threads)), ""


def _refusals(native: _NativeBackend | None, missing: str, cases: Iterable[OpCase]) -> dict[str, str]:
    """Op name -> why native does not run it (absent if it does)."""
    if native is None:
        return dict.fromkeys(OP_NAMES, missing)
    refusals = {op: "native does not have this op yet" for op in OP_NAMES if op not in native.IMPLEMENTED}
    for case in cases:
        sentence = native.supports(case) if case.op in native.IMPLEMENTED else None
        if sentence:
            refusals.setdefault(case.op, sentence)
    return refusals


def _spread(refusals: dict[str, str]) -> None:
    """If native cannot run one op of a group in SAME_BACKEND, it runs none of the group."""
    for what, group in SAME_BACKEND.items():
        for leader in [op for op in group if op in refusals]:
            for op in group:
                refusals.setdefault(op, f"shares {what} with {leader}, which native does not run")


def resolve_ops(
    backend: Backend,
    cases: Sequence[OpCase] = (),
    num_threads: int | None = None,
    device: str = "cpu",
    cuda_ops: str | None = None,
) -> OpsTable:
    """The table of chosen implementations for a model that will ask `cases`.

    num_threads  size of native's pool; None = the machine's physical cores
    device       "cpu", or "cuda" for auto, triton and cuda
    cuda_ops     as in EngineConfig
    Raises ConfigError for an unknown backend or too many threads; UnsupportedError if a forced backend, or an op named
    in cuda_ops, is missing or refuses a case, and whenever PAGELENS_CPU_ISA asks for what cannot be used here.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    unknown = sorted({case.op for case in cases} - set(OP_NAMES))
    if unknown:
        raise ConfigError(f"unknown op {unknown[0]!r}; known: {', '.join(OP_NAMES)}")
    if backend == "triton" or (device != "cpu" and backend in ("auto", "cuda")):
        return _resolve_gpu(backend, cases, device, cuda_ops)
    if device != "cpu" or backend == "cuda":
        raise ConfigError(f"backend={backend!r} does not run on device={device!r}; 'triton' and 'cuda' run on 'cuda'")
    if backend == "cuda-sim":
        return _resolve_sim(cases, cuda_ops)
    reference: Any = ReferenceOps()
    native, missing = (None, "reference was asked for") if backend == "reference" else _load_native(num_threads)
    if backend == "native" and native is None:
        raise UnsupportedError(f"backend native cannot run: {missing}")
    refusals = _refusals(native, missing, cases)
    if backend == "native" and native is not None:
        _raise_first_refusal(native, refusals)
    _spread(refusals)
    backends = {op: reference if op in refusals else native for op in OP_NAMES}
    choices: list[OpChoice] = []
    for op in OP_NAMES:
        runs_native = op not in refusals
        choices.append(OpChoice(op, "native", runs_native, refusals.get(op, "implemented, supports this model")))
        reason = "native runs this op" if runs_native else "complete: runs every op"
        choices.append(OpChoice(op, "reference", not runs_native, reason))
    return OpsTable(backends, choices, [native] if native is not None else [])


def _resolve_gpu(backend: str, cases: Sequence[OpCase], device: str, cuda_ops: str | None) -> OpsTable:
    """All ops by the Triton kernels or, where chosen, the CUDA kernels; rows of logits that must be seen on the host
    are sampled by the reference."""
    from .triton import INTERPRETED, TritonOps

    base = TritonOps(find_device(device))
    for case in cases:
        sentence = base.supports(case)
        if sentence:
            raise UnsupportedError(f"backend triton cannot run {case.op}: {sentence}")
    reason = INTERPRETED if device == "cpu" else f"runs on {base.device}"
    backends: dict[str, Any] = dict.fromkeys(OP_NAMES, base)
    backends["sample"] = ReferenceOps()
    choices: list[OpChoice] = []
    cuda, refusals = (None, {}) if backend == "triton" else _find_cuda(backend, base, cases, cuda_ops)
    for op in OP_NAMES:
        runs_cuda = cuda is not None and op in cuda.IMPLEMENTED and op not in refusals
        if runs_cuda:
            backends[op] = cuda
        if backend != "triton" and op in IN_CUDA:
            choices.append(OpChoice(op, "cuda", runs_cuda, refusals.get(op, reason)))
        if op != "sample":
            choices.append(OpChoice(op, "triton", not runs_cuda, "cuda runs this op" if runs_cuda else reason))
    choices.append(
        OpChoice("sample", "reference", True, "for rows that the host must see; others are chosen by triton")
    )
    return OpsTable(backends, choices, [base], base.device)


def _find_cuda(
    backend: str, base: Any, cases: Sequence[OpCase], cuda_ops: str | None
) -> tuple[CudaOps | None, dict[str, str]]:
    """The CUDA kernels, and op -> why it does not run on them. auto does without them if they are not built."""
    from .cuda import CudaOps

    chosen, named = choose_cuda_ops(cuda_ops, BY_DEFAULT if backend == "auto" else CUDA_OPS)
    try:
        kernels = load_kernels("_cuda")
        count, words = kernels.devices()
        if not count:
            raise UnsupportedError(f"the CUDA C++ kernels: {words}")
    except UnsupportedError as error:
        if backend == "cuda" or (named and chosen):
            raise
        return None, dict.fromkeys(OP_NAMES, str(error))
    cuda = CudaOps(kernels, "cuda", base, base.device)
    return cuda, _cuda_refusals(cuda, cases, chosen, named)


def _cuda_refusals(cuda: CudaOps, cases: Iterable[OpCase], chosen: frozenset[str], named: bool) -> dict[str, str]:
    """Op name -> why it does not run on a CUDA kernel. One that was asked for by name must: UnsupportedError."""
    refusals = {op: "not chosen: cuda_ops or PAGELENS_CUDA_OPS can name it" for op in OP_NAMES if op not in chosen}
    for case in cases:
        sentence = cuda.supports(case) if case.op in chosen else None
        if sentence and named:
            raise UnsupportedError(f"the CUDA kernels cannot run {case.op}: {sentence}; leave it out of cuda_ops")
        if sentence:
            refusals.setdefault(case.op, sentence)
    if "moe_ffn" in refusals:
        refusals.update(dict.fromkeys(WITH["moe_ffn"], refusals["moe_ffn"]))
    return refusals


def _resolve_sim(cases: Sequence[OpCase], cuda_ops: str | None) -> OpsTable:
    """The CUDA kernels on the CPU, all that there are unless cuda_ops says which; the reference runs the rest."""
    from .cuda import CudaOps

    reference: Any = ReferenceOps()
    cuda = CudaOps(load_kernels("_cuda_sim"), "cuda-sim", reference, torch.device("cpu"))
    refusals = _cuda_refusals(cuda, cases, *choose_cuda_ops(cuda_ops, CUDA_OPS))
    backends: dict[str, Any] = {op: reference if op in refusals else cuda for op in OP_NAMES}
    choices: list[OpChoice] = []
    for op in OP_NAMES:
        runs = op not in refusals
        if op in IN_CUDA:
            reason = "the CUDA kernel on this CPU: for tests, thousands of times slower than on a GPU"
            choices.append(OpChoice(op, "cuda-sim", runs, refusals.get(op, reason)))
        choices.append(
            OpChoice(op, "reference", not runs, "cuda-sim runs this op" if runs else "complete: runs every op")
        )
    return OpsTable(backends, choices, [])


def _raise_first_refusal(native: _NativeBackend, refusals: dict[str, str]) -> None:
    for op, sentence in refusals.items():
        if op in native.IMPLEMENTED:
            native.close()
            raise UnsupportedError(f"backend native cannot run {op}: {sentence}; use backend='auto'")


def as_ops(table: OpsTable) -> Ops:
    """The table seen as the contract (its methods are attributes, which a type checker cannot follow)."""
    return cast(Ops, table)
