"""What the tests of the native ops share: every instruction set of this machine, and a backend of two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pagelens import _native
from pagelens.ops.native import NativeOps

CHOSEN = _native.isa()


@pytest.fixture(params=_native.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(CHOSEN)


@pytest.fixture(scope="module")
def native() -> Iterator[NativeOps]:
    ops = NativeOps(2)
    yield ops
    ops.close()
