"""Activations that are rounded to int8 in groups, where the values are at the edges of their types."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ops.case import F32, difference
from ops.quantized_cases import OWN_INT4, OWN_INT8, QuantizedLinearCase, Recipe

from pagelens import _native
from pagelens.ops.native import NativeOps
from pagelens.ops.reference import ReferenceOps

CHOSEN = _native.isa()


@pytest.fixture(params=_native.supported_isas())
def native(request: pytest.FixtureRequest) -> Iterator[NativeOps]:
    _native.set_isa(request.param)
    ops = NativeOps(2)
    yield ops
    ops.close()
    _native.set_isa(CHOSEN)


@pytest.mark.parametrize("recipe", [OWN_INT8, OWN_INT4], ids=lambda recipe: recipe.name)
def test_rounded_activations_at_the_edges_equal_the_reference(recipe: Recipe, native: NativeOps) -> None:
    """Zeros, subnormal, huge and tied values round alike; NaN and infinity make their own row NaN, not others."""
    case = QuantizedLinearCase(F32, rows=8, width=136, out=40, recipe=recipe)
    x, weight, _, _ = case.tensors()
    x[0], x[1], x[2] = 0.0, x[1] * 1e-40, x[2] * 1e30
    x[3, :64] = 0.0
    x[4], x[4, ::8] = torch.arange(136) % 127 + 0.5, 127.0  # a scale of 1, and ties
    x[5, 70], x[6, 3] = torch.nan, -torch.inf
    result, wanted = (o.linear(x, o.pack_linear(weight)) for o in (native, ReferenceOps()))
    for row in range(8):
        problem = difference(result[row], wanted[row], case)
        assert problem is None, f"row {row}: {problem}"
    assert not result[:2].any()
    assert result[5:7].isnan().all()
    assert result[[2, 3, 4, 7]].isfinite().all()
