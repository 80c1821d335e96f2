"""One answer as the scheduler sees it: token ids, how many are in the cache, and in which blocks. Integers only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .prefix_cache import CachedBlock

Status = Literal["new", "waiting", "running", "finished"]


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Tokens start .. start+count-1 stand for the rows of an image; equal digests mean equal rows."""

    start: int
    count: int
    digest: bytes


@dataclass(slots=True, eq=False)
class Sequence:
    """token_ids          prompt, then the tokens generated so far (these survive a preemption)
    num_prompt_tokens  how many of them are the prompt
    max_new_tokens     the answer ends after so many; 0: pooled, there is no answer, and the last hidden state is wanted
    num_computed       tokens whose keys and values are in the cache
    block_table        its KV blocks; block i holds tokens i*block_size .. (i+1)*block_size-1
    leader             the first of several answers to one prompt; None in the first itself and where there is but one
    images             where the prompt shows images; None if it shows some without digests, so that nothing is cached
    num_cached         tokens that needed no computing when the sequence was last admitted
    num_filed          full blocks that the prefix cache knows of, the last of them at cache_tip
    """

    name: str
    token_ids: list[int]
    num_prompt_tokens: int
    max_new_tokens: int
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    status: Status = "new"
    num_preemptions: int = 0
    leader: Sequence | None = field(default=None, repr=False)
    images: tuple[ImageSpan, ...] | None = ()
    num_cached: int = 0
    num_filed: int = 0
    cache_tip: CachedBlock | None = field(default=None, repr=False)

    @property
    def root(self) -> Sequence:
        """The same for all answers to one prompt."""
        return self.leader or self

    @property
    def is_pooled(self) -> bool:
        return self.max_new_tokens == 0

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that must still go through the model before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """Work of one sequence in one step: tokens start .. start+count-1 go through the model."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether this chunk reaches the end of the sequence, so that its last row's logits give the next token."""
        return not self.sequence.is_pooled and self.end == len(self.sequence.token_ids)

    @property
    def pools(self) -> bool:
        """Whether this chunk reaches the end of a pooled sequence: its last row's hidden state is the result."""
        return self.sequence.is_pooled and self.end == len(self.sequence.token_ids)


Schedule = list[Chunk]
