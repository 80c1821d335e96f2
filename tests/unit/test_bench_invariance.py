"""benchmarks/bench_invariance.py without its second build: the arithmetic of its table, and its refusals."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.text_models import make_oracle, save

from pagelens import _native

ROOT = Path(__file__).resolve().parents[2]
CHOSEN = _native.isa()


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The module, with the benchmarks beside it importable, as in the benchmark itself."""
    spec = importlib.util.spec_from_file_location("bench_invariance", ROOT / "benchmarks" / "bench_invariance.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.insert(0, str(ROOT))
    yield module
    sys.path.remove(str(ROOT))
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny Qwen3; what benchmarks/peers/ours.py is told of it."""
    folder = save(make_oracle("Qwen3ForCausalLM", max_position_embeddings=640), tmp_path_factory.mktemp("tiny"))
    return {"model": str(folder), "threads": 2}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    _native.set_isa(CHOSEN)


def test_a_cost_is_the_median_of_ratios_of_pairs(bench: ModuleType) -> None:
    pairs = [(1.0, 1.0), (2.2, 2.0), (3.3, 3.0), (1.2, 1.0), (0.9, 1.0)]
    row = bench.row("bf16", "decode", pairs)
    assert row == ("bf16", "decode", "1200.00 ms", "1000.00 ms", "+10.0 % *", "-10.0 to +20.0")
    text = bench.table([row, bench.row("int8", "prefill", [(1.0, 1.0)] * 5)])
    assert text.endswith("* over 5 %: bf16 decode")
    assert "+0.0 % |" in text.replace("  ", " ").replace("  ", " ")
    assert bench.table([bench.row("int8", "prefill", [(1.04, 1.0)])]).endswith("no cost is over 5 %")


@pytest.mark.parametrize(("samples", "ranks"), [(1, (0, 0)), (5, (0, 4)), (10, (1, 8)), (100, (39, 60))])
def test_the_range_of_a_median(bench: ModuleType, samples: int, ranks: tuple[int, int]) -> None:
    """By the tables of the sign test: 10 samples, from the second to the ninth; 100, from the 40th to the 61st."""
    assert bench.median_range(list(range(samples))) == ranks


def test_the_two_orders_take_turns(bench: ModuleType) -> None:
    calls: list[str] = []
    pairs = bench.in_turns(lambda: calls.append("call"), ("fixed", "free"), 3, calls.append)
    assert calls == ["fixed", "call", "free", "call", "free", "call", "fixed", "call", "fixed", "call", "free", "call"]
    assert len(pairs) == 3


def test_an_engine_is_measured(
    bench: ModuleType, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workloads = [bench.Workload(3, pairs=2), bench.Workload(2, batch=4, pairs=2)]
    workloads.append(bench.Workload(8, prefill=True, pairs=1))
    assert bench.run_engine("bf16", model, workloads, (CHOSEN, CHOSEN)) == []
    assert f"not timed, as {CHOSEN} gives the same bits" in capsys.readouterr().out
    monkeypatch.setattr(bench, "bits_that_differ", lambda *_: (0, 1))
    rows = bench.run_engine("int8-cache", model, workloads, (CHOSEN, "portable"))
    assert [row[1] for row in rows] == ["decode at depth 3", "decode at depth 2, 4 sequences", "prefill of 8"]
    assert all(float(row[2].removesuffix(" ms")) > 0 for row in rows)
    monkeypatch.setattr(bench, "bits_that_differ", lambda *_: (1, 1))
    with pytest.raises(SystemExit, match="not batch invariant"):
        bench.run_engine("bf16", model, workloads, (CHOSEN, CHOSEN))


def test_free_order_is_in_no_normal_build() -> None:
    assert not any("free" in name for name in (*_native.compiled_isas(), *_native.supported_isas()))
    with pytest.raises(ValueError, match="is not an instruction set"):
        _native.set_isa("portable_free")


def test_the_build_names_a_set_that_it_does_not_know() -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "build/free_order"]
    environment = {**os.environ, "PAGELENS_FREE_ORDER": "mmx"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "PAGELENS_FREE_ORDER names 'mmx', which is not built; built are portable" in result.stderr
