"""Reads machine code: registers, stack, instructions by class, and the mix of the hottest loop."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from .compiled import Compiled

# Classes of instructions that the table counts, by the first part of their names.
TENSOR = ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "OMMA", "DMMA")
COPY = ("LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP")
SPILL = ("LDL", "STL")


@dataclass(frozen=True)
class Resources:
    """One kernel on one target. A thread's registers; stack in bytes a thread; shared memory in bytes a program.

    AMD: registers are vector registers, `accumulators` of them in the second half of the file; stack is scratch.
    wide_copies: copy instructions of 16 bytes; tensor, copies, spills: instructions in the whole kernel;
    loop: instructions of the hot loop (hot_loop, amd_loop), by name.
    """

    registers: int
    accumulators: int
    stack: int
    shared: int
    warps: int
    instructions: int
    tensor: int
    copies: int
    wide_copies: int
    spills: int
    loop: dict[str, int] = field(default_factory=dict)

    @property
    def loop_length(self) -> int:
        return sum(self.loop.values())

    @property
    def tensor_share(self) -> float:
        """Of the hot loop's instructions; 0 without a loop."""
        tensor = sum(n for name, n in self.loop.items() if name in TENSOR or "mfma" in name)
        return tensor / self.loop_length if self.loop else 0.0


def read(compiled: Compiled) -> Resources:
    return read_amd(compiled) if compiled.target.startswith("gfx") else read_nvidia(compiled)


@cache
def tool(name: str) -> str:
    """cuobjdump of the triton package, or of a CUDA toolkit on the PATH."""
    package = find_spec("triton")
    if package is not None and package.origin is not None:
        shipped = Path(package.origin).parent / "backends" / "nvidia" / "bin" / name
        if shipped.is_file():
            return str(shipped)
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither in the triton package nor on the PATH")
    return found


def run_tool(*arguments: str) -> str:
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.[\w]+)*)([^;]*);", re.M)
_FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.M)
_USAGE = re.compile(r"Function ([^\s:]+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
Line = tuple[int, str, str, str]  # address, name, modifiers, predicate and operands


@dataclass(frozen=True)
class Code:
    """One kernel of a cubin. shared: bytes of its static variables."""

    registers: int
    stack: int
    shared: int
    lines: list[Line]


def read_cubin(path: str) -> dict[str, Code]:
    """The kernels of a cubin, if any, by their (mangled) names."""
    usage = {m[1]: m for m in _USAGE.finditer(run_tool(tool("cuobjdump"), "-res-usage", path))}
    _, *parts = _FUNCTION.split(run_tool(tool("cuobjdump"), "-sass", path))
    listings = dict(zip(parts[::2], parts[1::2]))
    if set(usage) != set(listings):
        raise ValueError(f"cuobjdump printed resources of {sorted(usage)} and code of {sorted(listings)} in {path}")
    return {
        name: Code(int(found[2]), int(found[3]), int(found[4]), sass(listings[name])) for name, found in usage.items()
    }


def sass(listing: str) -> list[Line]:
    return [(int(m[1], 16), m[3], m[4], f"{m[2] or ''}{m[5]}".strip()) for m in _SASS.finditer(listing)]


def read_nvidia(compiled: Compiled) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (code,) = read_cubin(file.name).values()
    return resources_of(code, compiled.shared, compiled.num_warps)


def resources_of(code: Code, shared: int, warps: int) -> Resources:
    """shared: bytes a program, static variables included."""
    counts = Counter(name for _, name, _, _ in code.lines)
    return Resources(
        registers=code.registers,
        accumulators=0,
        stack=code.stack,
        shared=shared,
        warps=warps,
        instructions=sum(counts.values()),
        tensor=sum(counts[name] for name in TENSOR),
        copies=sum(counts[name] for name in COPY),
        wide_copies=sum(1 for _, name, mods, _ in code.lines if name in COPY and (name != "LDGSTS" or ".128" in mods)),
        spills=sum(counts[name] for name in SPILL),
        loop=hot_loop(code.lines),
    )


def hot_loop(code: list[Line]) -> dict[str, int]:
    """Instructions between a backward branch and its target: of all such loops the one with most tensor instructions
    that has no smaller loop with some inside, then the longest. If none has any, the longest of the innermost.

    Behind the kernel's end lie detours of warps whose threads have parted; their way back leads over the end (an EXIT
    without a condition) and is no loop. A loop may lie there, too.
    """
    at = {address: index for index, (address, *_) in enumerate(code)}
    ends = [index for index, (_, name, _, operands) in enumerate(code) if name == "EXIT" and not operands]
    loops: list[tuple[int, int, Counter[str]]] = []
    for index, (_, name, _, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
        start = at.get(int(target[1], 16)) if target else None
        if start is not None and index - start > 4 and not any(start < end < index for end in ends):
            loops.append((start, index, Counter(name for _, name, _, _ in code[start : index + 1])))

    def tensor(mix: Counter[str]) -> int:
        return sum(mix[name] for name in TENSOR)

    if any(tensor(mix) for *_, mix in loops):
        loops = [loop for loop in loops if tensor(loop[2])]
    inner = [
        mix
        for start, end, mix in loops
        if not any((s, e) != (start, end) and s >= start and e <= end for s, e, _ in loops)
    ]
    return dict(max(inner, key=lambda mix: (tensor(mix), sum(mix.values())), default=Counter()))


_AMD = re.compile(r"^\s+((?:v|s|ds|global|buffer|scratch|flat)_[a-z0-9_]+)", re.M)


def read_amd(compiled: Compiled) -> Resources:
    text = compiled.asm["amdgcn"]

    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        if not found:
            raise ValueError(f"{compiled.name}: no {pattern} in the assembly")
        return int(found[1])

    names = _AMD.findall(text)
    counts = Counter(names)
    wide = sum(n for name, n in counts.items() if name in ("global_load_dwordx4", "buffer_load_dwordx4"))
    loads = sum(n for name, n in counts.items() if name.startswith(("global_load", "buffer_load")))
    return Resources(
        registers=number(r"\.vgpr_count:\s+(\d+)"),
        accumulators=number(r"\.agpr_count:\s+(\d+)"),
        stack=number(r"ScratchSize: (\d+)"),
        shared=compiled.shared,
        warps=compiled.num_warps,
        instructions=sum(counts.values()),
        tensor=sum(n for name, n in counts.items() if "mfma" in name),
        copies=loads,
        wide_copies=wide,
        spills=sum(n for name, n in counts.items() if name.startswith("scratch_")),
        loop=amd_loop(text),
    )


def amd_loop(text: str) -> dict[str, int]:
    """Of labels .LBB0_n and branches back to them: the innermost loop with most mfma, then the longest."""
    code: list[str] = []
    labels: dict[str, int] = {}
    spans = []
    for line in text.splitlines():
        if label := re.match(r"^(\.LBB\w+):", line):
            labels[label[1]] = len(code)
        elif found := _AMD.match(line):
            code.append(found[1])
            target = re.search(r"(\.LBB\w+)", line) if found[1].startswith(("s_cbranch", "s_branch")) else None
            if target and target[1] in labels:
                spans.append((labels[target[1]], len(code) - 1))
    inner = [s for s in spans if not any(o != s and o[0] >= s[0] and o[1] <= s[1] for o in spans)]
    mixes = [Counter(code[start : end + 1]) for start, end in inner]
    if not mixes:
        return {}
    return dict(max(mixes, key=lambda mix: (sum(n for name, n in mix.items() if "mfma" in name), sum(mix.values()))))
