"""docs/gpu-resources.md: what every kernel of the workloads takes on every target, as its compiler says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pagelens.kernels.workloads import WORKLOADS, Workload

from . import nvcc
from .assembly import Resources, read
from .compiled import TARGETS, CompileError, compile_all, setup
from .cost import floor_seconds
from .cuda_kernels import CUDA_WORK, all_code, launched, readable, with_launch
from .cuda_launch import Kernels
from .occupancy import DEVICES, occupancy
from .recorded import record

HEAD = """# Resources of the GPU kernels

Not measured on a GPU. What the compilers say, by `python tools/gpu_resources.py --write` (tests compare). Triton
kernels: triton {version}, its own ptxas, cuobjdump and LLVM; each table is one workload of `kernels/workloads.py` with
the configuration that its target uses. CUDA C++ kernels (`csrc/cuda`): nvcc, at the end; a kernel that a call launches
several times has one row.

The floor is bytes at the full bandwidth or FLOPs at the full rate of a data sheet: A100 80 GB 2.04 TB/s and 312
TFLOP/s, H100 SXM 3.35 TB/s and 989 TFLOP/s.

regs: registers a thread (gfx942: vector registers, accumulators included). stack: bytes a thread (a frame that
nothing reads or writes is no spill). spills: LDL and STL
(gfx942: scratch) instructions. shared: bytes a program. tensor: HMMA, HGMMA, UTCHMMA, mfma ... instructions. copies:
asynchronous copies to shared memory (gfx942: loads), in brackets those of 16 bytes and more. programs: on one
multiprocessor at once, with their share of its warps and what limits them. loop: instructions of the hot loop and the
share of tensor ones; - if the compiler unrolled it whole.
"""
CUDA_HEAD = """
# CUDA C++ kernels

By nvcc {version}, every file compiled alone, with spills and local memory as errors. Shared memory is that of the
launch, as the kernels' host code chooses it.
"""
COLUMNS = (
    "| target | kernel | warps | regs | stack | spills | shared | instructions | tensor | copies | programs | loop |"
)


@dataclass(frozen=True)
class Row:
    workload: Workload
    target: str
    kernel: str
    resources: Resources


def collect(targets: Sequence[str] = TARGETS, processes: int = 0) -> list[Row]:
    """Every launch of every workload, compiled. Raises CompileError."""
    setup()
    jobs = [(w, t, launch) for w in WORKLOADS for t in targets for launch in record(w, t)]
    found = compile_all([(launch, target) for _, target, launch in jobs], read, Resources, processes)
    for result in found:
        if isinstance(result, CompileError):
            raise result
    kernels = [launch.name.removesuffix("_kernel") for *_, launch in jobs]
    return [Row(w, t, kernel, resources) for (w, t, _), kernel, resources in zip(jobs, kernels, found)]


def collect_cuda(units: Sequence[nvcc.Unit], kernels: Kernels) -> list[Row]:
    """Every kernel that the calls of CUDA_WORK launch, on every target of nvcc."""
    code = all_code(units)
    names = readable(list(code[nvcc.TARGETS[0]]))
    rows = []
    for work in CUDA_WORK:
        for target in nvcc.TARGETS:
            for job in launched(kernels, work):
                short = names[job.name].partition(": ")[2]
                rows.append(Row(work.workload, target, short, with_launch(code[target][job.name], target, job)))
    return rows


def render(rows: Sequence[Row]) -> str:
    """The part of the Triton kernels."""
    return HEAD.format(version=setup().__version__) + sections(rows, "")


def render_cuda(rows: Sequence[Row]) -> str:
    return CUDA_HEAD.format(version=nvcc.version()) + sections(rows, "CUDA: ")


def split(text: str) -> tuple[str, str]:
    """What `render` and `render_cuda` have written."""
    head, found, rest = text.partition(CUDA_HEAD.partition("By nvcc")[0])
    return head, found + rest


def sections(rows: Sequence[Row], prefix: str) -> str:
    parts = [""]
    for workload in {id(row.workload): row.workload for row in rows}.values():
        own = [row for row in rows if row.workload is workload]
        parts += [
            f"\n## {prefix}{workload.name}\n",
            floors(workload),
            *mixes(own),
            "",
            COLUMNS,
            "|" + "---|" * (COLUMNS.count("|") - 1),
        ]
        parts += [line(row) for row in own]
    return "\n".join(parts) + "\n"


def floors(workload: Workload) -> str:
    """Bytes, FLOPs, and the time that no kernel can beat."""
    times = []
    for target in ("sm_80", "sm_90"):
        seconds, bound = floor_seconds(target, workload)
        times.append(f"{DEVICES[target].name} {1e6 * seconds:.2f} us ({bound})")
    flops = f"{workload.flops / 1e9:.3f} GFLOP" if workload.products else "no product"
    return f"{workload.bytes / 1e6:.3f} MB, {flops}; floor: {', '.join(times)}."


def mixes(rows: Sequence[Row]) -> list[str]:
    """The hot loop on an A100 and an H100, where there is one."""
    lines = []
    for row in rows:
        if row.target not in ("sm_80", "sm_90") or not row.resources.loop:
            continue
        common = sorted(row.resources.loop.items(), key=lambda item: (-item[1], item[0]))[:8]
        lines.append(f"Hot loop of {row.kernel} on {row.target}: {', '.join(f'{n} {op}' for op, n in common)}.")
    return ["", "\n\n".join(lines)] if lines else []


def line(row: Row) -> str:
    r = row.resources
    fit = occupancy(row.target, r)
    loop = "-"
    if r.loop:
        loop = f"{r.loop_length}, {100 * r.tensor_share:.0f} %"
    cells = [
        row.target,
        row.kernel,
        r.warps,
        r.registers,
        r.stack,
        r.spills,
        r.shared,
        r.instructions,
        r.tensor,
        f"{r.copies} ({r.wide_copies})",
        f"{fit.programs}, {100 * fit.share:.0f} %, {fit.limiter}",
        loop,
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def problems(rows: Sequence[Row]) -> list[str]:
    """What a chosen configuration must not have: spills, products without tensor cores, narrow copies, no room."""
    found = []
    for row in rows:
        r, where = row.resources, f"{row.workload.name} on {row.target} ({row.kernel})"
        if r.spills:
            found.append(f"{where}: {r.stack} bytes of stack, {r.spills} spill instructions")
        if occupancy(row.target, r).programs == 0:
            found.append(f"{where}: not one program fits a multiprocessor of {DEVICES[row.target].name}")
        main = row.kernel.partition("<")[0] in PRODUCTS
        if main and not r.tensor:
            found.append(f"{where}: no tensor-core instruction")
        if main and row.workload.key not in NARROW and not row.target.startswith("gfx") and r.wide_copies == 0:
            found.append(f"{where}: no copy of 16 bytes")
    return found


PRODUCTS = {
    "linear",
    "grouped_gemm",
    "conv",
    "patch_embed",
    "attention",
    "window_attention",
    "paged_attention",
    "attend",
    "gate_up",
    "down",
}
NARROW: set[str] = set()
