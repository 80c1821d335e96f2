"""The prefix cache under random traffic, with a memory to check what it says it holds."""

from __future__ import annotations

import zlib
from itertools import accumulate

from helpers.prefix_caches import CAT, DOG, always_equal, make, sequence
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pagelens.runtime.blocks import BlockPool
from pagelens.runtime.prefix_cache import Content
from pagelens.runtime.scheduler import Scheduler
from pagelens.runtime.sequence import ImageSpan, Sequence
from pagelens.runtime.state import make_sibling

Seen = tuple[int, bytes | None, int]  # a token; if it stands for a vision row, digest and number of the row


def seen_by(one: Sequence, end: int) -> list[Seen]:
    """What a model sees in the first `end` places of a sequence with at most one image."""
    seen: list[Seen] = [(token, None, 0) for token in one.token_ids[:end]]
    for image in one.images or ():
        for place in range(image.start, min(end, image.start + image.count)):
            seen[place] = (one.token_ids[place], image.digest, place - image.start)
    return seen


def seen_in(contents: list[Content]) -> list[Seen]:
    """The same for a chain of cached blocks."""
    chain: list[Seen] = []
    for tokens, parts in contents:
        seen: list[Seen] = [(token, None, 0) for token in tokens]
        for digest, first_row, place, count in parts:
            seen[place : place + count] = [(tokens[place + i], digest, first_row + i) for i in range(count)]
        chain += seen
    return chain


def checksums_of(seen: list[Seen]) -> list[int]:
    """For each place a checksum of everything up to it."""
    return list(accumulate((repr(item).encode() for item in seen), lambda crc, item: zlib.crc32(item, crc), initial=0))[
        1:
    ]


class RandomTraffic(RuleBasedStateMachine):
    """Requests with common beginnings, images and several answers; cancels, failures, broken passes, tiny pools.

    `memory` is what a model would have written: for each slot a checksum of all tokens and images up to there. What a
    sequence is said to have computed, and what is findable, must be there, however it came there.
    """

    @initialize(
        num_blocks=st.integers(3, 14),
        size=st.integers(1, 4),
        seqs=st.integers(1, 5),
        tokens=st.integers(1, 12),
        kind=st.sampled_from(["hash", "equal", "off"]),
    )
    def start(self, num_blocks: int, size: int, seqs: int, tokens: int, kind: str) -> None:
        self.scheduler = make(num_blocks, size, seqs, tokens, always_equal if kind == "equal" else hash)
        if kind == "off":
            self.scheduler = Scheduler(BlockPool(num_blocks, size), seqs, tokens, 400)
        self.room = num_blocks * size + 1
        self.memory: dict[int, int] = {}
        self.live: list[Sequence] = []
        self.count = 0

    def slot(self, one: Sequence, place: int) -> int:
        size = self.scheduler.pool.block_size
        return one.block_table[place // size] * size + place % size

    @rule(
        common=st.integers(0, 12), own=st.lists(st.integers(0, 1), max_size=6), answer=st.integers(1, 12),
        num_answers=st.sampled_from([1, 1, 1, 2, 4]), digest=st.sampled_from([None, CAT, DOG]),
        start=st.integers(0, 6), count=st.integers(1, 6),
    )  # fmt: skip
    def arrive(
        self, common: int, own: list[int], answer: int, num_answers: int, digest: bytes | None, start: int, count: int
    ) -> None:
        prompt = [*range(common), *own] or [0]
        if len(prompt) + answer > self.room:
            return
        images = () if digest is None or start + count > len(prompt) else (ImageSpan(start, count, digest),)
        leader = sequence(f"s{self.count}", prompt, answer, images)
        self.count += 1
        for one in (leader, *(make_sibling(leader, i) for i in range(1, num_answers))):
            self.scheduler.add(one)
            self.live.append(one)

    @rule(choice=st.integers(0, 100))
    def cancel(self, choice: int) -> None:
        if self.live:
            self.scheduler.remove(self.live.pop(choice % len(self.live)))

    @rule()
    def clear(self) -> None:
        if self.scheduler.cache is not None:
            self.scheduler.cache.clear()

    @rule(failing=st.integers(0, 30), fed=st.integers(0, 3))
    def run(self, failing: int = 30, fed: int = 0) -> None:
        """`failing` is the number of the chunk in the pass that goes wrong, if there is one."""
        had_work = self.scheduler.has_work
        schedule = self.scheduler.schedule()
        assert bool(schedule) == had_work
        assert sum(chunk.count for chunk in schedule) <= self.scheduler.max_batch_tokens
        failed = {chunk.sequence for number, chunk in enumerate(schedule) if number == failing}
        written: list[int] = []
        for chunk in schedule:
            assert chunk.start == chunk.sequence.num_computed
            assert 0 < chunk.count <= len(chunk.sequence.token_ids) - chunk.start
            expected = checksums_of(seen_by(chunk.sequence, chunk.end))
            for place in range(chunk.start, chunk.end):
                slot = self.slot(chunk.sequence, place)
                written.append(slot)
                self.memory[slot] = -1 if chunk.sequence in failed else expected[place]
        assert len(set(written)) == len(written), "no slot is written twice in a pass"
        sampling = [chunk.sequence for chunk in schedule if chunk.samples]
        for one in sampling:
            token = zlib.crc32(f"{one.token_ids}{one.name if self.count % 2 else ''}".encode()) % 3
            room = one.max_new_tokens - one.num_generated
            one.token_ids += [token, *[2] * fed][:room]
        self.scheduler.commit(schedule, failed)
        for one in dict.fromkeys([*sampling, *failed]):
            if one in failed or one.num_generated >= one.max_new_tokens:
                self.scheduler.remove(one)
                self.live.remove(one)

    @rule()
    def break_pass(self) -> None:
        """A pass that raised: it wrote anything, was not committed, and all requests end."""
        for chunk in self.scheduler.schedule():
            for place in range(chunk.start, chunk.end):
                self.memory[self.slot(chunk.sequence, place)] = -1
        for one in self.live:
            self.scheduler.remove(one)
        self.live.clear()

    @invariant()
    def memory_is_as_the_tables_say(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        for one in self.scheduler.running:
            found = [self.memory[self.slot(one, place)] for place in range(one.num_computed)]
            assert found == checksums_of(seen_by(one, one.num_computed))
        cache, size = self.scheduler.cache, self.scheduler.pool.block_size
        for block, node in ({} if cache is None else cache._by_block).items():
            contents, parent = [node.content], node.parent
            while parent is not None:
                contents.insert(0, parent.content)
                parent = parent.parent
            expected = checksums_of(seen_in(contents))[-size:]
            assert [self.memory[block * size + place] for place in range(size)] == expected

    def teardown(self) -> None:
        """Everything that was not cancelled finishes, and every block is free."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):
            if not self.scheduler.has_work:
                break
            self.run()
            self.memory_is_as_the_tables_say()
        assert not self.live
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks


RandomTraffic.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None, derandomize=True)
TestRandomTraffic = RandomTraffic.TestCase
