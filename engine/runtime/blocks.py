"""Paged block allocator: which KV-cache blocks are in use and by how many sequences. Integers only, no tensors.

A block may be held by several sequences (`share`), and is free again when the last holder lets go. Free blocks are
reused oldest first, so that a prefix cache, once there is one, can keep freed blocks findable by the hash chain of
their tokens until they are overwritten: it only needs to hook `allocate` (forget the hash) and `share` (revive).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from ..errors import EngineError


class BlockPool:
    """num_blocks blocks of block_size tokens each, with reference counts."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._free = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that hold num_tokens tokens."""
        return -(-num_tokens // self.block_size)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference. Ask `num_free` first: too few is an EngineError."""
        if count > len(self._free):
            raise EngineError(f"{count} blocks were asked of a pool with {len(self._free)} of {self.num_blocks} free")
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block; only blocks in use can be shared."""
        for block in blocks:
            if self._ref_counts[block] < 1:
                raise EngineError(f"block {block} is free and cannot be shared")
            self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference of each block; a block without references is free."""
        for block in blocks:
            if self._ref_counts[block] < 1:
                raise EngineError(f"block {block} was released more often than it was taken")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
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
            if free[block] != (0 if count else 1):
                raise EngineError(
                    f"block {block} counts {count} references but is {free[block]} times in the free list"
                )
