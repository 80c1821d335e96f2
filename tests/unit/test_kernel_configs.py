"""Tile sizes as data: rules are taken in order, limits hold, what a rule leaves out comes from the kernel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pagelens.kernels import tuning
from pagelens.kernels.launch import Config, LaunchCounter, replaced_runner, start

CPU = torch.device("cpu")
DEFAULT = Config.make(num_warps=4, num_stages=3, BLOCK_M=64, BLOCK_N=32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.load_rules.cache_clear()
    yield tmp_path  # type: ignore[misc]
    tuning.load_rules.cache_clear()


def test_the_first_rule_whose_limits_hold(folder: Path) -> None:
    rules = [{"when": {"rows": 16, "out": 100}, "BLOCK_M": 16, "num_stages": 5}, {"when": {"rows": 64}, "BLOCK_N": 128}]
    (folder / "sm_80.json").write_text(json.dumps({"target": "sm_80", "kernels": {"linear": rules}}), encoding="utf-8")
    with tuning.forced_target("sm_80"):
        first = tuning.choose("linear", CPU, DEFAULT, rows=16, out=100)
        second = tuning.choose("linear", CPU, DEFAULT, rows=16, out=101)
        assert first == Config({"BLOCK_M": 16, "BLOCK_N": 32}, {"num_warps": 4, "num_stages": 5})
        assert second.sizes == {"BLOCK_M": 64, "BLOCK_N": 128}
        assert tuning.choose("linear", CPU, DEFAULT, rows=65, out=1) == DEFAULT
        assert tuning.choose("other", CPU, DEFAULT) == DEFAULT
    assert tuning.choose("linear", CPU, DEFAULT, rows=1, out=1) == DEFAULT  # the CPU's own target has no file here


def test_every_shipped_file_can_be_read() -> None:
    tuning.load_rules.cache_clear()
    files = sorted(tuning.FOLDER.glob("*.json"))
    assert files
    for path in files:
        assert tuning.load_rules(path.stem), path
        assert json.loads(path.read_text(encoding="utf-8"))["target"] == path.stem


def test_launches_can_be_counted_and_empty_grids_start_nothing() -> None:
    def kernel() -> None: ...

    counter = LaunchCounter()
    with replaced_runner(counter):
        start(kernel, (2, 3), (), {}, DEFAULT)
        start(kernel, (2, 0), (), {}, DEFAULT)
    assert counter.names == ["kernel"]
