"""What the prefix cache costs on the host: looking up and filing prompts, decode steps, digests of pages.

    python benchmarks/bench_prefix_cache.py

Scheduler and cache only, no model. Prints medians (20th to 80th percentile) of wall-clock times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from pagelens.inputs import digest_image
from pagelens.runtime.blocks import BlockPool
from pagelens.runtime.prefix_cache import PrefixCache
from pagelens.runtime.scheduler import Scheduler
from pagelens.runtime.sequence import Sequence
from pagelens.vision.modes import PUBLISHED_MODES
from pagelens.vision.tiling import plan_tiles

PROMPT, SEQUENCES, STEPS, BLOCK_SIZE, ROUNDS = 8192, 16, 256, 16, 30


def make_scheduler(cached: bool) -> Scheduler:
    pool = BlockPool(16384, BLOCK_SIZE)
    return Scheduler(pool, SEQUENCES, 2**18, 2**18, PrefixCache(pool) if cached else None)


def prompt(first: int, length: int = PROMPT) -> list[int]:
    return [first, *range(1000, 1000 + length - 1)]


def admit(scheduler: Scheduler, tokens: list[int]) -> Sequence:
    """Admit and compute a prompt."""
    sequence = Sequence("s", tokens, len(tokens), 2**17)
    scheduler.add(sequence)
    while sequence.num_pending:
        scheduler.commit(scheduler.schedule())
    return sequence


def time_prompts(cached: bool, hit: bool) -> list[float]:
    """Seconds of admitting and committing a prompt, first block to last."""
    scheduler, seconds = make_scheduler(cached), []
    for number in range(ROUNDS):
        started = time.perf_counter()
        sequence = admit(scheduler, prompt(0 if hit else number))
        seconds.append(time.perf_counter() - started)
        scheduler.remove(sequence)
    return seconds[1:]


def time_decodes(cached: bool) -> list[float]:
    """Seconds of schedule and commit of steps that decode SEQUENCES sequences, which fill a block in the same steps."""
    scheduler, seconds = make_scheduler(cached), []
    running = [admit(scheduler, prompt(number, 512)) for number in range(SEQUENCES)]
    for step in range(STEPS):
        for sequence in running:
            sequence.token_ids.append(step)
        started = time.perf_counter()
        scheduler.commit(scheduler.schedule())
        seconds.append(time.perf_counter() - started)
    return seconds


def time_calls(call: Callable[[], object]) -> list[float]:
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def show(name: str, seconds: list[float]) -> None:
    fifths = statistics.quantiles(seconds, n=5)
    median = statistics.median(seconds)
    print(f"{name:70} {median * 1e6:10.1f} us  ({fifths[0] * 1e6:.1f} to {fifths[-1] * 1e6:.1f})")


def main() -> None:
    for cached in (False, True):
        for hit in (False, True) if cached else (False,):
            kind = "no cache" if not cached else "all found" if hit else "nothing found"
            show(f"admit and commit a prompt of {PROMPT} tokens, {kind}", time_prompts(cached, hit))
    for cached in (False, True):
        steps = time_decodes(cached)
        # Prompts end at a block's end, so that every BLOCK_SIZE-th step fills a block of each sequence.
        full = steps[BLOCK_SIZE - 1 :: BLOCK_SIZE]
        others = [seconds for number, seconds in enumerate(steps) if number % BLOCK_SIZE != BLOCK_SIZE - 1]
        kind = "cache" if cached else "no cache"
        show(f"decode step of {SEQUENCES} sequences, no block full, {kind}", others)
        show(f"decode step of {SEQUENCES} sequences, {SEQUENCES} blocks full, {kind}", full)
    page = np.random.default_rng(0).integers(0, 256, (3508, 2480, 3), dtype=np.uint8)
    plan = plan_tiles(2480, 3508, next(mode for mode in PUBLISHED_MODES if mode.name == "gundam"))
    show("digest of a page of 2480 x 3508 pixels", time_calls(lambda: digest_image(page, plan)))


if __name__ == "__main__":
    main()
