"""Paged block allocator: which KV-cache blocks are in use and by how many sequences. Integers only, no tensors.

A block may be held by several sequences (`share`), and is free again when the last holder lets go. Free blocks whose
content is worth keeping (`keep`) are idle: they can be shared again, and are given out only when no other block is
free, the longest idle first. What the content is, is for the prefix cache to know.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence

from ..errors import EngineError


class BlockPool:
    """num_blocks blocks of block_size tokens each, with reference counts.

    on_evict  called with a kept block that `allocate` is about to give out
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.on_evict: Callable[[int], None] | None = None
        self._ref_counts = [0] * num_blocks
        self._free = deque(range(num_blocks))
        self._kept: set[int] = set()
        # Kept blocks without references, longest idle first. OrderedDict: the first key of a dict from which many were
        # taken is slow to find.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give out, the idle ones included."""
        return len(self._free) + len(self._idle)

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that hold num_tokens tokens."""
        return -(-num_tokens // self.block_size)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def is_kept(self, block: int) -> bool:
        return block in self._kept

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference. Ask `num_free` first: too few is an EngineError."""
        if count > self.num_free:
            raise EngineError(f"{count} blocks were asked of a pool with {self.num_free} of {self.num_blocks} free")
        blocks = []
        for _ in range(count):
            # Asked for each block anew: an eviction may turn other idle blocks into free ones.
            block = self._free.popleft() if self._free else self._evict()
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block; only blocks in use and idle ones can be shared."""
        for block in blocks:
            if block in self._idle:
                del self._idle[block]
            elif self._ref_counts[block] < 1:
                raise EngineError(f"block {block} is free and cannot be shared")
            self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference of each block, in this order; a block without references is free, or idle if kept."""
        for block in blocks:
            if self._ref_counts[block] < 1:
                raise EngineError(f"block {block} was released more often than it was taken")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] > 0:
                continue
            if block in self._kept:
                self._idle[block] = None
            else:
                self._free.append(block)

    def keep(self, block: int) -> None:
        """A block in use is worth keeping when its last holder lets go."""
        if self._ref_counts[block] < 1:
            raise EngineError(f"block {block} is free; there is nothing to keep in it")
        self._kept.add(block)

    def forget(self, block: int) -> None:
        """The content of a block is no longer worth keeping."""
        self._kept.discard(block)
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)

    def check_integrity(self, tables: Iterable[tuple[str, Sequence[int]]]) -> None:
        """Check that the counts are exactly those of the block tables given as (owner's name, blocks) of every owner.

        O(num_blocks). Raises EngineError naming the first block that is leaked, lost, or counted wrongly.
        """
        held: Counter[int] = Counter()
        for owner, blocks in tables:
            if len(set(blocks)) != len(blocks):
                raise EngineError(f"the block table of {owner} holds a block twice: {list(blocks)}")
            outside = [block for block in blocks if not 0 <= block < self.num_blocks]
            if outside:
                raise EngineError(
                    f"{owner} holds block {outside[0]}, but the pool has blocks 0 to {self.num_blocks - 1}"
                )
            held.update(blocks)
        free = Counter(self._free)
        for block, count in enumerate(self._ref_counts):
            if held[block] != count:
                raise EngineError(f"block {block} counts {count} references but {held[block]} block tables hold it")
            times = free[block] + (block in self._idle)
            if times != (0 if count else 1):
                raise EngineError(f"block {block} counts {count} references but is {times} times in the free list")
            if not count and (block in self._idle) != (block in self._kept):
                raise EngineError(f"block {block} is free, and kept and idle disagree about it")

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self._kept.discard(block)
        if self.on_evict is not None:
            self.on_evict(block)
        return block
