"""Memories of the machine: the device's global memory, and the shared memory of the CTAs that run together.

Global memory is one heap with a guard gap behind each allocation; an access must lie in one allocation and be aligned
to its size. Shared memory starts as 0xff bytes (NaN in every float type) and keeps a shadow beside the data: which
copies are in flight, and which thread wrote and read each granule last and in which interval between barriers. An
access that no barrier orders after another thread's conflicting one is a hazard.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .bits import UNSIGNED, Array
from .errors import Hazard, MemoryFault

GUARD = 4096
HEAP_START = 4096  # so that small numbers are no addresses


class GlobalMemory:
    """Arrays copied in by `add`, read back by `get`."""

    def __init__(self) -> None:
        self.buffers: list[tuple[int, int]] = []
        self.end = HEAP_START
        self.heap: Array = np.full(HEAP_START, 0xFF, np.uint8)
        self.mapped: Array = np.zeros(HEAP_START, bool)
        self.bytes_read = 0
        self.bytes_written = 0

    def add(self, data: Array, misalign: int = 0) -> int:
        """Copies the bytes of `data` in and returns their address, a multiple of 256 plus `misalign`."""
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        start = -(-(self.end + GUARD) // 256) * 256 + misalign
        self.end = start + raw.size
        size = -(-(self.end + GUARD) // 16) * 16
        heap, mapped = np.full(size, 0xFF, np.uint8), np.zeros(size, bool)
        heap[: self.heap.size], mapped[: self.mapped.size] = self.heap, self.mapped
        heap[start : self.end], mapped[start : self.end] = raw, True
        self.heap, self.mapped = heap, mapped
        self.buffers.append((start, raw.size))
        return start

    def get(self, address: int) -> Array:
        """The bytes (uint8) of the buffer that starts at `address`."""
        size = dict(self.buffers)[address]
        return self.heap[address : address + size]

    def check(self, addresses: Array, size: int, what: str) -> None:
        """addresses [lanes] int64; all of them are accessed."""
        inside = (addresses >= 0) & (addresses <= self.heap.size - size)
        safe = np.where(inside, addresses, 0)
        good = inside & self.mapped[safe] & self.mapped[safe + size - 1]
        if not good.all():
            worst = int(addresses[np.argmin(good)])
            raise MemoryFault(f"{what} of {size} bytes at {worst:#x}: {self._nearest(worst)}")
        if (addresses & (size - 1)).any():
            worst = int(addresses[np.argmax(addresses & (size - 1))])
            raise MemoryFault(f"{what} of {size} bytes at {worst:#x} is not aligned")

    def _nearest(self, address: int) -> str:
        below = [(start, size) for start, size in self.buffers if start <= address]
        if not below:
            return "below all buffers"
        start, size = max(below)
        return f"{address - start} bytes behind the start of a buffer of {size}"

    def load(self, addresses: Array, bits: int, count: int) -> Array:
        """[lanes, count] unsigned integers of `bits` each."""
        size = bits // 8 * count
        self.check(addresses, size, "global load")
        self.bytes_read += size * addresses.size
        return self.heap.view(UNSIGNED[bits]).reshape(-1, count)[addresses // size]

    def store(self, addresses: Array, values: Array) -> None:
        """values [lanes, count], unsigned."""
        count = values.shape[1]
        size = values.dtype.itemsize * count
        self.check(addresses, size, "global store")
        self.bytes_written += size * addresses.size
        self.heap.view(values.dtype).reshape(-1, count)[addresses // size] = values


@dataclass
class Copy:
    """A cp.async of some lanes: addresses, bytes to copy (the rest of `size` becomes zero), the group of each lane."""

    lanes: Array
    shared: Array
    source: Array
    size: int
    copied: Array
    group: Array


class SharedMemory:
    """One region per CTA, side by side. Addresses are those of the CTA, from 0.

    granule: bytes that one entry of the shadow stands for; no access of the kernel is smaller.
    """

    NOBODY, MANY = -1, -2  # readers: a lane >= 0, nobody, or many; -3 - w: many lanes of warp w

    def __init__(self, ctas: int, size: int, lane_cta: Array, lane_warp: Array, granule: int) -> None:
        self.size, self.granule = size, granule
        self.stride = -(-size // 256) * 256 + 256
        self.data: Array = np.full(ctas * self.stride, 0xFF, np.uint8)
        self.lane_warp = lane_warp
        self.lane_base = lane_cta.astype(np.int64) * self.stride
        shadow = ctas * self.stride // granule
        self.in_flight: Array = np.zeros(shadow, bool)
        self.writer: Array = np.full(shadow, self.NOBODY, np.int32)
        self.reader: Array = np.full(shadow, self.NOBODY, np.int32)
        self.written_at: Array = np.zeros(shadow, np.int32)
        self.read_at: Array = np.zeros(shadow, np.int32)
        self.epoch: Array = np.zeros(lane_cta.size, np.int32)  # of each lane: barriers of its CTA or warp so far
        self.cta_epoch: Array = np.zeros(lane_cta.size, np.int32)  # its epoch at the CTA's last barrier
        self.hazards: list[str] = []
        self.strict = True

    def barrier(self, lanes: Array) -> None:
        """A barrier of whole CTAs: whatever `lanes` did before is ordered before what they do next."""
        self.epoch[lanes] = self.epoch.max(initial=0) + 1
        self.cta_epoch[lanes] = self.epoch[lanes]

    def warp_barrier(self, lanes: Array) -> None:
        self.epoch[lanes] = self.epoch.max(initial=0) + 1

    def report(self, sentence: str) -> None:
        if self.strict:
            raise Hazard(sentence)
        self.hazards.append(sentence)

    def place(self, lanes: Array, addresses: Array, size: int, what: str) -> Array:
        """Byte positions in `data`, after the checks that every access needs."""
        good = (addresses >= 0) & (addresses <= self.size - size)
        if not good.all():
            worst = int(addresses[np.argmin(good)])
            raise MemoryFault(f"shared {what} of {size} bytes at {worst}, of {self.size} bytes of shared memory")
        if (addresses & (size - 1)).any():
            worst = int(addresses[np.argmax(addresses & (size - 1))])
            raise MemoryFault(f"shared {what} of {size} bytes at {worst} is not aligned")
        return self.lane_base[lanes] + addresses

    def shadow(self, places: Array, size: int) -> Array:
        """[lanes, granules] indices of the shadow."""
        return places[:, None] // self.granule + np.arange(max(size // self.granule, 1))

    def load(self, lanes: Array, addresses: Array, bits: int, count: int) -> Array:
        size = bits // 8 * count
        places = self.place(lanes, addresses, size, "load")
        cells = self.shadow(places, size)
        if self.in_flight[cells].any():
            at = int(addresses[np.argmax(self.in_flight[cells].any(1))])
            self.report(f"shared load at {at} of a cp.async target that was not waited for")
        self._order(lanes, cells, addresses, self.writer, self.written_at, "load", "store")
        self._note_read(lanes, cells)
        return self.data.view(UNSIGNED[bits]).reshape(-1, count)[places // size]

    def store(self, lanes: Array, addresses: Array, values: Array) -> None:
        count = values.shape[1]
        size = values.dtype.itemsize * count
        places = self.place(lanes, addresses, size, "store")
        self._note_write(lanes, self.shadow(places, size), addresses)
        self.put(lanes, addresses, values)

    def load_atomic(self, lanes: Array, addresses: Array, bits: int) -> Array:
        """The read of an atomic access, whose write is `put`: atomics need no barrier among themselves."""
        places = self.place(lanes, addresses, bits // 8, "atomic")
        cells = self.shadow(places, bits // 8)
        plain = (self.writer[cells] != self.MANY).all(1)
        self._note_write(lanes[plain], cells[plain], addresses[plain])
        self.writer[cells] = self.MANY
        self.written_at[cells] = self.epoch[lanes][:, None]
        return self.data.view(UNSIGNED[bits])[places // (bits // 8)]

    def put(self, lanes: Array, addresses: Array, values: Array) -> None:
        """The bare write of values [lanes, count]."""
        count = values.shape[1]
        places = self.lane_base[lanes] + addresses
        self.data.view(values.dtype).reshape(-1, count)[places // (values.dtype.itemsize * count)] = values

    def begin_copy(self, lanes: Array, addresses: Array, size: int) -> None:
        """The target of a cp.async: poisoned until `end_copy`."""
        places = self.place(lanes, addresses, size, "cp.async")
        cells = self.shadow(places, size)
        self._note_write(lanes, cells, addresses)
        self.in_flight[cells] = True
        self.data.reshape(-1, size)[places // size] = 0xFF

    def end_copy(self, lanes: Array, addresses: Array, data: Array) -> None:
        """data [lanes, size] uint8. From here on the issuing thread sees it; others do after a barrier."""
        size = data.shape[1]
        places = self.lane_base[lanes] + addresses
        cells = self.shadow(places, size)
        self.in_flight[cells] = False
        self.writer[cells] = lanes[:, None]
        self.written_at[cells] = self.epoch[lanes][:, None]
        self.data.reshape(-1, size)[places // size] = data

    def _note_write(self, lanes: Array, cells: Array, addresses: Array) -> None:
        if self.in_flight[cells].any():
            at = int(addresses[np.argmax(self.in_flight[cells].any(1))])
            self.report(f"shared store at {at} into a cp.async target that was not waited for")
        self._order(lanes, cells, addresses, self.writer, self.written_at, "store", "store")
        self._order(lanes, cells, addresses, self.reader, self.read_at, "store", "load")
        self.writer[cells] = lanes[:, None]
        self.written_at[cells] = self.epoch[lanes][:, None]
        self.reader[cells] = self.NOBODY

    def _order(
        self, lanes: Array, cells: Array, addresses: Array, who: Array, when: Array, now: str, then: str
    ) -> None:
        """Reports an access (`now`) of a cell that another thread accessed (`then`) with no barrier in between."""
        other, since = who[cells], when[cells]
        lane = lanes[:, None]
        unordered = (other != lane) & (other != self.NOBODY) & (since >= self.cta_epoch[lanes][:, None])
        if not unordered.any():
            return
        warp = self.lane_warp[lanes][:, None]
        other_warp = np.where(other >= 0, self.lane_warp[np.maximum(other, 0)], -3 - other)
        ordered_in_warp = (other != self.MANY) & (other_warp == warp) & (since < self.epoch[lanes][:, None])
        bad = unordered & ~ordered_in_warp
        if bad.any():
            row = int(np.argmax(bad.any(1)))
            self.report(
                f"shared {now} at {int(addresses[row])} by lane {int(lanes[row])} with no barrier after another "
                f"thread's {then}"
            )

    def _note_read(self, lanes: Array, cells: Array) -> None:
        """Remembers who read a cell since the last barrier: one lane, many of a warp, or many."""
        lane, warp = np.broadcast_to(lanes[:, None], cells.shape), self.lane_warp[lanes][:, None]
        before, when = self.reader[cells], self.read_at[cells]
        stale = (before == self.NOBODY) | (when < self.cta_epoch[lanes][:, None]) | (before == lane)
        before_warp = np.where(before >= 0, self.lane_warp[np.maximum(before, 0)], -3 - before)
        together = np.where((before != self.MANY) & (before_warp == warp), -3 - warp, self.MANY)
        self.reader[cells] = np.where(stale, lane, together)
        # Lanes of this one access that share a cell: the last one stands there; make it "many" where it is not alone.
        shared_by_many = self.reader[cells] != np.where(stale, lane, together)
        if shared_by_many.any():
            owner = self.reader[cells]
            owner_warp = np.where(owner >= 0, self.lane_warp[np.maximum(owner, 0)], -3 - owner)
            same = (owner != self.MANY) & (owner_warp == warp)
            self.reader[cells[shared_by_many]] = np.where(same, -3 - warp, self.MANY)[shared_by_many]
        self.read_at[cells] = self.epoch[lanes][:, None]
