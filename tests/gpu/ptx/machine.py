"""The machine: all threads of a few CTAs in lockstep, with divergence.

A lane is one thread; the lanes of the CTAs that run together lie one CTA after the other. A register is an array of raw
bits with one element a lane, or one element in all where every lane holds the same value. The lanes at the lowest
program counter go first, so lanes that took different branches meet again where the branches do; a lane waits at a
`.sync` instruction until the others of its warp (or CTA) have reached the same one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .bits import UNSIGNED, Array
from .errors import Deadlock, PtxError, UndefinedRegister, UnknownPtx
from .memory import Copy, GlobalMemory, SharedMemory

if TYPE_CHECKING:
    from .decode import Program

WARP = 32
Mask = Array | None  # lanes that execute; None: all


@dataclass(frozen=True)
class Launch:
    """grid, block: sizes along x, y, z; shared_bytes: dynamic shared memory; parameters: their bytes."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    parameters: Array


class Machine:
    """Runs the CTAs `ctas` (linear numbers, x fastest) of one launch."""

    def __init__(self, program: Program, launch: Launch, memory: GlobalMemory, ctas: list[int], max_steps: int) -> None:
        self.program, self.launch, self.memory = program, launch, memory
        self.threads = int(np.prod(launch.block))
        if self.threads % WARP:
            raise UnknownPtx(f"a block of {self.threads} threads, no multiple of {WARP}")
        self.lanes = self.threads * len(ctas)
        self.every = np.arange(self.lanes)
        self.lane_cta = self.every // self.threads
        self.thread = (self.every % self.threads).astype(np.uint32)
        self.cta = np.array(ctas, np.uint32)[self.lane_cta]
        self.registers: list[Array | None] = [None] * len(program.kernel.registers)
        size = program.kernel.shared_bytes + launch.shared_bytes
        self.shared = SharedMemory(len(ctas), size, self.lane_cta, self.every // WARP, program.granule)
        self.copies: list[Copy] = []
        self.groups_committed = np.zeros(self.lanes, np.int64)
        self.alive = np.ones(self.lanes, bool)
        self.pc = np.zeros(self.lanes, np.int64)
        self.parked = np.zeros(self.lanes, bool)
        self.max_steps = max_steps
        self.steps = 0
        self.executed: Counter[str] = Counter()

    # ---- registers and masks ---------------------------------------------------------------------------------------
    def read(self, index: int) -> Array:
        value = self.registers[index]
        if value is None:
            raise UndefinedRegister(f"{self.program.kernel.registers[index].name} is read before it is written")
        return value

    def write(self, index: int, value: Array, mask: Mask) -> None:
        """Lanes outside `mask` keep what they have: all ones where nothing was written."""
        if mask is not None:
            old = self.registers[index]
            if old is None:
                old = np.ones(1, bool) if value.dtype == np.bool_ else ~np.zeros(1, value.dtype)
            value = np.where(mask, value, old)
        self.registers[index] = value

    def wide(self, value: Array) -> Array:
        """One element a lane."""
        return value if value.shape[0] == self.lanes else np.repeat(value, self.lanes)

    def active(self, mask: Mask) -> Array:
        """Indices of the lanes that execute."""
        return self.every if mask is None else np.flatnonzero(mask)

    def of(self, value: Array, lanes: Array) -> Array:
        """The values of these lanes."""
        return np.repeat(value, lanes.size) if value.shape[0] != self.lanes else value[lanes]

    def special(self, name: str) -> Array:
        stem, _, axis = name.partition(".")
        block, grid = self.launch.block, self.launch.grid
        if axis in ("x", "y", "z"):
            n = "xyz".index(axis)
            sizes = block if stem in ("%tid", "%ntid") else grid
            below = np.uint32(np.prod(sizes[:n], dtype=np.int64))
            if stem in ("%tid", "%ctaid"):
                return (self.thread if stem == "%tid" else self.cta) // below % np.uint32(sizes[n])
            if stem in ("%ntid", "%nctaid"):
                return np.array([sizes[n]], np.uint32)
        lane = self.thread % np.uint32(WARP)
        if name == "%laneid":
            return lane
        if name == "%warpid":
            return self.thread // np.uint32(WARP)
        bit = np.uint32(1) << lane
        masks = {"lt": bit - np.uint32(1), "le": bit | (bit - np.uint32(1)), "eq": bit}
        if name.startswith("%lanemask_"):
            key = name.removeprefix("%lanemask_")
            if key in masks:
                return masks[key]
            if key in ("gt", "ge"):
                return ~masks["le" if key == "gt" else "lt"]
        raise UnknownPtx(f"special register {name}")

    # ---- execution -------------------------------------------------------------------------------------------------
    def run(self) -> None:
        with np.errstate(all="ignore"):
            while self.alive.any():
                self._run_lowest()

    def _run_lowest(self) -> None:
        """Runs the lanes at the lowest program counter until they branch, wait, or reach other lanes."""
        ready = self.alive & ~self.parked
        if not ready.any():
            raise Deadlock(self._where())
        pc = int(self.pc[ready].min())
        group = self.alive & (self.pc == pc)
        self.parked &= ~group
        others = self.pc[self.alive & (self.pc > pc)]  # ready, or waiting for lanes of this group to come by
        limit = int(others.min()) if others.size else len(self.program.code)
        mask: Mask = None if group.all() else group
        code = self.program.code
        while True:
            if pc >= len(code):
                raise PtxError("execution runs past the end of the kernel")
            step = code[pc]
            self._count(pc)
            if step.scope and not self._gather(pc, mask):
                return
            if step.control:
                break
            if step.guard is None:
                step.run(self, mask)
            else:
                guarded = self._guarded(step.guard, step.negate, mask)
                if guarded is not False:
                    step.run(self, guarded)
            pc += 1
            if pc >= limit:
                self.pc[group] = pc
                return
        self._control(pc, mask)

    def _count(self, pc: int) -> None:
        self.steps += 1
        if self.steps > self.max_steps:
            raise Deadlock(f"more than {self.max_steps} steps; at {self.program.code[pc].text}")
        self.executed[self.program.code[pc].name] += 1

    def _guarded(self, guard: int, negate: bool, mask: Mask) -> Mask | bool:
        """The lanes of `mask` whose guard holds; False if none."""
        predicate = self.read(guard) ^ negate
        if predicate.shape[0] == 1:
            return mask if predicate[0] else False
        both = predicate if mask is None else predicate & mask
        if both.all():
            return None
        return both if both.any() else False

    def _control(self, pc: int, mask: Mask) -> None:
        step = self.program.code[pc]
        group = np.ones(self.lanes, bool) if mask is None else mask
        taken = self._guarded(step.guard, step.negate, mask) if step.guard is not None else mask
        lanes = group if taken is None else np.zeros(self.lanes, bool) if taken is False else np.asarray(taken)
        self.pc[group] = pc + 1
        if step.name == "bra":
            self.pc[lanes] = step.target
        else:
            self.alive &= ~lanes
            self.parked[:] = False  # whoever waited for these lanes looks again

    def _gather(self, pc: int, mask: Mask) -> bool:
        """True if every warp (or CTA) that is at this instruction is complete; else the complete ones run it, alone."""
        step = self.program.code[pc]
        if mask is None:
            return True
        size = WARP if step.scope == "warp" else self.threads
        here = mask.reshape(-1, size).any(1)
        if step.aligned and (here & ~self.alive.reshape(-1, size).all(1)).any():
            raise PtxError(f"threads of a warp have left before {step.text}")
        needed = self.alive if step.members is None else self.alive & step.members(self, mask)
        incomplete = here & (needed & ~mask).reshape(-1, size).any(1)
        if not incomplete.any():
            return True
        waiting = mask & np.repeat(incomplete, size)
        complete = mask & ~waiting
        self.pc[mask] = pc
        self.parked |= waiting
        if complete.any():
            chosen = self._guarded(step.guard, step.negate, complete) if step.guard is not None else complete
            if chosen is not False:
                step.run(self, chosen)
            self.pc[complete] = pc + 1
        return False

    def _where(self) -> str:
        waiting = Counter(self.program.code[pc].text for pc in self.pc[self.alive])
        return "no thread can go on: " + "; ".join(f"{n} at {text}" for text, n in waiting.items())

    # ---- asynchronous copies ---------------------------------------------------------------------------------------
    def wait_copies(self, mask: Mask, keep: int | None) -> None:
        """Ends the copies of all but each lane's `keep` latest committed groups; None: also of those not committed."""
        chosen = np.zeros(self.lanes, bool)
        chosen[self.active(mask)] = True
        left = []
        for copy in self.copies:
            done = chosen[copy.lanes]
            if keep is not None:
                done &= copy.group < self.groups_committed[copy.lanes] - keep
            if done.any():
                self._finish(copy, done)
            if not done.all():
                rest = ~done
                fields = (copy.lanes, copy.shared, copy.source)
                lanes, shared, source = (field[rest] for field in fields)
                left.append(Copy(lanes, shared, source, copy.size, copy.copied[rest], copy.group[rest]))
        self.copies = left

    def _finish(self, copy: Copy, done: Array) -> None:
        data = np.zeros((copy.lanes.size, copy.size), np.uint8)
        whole = done & (copy.copied == copy.size)
        if whole.any():
            data[whole] = self._bytes(copy.source[whole], copy.size)
        for row in np.flatnonzero(done & (copy.copied > 0) & (copy.copied < copy.size)):
            first = int(copy.source[row])
            data[row, : copy.copied[row]] = self.memory.heap[first : first + int(copy.copied[row])]
        self.shared.end_copy(copy.lanes[done], copy.shared[done], data[done])

    def _bytes(self, addresses: Array, size: int) -> Array:
        words = self.memory.load(addresses, 32, size // 4)
        return np.ascontiguousarray(words).view(np.uint8).reshape(addresses.size, size)


def signed_bits(value: int, bits: int) -> Array:
    """An integer as the raw bits of a uniform register."""
    return np.array([value & ((1 << bits) - 1)], UNSIGNED[bits])
