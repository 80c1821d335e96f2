"""Schedulers with a prefix cache, and sequences for them."""

from __future__ import annotations

from collections.abc import Callable

from pagelens.runtime.blocks import BlockPool
from pagelens.runtime.prefix_cache import PrefixCache
from pagelens.runtime.scheduler import Scheduler
from pagelens.runtime.sequence import ImageSpan, Sequence

SIZE = 4
CAT, DOG = b"cat", b"dog"


def always_equal(_: object) -> int:
    return 7


def make(
    num_blocks: int = 100, size: int = SIZE, seqs: int = 8, tokens: int = 64, hash_block: Callable[[object], int] = hash
) -> Scheduler:
    pool = BlockPool(num_blocks, size)
    return Scheduler(pool, seqs, tokens, 400, PrefixCache(pool, hash_block))


def sequence(name: str, tokens: list[int], answer: int = 1, images: tuple[ImageSpan, ...] | None = ()) -> Sequence:
    return Sequence(name, list(tokens), len(tokens), answer, images=images)


def cache_of(scheduler: Scheduler) -> PrefixCache:
    assert scheduler.cache is not None
    return scheduler.cache
