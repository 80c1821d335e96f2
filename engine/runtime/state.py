"""Everything the engine knows of one request while it runs: its answers, its clock, and the error that ended it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from ..types import RequestMetrics, RequestOutput
from .answer import Answer
from .sampler import Sampled
from .sequence import ImageSpan, Sequence

if TYPE_CHECKING:
    from ..inputs import Request
    from ..text.tokenizer import Tokenizer


class RequestState:
    """One request: sampling.n answers, each with a sequence of its own. `sequence` is that of the first."""

    def __init__(
        self, request: Request, max_new_tokens: int, eos_token_ids: tuple[int, ...], tokenizer: Tokenizer | None
    ) -> None:
        self.request = request
        self.sequence = Sequence(
            request.request_id,
            list(request.token_ids),
            len(request.token_ids),
            max_new_tokens,
            images=image_spans(request),
        )
        sequences = [self.sequence, *(make_sibling(self.sequence, i) for i in range(1, request.sampling.n))]
        self.answers = [
            Answer(request, index, sequence, eos_token_ids, tokenizer) for index, sequence in enumerate(sequences)
        ]
        self.error: Exception | None = None
        self._pooled: NDArray[np.float32] | None = None
        self.metrics = RequestMetrics(preprocess_s=request.preprocess_s, num_image_tokens=request.num_image_tokens)
        self._arrived = time.perf_counter()
        self._scheduled: float | None = None
        self._first_token: float | None = None

    @property
    def finished(self) -> bool:
        return all(answer.finished for answer in self.answers)

    @property
    def finish_reason(self) -> str | None:
        """Of the first answer."""
        return self.answers[0].finish_reason

    def mark_scheduled(self) -> None:
        """Called whenever the request is part of a pass; the first time ends its wait in the queue."""
        if self._scheduled is None:
            self._scheduled = time.perf_counter()
            self.metrics.queue_s = self._scheduled - self._arrived
            self.metrics.num_cached_tokens = self.sequence.num_cached

    def count_pass(self, seconds: float) -> None:
        """A pass with tokens of this request took so long; those before its first token are its prefill."""
        if self._first_token is None:
            self.metrics.prefill_s += seconds

    def accept(self, answer: Answer, sampled: Sampled) -> None:
        """Take a chosen token for one answer. The error that there is none ends all of them."""
        if answer.finished:
            return
        if sampled.error is not None:
            self.fail(sampled.error)
            return
        self._clock_token()
        answer.accept(sampled)

    def accept_pooled(self, hidden: NDArray[np.float32]) -> None:
        """Take the final hidden state [C] of the last token, which is all that a pooled request asks for."""
        if not np.isfinite(hidden).all():
            bad = int((~np.isfinite(hidden)).sum())
            self.fail(
                EngineError(
                    f"{bad} of {len(hidden)} values of the hidden state are not finite; the weights or an op are broken"
                )
            )
            return
        self._pooled = hidden
        self.answers[0].finish("stop")

    def cancel(self) -> None:
        """End the answers that have not ended, with finish_reason "abort"; they keep what they have."""
        for answer in self.answers:
            if not answer.finished:
                answer.finish("abort")

    def fail(self, error: Exception) -> None:
        """End all answers because of an error of this request: finish_reason "abort", the sentence as stop_reason."""
        self.error = error
        for answer in self.answers:
            if not answer.finished:
                answer.finish("abort", str(error))

    def output(self) -> RequestOutput:
        """A snapshot that later steps do not change."""
        request = self.request
        self.metrics.num_preemptions = sum(answer.sequence.num_preemptions for answer in self.answers)
        outputs = [answer.output() for answer in self.answers]
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.token_ids,
            outputs,
            self.finished,
            replace(self.metrics),
            self._pooled,
        )

    def _clock_token(self) -> None:
        now = time.perf_counter()
        if self._first_token is None:
            self._first_token = now
            self.metrics.time_to_first_token_s = now - self._arrived
        else:
            self.metrics.decode_s = now - self._first_token


def image_spans(request: Request) -> tuple[ImageSpan, ...] | None:
    """Where the prompt shows which image; None if an image has no digest."""
    spans = []
    for image in request.images:
        if image.digest is None:
            return None
        spans.append(ImageSpan(image.start, image.count, image.digest))
    return tuple(spans)


def make_sibling(leader: Sequence, index: int) -> Sequence:
    """The sequence of another answer to the same prompt."""
    return Sequence(
        f"{leader.name}.{index}",
        list(leader.token_ids),
        leader.num_prompt_tokens,
        leader.max_new_tokens,
        leader=leader,
        images=leader.images,
    )
