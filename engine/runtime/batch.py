"""Turns a Schedule into the flat tensors of a ForwardBatch, in memory allocated once.

A step that only decodes allocates no tensor: the fields of its batch are views of one buffer, filled through numpy. For
a device there is a second one of the same form, which gets the whole of the first in one copy; the views never move, so
that a recorded step finds them again. A batch is valid until the next `build`, which returns the same object again if
it has the same sizes, and which must not come before the device has done with it (reading the tokens of a step back
waits for that).
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import torch
from torch import Tensor

from ..types import ForwardBatch
from .sequence import Chunk, Schedule, Sequence

ALIGNMENT = 64  # elements: every field begins on a line of its own
CPU = torch.device("cpu")
LADDER = (1, 2, 4, 8, *range(16, 257, 16))  # sequences of the decode steps that a device records
ImageRows = Callable[[Sequence, int, int], list[tuple[int, Tensor]]]


class BatchBuilder:
    """Buffers for batches of up to max_batch_tokens tokens of max_num_seqs sequences of max_blocks KV blocks each.

    image_rows(sequence, start, end) returns the vision rows that stand at positions start..end-1, as (position of the
    first row, rows [n, C]) pieces in order; None if the model reads no images.
    """

    def __init__(
        self,
        max_batch_tokens: int,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
        image_rows: ImageRows | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.block_size = block_size
        self._image_rows = image_rows
        self._device = device
        shapes = {
            "token_ids": (max_batch_tokens,),
            "positions": (max_batch_tokens,),
            "slots": (max_batch_tokens,),
            "query_starts": (max_num_seqs + 1,),
            "context_lens": (max_num_seqs,),
            "logit_rows": (max_num_seqs,),
            "pooled_rows": (max_num_seqs,),
            # Whole rows are passed on, so the tensor stays contiguous; entries behind a sequence's own are 0.
            "block_tables": (max_num_seqs, max_blocks),
        }
        self._host, fields = _one_buffer(shapes, CPU)
        if device.type == "cpu":
            self._copy = self._host
        else:
            self._copy, fields_there = _one_buffer(shapes, device)
        there = fields if device.type == "cpu" else fields_there
        self._token_ids = there["token_ids"]
        self._positions = there["positions"]
        self._slots = there["slots"]
        self._query_starts = there["query_starts"]
        self._context_lens = there["context_lens"]
        self._logit_rows = there["logit_rows"]
        self._pooled_rows = there["pooled_rows"]
        self._block_tables = there["block_tables"]
        self._np_token_ids = fields["token_ids"].numpy()
        self._np_positions = fields["positions"].numpy()
        self._np_slots = fields["slots"].numpy()
        self._np_query_starts = fields["query_starts"].numpy()
        self._np_context_lens = fields["context_lens"].numpy()
        self._np_logit_rows = fields["logit_rows"].numpy()
        self._np_pooled_rows = fields["pooled_rows"].numpy()
        self._np_block_tables = fields["block_tables"].numpy()
        self._last: tuple[tuple[int, int, int, int], ForwardBatch] | None = None
        self._num_filled = [0] * max_num_seqs
        self._row_owners: list[tuple[Sequence, int] | None] = [None] * max_num_seqs

    def build(self, schedule: Schedule) -> ForwardBatch:
        """The batch of a schedule; chunk s of it is sequence s.

        The logit rows are the last rows of chunks that sample, the pooled rows those of chunks that pool. On a device a
        batch of decodes is filled up to a size of LADDER, so that few sizes need be recorded: the rows behind the
        schedule's have no slot (-1), so that nothing is stored for them, and nobody asks for their results.
        """
        num_tokens = num_logits = num_pooled = 0
        pieces: list[tuple[int, Tensor]] = []
        for row, chunk in enumerate(schedule):
            self._fill_table(row, chunk.sequence)
            if chunk.count == 1:
                self._fill_one(num_tokens, chunk)
            else:
                self._fill_many(num_tokens, row, chunk)
            if self._image_rows is not None and chunk.start < chunk.sequence.num_prompt_tokens:
                shift = num_tokens - chunk.start
                found = self._image_rows(chunk.sequence, chunk.start, chunk.end)
                pieces.extend((position + shift, rows) for position, rows in found)
            num_tokens += chunk.count
            self._np_query_starts[row + 1] = num_tokens
            self._np_context_lens[row] = chunk.end
            if chunk.samples:
                self._np_logit_rows[num_logits] = num_tokens - 1
                num_logits += 1
            elif chunk.pools:
                self._np_pooled_rows[num_pooled] = num_tokens - 1
                num_pooled += 1
        num_seqs = len(schedule)
        if self._device.type != "cpu" and num_tokens == num_seqs:
            num_seqs = num_tokens = self._fill_up(num_seqs)
        sizes = (num_tokens, num_seqs, num_logits, num_pooled)
        if self._copy is not self._host:
            self._copy.copy_(self._host, non_blocking=True)
        if self._last is not None and self._last[0] == sizes and not pieces:
            return self._last[1]
        image_index, image_rows = _join(pieces, self._device)
        batch = ForwardBatch(
            token_ids=self._token_ids[:num_tokens],
            positions=self._positions[:num_tokens],
            slots=self._slots[:num_tokens],
            query_starts=self._query_starts[: num_seqs + 1],
            context_lens=self._context_lens[:num_seqs],
            block_tables=self._block_tables[:num_seqs],
            logit_rows=self._logit_rows[:num_logits],
            image_index=image_index,
            image_rows=image_rows,
            pooled_rows=self._pooled_rows[:num_pooled] if num_pooled else None,
        )
        self._last = None if pieces else (sizes, batch)
        return batch

    def _fill_up(self, count: int) -> int:
        """Empty decodes up to the next size of the ladder that the buffers hold; returns it."""
        size = min(next((s for s in LADDER if s >= count), count), len(self._np_context_lens), len(self._np_token_ids))
        for row in range(count, size):
            self._np_token_ids[row] = 0
            self._np_positions[row] = 0
            self._np_slots[row] = -1
            self._np_query_starts[row + 1] = row + 1
            self._np_context_lens[row] = 1
        return max(size, count)

    def _fill_table(self, row: int, sequence: Sequence) -> None:
        """Write a block table; only its new entries if the row already belongs to the sequence, as in most decodes."""
        blocks, filled = sequence.block_table, self._num_filled[row]
        owner = (sequence, sequence.num_preemptions)
        if self._row_owners[row] == owner:
            for place in range(filled, len(blocks)):
                self._np_block_tables[row, place] = blocks[place]
        else:
            self._np_block_tables[row, : len(blocks)] = blocks
            self._np_block_tables[row, len(blocks) : filled] = 0
            self._row_owners[row] = owner
        self._num_filled[row] = len(blocks)

    def _fill_one(self, at: int, chunk: Chunk) -> None:
        position = chunk.start
        self._np_token_ids[at] = chunk.sequence.token_ids[position]
        self._np_positions[at] = position
        block = chunk.sequence.block_table[position // self.block_size]
        self._np_slots[at] = block * self.block_size + position % self.block_size

    def _fill_many(self, at: int, row: int, chunk: Chunk) -> None:
        part = slice(at, at + chunk.count)
        positions = np.arange(chunk.start, chunk.end, dtype=np.int32)
        blocks = self._np_block_tables[row][positions // self.block_size]
        self._np_token_ids[part] = chunk.sequence.token_ids[chunk.start : chunk.end]
        self._np_positions[part] = positions
        self._np_slots[part] = blocks * self.block_size + positions % self.block_size


def _one_buffer(shapes: dict[str, tuple[int, ...]], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """A zeroed int32 buffer, pinned if it is the host's side of a GPU's, and its fields."""
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name] = end
        end += -(-prod(shape) // ALIGNMENT) * ALIGNMENT
    pinned = device.type == "cpu" and torch.cuda.is_available()
    buffer = torch.zeros(end, dtype=torch.int32, device=device, pin_memory=pinned)
    fields = {name: buffer[starts[name] : starts[name] + prod(shape)].view(shape) for name, shape in shapes.items()}
    return buffer, fields


def _join(pieces: list[tuple[int, Tensor]], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Image pieces (first batch row, rows) as one index and one matrix; a single piece is not copied."""
    if not pieces:
        return None, None
    index = torch.cat([torch.arange(first, first + len(rows), dtype=torch.int32) for first, rows in pieces])
    rows = pieces[0][1] if len(pieces) == 1 else torch.cat([rows for _, rows in pieces])
    return index.to(device), rows
