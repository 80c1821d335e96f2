"""Chooses the next token of each sequence from its row of logits: greedy or seeded sampling, and log probabilities."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import EngineError
from ..ops import Ops, SamplingCut
from ..ops.reference_sampling import ReferenceSampling
from ..ops.triton_sampling import DeviceSampling, RowChoice
from ..types import Logprob, SamplingParams
from .logits import (
    BanProcessor,
    LogitsProcessor,
    MinTokensProcessor,
    NgramProcessor,
    PenaltyProcessor,
    Row,
)

GREEDY = SamplingCut(0.0)


@dataclass(frozen=True, slots=True)
class Sampled:
    """token is -1 if `error` tells why none could be chosen."""

    token: int
    logprobs: dict[int, Logprob] | None = None
    error: EngineError | None = None


class SequenceSampler:
    """The choice of one sequence's tokens: depends on its own logits, history and seed, never on its neighbours."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: list[int],
        end_ids: frozenset[int],
        whitelist: frozenset[int] = frozenset(),
        banned: frozenset[int] = frozenset(),
    ) -> None:
        """end_ids: tokens that would end the answer (for min_tokens). whitelist: ids that the guard never forbids.

        banned: ids that are never chosen.
        """
        self.params = params
        # random.Random.random() gives the same numbers for a seed in every Python version, by its documentation.
        self._random = random.Random(params.seed) if params.temperature > 0 else None
        self._processors: list[LogitsProcessor] = []
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        if penalties != (1.0, 0.0, 0.0):
            self._processors.append(PenaltyProcessor(prompt, *penalties))
        guard = params.ngram_guard
        if guard is not None and not isinstance(guard, bool):
            self._processors.append(NgramProcessor(guard.size, guard.window, whitelist))
        if params.min_tokens > 0 and end_ids:
            self._processors.append(MinTokensProcessor(params.min_tokens, end_ids))
        if banned:
            self._processors.append(BanProcessor(banned))

    def prepare(self, row: Row) -> tuple[Row, SamplingCut]:
        """Apply the processors to logits [V] in place. Returns the row as it was, if that is needed, and its cut."""
        params = self.params
        raw = row.copy() if params.logprobs is not None and self._processors else row
        for processor in self._processors:
            processor.apply(row)
        if self._random is None:
            return raw, GREEDY
        return raw, SamplingCut(params.temperature, params.top_k, params.top_p, params.min_p, self._random.random())

    def finish(self, token: int, row: Row, raw: Row) -> Sampled:
        """What comes of the chosen token, or of -1. Does not record it: see `observe`."""
        if token < 0:
            return Sampled(-1, error=EngineError(_not_finite(row, raw)))
        logprobs = self.params.logprobs
        return Sampled(token, None if logprobs is None else top_logprobs(raw, token, logprobs))

    def for_device(self) -> RowChoice | None:
        """The choice as a device can make it, the next random number drawn; None if it needs the logits on the host.

        Penalties, forbidden and required tokens and log probabilities do.
        """
        params = self.params
        guards = [p for p in self._processors if isinstance(p, NgramProcessor)]
        if len(guards) < len(self._processors) or params.logprobs is not None:
            return None
        size, window, allowed, history = guards[0].rule if guards else (0, 0, frozenset[int](), ())
        drawn = self._random is not None
        return RowChoice(
            temperature=params.temperature if drawn else 0.0,
            top_k=max(params.top_k, 0),
            top_p=params.top_p,
            min_p=params.min_p,
            uniform=self._random.random() if self._random is not None else 0.0,
            ngram_size=size,
            ngram_window=window,
            history=history,
            allowed=allowed,
        )

    def observe(self, token: int) -> None:
        for processor in self._processors:
            processor.observe(token)


def answer_seed(seed: int | None, index: int) -> int | None:
    """Seed of one of several answers: `seed` for the first, unrelated ones for the others; None stays None."""
    if seed is None or index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "big")


class Sampler:
    """Chooses for all rows of a pass.

    num_tokens  logits from here on belong to padding rows of the vocabulary: they become -inf before anything else, so
                that no such id is chosen, ranked or counted in a log probability; None = there is no padding
    ops         whose `sample` chooses; None = the reference's
    sampling    of a backend whose logits lie on a device; None = they lie on the host
    """

    def __init__(
        self, num_tokens: int | None = None, ops: Ops | None = None, sampling: DeviceSampling | None = None
    ) -> None:
        self._num_tokens = num_tokens
        self._choose_greedy = ReferenceSampling().sample
        self._choose = self._choose_greedy if ops is None else ops.sample
        self._sampling = sampling

    def sample(self, logits: Tensor, samplers: list[SequenceSampler]) -> list[Sampled]:
        """logits [L, V] float32, one row a sampler; they are changed in place."""
        if self._sampling is not None and samplers:
            return self._sample_on_device(self._sampling, logits, samplers)
        rows = logits.numpy()
        if self._num_tokens is not None:
            rows[:, self._num_tokens :] = -np.inf
        prepared = [sampler.prepare(row) for sampler, row in zip(samplers, rows, strict=True)]
        cuts = [cut for _, cut in prepared]
        # numpy's argmax of a row or two takes less than a call of the native op costs.
        few = len(cuts) <= 2 and all(cut is GREEDY for cut in cuts)
        tokens = (self._choose_greedy if few else self._choose)(logits, cuts)
        return [
            sampler.finish(token, row, raw)
            for sampler, token, row, (raw, _) in zip(samplers, tokens, rows, prepared, strict=True)
        ]

    def _sample_on_device(
        self, sampling: DeviceSampling, logits: Tensor, samplers: list[SequenceSampler]
    ) -> list[Sampled]:
        """Only the token ids are read back, and whole rows for those samplers that a device cannot serve."""
        choices = [sampler.for_device() for sampler in samplers]
        host = {i: logits[i].cpu().numpy() for i, choice in enumerate(choices) if choice is None}
        tokens = [-1] * len(choices)
        if len(host) < len(choices):
            tokens = sampling.choose(logits, [choice or RowChoice() for choice in choices], self._num_tokens)
        chosen = []
        for i, sampler in enumerate(samplers):
            if i in host:
                if self._num_tokens is not None:
                    host[i][self._num_tokens :] = -np.inf
                raw, cut = sampler.prepare(host[i])
                (token,) = self._choose_greedy(torch.from_numpy(host[i])[None], [cut])
                chosen.append(sampler.finish(token, host[i], raw))
            elif tokens[i] < 0:
                row = logits[i].cpu().numpy()
                chosen.append(Sampled(-1, error=EngineError(_not_finite(row, row))))
            else:
                chosen.append(Sampled(tokens[i]))
        return chosen


def top_logprobs(row: Row, chosen: int, count: int) -> dict[int, Logprob]:
    """The chosen token's and the `count` most likely tokens' log softmax of a row; ranks from 1, ties by lowest id."""
    logits = row.astype(np.float64)
    top = logits.max()
    normaliser = top + np.log(np.exp(logits - top).sum())
    found = {chosen: Logprob(float(logits[chosen] - normaliser), _rank(row, chosen))}
    if count > 0:
        count = min(count, len(row))
        kth = np.partition(row, len(row) - count)[len(row) - count]
        above, equal = np.flatnonzero(row > kth), np.flatnonzero(row == kth)
        best = np.concatenate([above, equal[: count - len(above)]])
        for rank, token in enumerate(best[np.lexsort((best, -row[best]))].tolist(), start=1):
            found[token] = Logprob(float(logits[token] - normaliser), rank)
    return found


def _rank(row: Row, token: int) -> int:
    value = row[token]
    return int((row > value).sum() + (row[:token] == value).sum()) + 1


def _not_finite(row: Row, raw: Row) -> str:
    num_nan = int(np.isnan(row).sum())
    if num_nan:
        return f"the model returned NaN for {num_nan} of {len(row)} logits; the weights or an op are broken"
    if np.isposinf(row).any():
        return "the model returned an infinite logit; the weights or an op are broken"
    return "every token is forbidden: the model's logits are all -inf, or the sampling rules exclude all of them"
