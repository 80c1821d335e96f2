"""Finds KV blocks that hold the beginning of a new sequence: a tree of full blocks under a hash chain.

The key of a block is the hash of its parent's key, its tokens and the vision rows in it. A hash only says where to
look: a block is a hit if its parent, tokens and rows are equal. Vision rows are told by the digest of pixels and tiling
plan and by their place in the image, never by their values. No tensors here.

A sequence files its blocks as passes fill them; the pool keeps filed blocks when nobody holds them any more. A sequence
releases its last block first, so that children are evicted before their parents. Where a parent goes first after all
(two sequences computed the same block, one of them filed it, and the other filed what follows), its descendants are
forgotten with it, for they could not be found any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from ..errors import EngineError
from ..types import PrefixCacheStats
from .blocks import BlockPool
from .sequence import Sequence

# Vision rows of a block: digest of the image, number of the first row in it, its place in the block, number of rows.
ImageRows: TypeAlias = tuple[bytes, int, int, int]
Content: TypeAlias = tuple[tuple[int, ...], tuple[ImageRows, ...]]


@dataclass(slots=True, eq=False)
class CachedBlock:
    """A node of the tree. `block` is -1 once it is forgotten."""

    key: int
    parent: CachedBlock | None = field(repr=False)
    content: Content
    block: int
    children: set[CachedBlock] = field(default_factory=set, repr=False)


class PrefixCache:
    """The findable blocks of a pool, whose evictions it follows.

    hash_block  of (parent's key, tokens, vision rows); tests make it collide
    """

    def __init__(self, pool: BlockPool, hash_block: Callable[[object], int] = hash) -> None:
        self.pool = pool
        pool.on_evict = self._on_evict
        self._hash = hash_block
        self._buckets: dict[int, list[CachedBlock]] = {}
        self._by_block: dict[int, CachedBlock] = {}
        self._num_queried_tokens = 0
        self._num_cached_tokens = 0
        self._num_evictions = 0

    def find(self, sequence: Sequence) -> list[CachedBlock]:
        """Blocks that hold the beginning of a sequence, first to last. At least its last token is left to compute."""
        found: list[CachedBlock] = []
        node: CachedBlock | None = None
        if sequence.images is None:
            return found
        for index in range((len(sequence.token_ids) - 1) // self.pool.block_size):
            content = self._content(sequence, index)
            node = self._look_up(self._key(node, content), node, content)
            if node is None:
                break
            found.append(node)
        return found

    def is_being_computed(self, sequence: Sequence, found: list[CachedBlock], running: Iterable[Sequence]) -> bool:
        """Whether a running sequence is about to fill the first block that `sequence` did not find."""
        index, size = len(found), self.pool.block_size
        end = (index + 1) * size
        if end >= len(sequence.token_ids) or sequence.images is None:
            return False
        content = self._content(sequence, index)
        for other in running:
            if other.images is None or not other.num_computed < end <= len(other.token_ids):
                continue
            if index and (len(other.block_table) < index or other.block_table[index - 1] != found[-1].block):
                continue
            if content == self._content(other, index):
                return True
        return False

    def attach(self, sequence: Sequence, found: list[CachedBlock]) -> None:
        """A sequence was admitted with these blocks at the head of its table."""
        sequence.cache_tip = found[-1] if found else None
        sequence.num_filed = len(found)
        if sequence.num_preemptions == 0 and sequence.leader is None:
            self._num_queried_tokens += sequence.num_prompt_tokens
            self._num_cached_tokens += len(found) * self.pool.block_size

    def file(self, sequence: Sequence) -> None:
        """Make the blocks findable that a sequence has filled since the last call. Hashes each block once."""
        num_full = sequence.num_computed // self.pool.block_size
        if sequence.num_filed >= num_full or sequence.images is None:
            return
        tip = sequence.cache_tip
        if tip is not None and tip.block < 0:
            return  # what its blocks follow was forgotten, perhaps because it is wrong
        for index in range(sequence.num_filed, num_full):
            content = self._content(sequence, index)
            key = self._key(tip, content)
            # A block that another sequence has filed already stays private to this one.
            tip = self._look_up(key, tip, content) or self._add(key, tip, content, sequence.block_table[index])
        sequence.cache_tip = tip
        sequence.num_filed = num_full

    def discard(self, sequence: Sequence) -> None:
        """Forget every block that a failed sequence holds, and what follows them."""
        for block in sequence.block_table:
            if (node := self._by_block.get(block)) is not None:
                self._forget(node)

    def clear(self) -> None:
        """Forget everything. Running sequences keep their blocks, which nobody finds any more."""
        for block, node in self._by_block.items():
            node.block = -1
            self.pool.forget(block)
        self._by_block.clear()
        self._buckets.clear()

    def stats(self) -> PrefixCacheStats:
        return PrefixCacheStats(
            num_blocks=self.pool.num_blocks,
            num_cached_blocks=len(self._by_block),
            num_queried_tokens=self._num_queried_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_evictions=self._num_evictions,
        )

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Check the tree against itself, the pool and the running sequences. Raises EngineError naming the block."""
        for block, node in self._by_block.items():
            parent = node.parent
            if node.block != block or not self.pool.is_kept(block):
                raise EngineError(f"block {block} is cached as {node.block}, kept: {self.pool.is_kept(block)}")
            if node.key != self._key(parent, node.content) or node not in self._buckets.get(node.key, ()):
                raise EngineError(f"block {block} is cached under a key at which it cannot be found")
            if parent is not None and (self._by_block.get(parent.block) is not parent or node not in parent.children):
                raise EngineError(f"block {block} is cached, but not the block before it")
        num_nodes = sum(map(len, self._buckets.values()))
        num_kept = sum(map(self.pool.is_kept, range(self.pool.num_blocks)))
        if not num_nodes == num_kept == len(self._by_block):
            raise EngineError(f"{len(self._by_block)} blocks are cached, {num_nodes} findable and {num_kept} kept")
        for sequence in running:
            self._check_table(sequence)

    def _check_table(self, sequence: Sequence) -> None:
        """What the cache says of a sequence's blocks is what its tokens say."""
        nodes = [self._by_block.get(block) for block in sequence.block_table]
        expected: CachedBlock | None = None
        for index in range(len(nodes) - 1, -1, -1):
            node, block = nodes[index], sequence.block_table[index]
            if node is not None and (index + 1) * self.pool.block_size > sequence.num_computed:
                raise EngineError(f"block {block} of {sequence.name} is cached, but not computed yet")
            # Two nodes never have the same parent and content, so a later block's ancestor is the only one possible.
            if node is not None and expected is not None and node is not expected:
                raise EngineError(f"block {block} of {sequence.name} is not the one that later cached ones follow")
            expected = expected or node
            if expected is None:
                continue
            if expected.content != self._content(sequence, index) or (expected.parent is None) != (index == 0):
                raise EngineError(f"block {expected.block} is cached with other tokens than {sequence.name} has there")
            expected = expected.parent

    def _content(self, sequence: Sequence, index: int) -> Content:
        """Tokens and vision rows of a full block."""
        start = index * self.pool.block_size
        end = start + self.pool.block_size
        rows: tuple[ImageRows, ...] = ()
        for image in sequence.images or ():
            first, last = max(start, image.start), min(end, image.start + image.count)
            if first < last:
                rows += ((image.digest, first - image.start, first - start, last - first),)
        return tuple(sequence.token_ids[start:end]), rows

    def _key(self, parent: CachedBlock | None, content: Content) -> int:
        return self._hash((parent.key if parent else 0, *content))

    def _look_up(self, key: int, parent: CachedBlock | None, content: Content) -> CachedBlock | None:
        for node in self._buckets.get(key, ()):
            # The parent was verified before, so that its identity stands for all tokens up to here.
            if node.parent is parent and node.content == content:
                return node
        return None

    def _add(self, key: int, parent: CachedBlock | None, content: Content, block: int) -> CachedBlock:
        node = CachedBlock(key, parent, content, block)
        self._buckets.setdefault(key, []).append(node)
        self._by_block[block] = node
        if parent is not None:
            parent.children.add(node)
        self.pool.keep(block)
        return node

    def _on_evict(self, block: int) -> None:
        self._num_evictions += 1
        self._forget(self._by_block[block])

    def _forget(self, node: CachedBlock) -> None:
        """Forget a block and its descendants."""
        if node.parent is not None:
            node.parent.children.discard(node)
        doomed = [node]
        while doomed:
            node = doomed.pop()
            doomed += node.children
            node.children.clear()
            bucket = self._buckets[node.key]
            bucket.remove(node)
            if not bucket:
                del self._buckets[node.key]
            del self._by_block[node.block]
            self.pool.forget(node.block)
            node.block = -1
