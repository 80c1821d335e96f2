"""One backend an op, chosen once: what is chosen, what is said of it, and that a forced backend never falls back."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from pagelens.errors import ConfigError, UnsupportedError
from pagelens.ops import OP_NAMES, OpCase
from pagelens.ops.reference import ReferenceOps
from pagelens.ops.registry import PACKED_BY, SAME_BACKEND, OpsTable, resolve_ops


class FakeNative(ReferenceOps):
    """A native backend that has some ops and refuses some cases; `closed` counts."""

    name = "native"
    IMPLEMENTED: frozenset[str] = frozenset()
    refused: dict[str, str]
    closed = 0

    def supports(self, case: OpCase) -> str | None:
        return self.refused.get(case.op)

    def close(self) -> None:
        type(self).closed += 1


def install(monkeypatch: pytest.MonkeyPatch, ops: set[str], refused: dict[str, str] | None = None) -> type[FakeNative]:
    class Native(FakeNative):
        IMPLEMENTED = frozenset(ops)

    Native.refused = refused or {}
    module: Any = type(sys)("pagelens.ops.native")
    module.NativeOps = lambda num_threads: Native()
    monkeypatch.setitem(sys.modules, "pagelens.ops.native", module)
    return Native


def chosen(table: OpsTable) -> dict[str, str]:
    return {choice.op: choice.backend for choice in table.explain() if choice.chosen}


def reason(table: OpsTable, op: str) -> str:
    return next(choice.reason for choice in table.explain() if choice.op == op and choice.backend == "native")


CASES = [OpCase(op, torch.float32) for op in OP_NAMES]


def test_auto_takes_native_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"linear", "rms_norm"}, {"rms_norm": "rms_norm: odd widths are not done"})
    table = resolve_ops("auto", CASES)
    assert chosen(table) == {op: "native" if op == "linear" else "reference" for op in OP_NAMES}
    assert reason(table, "rms_norm") == "rms_norm: odd widths are not done"
    assert reason(table, "attention") == "native does not have this op yet"
    assert table.backend_of == chosen(table)
    assert table.name == "native+reference"


def test_every_op_has_one_line_a_backend_and_one_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"linear"})
    lines = resolve_ops("auto").explain()
    assert [(line.op, line.backend) for line in lines] == [(op, b) for op in OP_NAMES for b in ("native", "reference")]
    assert all(line.reason for line in lines)
    assert sum(line.chosen for line in lines) == len(OP_NAMES)


def test_packing_goes_with_its_op(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"linear", "conv_downsample"})
    table: Any = resolve_ops("auto")
    for pack, op in PACKED_BY.items():
        assert getattr(table, pack).__self__ is getattr(table, op).__self__
    assert table.pack_linear.__self__.name == "native"
    assert table.pack_moe.__self__.name == "reference"


@pytest.mark.parametrize(
    ("what", "refused"), [(what, op) for what, group in SAME_BACKEND.items() for op in group], ids=str
)
def test_ops_that_share_something_share_a_backend(monkeypatch: pytest.MonkeyPatch, what: str, refused: str) -> None:
    install(monkeypatch, set(OP_NAMES), {refused: "no"})
    table = resolve_ops("auto", CASES)
    assert {table.backend_of[op] for op in SAME_BACKEND[what]} == {"reference"}
    assert table.backend_of["linear"] == "native"
    others = [op for op in SAME_BACKEND[what] if op != refused]
    assert all(f"shares {what} with {refused}" in reason(table, op) for op in others)


def test_a_forced_backend_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    native = install(monkeypatch, {"linear", "rms_norm"}, {"rms_norm": "widths must be even"})
    with pytest.raises(UnsupportedError, match="cannot run rms_norm: widths must be even"):
        resolve_ops("native", CASES)
    assert native.closed == 1
    # What native does not have at all runs on reference, and the report says so.
    table = resolve_ops("native", [OpCase("linear", torch.float32), OpCase("attention", torch.float32)])
    assert table.backend_of["attention"] == "reference"
    assert reason(table, "attention") == "native does not have this op yet"


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pagelens.ops.native", None)
    table = resolve_ops("auto", CASES)
    assert set(chosen(table).values()) == {"reference"}
    assert "not built" in reason(table, "linear")
    with pytest.raises(UnsupportedError, match=r"not built.*pip install"):
        resolve_ops("native", CASES)


def test_reference_on_demand_loads_nothing_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pagelens.ops.native", None)
    table = resolve_ops("reference", CASES)
    assert set(chosen(table).values()) == {"reference"}
    assert reason(table, "linear") == "reference was asked for"


def test_close_is_idempotent(monkeypatch: pytest.MonkeyPatch) -> None:
    native = install(monkeypatch, {"linear"})
    table = resolve_ops("auto")
    table.close()
    table.close()
    assert native.closed == 1


def test_the_real_native_backend_runs_the_decoder() -> None:
    table = resolve_ops("native", num_threads=1)
    decoder = OP_NAMES[: OP_NAMES.index("patch_embed")]
    assert {table.backend_of[op] for op in decoder} == {"native"}
    table.close()


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="backend='gpu' is not one of auto, reference, native"):
        resolve_ops("gpu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown op 'softmax'"):
        resolve_ops("auto", [OpCase("softmax", torch.float32)])
