"""Which tokens of which sequences go through the model next. Integers only: no tensors, no text, no clock.

First come, first served, without exceptions, so nothing starves: `running` and `waiting` are each in order of arrival,
and everything running arrived before everything waiting. A sequence is admitted once blocks for all its known tokens
are free; its prompt is then computed in chunks that share each pass with the decodes of older sequences. When a decode
finds no block, the newest sequence gives up its blocks, goes back to the head of the queue and later recomputes
everything it knew (prompt and answer so far).

What is computed already is shared: full blocks that the prefix cache finds, and those of a prompt with several answers.
A sequence whose next block is just being computed by another waits for it, and so does what is behind it in the queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from ..errors import CapacityError, EngineError
from .blocks import BlockPool
from .prefix_cache import PrefixCache
from .sequence import Chunk, Schedule, Sequence


class Scheduler:
    """Owns the queues and hands out the pool's blocks. Call schedule(), run it, commit() it; repeat.

    cache  None = nothing is found again, and only the answers to one prompt share its blocks
    """

    def __init__(
        self,
        pool: BlockPool,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_model_len: int,
        cache: PrefixCache | None = None,
        model_limit: int | None = None,
    ) -> None:
        """model_limit: positions that the model has, for errors; None: not known."""
        self.pool = pool
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.max_model_len = max_model_len
        # An option that is at its limit is no remedy.
        self._length_remedy = "" if max_model_len == model_limit else " or raise max_model_len"
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._blocked: tuple[Sequence, int] | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def resolve_max_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """Number of tokens the answer may have; None asks for all the room there is, 0 for no answer (pooling).

        Reads only what never changes, so any thread may call it. Raises CapacityError if the request can never fit.
        """
        cache_tokens = self.pool.num_blocks * self.pool.block_size
        limit, name, remedy = self.max_model_len, "max_model_len is", self._length_remedy
        if max_tokens == 0:
            if cache_tokens < limit:
                limit, name, remedy = cache_tokens, "the KV-cache has room for", " or raise kv_cache_bytes"
            if num_prompt_tokens > limit:
                raise CapacityError(f"the text has {num_prompt_tokens} tokens but {name} {limit}; shorten it{remedy}")
            return 0
        # The last token of an answer is never fed back, so it needs no place in the cache.
        if cache_tokens + 1 < limit:
            limit, name, remedy = cache_tokens + 1, "the KV-cache has room for", " or raise kv_cache_bytes"
        if num_prompt_tokens >= limit:
            raise CapacityError(
                f"prompt has {num_prompt_tokens} tokens but {name} {limit}, which leaves no room for an answer; "
                f"shorten the prompt{remedy}"
            )
        if max_tokens is None:
            return limit - num_prompt_tokens
        if num_prompt_tokens + max_tokens > limit:
            raise CapacityError(
                f"prompt needs {num_prompt_tokens} + {max_tokens} tokens but {name} {limit}; lower max_tokens{remedy}"
            )
        return max_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises CapacityError if it can never fit."""
        self.resolve_max_tokens(sequence.num_prompt_tokens, sequence.max_new_tokens)
        sequence.status = "waiting"
        self.waiting.append(sequence)

    def schedule(self) -> Schedule:
        """Choose the next pass. Empty only if there is no work: what it returns must be run and committed."""
        budget = self.max_batch_tokens
        chunks: Schedule = []
        for sequence in list(self.running):
            if budget == 0 or sequence.status != "running":
                break
            count = min(sequence.num_pending, budget)
            self._make_room(sequence, sequence.num_computed + count)
            if sequence.status != "running":
                break
            chunks.append(Chunk(sequence, sequence.num_computed, count))
            budget -= count
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            count = min(sequence.num_pending, budget)
            chunks.append(Chunk(sequence, sequence.num_computed, count))
            budget -= count
        return chunks

    def commit(self, schedule: Schedule, failed: Collection[Sequence] = ()) -> None:
        """Record that the keys and values of a schedule are in the cache, where other sequences may now find them.

        Nothing that a `failed` sequence holds can be found afterwards.
        """
        for chunk in schedule:
            chunk.sequence.num_computed = chunk.end
            if self.cache is not None and chunk.sequence not in failed:
                self.cache.file(chunk.sequence)
        if self.cache is not None:
            for sequence in failed:
                self.cache.discard(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or cancelled, and free its blocks. Harmless if it is already out."""
        if sequence.status == "running":
            self.running.remove(sequence)
        elif sequence.status == "waiting":
            self.waiting.remove(sequence)
        self._free_blocks(sequence)
        sequence.status = "finished"

    def check_integrity(self) -> None:
        """Check queues, tables and reference counts against each other; may run between any two steps.

        Raises EngineError naming what is wrong.
        """
        for sequence in self.waiting:
            if sequence.status != "waiting" or sequence.block_table or sequence.num_computed:
                raise EngineError(f"{sequence.name} waits but holds blocks {sequence.block_table} ({sequence.status})")
        for sequence in self.running:
            capacity = len(sequence.block_table) * self.pool.block_size
            if sequence.status != "running" or not 0 <= sequence.num_computed <= min(capacity, len(sequence.token_ids)):
                raise EngineError(
                    f"{sequence.name} ({sequence.status}) has {sequence.num_computed} of {len(sequence.token_ids)} "
                    f"tokens in a cache of {capacity} places"
                )
        if len(self.running) > self.max_num_seqs:
            raise EngineError(f"{len(self.running)} sequences run but max_num_seqs is {self.max_num_seqs}")
        self.pool.check_integrity((sequence.name, sequence.block_table) for sequence in self.running)
        for sequence in self.running:
            for block in sequence.block_table[sequence.num_computed // self.pool.block_size :]:
                if self.pool.ref_count(block) > 1:
                    raise EngineError(f"{sequence.name} is still to write to block {block}, which others hold too")
        if self.cache is not None:
            self.cache.check_integrity(self.running)

    def _admit(self, sequence: Sequence) -> bool:
        """Move the head of the queue to `running`, with blocks for all its tokens; False if it has to wait."""
        # Nothing was given back since it last found too few blocks: do not look up its tokens in every step.
        if self._blocked is not None and self._blocked[0] is sequence and self.pool.num_free <= self._blocked[1]:
            return False
        found = [] if self.cache is None else self.cache.find(sequence)
        if self.cache is not None and self.cache.is_being_computed(sequence, found, self.running):
            return False
        shared = self._sibling_blocks(sequence) if self.cache is None else [node.block for node in found]
        if shared is None:
            return False
        missing = self.pool.num_needed(len(sequence.token_ids)) - len(shared)
        num_idle = sum(self.pool.ref_count(block) == 0 for block in shared)
        if missing > self.pool.num_free - num_idle:
            self._blocked = (sequence, self.pool.num_free)
            return False
        self._blocked = None
        self.waiting.popleft()
        self.pool.share(shared)  # before anything is allocated, which could evict them
        sequence.block_table = shared + self.pool.allocate(missing)
        sequence.num_computed = sequence.num_cached = len(shared) * self.pool.block_size
        if self.cache is not None:
            self.cache.attach(sequence, found)
        sequence.status = "running"
        self.running.append(sequence)
        return True

    def _sibling_blocks(self, sequence: Sequence) -> list[int] | None:
        """Full blocks of the prompt in the hands of another answer to it; None if that one is still computing them."""
        count = (sequence.num_prompt_tokens - 1) // self.pool.block_size
        for other in self.running:
            if other.root is sequence.root:
                return other.block_table[:count] if other.num_computed >= count * self.pool.block_size else None
        return []

    def _make_room(self, sequence: Sequence, num_tokens: int) -> None:
        """Extend a block table to num_tokens, preempting the newest sequences if need be.

        The last to give way is `sequence` itself, which then does not run in this step.
        """
        missing = self.pool.num_needed(num_tokens) - len(sequence.block_table)
        while missing > self.pool.num_free and sequence.status == "running":
            self._preempt(self.running.pop())
        if missing > 0 and sequence.status == "running":
            sequence.block_table.extend(self.pool.allocate(missing))

    def _preempt(self, sequence: Sequence) -> None:
        self._free_blocks(sequence)
        sequence.status = "waiting"
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _free_blocks(self, sequence: Sequence) -> None:
        # The last first, for it is useless without those before it and should be evicted before them.
        self.pool.release(reversed(sequence.block_table))
        sequence.block_table = []
        sequence.num_filed, sequence.cache_tip = 0, None
