"""Probes of memory and arithmetic: they measure something, and what is asked wrongly is said.

An upper limit stands for work that the compiler has removed: that would be done at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pagelens import _native
from pagelens.ops.native import NativeOps

LANES = {"portable": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16}
TERMS = {"float32": 1, "bfloat16": 2, "int8": 4}
MOST_INSTRUCTIONS = 4 * 7e9  # a second and core: far above any processor


@pytest.fixture
def pool() -> Iterator[_native.ThreadPool]:
    pool = _native.ThreadPool(2)
    yield pool
    pool.close()


@pytest.fixture(params=_native.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.mark.parametrize("kind", TERMS)
def test_arithmetic_has_a_plausible_rate(pool: _native.ThreadPool, isa: str, kind: str) -> None:
    rates = _native.probe_flops(pool, kind, seconds=0.01, repeats=2)
    assert len(rates) == 2
    assert all(1e7 < rate < 2 * 2 * LANES[isa] * TERMS[kind] * MOST_INSTRUCTIONS for rate in rates), rates


def test_reading_has_a_plausible_rate(pool: _native.ThreadPool, isa: str) -> None:
    rates = _native.probe_bandwidth(pool, num_bytes=(1 << 26) + 1, repeats=3)
    assert len(rates) == 3
    assert all(1e7 < rate < 2 * 4 * LANES[isa] * MOST_INSTRUCTIONS for rate in rates), rates


def test_arguments_are_checked(pool: _native.ThreadPool) -> None:
    with pytest.raises(ValueError, match="kind must be float32, bfloat16 or int8, got 'fp8'"):
        _native.probe_flops(pool, "fp8")
    for seconds in (0.0, -1.0, 61.0, float("nan")):
        with pytest.raises(ValueError, match="seconds must be above 0 and at most 60"):
            _native.probe_flops(pool, "int8", seconds)
    for repeats in (0, 10001):
        with pytest.raises(ValueError, match="repeats must be between 1 and 10000"):
            _native.probe_flops(pool, "int8", 0.01, repeats)
        with pytest.raises(ValueError, match="repeats must be between 1 and 10000"):
            _native.probe_bandwidth(pool, 1 << 20, repeats)
    for num_bytes in (0, -5, (1 << 20) - 1, (1 << 40) + 1):
        with pytest.raises(ValueError, match=r"num_bytes must be between 2\^20 and 2\^40"):
            _native.probe_bandwidth(pool, num_bytes)


def test_a_closed_pool_probes_nothing() -> None:
    pool = _native.ThreadPool(1)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        _native.probe_flops(pool, "float32")
    with pytest.raises(RuntimeError, match="closed"):
        _native.probe_bandwidth(pool, 1 << 20)


@pytest.mark.parametrize("outs", [1, 40, 3000])
def test_a_read_of_weights_is_recorded_and_timed(isa: str, outs: int) -> None:
    """Its time is that of its bytes: none is done without them, of one line or of many pieces."""
    ops = NativeOps(2)
    packed = ops.pack_linear(torch.zeros(outs, 1024))
    ids, table, out = torch.tensor([0], dtype=torch.int32), torch.zeros(2, 8), torch.empty(1, 8)
    program = ops.new_program()
    program.begin()
    _native.read_weights(ops._pool, packed.handle)
    ops.embedding(ids, table, out=out)
    program.end()
    _native.read_weights(ops._pool, packed.handle)
    assert program.num_calls == 2
    read, lookup = program.timed_replay()
    assert packed.handle.num_bytes / 1e12 < read < 1.0
    assert 0 < lookup < 1.0
    ops.close()


def test_a_timed_replay_ends_at_what_is_bad() -> None:
    ops = NativeOps(1)
    ids, table, out = torch.tensor([0], dtype=torch.int32), torch.zeros(2, 8), torch.empty(1, 8)
    program = ops.new_program()
    program.begin()
    for _ in range(3):
        ops.embedding(ids, table, out=out)
    program.end()
    ids[0] = 2
    assert len(program.timed_replay()) == 1
    assert program.replay() == 0
    ids[0] = 1
    assert len(program.timed_replay()) == 3
    ops.close()
