"""Choosing tokens: greedy ties, each truncation against a plain definition, seeds, log probabilities, bad logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagelens.ops import SamplingCut, reference_sampling
from pagelens.runtime.sampler import Sampled, Sampler, SequenceSampler, top_logprobs
from pagelens.types import NgramGuard, SamplingParams


def sampler(**params: object) -> SequenceSampler:
    return SequenceSampler(SamplingParams(**params), [2, 3], frozenset({1}))  # type: ignore[arg-type]


def choose(chooser: SequenceSampler, row: np.ndarray) -> Sampled:
    return Sampler().sample(torch.from_numpy(row)[None], [chooser])[0]


def draw(row: np.ndarray, params: SamplingParams, uniform: float) -> int:
    cut = SamplingCut(params.temperature, params.top_k, params.top_p, params.min_p, uniform)
    return reference_sampling.draw(row, cut)


def random_row(size: int = 200, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)


def allowed(row: np.ndarray, params: SamplingParams) -> dict[int, float]:
    """Token -> probability after temperature, top_k, min_p and top_p, by sorting everything."""
    order = sorted(range(len(row)), key=lambda t: (-row[t], t))
    weights = {t: float(np.exp((np.float64(row[t]) - row.max()) / params.temperature)) for t in order}
    if params.top_k:
        weights = {t: weights[t] for t in order[: params.top_k]}
    weights = {t: w for t, w in weights.items() if w >= params.min_p and w > 0}
    total, reached, kept = sum(weights.values()), 0.0, {}
    for token, weight in weights.items():
        if params.top_p < 1 and reached >= params.top_p * total:
            break
        kept[token] = weight
        reached += weight
    return {t: w / sum(kept.values()) for t, w in kept.items()}


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    row = np.zeros(50, np.float32)
    row[[7, 30]] = 2.0
    assert choose(sampler(), row).token == 7


CUTS = [
    {"temperature": 1.0},
    {"temperature": 0.5, "top_k": 5},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.5, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 0.001},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 3.0, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 100.0, "top_p": 0.999},
    {"temperature": 1.0, "top_k": 500},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_draw_inverts_the_cumulative_distribution_of_the_definition(cut: dict[str, float]) -> None:
    params = SamplingParams(**cut)  # type: ignore[arg-type]
    for seed in range(5):
        row = np.round(random_row(seed=seed), 1)  # rounding makes ties
        expected = allowed(row, params)
        tokens, bounds = list(expected), np.cumsum(list(expected.values()))
        for uniform in [0.0, *(np.arange(97) / 97), 1 - 1e-12]:
            place = int(np.searchsorted(bounds, uniform, side="right"))
            if np.abs(bounds - uniform).min() > 1e-9:  # not on a border, where the last bit decides
                assert draw(row, params, uniform) == tokens[min(place, len(tokens) - 1)]


def test_extreme_temperature_is_greedy_without_warnings() -> None:
    row = random_row()
    params = SamplingParams(temperature=1e-9)
    with np.errstate(all="raise", under="ignore"):
        assert draw(row, params, 0.999) == int(row.argmax())


def test_frequencies_follow_the_distribution() -> None:
    row = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    chooser = sampler(temperature=1.0, seed=1)
    counts = np.bincount([choose(chooser, row.copy()).token for _ in range(8000)], minlength=4) / 8000
    # Five standard errors of a share of 0.5 in 8000 draws are 0.028.
    assert np.abs(counts - [0.5, 0.25, 0.125, 0.125]).max() < 0.028


def test_a_seed_gives_the_same_tokens_whatever_the_neighbours() -> None:
    rows = torch.from_numpy(np.stack([random_row(seed=i) for i in range(6)]))
    alone = sampler(temperature=1.0, seed=42)
    expected = [choose(alone, rows[i].numpy().copy()).token for i in range(6)]
    chosen, others = sampler(temperature=1.0, seed=42), sampler(temperature=1.0, seed=7)
    found = []
    for i in range(6):
        logits = torch.stack([rows[(i + 3) % 6], rows[i], rows[(i + 1) % 6]])
        found.append(Sampler().sample(logits, [others, chosen, sampler()])[1].token)
    assert found == expected
    assert len(set(expected)) > 1
    unseeded = [choose(sampler(temperature=1.0), rows[0].numpy().copy()).token for _ in range(30)]
    assert len(set(unseeded)) > 1


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    row = random_row(50)
    row[[10, 11]] = row.max() + 1  # a tie at the top
    raw = torch.log_softmax(torch.from_numpy(row).double(), 0)
    chooser = sampler(logprobs=3, repetition_penalty=5.0, presence_penalty=1.0)
    chooser.observe(10)
    chooser.observe(11)
    sampled = choose(chooser, row.copy())
    assert sampled.logprobs is not None
    assert sampled.token not in (10, 11), "the penalty moved the choice away"
    ranks = {token: logprob.rank for token, logprob in sampled.logprobs.items()}
    order = sorted(range(50), key=lambda t: (-row[t], t))
    assert ranks == {t: order.index(t) + 1 for t in {*order[:3], sampled.token}}
    for token, logprob in sampled.logprobs.items():
        assert logprob.logprob == pytest.approx(float(raw[token]), abs=1e-12)


def test_logprobs_zero_gives_the_chosen_token_only() -> None:
    row = random_row(30)
    assert list(top_logprobs(row, 4, 0)) == [4]
    assert len(top_logprobs(row, 4, 30)) == 30


def test_rows_are_used_in_place_and_rows_without_processors_stay_as_they_are() -> None:
    logits = torch.from_numpy(np.stack([random_row(seed=1), random_row(seed=2)]))
    before = logits.clone()
    guard = sampler(ngram_guard=NgramGuard(2, 4))
    best = int(logits[1].argmax())
    for token in (best, best):
        guard.observe(token)
    sampled = Sampler().sample(logits, [sampler(temperature=1.0, top_p=0.5, seed=0), guard])
    assert torch.equal(logits[0], before[0])
    assert torch.isneginf(logits[1, best])
    assert sampled[1].token != best


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "top_k": 3}, {"logprobs": 2}])
def test_bad_logits_are_an_error_of_their_sequence_only(params: dict[str, float]) -> None:
    logits = torch.from_numpy(np.stack([random_row(seed=i) for i in range(4)]))
    logits[0, 9] = float("nan")
    logits[1, 9] = float("inf")
    logits[2, :] = float("-inf")
    found = Sampler().sample(logits, [sampler(**params) for _ in range(4)])
    assert [sampled.token == -1 for sampled in found] == [True, True, True, False]
    assert "NaN for 1 of 200 logits" in str(found[0].error)
    assert "infinite logit" in str(found[1].error)
    assert "every token is forbidden" in str(found[2].error)
    assert found[3].error is None
