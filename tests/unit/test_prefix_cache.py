"""The prefix cache with integers only: what is found and what is evicted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers.prefix_caches import CAT, DOG, always_equal, cache_of, make, sequence

from pagelens.errors import EngineError
from pagelens.runtime.prefix_cache import PrefixCache
from pagelens.runtime.scheduler import Scheduler
from pagelens.runtime.sequence import ImageSpan, Schedule, Sequence
from pagelens.runtime.state import make_sibling


def step(scheduler: Scheduler) -> Schedule:
    """One step as the engine does it; every sampled token is 99."""
    schedule = scheduler.schedule()
    sampling = [chunk.sequence for chunk in schedule if chunk.samples]
    for one in sampling:
        one.token_ids.append(99)
    scheduler.commit(schedule)
    for one in sampling:
        if one.num_generated >= one.max_new_tokens:
            scheduler.remove(one)
    scheduler.check_integrity()
    return schedule


def run(scheduler: Scheduler, *sequences: Sequence) -> list[int]:
    """Run sequences to their ends; how many tokens of each were found when it was last admitted."""
    for one in sequences:
        scheduler.add(one)
    while scheduler.has_work:
        step(scheduler)
    return [one.num_cached for one in sequences]


@pytest.mark.parametrize("hash_block", [hash, always_equal], ids=["hash", "all collide"])
def test_full_blocks_of_a_common_beginning_are_found(hash_block: Callable[[object], int]) -> None:
    scheduler = make(hash_block=hash_block)
    prompt = list(range(12))
    assert run(scheduler, sequence("a", prompt)) == [0]
    assert run(scheduler, sequence("same", prompt)) == [8], "the last token of a prompt is always computed"
    assert run(scheduler, sequence("longer", [*prompt, 1, 2])) == [12]
    assert run(scheduler, sequence("ends in a block", prompt[:11])) == [8]
    assert run(scheduler, sequence("second block differs", [*prompt[:4], 50, *prompt[5:]])) == [4]
    assert run(scheduler, sequence("first differs", [50, *prompt[1:]])) == [0]
    assert run(scheduler, sequence("same block elsewhere", [*prompt[4:8], *prompt[4:8], *prompt[8:]])) == [0]


@pytest.mark.parametrize("hash_block", [hash, always_equal], ids=["hash", "all collide"])
def test_an_image_is_part_of_what_is_compared(hash_block: Callable[[object], int]) -> None:
    scheduler = make(hash_block=hash_block)
    prompt = [1, 2, *[3] * 7, 4, 5, 6, 7]

    def ask(name: str, *images: ImageSpan) -> int:
        return run(scheduler, sequence(name, prompt, images=images))[0]

    assert ask("a", ImageSpan(2, 7, CAT)) == 0
    assert ask("again", ImageSpan(2, 7, CAT)) == 12
    assert ask("another image", ImageSpan(2, 7, DOG)) == 0
    assert ask("no image", *()) == 0
    assert ask("the same rows one token later", ImageSpan(3, 6, CAT)) == 0
    assert ask("shorter, so its second block differs", ImageSpan(2, 5, CAT)) == 4
    assert ask("another image behind it", ImageSpan(2, 5, CAT), ImageSpan(7, 2, DOG)) == 4
    assert ask("that one again", ImageSpan(2, 5, CAT), ImageSpan(7, 2, DOG)) == 12


def test_without_a_digest_nothing_is_kept_or_found() -> None:
    scheduler = make()
    prompt = list(range(12))
    assert run(scheduler, sequence("a", prompt, images=None)) == [0]
    assert cache_of(scheduler).stats().num_cached_blocks == 0
    run(scheduler, sequence("b", prompt))
    assert run(scheduler, sequence("c", prompt, images=None)) == [0]


def test_answers_are_found_too() -> None:
    scheduler = make()
    first = sequence("a", [1, 2, 3], answer=10)
    run(scheduler, first)
    # The last token of an answer is never computed: 12 of 13 are in the cache.
    assert run(scheduler, sequence("next turn", [*first.token_ids, 5, 6])) == [12]


def test_who_asks_for_what_is_being_computed_waits_for_it() -> None:
    scheduler = make(tokens=8)
    prompt = list(range(18))
    first, second, other = sequence("a", prompt, 3), sequence("b", [*prompt, 7], 3), sequence("c", [50] * 6, 3)
    for one in (first, second, other):
        scheduler.add(one)
    shapes = [[(c.sequence.name, c.start, c.count) for c in step(scheduler)] for _ in range(4)]
    assert shapes[:3] == [[("a", 0, 8)], [("a", 8, 8)], [("a", 16, 2), ("b", 16, 3), ("c", 0, 3)]]
    assert shapes[3] == [("a", 18, 1), ("b", 19, 1), ("c", 3, 3)]


@pytest.mark.parametrize(
    "waiting",
    [list(range(8)), [*range(4), 60, 61, 62, 63, 8], [60, *range(1, 9)]],
    ids=["its second block is never looked up", "another second block", "another first block"],
)
def test_nobody_waits_for_what_it_could_not_use(waiting: list[int]) -> None:
    scheduler = make()
    run(scheduler, sequence("before", [*range(4), 70]), sequence("other", [60, *range(1, 4), 70]))
    scheduler.add(sequence("a", list(range(9)), 2))
    scheduler.add(sequence("b", waiting, 2))
    assert [(c.sequence.name, c.start) for c in step(scheduler)] == [("a", 4), ("b", 4)]


def test_the_longest_unused_blocks_go_first_and_children_before_parents() -> None:
    scheduler = make(num_blocks=8)
    old, new = list(range(10, 19)), list(range(20, 29))
    run(scheduler, sequence("old", old))
    run(scheduler, sequence("new", new))
    run(scheduler, sequence("old again", old))
    assert cache_of(scheduler).stats().num_cached_blocks == 4
    # Five blocks: the four that hold nothing, and then the end of what was not used for longest.
    run(scheduler, sequence("large", list(range(40, 57))))
    assert cache_of(scheduler).stats().num_evictions == 1
    found = {name: len(cache_of(scheduler).find(sequence(name, p))) for name, p in (("old", old), ("new", new))}
    assert found == {"old": 2, "new": 1}


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    scheduler = make(num_blocks=5)
    old, new = sequence("old", list(range(7)), 8), sequence("new", list(range(20, 28)), 6)
    run(scheduler, old, new)
    assert new.num_preemptions == 1
    assert new.num_cached > 0


def test_blocks_of_a_failed_pass_are_not_found() -> None:
    scheduler = make(tokens=8)
    prompt = list(range(18))
    failing, sharing = sequence("a", prompt, 3), sequence("b", [*prompt[:9], *[60] * 8], 9)
    run(scheduler, sequence("before", prompt[:5]))
    scheduler.add(failing)
    step(scheduler)
    assert failing.num_cached == 4
    assert len(cache_of(scheduler).find(sequence("c", prompt))) == 3
    scheduler.add(sharing)
    schedule = scheduler.schedule()
    assert [chunk.sequence for chunk in schedule] == [failing, sharing]
    scheduler.commit(schedule, {failing})
    scheduler.remove(failing)
    scheduler.check_integrity()
    assert cache_of(scheduler).find(sequence("c", prompt)) == []
    while scheduler.has_work:
        step(scheduler)
    assert cache_of(scheduler).find(sequence("c", prompt)) == [], "who held them does not bring them back"
    assert scheduler.pool.num_free == 100


def test_clear_forgets_and_disturbs_nobody() -> None:
    scheduler = make()
    running = sequence("a", list(range(9)), 12)
    scheduler.add(running)
    step(scheduler)
    cache_of(scheduler).clear()
    scheduler.check_integrity()
    assert cache_of(scheduler).stats().num_cached_blocks == 0
    while scheduler.has_work:
        step(scheduler)
    assert cache_of(scheduler).find(sequence("b", list(range(9)))) == []
    assert run(scheduler, sequence("b", list(range(9))), sequence("c", list(range(9)))) == [0, 8]


def test_a_duplicate_chain_loses_its_parent_and_what_follows_it() -> None:
    """Two sequences that cannot see each other compute the same; the cache holds one block of each."""
    scheduler = make(num_blocks=7, tokens=3)
    first, second = sequence("a", list(range(5)), 1), sequence("b", list(range(9)), 2)
    scheduler.add(first)
    hidden = sequence("b", list(range(9)), 2, images=None)
    hidden_table: list[int] = []
    scheduler.add(hidden)
    while scheduler.has_work:
        schedule = scheduler.schedule()
        scheduler.commit(schedule)
        hidden_table = hidden_table or list(hidden.block_table)
        for chunk in schedule:
            if chunk.samples:
                scheduler.remove(chunk.sequence)
        if hidden.num_computed >= 3 and hidden.images is None:
            hidden.images = ()  # from now on its blocks are filed: the first is a's
        scheduler.check_integrity()
        if hidden.status == "running" and hidden.num_filed == 2:
            break
    node = cache_of(scheduler).find(second)
    assert [one.block in hidden_table for one in node] == [False, True]
    scheduler.pool.allocate(scheduler.pool.num_free)  # a's block is evicted while the other is in use
    assert cache_of(scheduler).find(second) == []
    assert cache_of(scheduler).stats().num_cached_blocks == 0


def test_a_sequence_that_waits_for_blocks_is_not_looked_up_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(num_blocks=4)
    scheduler.add(sequence("a", list(range(9)), 6))
    scheduler.add(sequence("b", list(range(50, 59)), 2))
    looked_up: list[str] = []
    find = cache_of(scheduler).find

    def spy(one: Sequence) -> list[object]:
        looked_up.append(one.name)
        return find(one)  # type: ignore[return-value]

    monkeypatch.setattr(cache_of(scheduler), "find", spy)
    while scheduler.has_work:
        step(scheduler)
    assert looked_up == ["a", "b", "b"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda cache: cache.pool._kept.discard(0), "block 0 is cached as 0, kept: False"),
        (lambda cache: cache._buckets.clear(), "block 0 is cached under a key at which it cannot be found"),
        (lambda cache: cache._by_block[1].parent.children.clear(), "block 1 is cached, but not the block before it"),
        (lambda cache: cache.pool.keep(2), "2 blocks are cached, 2 findable and 3 kept"),
    ],
)
def test_integrity_check_names_the_damage(damage: Callable[[PrefixCache], None], message: str) -> None:
    scheduler = make()
    scheduler.add(sequence("a", list(range(9)), 4))
    step(scheduler)
    damage(cache_of(scheduler))
    with pytest.raises(EngineError, match=message):
        scheduler.check_integrity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.token_ids.__setitem__(1, 77), "block 0 is cached with other tokens than a has there"),
        (lambda one: one.block_table.reverse(), "a has there|is still to write|not computed yet"),
        (lambda one: setattr(one, "num_computed", 7), "block 1 of a is cached, but not computed yet"),
    ],
)
def test_integrity_check_compares_cache_and_tables(change: Callable[[Sequence], None], message: str) -> None:
    scheduler = make()
    running = sequence("a", list(range(9)), 4)
    scheduler.add(running)
    step(scheduler)
    change(running)
    with pytest.raises(EngineError, match=message):
        scheduler.check_integrity()


def test_integrity_check_finds_a_shared_block_that_is_still_written_to() -> None:
    scheduler = make()
    running = sequence("a", list(range(6)), 4)
    scheduler.add(running)
    step(scheduler)
    scheduler.pool.share(running.block_table[1:])
    other = sequence("b", list(range(6)), 4)
    other.block_table, other.num_computed, other.status = running.block_table[1:], 4, "running"
    scheduler.running.append(other)
    with pytest.raises(EngineError, match="a is still to write to block 1, which others hold too"):
        scheduler.check_integrity()


# ---- several answers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_an_answer_waits_until_the_prompt_is_computed(cached: bool) -> None:
    """Not even the same pass may read blocks of another: it might fail."""
    scheduler = make(tokens=64)
    if not cached:
        scheduler = Scheduler(scheduler.pool, 8, 64, 400)
    leader = sequence("a", list(range(11)), 5)
    for one in (leader, make_sibling(leader, 1)):
        scheduler.add(one)
    assert [chunk.sequence.name for chunk in step(scheduler)] == ["a"]
    assert [chunk.sequence.name for chunk in step(scheduler)] == ["a", "a.1"]


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_answers_to_one_prompt_share_its_full_blocks(cached: bool) -> None:
    scheduler = make(tokens=8)
    if not cached:
        scheduler = Scheduler(scheduler.pool, 8, 8, 400)
    leader = sequence("a", list(range(11)), 5)
    answers = [leader, *(make_sibling(leader, i) for i in (1, 2, 3))]
    for one in answers:
        scheduler.add(one)
    shapes = [[(c.sequence.name, c.start, c.count) for c in step(scheduler)] for _ in range(3)]
    assert shapes[:2] == [[("a", 0, 8)], [("a", 8, 3), ("a.1", 8, 3), ("a.2", 8, 2)]], "the prompt is computed once"
    assert shapes[2] == [("a", 11, 1), ("a.1", 11, 1), ("a.2", 10, 1), ("a.3", 8, 3)]
    assert {tuple(one.block_table[:2]) for one in answers} == {tuple(leader.block_table[:2])}
    assert len({one.block_table[2] for one in answers}) == 4, "each writes to a block of its own"
    assert [scheduler.pool.ref_count(block) for block in leader.block_table] == [4, 4, 1]
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.pool.num_free == 100
    if cached:
        stats = cache_of(scheduler).stats()
        assert (stats.num_queried_tokens, stats.num_cached_tokens) == (11, 0), "shared answers are no hits"
