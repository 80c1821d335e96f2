"""What the CUDA kernels take on the sizes of the real models: machine code by nvcc, launches by their own host code."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

from pagelens.kernels.workloads import WORKLOADS, Workload

from . import nvcc
from .assembly import Resources, read_cubin, resources_of
from .cuda_launch import CudaLaunch, Kernels, record
from .occupancy import RESERVED

KINDS = ("bf16", "int8", "int4")  # WeightKind of csrc/cuda/kernels.h


@dataclass(frozen=True)
class CudaWork:
    """call(module): the kernels' function on the workload's sizes, at addresses that nobody reads."""

    workload: Workload
    call: Callable[[ModuleType], None]


def named(name: str) -> Workload:
    return next(workload for workload in WORKLOADS if workload.name == name)


def window_attention(window: int) -> CudaWork:
    grid, size = 64, window or 64

    def call(module: ModuleType) -> None:
        sizes = {"views": 1, "grid": grid, "size": size, "across": -(-grid // size), "heads": 12, "head_dim": 64}
        module.window_attention(0, 0, 0, 0, 0, 0, **sizes, scale=0.125, out=0, stream=0)

    return CudaWork(named(f"window_attention {grid} window {window}"), call)


def conv_downsample() -> CudaWork:
    """All of it; the maps between the convolutions are not counted as bytes that must move."""
    parts = [work for work in WORKLOADS if work.key in ("conv", "conv_norm")]
    weights = 2 * (256 * 768 + 9 * 256 * 256 + 9 * 256 * 512 + 9 * 512 * 1024)
    moved = weights + 2 * 64 * 64 * 768 + 2 * 16 * 16 * 1024
    whole = replace(parts[0], name="conv_downsample 64", bytes=moved, flops=sum(part.flops for part in parts))

    def call(module: ModuleType) -> None:
        module.conv_downsample(0, 1, 64, 768, 256, 512, 1024, [0] * 8, 1e-6, 0, 0, 0, 0, 0)

    return CudaWork(whole, call)


def paged_attention(workload: str, rows: int, context: int, heads: int, kv_heads: int) -> CudaWork:
    def call(module: ModuleType) -> None:
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": 128, "block_size": 16, "sequences": 1}
        lengths = {"table_width": -(-context // 16), "tokens": rows, "longest_context": context}
        places = dict.fromkeys(("q", "keys", "values", "block_tables", "query_starts", "context_lens", "out"), 0)
        args = module.PagedAttentionArgs(**places, **sizes, **lengths, scale=0.1)
        module.paged_attention(args, 0, 0)

    return CudaWork(named(workload), call)


def moe_routing(tokens: int, experts: int, top_k: int) -> CudaWork:
    def call(module: ModuleType) -> None:
        module.moe_routing(0, tokens, experts, top_k, True, 1.0, 0, 0, 0, 0, 0)

    return CudaWork(named(f"moe_routing {tokens}x{experts} top {top_k}"), call)


def grouped_gemm(tokens: int, kind: str) -> CudaWork:
    """DeepSeek-OCR's layer; quantised weights with a float32 scale for 64 (int8) or 32 (int4) inputs of a row."""
    width, inner, experts, top_k = 1280, 896, 64, 6
    workload = named(f"grouped_gemm {tokens} tokens, {experts} experts, top {top_k}")
    if kind != "bf16":
        values = 3 * width * inner * min(tokens * top_k, experts)
        per_value = {"int8": 1 + 4 / 64, "int4": 0.5 + 4 / 32}[kind]
        moved = workload.bytes - int((2 - per_value) * values)
        workload = replace(workload, name=f"{workload.name}, {kind}", bytes=moved)

    def call(module: ModuleType) -> None:
        module.grouped_gemm(0, tokens, width, inner, experts, top_k, {"bf16": "bfloat16"}.get(kind, kind), *[0] * 11)

    return CudaWork(workload, call)


def qk_norm_rope_store() -> CudaWork:
    def call(module: ModuleType) -> None:
        module.qk_norm_rope_store(0, 40 * 128, 1, 32, 4, 128, 64, 64, 0, 0, 0, 0, 0, 0, 1e-6, 0, 0, 0, 0)

    return CudaWork(named("qk_norm_rope_store 1x32of4x128"), call)


CUDA_WORK = (
    window_attention(14),
    window_attention(0),
    conv_downsample(),
    paged_attention("paged_attention_decode 1024 10of10x128", 1, 1024, 10, 10),
    paged_attention("paged_attention_decode 4096 32of4x128", 1, 4096, 32, 4),
    moe_routing(1, 128, 8),
    moe_routing(1024, 64, 6),
    *(grouped_gemm(tokens, kind) for kind in KINDS for tokens in (1, 1024)),
    qk_norm_rope_store(),
)


def code_of(unit: nvcc.Unit) -> dict[str, dict[str, Resources]]:
    """target -> kernel's mangled name -> what its code says; shared: static variables only, warps: 0. Kept on disk."""
    text = Path(__file__).with_name("assembly.py").read_text(encoding="utf-8")
    path = unit.ptx.parent / f"resources-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if not path.is_file():
        read = {
            target: {name: asdict(resources_of(code, code.shared, 0)) for name, code in read_cubin(str(cubin)).items()}
            for target, cubin in unit.cubins.items()
        }
        path.write_text(json.dumps(read), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    return {target: {name: Resources(**r) for name, r in kernels.items()} for target, kernels in found.items()}


def all_code(units: Sequence[nvcc.Unit]) -> dict[str, dict[str, Resources]]:
    """As code_of, of all files together."""
    merged: dict[str, dict[str, Resources]] = {target: {} for target in nvcc.TARGETS}
    for kernels in nvcc.side_by_side(code_of, units):
        for target, found in kernels.items():
            merged[target].update(found)
    return merged


def readable(names: Sequence[str]) -> dict[str, str]:
    """Mangled names -> "file: kernel<parameters>", for example "grouped_gemm: down<64, int8>"."""
    plain = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = {}
    for mangled, name in zip(names, plain):
        name = re.sub(r"\(pagelens::cuda::WeightKind\)(\d)", lambda m: KINDS[int(m[1])], name)
        found = re.search(r"\(anonymous namespace\)::(\w+(?:<[^(]*>)?)\(", name)
        file = re.search(r"_[0-9a-f]{8}_\d+_(\w+)_cu_", mangled)  # behind a hash and the length of the name
        if not found or not file:
            raise ValueError(f"{mangled} is no kernel of csrc/cuda")
        short[mangled] = f"{file[1]}: {found[1].replace('simt::', '')}"
    return short


def launched(kernels: Kernels, work: CudaWork) -> list[CudaLaunch]:
    """The launches, those that repeat a kernel with the same block and shared memory once."""
    first = {(job.name, job.block, job.shared): job for job in reversed(record(kernels, work.call))}
    return list(reversed(first.values()))


def with_launch(code: Resources, target: str, job: CudaLaunch) -> Resources:
    """From sm_90 on, cuobjdump counts what the system takes of shared memory among the static variables."""
    threads = job.block[0] * job.block[1] * job.block[2]
    static = code.shared if target in ("sm_80", "sm_89") else max(code.shared - RESERVED, 0)
    return replace(code, shared=static + job.shared, warps=-(-threads // 32))
