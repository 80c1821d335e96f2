"""docs/gpu-resources.md: what every kernel of the workloads takes on every target, as its compiler says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pagelens.kernels.launch import Launch
from pagelens.kernels.workloads import WORKLOADS, Workload

from .assembly import Resources, read
from .compiled import TARGETS, CompileError, compile_all, setup
from .cost import floor_seconds
from .occupancy import DEVICES, occupancy
from .recorded import record

HEAD = """# Resources of the GPU kernels

Not measured on a GPU. What the compilers say, by `python tools/gpu_resources.py --write` (a test compares): triton
{version}, its own ptxas, cuobjdump and LLVM. Each table is one workload of `kernels/workloads.py` with the
configuration that its target uses.

The floor is bytes at the full bandwidth or FLOPs at the full rate of a data sheet: A100 80 GB 2.04 TB/s and 312
TFLOP/s, H100 SXM 3.35 TB/s and 989 TFLOP/s.

regs: registers a thread (gfx942: vector registers, accumulators included). stack: bytes a thread (a frame that
nothing reads or writes is no spill). spills: LDL and STL
(gfx942: scratch) instructions. shared: bytes a program. tensor: HMMA, HGMMA, UTCHMMA, mfma ... instructions. copies:
asynchronous copies to shared memory (gfx942: loads), in brackets those of 16 bytes and more. programs: on one
multiprocessor at once, with their share of its warps and what limits them. loop: instructions of the hot loop and the
share of tensor ones; - if the compiler unrolled it whole.
"""
COLUMNS = (
    "| target | kernel | warps | regs | stack | spills | shared | instructions | tensor | copies | programs | loop |"
)


@dataclass(frozen=True)
class Row:
    workload: Workload
    target: str
    launch: Launch
    resources: Resources


def collect(targets: Sequence[str] = TARGETS, processes: int = 0) -> list[Row]:
    """Every launch of every workload, compiled. Raises CompileError."""
    setup()
    jobs = [(w, t, launch) for w in WORKLOADS for t in targets for launch in record(w, t)]
    found = compile_all([(launch, target) for _, target, launch in jobs], read, Resources, processes)
    for result in found:
        if isinstance(result, CompileError):
            raise result
    return [Row(w, t, launch, resources) for (w, t, launch), resources in zip(jobs, found)]


def render(rows: Sequence[Row]) -> str:
    parts = [HEAD.format(version=setup().__version__)]
    for workload in WORKLOADS:
        own = [row for row in rows if row.workload is workload]
        parts += [
            f"\n## {workload.name}\n",
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
        name = row.launch.name.removesuffix("_kernel")
        lines.append(f"Hot loop of {name} on {row.target}: {', '.join(f'{n} {op}' for op, n in common)}.")
    return ["", "\n\n".join(lines)] if lines else []


def line(row: Row) -> str:
    r = row.resources
    fit = occupancy(row.target, r)
    loop = "-"
    if r.loop:
        tensor = sum(n for name, n in r.loop.items() if name.endswith("MMA") or "mfma" in name)
        loop = f"{r.loop_length}, {100 * tensor / r.loop_length:.0f} %"
    cells = [
        row.target,
        row.launch.name.removesuffix("_kernel"),
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
        r, where = row.resources, f"{row.workload.name} on {row.target} ({row.launch.name})"
        if r.spills:
            found.append(f"{where}: {r.stack} bytes of stack, {r.spills} spill instructions")
        if occupancy(row.target, r).programs == 0:
            found.append(f"{where}: not one program fits a multiprocessor of {DEVICES[row.target].name}")
        main = row.launch.name in PRODUCTS
        if main and not r.tensor:
            found.append(f"{where}: no tensor-core instruction")
        if main and row.workload.key not in NARROW and not row.target.startswith("gfx") and r.wide_copies == 0:
            found.append(f"{where}: no copy of 16 bytes")
    return found


PRODUCTS = {
    "linear_kernel",
    "grouped_gemm_kernel",
    "conv_kernel",
    "patch_embed_kernel",
    "attention_kernel",
    "window_attention_kernel",
    "paged_attention_kernel",
}
NARROW: set[str] = set()
