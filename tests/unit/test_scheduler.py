"""The scheduler with integers only: order, chunks, preemption, capacity, and random traffic checked at every step."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pagelens.errors import CapacityError, EngineError
from pagelens.runtime.blocks import BlockPool
from pagelens.runtime.scheduler import Scheduler
from pagelens.runtime.sequence import Schedule, Sequence


def make(num_blocks: int = 100, block_size: int = 4, seqs: int = 8, tokens: int = 64, length: int = 400) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, block_size), seqs, tokens, length)


def add(scheduler: Scheduler, name: str, prompt: int, answer: int = 4) -> Sequence:
    sequence = Sequence(name, list(range(prompt)), prompt, answer)
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> Schedule:
    """Run one schedule as the engine does: commit, a token for each chunk that samples, retire what is done."""
    schedule = scheduler.schedule()
    scheduler.commit(schedule)
    for sequence in [chunk.sequence for chunk in schedule if chunk.samples]:
        sequence.token_ids.append(0)
        if sequence.num_generated >= sequence.max_new_tokens:
            scheduler.remove(sequence)
    scheduler.check_integrity()
    return schedule


def shape(schedule: Schedule) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.name, chunk.start, chunk.count) for chunk in schedule]


def test_a_long_prompt_is_cut_and_shares_passes_with_decodes() -> None:
    scheduler = make(tokens=10)
    add(scheduler, "a", 6)
    add(scheduler, "b", 20)
    assert shape(step(scheduler)) == [("a", 0, 6), ("b", 0, 4)]
    assert shape(step(scheduler)) == [("a", 6, 1), ("b", 4, 9)]
    assert shape(step(scheduler)) == [("a", 7, 1), ("b", 13, 7)]
    assert shape(step(scheduler)) == [("a", 8, 1), ("b", 20, 1)]
    assert shape(step(scheduler)) == [("b", 21, 1)]


def test_only_a_chunk_that_reaches_the_end_samples() -> None:
    scheduler = make(tokens=4)
    add(scheduler, "a", 9)
    samples = []
    for _ in range(4):
        schedule = scheduler.schedule()
        samples.append([chunk.samples for chunk in schedule])
        scheduler.commit(schedule)
        if schedule[0].samples:
            break
    assert samples == [[False], [False], [True]]


def test_max_num_seqs_and_order_of_arrival() -> None:
    scheduler = make(seqs=2)
    for name in "abc":
        add(scheduler, name, 3, answer=2)
    assert shape(step(scheduler)) == [("a", 0, 3), ("b", 0, 3)]
    assert shape(step(scheduler)) == [("a", 3, 1), ("b", 3, 1)]
    assert shape(step(scheduler)) == [("c", 0, 3)]


def test_a_small_prompt_does_not_overtake_a_large_one_that_waits_for_blocks() -> None:
    scheduler = make(num_blocks=11)
    add(scheduler, "a", 20, answer=3)
    add(scheduler, "large", 36, answer=2)
    add(scheduler, "small", 2, answer=2)
    order = [name for _ in range(10) for name, start, _ in shape(step(scheduler)) if start == 0]
    assert order == ["a", "large", "small"]


def test_the_newest_is_preempted_and_recomputes_everything() -> None:
    scheduler = make(num_blocks=4)
    old = add(scheduler, "old", 7, answer=8)
    new = add(scheduler, "new", 8, answer=3)
    assert shape(step(scheduler)) == [("old", 0, 7), ("new", 0, 8)]
    assert (len(old.block_table), len(new.block_table)) == (2, 2)
    assert shape(step(scheduler)) == [("old", 7, 1)], "new needs a third block and gives up its own"
    assert (new.status, new.num_computed, new.block_table, new.num_preemptions) == ("waiting", 0, [], 1)
    while new.status == "waiting":
        schedule = step(scheduler)
    assert old.status == "finished"
    assert shape(schedule) == [("new", 0, 9)], "its prompt and the token it had"
    assert scheduler.num_preemptions == 1


def test_a_preempted_sequence_keeps_its_place_before_later_arrivals() -> None:
    scheduler = make(num_blocks=5, seqs=2)
    add(scheduler, "a", 8, answer=9)
    victim = add(scheduler, "b", 8, answer=3)
    add(scheduler, "c", 3, answer=1)
    started = []
    while scheduler.has_work:
        started += [name for name, start, _ in shape(step(scheduler)) if start == 0]
    assert victim.num_preemptions == 1
    assert started == ["a", "b", "b", "c"]


def test_cancel_in_every_state_frees_the_blocks() -> None:
    scheduler = make(num_blocks=6, seqs=1)
    running, waiting = add(scheduler, "a", 8), add(scheduler, "b", 8)
    step(scheduler)
    scheduler.remove(waiting)
    scheduler.remove(running)
    scheduler.remove(running)
    scheduler.check_integrity()
    assert scheduler.pool.num_free == 6
    assert not scheduler.has_work


def test_capacity_error_names_numbers_and_remedy() -> None:
    scheduler = Scheduler(BlockPool(1000, 16), 8, 64, max_model_len=4096)
    with pytest.raises(CapacityError) as error:
        scheduler.resolve_max_tokens(903, 4096)
    assert str(error.value) == (
        "prompt needs 903 + 4096 tokens but max_model_len is 4096; lower max_tokens or raise max_model_len"
    )
    with pytest.raises(CapacityError, match=r"prompt has 4096 tokens but max_model_len is 4096, which leaves no room"):
        scheduler.resolve_max_tokens(4096, None)
    assert scheduler.resolve_max_tokens(903, None) == 4096 - 903
    assert scheduler.resolve_max_tokens(903, 4096 - 903) == 4096 - 903


def test_capacity_of_a_small_cache_is_used_to_the_last_place() -> None:
    scheduler = Scheduler(BlockPool(4, 4), 8, 64, max_model_len=100)
    with pytest.raises(
        CapacityError, match=r"10 \+ 8 tokens but the KV-cache has room for 17; .* raise kv_cache_bytes"
    ):
        scheduler.resolve_max_tokens(10, 8)
    sequence = add(scheduler, "a", 10, answer=7)
    while scheduler.has_work:
        step(scheduler)
    assert (sequence.num_generated, sequence.num_preemptions) == (7, 0)


def test_integrity_check_finds_a_sequence_ahead_of_its_cache() -> None:
    scheduler = make()
    sequence = add(scheduler, "a", 6)
    step(scheduler)
    sequence.num_computed = 40
    with pytest.raises(EngineError, match=r"a \(running\) has 40 of 7 tokens in a cache of 8 places"):
        scheduler.check_integrity()


class RandomTraffic(RuleBasedStateMachine):
    """Arrivals, cancellations and steps in any order, with pools hardly larger than one request.

    Keeps its own account of what was computed: between two preemptions a sequence's tokens must be computed each
    exactly once and in order.
    """

    @initialize(
        num_blocks=st.integers(2, 12), block_size=st.integers(1, 5), seqs=st.integers(1, 5), tokens=st.integers(1, 12)
    )
    def start(self, num_blocks: int, block_size: int, seqs: int, tokens: int) -> None:
        self.scheduler = make(num_blocks, block_size, seqs, tokens, length=40)
        self.live: list[Sequence] = []
        self.computed: dict[str, int] = {}
        self.preemptions: dict[str, int] = {}
        self.arrivals: list[str] = []
        self.count = 0

    @rule(prompt=st.integers(1, 30), answer=st.integers(1, 20))
    def arrive(self, prompt: int, answer: int) -> None:
        name = f"s{self.count}"
        self.count += 1
        room = min(40, self.scheduler.pool.num_blocks * self.scheduler.pool.block_size + 1)
        if prompt + answer > room:
            with pytest.raises(CapacityError):
                add(self.scheduler, name, prompt, answer)
            return
        self.live.append(add(self.scheduler, name, prompt, answer))
        self.computed[name] = self.preemptions[name] = 0
        self.arrivals.append(name)

    @rule(choice=st.integers(0, 100))
    def cancel(self, choice: int) -> None:
        if self.live:
            self.scheduler.remove(self.live.pop(choice % len(self.live)))

    @rule()
    def run(self) -> None:
        had_work = self.scheduler.has_work
        oldest = self.live[0] if self.live else None
        schedule = self.scheduler.schedule()
        assert bool(schedule) == had_work
        if oldest is not None:
            assert schedule[0].sequence is oldest, "the oldest always moves"
        assert sum(chunk.count for chunk in schedule) <= self.scheduler.max_batch_tokens
        assert len(schedule) <= self.scheduler.max_num_seqs
        names = [chunk.sequence.name for chunk in schedule]
        assert names == sorted(names, key=self.arrivals.index), "in order of arrival"
        for chunk in schedule:
            sequence = chunk.sequence
            if sequence.num_preemptions != self.preemptions[sequence.name]:
                self.preemptions[sequence.name] = sequence.num_preemptions
                self.computed[sequence.name] = 0
            assert chunk.count > 0
            assert chunk.start == self.computed[sequence.name], "each token once and in order"
            assert chunk.end <= len(sequence.token_ids)
            assert len(sequence.block_table) * self.scheduler.pool.block_size >= chunk.end
            self.computed[sequence.name] = chunk.end
        self.scheduler.commit(schedule)
        for sequence in [chunk.sequence for chunk in schedule if chunk.samples]:
            sequence.token_ids.append(0)
            if sequence.num_generated >= sequence.max_new_tokens:
                self.scheduler.remove(sequence)
                self.live.remove(sequence)

    @invariant()
    def in_order(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        """Whatever happened, everything that was not cancelled finishes and gives its blocks back."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):
            if not self.scheduler.has_work:
                break
            self.run()
            self.scheduler.check_integrity()
        assert not self.live
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks


RandomTraffic.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
TestRandomTraffic = RandomTraffic.TestCase
