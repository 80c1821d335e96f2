"""One request as the scheduler sees it: token ids, how many are in the cache, and in which blocks. Integers only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Status = Literal["new", "waiting", "running", "finished"]


@dataclass(slots=True, eq=False)
class Sequence:
    """token_ids          prompt, then the tokens generated so far (these survive a preemption)
    num_prompt_tokens  how many of them are the prompt
    max_new_tokens     the answer ends after so many; 0: pooled, there is no answer, and the last hidden state is wanted
    num_computed       tokens whose keys and values are in the cache
    block_table        its KV blocks; block i holds tokens i*block_size .. (i+1)*block_size-1
    """

    name: str
    token_ids: list[int]
    num_prompt_tokens: int
    max_new_tokens: int
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    status: Status = "new"
    num_preemptions: int = 0

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
