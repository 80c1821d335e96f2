"""Tokens chosen on the device are those that the host's sampler chooses, n-gram guard included."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pagelens.kernels.interpreter.checks import checked
from pagelens.ops import SamplingCut
from pagelens.ops.reference_sampling import ReferenceSampling
from pagelens.ops.triton import TritonOps
from pagelens.ops.triton_sampling import RowChoice
from pagelens.runtime.logits import NgramProcessor
from pagelens.runtime.sampler import Sampler, SequenceSampler
from pagelens.types import NgramGuard, SamplingParams

VOCAB = 1500  # two tiles, the second in part
CHOICES = [
    RowChoice(temperature=1.0),
    RowChoice(temperature=0.6, top_k=20, top_p=0.95),
    RowChoice(temperature=0.7, top_k=1, top_p=0.8),
    RowChoice(temperature=1.5, top_p=0.5),
    RowChoice(temperature=1.0, min_p=0.1),
    RowChoice(temperature=0.9, top_k=50, top_p=0.9, min_p=0.05),
    RowChoice(temperature=2.0, top_k=VOCAB + 5),
]


def wanted(logits: torch.Tensor, choice: RowChoice) -> int:
    cut = SamplingCut(choice.temperature, choice.top_k, choice.top_p, choice.min_p, choice.uniform)
    return ReferenceSampling().sample(logits[None].clone(), [cut])[0]


def make_logits(kind: str, rows: int) -> torch.Tensor:
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    return logits.round() if kind == "ties" else logits


@pytest.mark.parametrize("kind", ["noise", "ties"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_draws_are_the_hosts(choice: RowChoice, kind: str, triton_ops: TritonOps) -> None:
    """Falling probabilities, ties by the lowest id, cut by cut."""
    uniforms = [0.0, 0.13, 0.5, 0.87, 0.999]
    logits = make_logits(kind, len(uniforms))
    rows = [replace(choice, uniform=u) for u in uniforms]
    with checked():
        tokens = triton_ops.sampling.choose(logits.clone(), rows, None)
    assert tokens == [wanted(row, choice) for row, choice in zip(logits, rows)]


def test_greedy_takes_the_lowest_id_and_no_padding(triton_ops: TritonOps) -> None:
    logits = make_logits("ties", 3)
    logits[1, [700, 1200]] = 50.0
    logits[2, 1400] = 90.0
    with checked():
        tokens = triton_ops.sampling.choose(logits, [RowChoice()] * 3, 1300)
    assert tokens[1] == 700
    assert tokens == [int(np.argmax(row[:1300].numpy())) for row in logits]


def test_logits_that_are_not_finite_give_no_token(triton_ops: TritonOps) -> None:
    logits = torch.zeros(4, VOCAB)
    logits[1, 7], logits[2, 7], logits[3] = torch.nan, torch.inf, -torch.inf
    with checked():
        assert triton_ops.sampling.choose(logits, [RowChoice()] * 4, None) == [0, -1, -1, -1]


def test_ngrams_that_would_repeat_are_forbidden(triton_ops: TritonOps) -> None:
    generator = np.random.default_rng(5)
    cases = [(3, 20, 60), (2, 90, 40), (2, 5, 30), (4, 7, 4), (5, 600, 500), (20, 90, 3)]
    allowed = frozenset({2, 3})
    processors, rows = [], []
    for size, window, length in cases:
        processor = NgramProcessor(size, window, allowed)
        for token in generator.integers(0, 4 if size > 2 else 12, length).tolist():
            processor.observe(token)
        processors.append(processor)
        rows.append(RowChoice(0.0, ngram_size=size, ngram_window=window, history=processor.rule[3], allowed=allowed))
    rows.append(RowChoice())
    logits = torch.arange(12.0).flip(0).repeat(len(rows), 1).contiguous()
    kept = logits.clone()
    with checked():
        triton_ops.sampling.choose(logits, rows, None)
    for row, before, processor in zip(logits, kept, processors):
        processor.apply(before.numpy())
        assert torch.equal(row, before)
    assert torch.equal(logits[-1], kept[-1])
    assert any(p.banned() for p in processors)


def test_the_sampler_reads_rows_back_only_where_it_must(triton_ops: TritonOps) -> None:
    """A pass of greedy, drawn, guarded and penalised rows: the same tokens as on the host."""
    logits = make_logits("noise", 4)
    asked = [
        SamplingParams(),
        SamplingParams(temperature=0.8, top_k=40, top_p=0.9, seed=11),
        SamplingParams(ngram_guard=NgramGuard(size=2, window=50)),
        SamplingParams(repetition_penalty=1.3, logprobs=2),
    ]
    results = []
    for sampling in (None, triton_ops.sampling):
        samplers = [SequenceSampler(params, [1, 2], frozenset({0})) for params in asked]
        for token in (5, 6, 5):
            for one in samplers:
                one.observe(token)
        assert [one.for_device() is None for one in samplers] == [False, False, False, True]
        samplers[1] = SequenceSampler(asked[1], [1, 2], frozenset({0}))
        results.append(Sampler(1400, None, sampling).sample(logits.clone(), samplers))
    assert [r.token for r in results[0]] == [r.token for r in results[1]]
    assert results[1][3].logprobs == results[0][3].logprobs
    broken = Sampler(None, None, triton_ops.sampling).sample(
        torch.full((1, 9), torch.nan), [SequenceSampler(SamplingParams(), [], frozenset())]
    )
    assert "NaN" in str(broken[0].error)
