"""Decode steps that are replayed give what computing them gives, and are computed again when anything has moved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.tiny_models import EVEN, Session, ints, make_batch, make_cache, random_tensors
from torch import Tensor

from pagelens.errors import EngineClosedError, ShapeError
from pagelens.models.deepseek_ocr import DeepseekOcr
from pagelens.ops.registry import as_ops, resolve_ops
from pagelens.types import ForwardBatch

TABLES = [[0, 1, 2], [5, 4, 3]]


class CountingOps:
    """The ops of a table; counts calls that come from Python."""

    def __init__(self, table: Any) -> None:
        self._table, self.calls = table, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._table, name)
        if name not in ("rms_norm", "linear", "moe_ffn", "swiglu_ffn", "paged_attention"):
            return found

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return found(*args, **kwargs)

        return counted


@pytest.fixture(params=["native", "reference"])
def model(request: pytest.FixtureRequest) -> Iterator[DeepseekOcr]:
    table = resolve_ops(request.param, DeepseekOcr.op_cases(EVEN, torch.float32), num_threads=2)
    ops: Any = CountingOps(as_ops(table))
    yield DeepseekOcr.from_tensors(EVEN, random_tensors(EVEN), torch.float32, ops)
    table.close()


class Steps:
    """Decode steps of two sequences in one set of tensors, as the engine makes them."""

    def __init__(self, model: DeepseekOcr) -> None:
        self.model, self.lengths = model, [4, 2]
        self.cache = make_cache(model.decoder.config, 8, 8, torch.float32)
        model.forward(make_batch([([0, 5, 9, 33], 0), ([0, 61], 0)], TABLES, 8), self.cache)
        self.batch = make_batch([([1], 4), ([1], 2)], TABLES, 8)

    def fill(self, tokens: tuple[int, int]) -> ForwardBatch:
        fresh = make_batch([([t], n) for t, n in zip(tokens, self.lengths)], TABLES, 8)
        for name in ("token_ids", "positions", "slots", "context_lens"):
            getattr(self.batch, name).copy_(getattr(fresh, name))
        return self.batch

    def step(self, tokens: tuple[int, int], cache: Any = None) -> Tensor:
        logits = self.model.forward(self.fill(tokens), cache or self.cache)
        self.lengths = [n + 1 for n in self.lengths]
        return logits


def fresh_step(model: DeepseekOcr, steps: Steps, tokens: tuple[int, int]) -> Tensor:
    """The same step from tensors of its own, which no program knows."""
    batch = make_batch([([t], n) for t, n in zip(tokens, steps.lengths)], TABLES, 8)
    return model.forward(batch, steps.cache)


def calls(model: DeepseekOcr) -> int:
    return model.ops.calls  # type: ignore[attr-defined]


def test_a_replay_is_the_step(model: DeepseekOcr) -> None:
    steps = Steps(model)
    steps.step((7, 8))
    for tokens in ((9, 10), (11, 3), (0, 0)):
        expected = fresh_step(model, steps, tokens)
        before = calls(model)
        result = steps.step(tokens)
        assert torch.equal(result, expected)
        made = calls(model) - before
        # The head is not replayed: its result is new memory.
        assert made == 1 if model.ops.new_program() is not None else made > 10


def test_a_bad_id_in_a_replay_is_the_error_it_would_be(model: DeepseekOcr) -> None:
    steps = Steps(model)
    steps.step((7, 8))
    with pytest.raises(ShapeError, match="embedding"):
        steps.step((7, EVEN.decoder.vocab_size))
    expected = fresh_step(model, steps, (3, 4))
    assert torch.equal(steps.step((3, 4)), expected)


def test_a_larger_pass_in_between_moves_the_scratch_memory(model: DeepseekOcr) -> None:
    steps = Steps(model)
    steps.step((7, 8))
    other = Session(model)
    other.feed(list(range(60)))
    expected = fresh_step(model, steps, (9, 10))
    assert torch.equal(steps.step((9, 10)), expected)
    assert torch.equal(steps.step((5, 6)), steps.model.forward(again(steps, (5, 6)), steps.cache))


def again(steps: Steps, tokens: tuple[int, int]) -> ForwardBatch:
    """The step that was just made, once more."""
    return make_batch([([t], n - 1) for t, n in zip(tokens, steps.lengths)], TABLES, 8)


def test_another_cache_is_another_program(model: DeepseekOcr) -> None:
    steps = Steps(model)
    steps.step((7, 8))
    other = make_cache(model.decoder.config, 8, 8, torch.float32)
    for mine, theirs in zip((*steps.cache.keys, *steps.cache.values), (*other.keys, *other.values)):
        theirs.copy_(mine)
    first = steps.step((9, 10))
    steps.lengths = [n - 1 for n in steps.lengths]
    assert torch.equal(steps.step((9, 10), other), first)
    assert torch.equal(other.keys[0].nan_to_num(), steps.cache.keys[0].nan_to_num()), "unused places are NaN"


def test_other_rows_are_another_program(model: DeepseekOcr) -> None:
    """Logits of fewer rows, in the same memory: what picks the rows out is recorded, too."""
    steps = Steps(model)
    steps.step((7, 8))
    expected = fresh_step(model, steps, (9, 10))
    batch = steps.fill((9, 10))
    for count in (1, 2, 0, 1):
        fewer = replace(batch, logit_rows=batch.logit_rows[:count])
        torch.testing.assert_close(steps.model.forward(fewer, steps.cache), expected[:count])


def test_a_closed_pool_ends_replays_too() -> None:
    table = resolve_ops("native", DeepseekOcr.op_cases(EVEN, torch.float32), num_threads=1)
    steps = Steps(DeepseekOcr.from_tensors(EVEN, random_tensors(EVEN), torch.float32, as_ops(table)))
    steps.step((7, 8))
    table.close()
    with pytest.raises(EngineClosedError):
        steps.step((9, 10))


def test_a_program_holds_the_calls_between_begin_and_end() -> None:
    table = resolve_ops("native", num_threads=1)
    program = table.new_program()
    program.begin()
    as_ops(table).embedding(ints([0]), torch.zeros(2, 8))
    program.end()
    as_ops(table).embedding(ints([1]), torch.zeros(2, 8))
    assert program.num_calls == 1
    assert resolve_ops("reference").new_program() is None
    table.close()
