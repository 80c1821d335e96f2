"""The op `sample`: native chooses the reference's token under every instruction set, whatever the neighbours."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from ops.sample_cases import CUTS, KINDS, REAL_SAMPLES, SMALL_SAMPLES, SampleCase

from pagelens import _native
from pagelens.errors import ShapeError
from pagelens.ops import SamplingCut
from pagelens.ops.native import NativeOps
from pagelens.ops.reference import ReferenceOps


@cache
def expected(case: SampleCase) -> list[int]:
    return ReferenceOps().sample(*case.tensors())


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind: str, isa: str, native: NativeOps) -> None:
    for case in SMALL_SAMPLES:
        if case.kind == kind:
            logits, cuts = case.tensors()
            before = logits.clone()
            assert native.sample(logits, cuts) == expected(case), case.id
            assert torch.equal(logits, before)


@pytest.mark.parametrize("case", REAL_SAMPLES, ids=lambda case: case.id)
def test_equals_the_reference_at_real_size(case: SampleCase, native: NativeOps) -> None:
    logits, cuts = case.tensors()
    for isa in _native.supported_isas():
        _native.set_isa(isa)
        assert native.sample(logits, cuts) == expected(case), isa


def test_a_row_does_not_depend_on_its_neighbours(native: NativeOps) -> None:
    torch.manual_seed(0)
    logits = torch.randn(len(CUTS), 40_000) * 3
    cuts = [cut._replace(uniform=0.37) for cut in CUTS.values()]
    together = native.sample(logits, cuts)
    alone = [native.sample(row[None], [cut])[0] for row, cut in zip(logits, cuts, strict=True)]
    assert together == alone
    with_one_thread = NativeOps(1)
    assert with_one_thread.sample(logits, cuts) == together
    with_one_thread.close()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 70, 199])
@pytest.mark.parametrize("cut", CUTS)
def test_rows_without_a_finite_maximum(bad: float, place: int, cut: str, isa: str, native: NativeOps) -> None:
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    logits[0, place] = bad
    logits[1] = float("-inf")
    cuts = [CUTS[cut]._replace(uniform=0.5)] * 3
    for ops in (native, ReferenceOps()):
        assert [token < 0 for token in ops.sample(logits, cuts)] == [True, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_number_below_1_gives_a_candidate(kind: str, isa: str, native: NativeOps) -> None:
    """Not always the reference's: there the last bits of the sums decide. But never a token that was cut."""
    for cut in CUTS:
        logits, cuts = SampleCase(1000, kind, cut).tensors()
        tokens = native.sample(logits, [cut._replace(uniform=1 - 2.0**-53) for cut in cuts])
        for row, cut, token in zip(logits, cuts, tokens, strict=True):
            least = row.topk(min(cut.top_k, 1000)).values[-1] if cut.top_k else row.min()
            weight = ((row[token] - row.max()).double() / max(cut.temperature, 1e-300)).exp()
            assert row[token] >= least
            assert weight > 0
            assert weight >= cut.min_p


def test_frequencies_follow_the_distribution(native: NativeOps) -> None:
    logits = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125])).repeat(4096, 1)
    uniforms = torch.rand(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).tolist()
    tokens = torch.tensor(native.sample(logits, [SamplingCut(1.0, uniform=u) for u in uniforms]))
    shares = torch.bincount(tokens, minlength=4) / 4096
    # Five standard errors of a share of 0.5 in 4096 draws are 0.039.
    assert (shares - torch.tensor([0.5, 0.25, 0.125, 0.125])).abs().max() < 0.039


def test_wrong_shapes(native: NativeOps) -> None:
    greedy = SamplingCut(0.0)
    for logits in (torch.zeros(2, 5), torch.zeros(1, 5, dtype=torch.bfloat16), torch.zeros(1, 0)):
        with pytest.raises(ShapeError, match=r"logits must be \[1, V\] float32"):
            native.sample(logits, [greedy])
    assert native.sample(torch.zeros(0, 5), []) == []
