"""One answer while it runs, and what happens when it gets a token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..types import CompletionOutput, Logprob, NgramGuard, SamplingParams
from .repetition import RepetitionDetector
from .sampler import Sampled, SequenceSampler, answer_seed
from .sequence import Sequence
from .thinking import ThinkingBudget

if TYPE_CHECKING:
    from ..inputs import Request
    from ..text.stream import IncrementalDetokenizer
    from ..text.tokenizer import Tokenizer


class Answer:
    """One answer: its sequence, how its tokens are chosen, its text so far, and why it ended.

    index  of the answer among those of its request
    """

    def __init__(
        self,
        request: Request,
        index: int,
        sequence: Sequence,
        eos_token_ids: tuple[int, ...],
        tokenizer: Tokenizer | None,
    ) -> None:
        params = replace(request.sampling, seed=answer_seed(request.sampling.seed, index))
        self.index = index
        self.sequence = sequence
        self._eos_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._stop_ids = frozenset(params.stop_token_ids or ())
        guard = params.ngram_guard if isinstance(params.ngram_guard, NgramGuard) else NgramGuard()
        whitelist = resolve_whitelist(guard, tokenizer)
        end_ids = self._eos_ids | self._stop_ids
        plan = request.thinking
        banned = frozenset({plan.tokens.open_id}) if plan is not None and plan.budget == 0 else frozenset[int]()
        self.sampler = SequenceSampler(params, request.token_ids, end_ids, whitelist, banned)
        self._thinking: ThinkingBudget | None = None
        if plan is not None and plan.budget > 0 and tokenizer is not None:
            self._thinking = ThinkingBudget(plan, tokenizer.id_to_bytes)
        self._detector = RepetitionDetector(whitelist) if params.detect_repetition else None
        self._detokenizer = make_detokenizer(params, tokenizer)
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._cumulative_logprob = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def accept(self, sampled: Sampled) -> None:
        """Take a chosen token and decide whether the answer has ended."""
        token = sampled.token
        self.sequence.token_ids.append(token)
        self.sampler.observe(token)
        if self._logprobs is not None and sampled.logprobs is not None:
            self._logprobs.append(sampled.logprobs)
            self._cumulative_logprob += sampled.logprobs[token].logprob
        if token in self._eos_ids or token in self._stop_ids:
            self.finish("stop", None if token in self._eos_ids else token)
            return
        if self._detokenizer is not None:
            self._detokenizer.push([token])
            if self._detokenizer.stopped is not None:
                self.finish("stop", self._detokenizer.stopped)
                return
        # A loop in a block with a budget is left to the budget, so that an answer follows.
        is_watched = self._thinking is None or not self._thinking.is_inside
        if self._thinking is not None:
            self._feed(self._thinking.take(token))
        if self._detector is not None and is_watched and self._detector.push(token):
            self.finish("repetition")
        elif self.sequence.num_generated >= self.sequence.max_new_tokens:
            self.finish("length")

    def _feed(self, tokens: tuple[int, ...]) -> None:
        """Go on with tokens that were not chosen. The next pass computes them like a piece of the prompt.

        They are part of the answer: max_tokens cuts them, penalties and the n-gram guard see them. They cannot end it:
        neither stop strings completed in them nor stop ids count.
        """
        tokens = tokens[: self.sequence.max_new_tokens - self.sequence.num_generated]
        for token in tokens:
            self.sequence.token_ids.append(token)
            self.sampler.observe(token)
            if self._logprobs is not None:
                self._logprobs.append({})
        if self._detokenizer is not None and tokens:
            self._detokenizer.push(tokens, can_stop=False)

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """End the answer; text held back until now is given out."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self._detokenizer is not None:
            self._detokenizer.finish()

    def output(self) -> CompletionOutput:
        """A snapshot that later steps do not change."""
        sequence = self.sequence
        return CompletionOutput(
            index=self.index,
            text="" if self._detokenizer is None else self._detokenizer.text,
            token_ids=sequence.token_ids[sequence.num_prompt_tokens :],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=None if self._logprobs is None else list(self._logprobs),
            cumulative_logprob=None if self._logprobs is None else self._cumulative_logprob,
        )


def resolve_whitelist(guard: NgramGuard, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Ids of the white-listed texts that are tokens of this model."""
    if tokenizer is None:
        return frozenset()
    return frozenset(found for text in guard.whitelist if (found := tokenizer.token_id(text)) is not None)


def make_detokenizer(params: SamplingParams, tokenizer: Tokenizer | None) -> IncrementalDetokenizer | None:
    if tokenizer is None:
        return None
    from ..text.stream import IncrementalDetokenizer

    return IncrementalDetokenizer(tokenizer, params.stop or (), params.skip_special_tokens, params.min_tokens)
