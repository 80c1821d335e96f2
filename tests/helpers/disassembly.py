"""What a compiler made of the hot loops: instructions of x86-64 functions in objdump's text, and accumulators that it
keeps in memory.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

HEADER = re.compile(r"^([0-9a-f]+) <(.*)>:$")
INSTRUCTION = re.compile(r"^\s+([0-9a-f]+):\s+(\S+)\s*(.*)$")
JUMP_TARGET = re.compile(r"^([0-9a-f]+)\b")
# From the strongest: dot products of 8 or 16 bits, then multiplications of floats.
PRODUCTS = (re.compile(r"vpdpbusd|vdpbf16ps|v?pmaddwd|v?pmaddubsw"), re.compile(r"vfn?madd|v?mulps"))
LEAF = re.compile(r"__attribute__\(\(noinline\)\)\s+(?:void|bool|int64_t)\s+(\w+)\(")


@dataclass
class Function:
    """(address, mnemonic, operands) of each instruction."""

    name: str
    code: list[tuple[int, str, str]] = field(default_factory=list)

    def innermost_loops(self) -> list[tuple[int, int]]:
        """First and last address of each loop (a jump backwards within the function) that has no loop inside."""
        start = self.code[0][0] if self.code else 0
        loops = []
        for address, mnemonic, operands in self.code:
            target = JUMP_TARGET.match(operands)
            if mnemonic.startswith("j") and target and start <= int(target.group(1), 16) < address:
                loops.append((int(target.group(1), 16), address))
        return [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]

    def hot_loops(self) -> list[tuple[int, int]]:
        """The innermost loops that multiply, with the strongest such instruction that the function has.

        So the loop over the groups of a product of whole numbers, which has floats only, is none.
        """
        loops = self.innermost_loops()
        for products in PRODUCTS:
            if found := [loop for loop in loops if any(products.match(m) for _, m, _ in self.within(loop))]:
                return found
        return []

    def within(self, loop: tuple[int, int]) -> list[tuple[int, str, str]]:
        return [line for line in self.code if loop[0] <= line[0] <= loop[1]]

    def spills(self) -> list[str]:
        """Instructions of the hot loops that put a vector on the stack: a sum or a number that had no register.

        Reading from it alone is no spill: a constant may lie there.
        """
        # %rbp is the frame only where the function sets it up; else it is a register like others.
        framed = any(m == "mov" and o.replace(" ", "") == "%rsp,%rbp" for _, m, o in self.code)
        store = re.compile(r"^%[xyz]mm\d+,\S*\(%r(sp|bp)[,)]" if framed else r"^%[xyz]mm\d+,\S*\(%rsp[,)]")
        return [
            f"{self.name} at {address:x}: {mnemonic} {operands}"
            for loop in self.hot_loops()
            for address, mnemonic, operands in self.within(loop)
            if store.search(operands)
        ]


def functions_of(binary: Path) -> list[Function]:
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(binary)]
    found: list[Function] = []
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if header := HEADER.match(line):
            found.append(Function(header.group(2)))
        elif found and (instruction := INSTRUCTION.match(line)):
            found[-1].code.append((int(instruction.group(1), 16), instruction.group(2), instruction.group(3)))
    return found


def leaves_of(sources: Path) -> set[str]:
    """Names of the functions that the kernels keep out of line so that their accumulators stay in registers."""
    return {
        name for path in sources.iterdir() if path.suffix in (".h", ".cpp") for name in LEAF.findall(path.read_text())
    }
