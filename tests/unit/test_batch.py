"""Batches: the flat tensors of a schedule, vision rows cut by chunks, and decode steps that allocate no tensor."""

from __future__ import annotations

import random

import torch
from torch.profiler import ProfilerActivity, profile

from pagelens.runtime.batch import BatchBuilder
from pagelens.runtime.sequence import Chunk, Sequence
from pagelens.types import ForwardBatch

BLOCK = 4


def sequence(name: str, tokens: list[int], blocks: list[int], prompt: int | None = None) -> Sequence:
    made = Sequence(name, tokens, len(tokens) if prompt is None else prompt, 8)
    made.block_table = blocks
    return made


def lists(batch: ForwardBatch) -> dict[str, list]:
    names = ("token_ids", "positions", "slots", "query_starts", "context_lens", "block_tables", "logit_rows")
    for name in names:
        assert getattr(batch, name).dtype == torch.int32
        assert getattr(batch, name).is_contiguous()
    return {name: getattr(batch, name).tolist() for name in names}


def test_pooled_sequences_have_rows_of_their_own() -> None:
    """Only the chunk that ends a pooled text has one; a batch without any has no such tensor."""
    builder = BatchBuilder(16, 4, 3, BLOCK)
    a, b, c = (sequence(name, [1, 2, 3, 4], [block]) for block, name in enumerate("abc"))
    b.max_new_tokens = c.max_new_tokens = 0
    batch = builder.build([Chunk(a, 3, 1), Chunk(b, 0, 4), Chunk(c, 1, 2)])
    assert batch.logit_rows.tolist() == [0]
    assert batch.pooled_rows is not None
    assert batch.pooled_rows.dtype == torch.int32
    assert batch.pooled_rows.tolist() == [4]
    assert builder.build([Chunk(a, 3, 1), Chunk(c, 1, 2)]).pooled_rows is None


def test_prefill_chunk_and_decodes_in_one_batch() -> None:
    builder = BatchBuilder(16, 4, 3, BLOCK)
    a = sequence("a", [10, 11, 12, 13, 14, 15], [7, 2], prompt=3)
    b = sequence("b", [20, 21, 22, 23, 24, 25, 26, 27, 28], [5, 0, 3])
    c = sequence("c", [30], [1])
    batch = builder.build([Chunk(a, 5, 1), Chunk(b, 2, 5), Chunk(c, 0, 1)])
    assert lists(batch) == {
        "token_ids": [15, 22, 23, 24, 25, 26, 30],
        "positions": [5, 2, 3, 4, 5, 6, 0],
        "slots": [2 * 4 + 1, 22, 23, 0, 1, 2, 4],
        "query_starts": [0, 1, 6, 7],
        "context_lens": [6, 7, 1],
        "block_tables": [[7, 2, 0], [5, 0, 3], [1, 0, 0]],
        "logit_rows": [0, 6],
    }
    assert batch.image_index is None
    assert batch.image_rows is None


def test_reused_rows_hold_no_blocks_of_their_former_owner() -> None:
    builder = BatchBuilder(16, 2, 4, BLOCK)
    a = sequence("a", list(range(9)), [9, 8, 7])
    b = sequence("b", [1, 2], [6])
    builder.build([Chunk(a, 8, 1), Chunk(b, 1, 1)])
    assert builder.build([Chunk(b, 1, 1)]).block_tables.tolist() == [[6, 0, 0, 0]]
    b.block_table.append(4)
    assert builder.build([Chunk(b, 1, 1)]).block_tables.tolist() == [[6, 4, 0, 0]]
    b.block_table, b.num_preemptions = [3], 1
    assert builder.build([Chunk(b, 1, 1)]).block_tables.tolist() == [[3, 0, 0, 0]]


def test_equals_a_plain_construction_on_random_schedules() -> None:
    rng = random.Random(5)
    builder = BatchBuilder(64, 6, 8, BLOCK)
    for _ in range(300):
        free = rng.sample(range(48), 48)
        chunks = []
        for index in range(rng.randint(1, 6)):
            length = rng.randint(1, 10)
            start = rng.randrange(length)
            blocks = [free.pop() for _ in range(-(-length // BLOCK) + rng.randint(0, 1))]
            made = sequence(f"s{index}", [rng.randrange(99) for _ in range(length)], blocks)
            chunks.append(Chunk(made, start, rng.randint(1, length - start)))
        batch = builder.build(chunks)
        ids, positions, slots, starts, rows = [], [], [], [0], []
        for chunk in chunks:
            for position in range(chunk.start, chunk.end):
                ids.append(chunk.sequence.token_ids[position])
                positions.append(position)
                slots.append(chunk.sequence.block_table[position // BLOCK] * BLOCK + position % BLOCK)
            starts.append(len(ids))
            if chunk.end == len(chunk.sequence.token_ids):
                rows.append(len(ids) - 1)
        assert lists(batch) == {
            "token_ids": ids,
            "positions": positions,
            "slots": slots,
            "query_starts": starts,
            "context_lens": [chunk.end for chunk in chunks],
            "block_tables": [c.sequence.block_table + [0] * (8 - len(c.sequence.block_table)) for c in chunks],
            "logit_rows": rows,
        }


def test_chunks_cut_through_the_rows_of_images() -> None:
    rows = torch.arange(20.0).view(10, 2)

    def image_rows(owner: Sequence, start: int, end: int) -> list[tuple[int, torch.Tensor]]:
        first, last = max(start, 2), min(end, 12)  # ten rows at positions 2..11
        return [(first, rows[first - 2 : last - 2])] if first < last else []

    builder = BatchBuilder(32, 2, 8, BLOCK, image_rows)
    a = sequence("a", list(range(14)), [0, 1, 2, 3])
    b = sequence("b", list(range(14)), [4, 5, 6, 7])
    batch = builder.build([Chunk(a, 10, 4), Chunk(b, 0, 5)])
    assert batch.image_index is not None
    assert batch.image_rows is not None
    assert batch.image_index.tolist() == [0, 1, 6, 7, 8]
    assert torch.equal(batch.image_rows, rows[[8, 9, 0, 1, 2]])
    only = builder.build([Chunk(b, 5, 5)])
    assert only.image_rows is not None
    assert only.image_rows.data_ptr() == rows[3:].data_ptr(), "a single piece is not copied"
    assert builder.build([Chunk(a, 12, 2)]).image_rows is None


def allocations(prof: profile) -> int:
    """Number of tensor allocations that a profile saw."""
    return sum(event.self_cpu_memory_usage > 0 for event in prof.events())


def test_a_decode_step_allocates_no_tensor() -> None:
    builder = BatchBuilder(64, 4, 4, BLOCK)
    sequences = [sequence(f"s{i}", list(range(9)), [3 * i, 3 * i + 1, 3 * i + 2], prompt=4) for i in range(4)]
    first = builder.build([Chunk(s, 8, 1) for s in sequences])
    before = [getattr(first, name).data_ptr() for name in ("token_ids", "slots", "block_tables", "logit_rows")]
    for made in sequences:
        made.token_ids.append(5)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        second = builder.build([Chunk(s, 9, 1) for s in sequences])
    assert allocations(prof) == 0
    assert before == [getattr(second, name).data_ptr() for name in ("token_ids", "slots", "block_tables", "logit_rows")]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        torch.zeros(3)
    assert allocations(prof) > 0, "the counter counts"
