"""The block pool: counts, order of reuse, and an integrity check that finds every kind of damage."""

from __future__ import annotations

import pytest

from pagelens.errors import EngineError
from pagelens.runtime.blocks import BlockPool


def test_allocate_and_release_reuse_the_oldest_free_block_first() -> None:
    pool = BlockPool(4, 16)
    first = pool.allocate(2)
    assert first == [0, 1]
    assert pool.num_free == 2
    pool.release(first)
    assert pool.allocate(4) == [2, 3, 0, 1]
    assert pool.num_free == 0


def test_a_shared_block_is_free_only_after_its_last_holder() -> None:
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    pool.share(blocks)
    assert pool.ref_count(blocks[0]) == 2
    pool.check_integrity([("a", blocks), ("b", blocks)])
    pool.release(blocks)
    assert pool.num_free == 1
    pool.release(blocks)
    assert pool.num_free == 2
    pool.check_integrity([])


def test_kept_blocks_are_given_out_last_and_can_be_shared_until_then() -> None:
    pool = BlockPool(4, 16)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    blocks = pool.allocate(3)
    for block in blocks[:2]:
        pool.keep(block)
    pool.release(blocks)
    pool.check_integrity([])
    assert pool.num_free == 4
    pool.share([0])
    assert pool.ref_count(0) == 1
    pool.release([0])
    assert pool.allocate(3) == [3, 2, 1], "what is not kept, then the longest idle"
    assert evicted == [1]
    assert not pool.is_kept(1)
    with pytest.raises(EngineError, match="block 0 is free; there is nothing to keep"):
        pool.keep(0)
    pool.forget(0)
    with pytest.raises(EngineError, match="block 0 is free and cannot be shared"):
        pool.share([0])
    pool.release([1])
    pool.check_integrity([("a", [2, 3])])
    assert pool.allocate(2) == [0, 1]
    assert evicted == [1]


def test_integrity_check_finds_an_idle_block_that_is_not_kept() -> None:
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    pool.keep(0)
    pool.release(blocks)
    pool._kept.clear()
    with pytest.raises(EngineError, match="block 0 is free, and kept and idle disagree"):
        pool.check_integrity([])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_num_needed(tokens: int, blocks: int) -> None:
    assert BlockPool(8, 16).num_needed(tokens) == blocks


def test_misuse_is_refused() -> None:
    pool = BlockPool(2, 16)
    with pytest.raises(EngineError, match="3 blocks were asked of a pool with 2 of 2 free"):
        pool.allocate(3)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(EngineError, match="block 0 was released more often"):
        pool.release(blocks)
    with pytest.raises(EngineError, match="block 0 is free and cannot be shared"):
        pool.share(blocks)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([("a", [0])], "block 1 counts 1 references but 0 block tables hold it"),
        ([("a", [0, 1]), ("b", [1])], "block 1 counts 1 references but 2 block tables hold it"),
        ([("a", [0, 1, 1])], "the block table of a holds a block twice"),
        ([("a", [0, 1, 9])], "a holds block 9, but the pool has blocks 0 to 3"),
        ([("a", [0, 1, 2])], "block 2 counts 0 references but 1 block tables hold it"),
    ],
)
def test_integrity_check_names_the_damage(tables: list[tuple[str, list[int]]], message: str) -> None:
    pool = BlockPool(4, 16)
    pool.allocate(2)
    pool.check_integrity([("a", [0, 1])])
    with pytest.raises(EngineError, match=message):
        pool.check_integrity(tables)


def test_integrity_check_finds_a_damaged_free_list() -> None:
    pool = BlockPool(2, 16)
    pool._free.append(0)
    with pytest.raises(EngineError, match="block 0 counts 0 references but is 2 times in the free list"):
        pool.check_integrity([])
