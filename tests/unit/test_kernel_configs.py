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


# ---- relatives and wide operands -----------------------------------------------------------------------------------
def test_a_target_without_a_file_uses_its_relatives(folder: Path) -> None:
    rules = {"linear": [{"BLOCK_M": 16}]}
    (folder / "sm_89.json").write_text(json.dumps({"target": "sm_89", "kernels": rules}), encoding="utf-8")
    assert tuning.load_rules("sm_86") == tuning.load_rules("sm_89") != {}
    (folder / "sm_86.json").write_text(json.dumps({"target": "sm_86", "kernels": {}}), encoding="utf-8")
    tuning.load_rules.cache_clear()
    assert tuning.load_rules("sm_86") == {}
    assert tuning.load_rules("sm_75") == {}


def test_every_relative_has_a_file() -> None:
    for target, relative in tuning.LIKE.items():
        assert (tuning.FOLDER / f"{relative}.json").is_file()
        assert not (tuning.FOLDER / f"{target}.json").is_file()


def test_wide_operands_get_smaller_tiles() -> None:
    config = Config.make(num_warps=4, num_stages=4, BLOCK_M=64, BLOCK_K=32)
    with tuning.forced_target("sm_89"):
        assert tuning.fitted(config, CPU, "BLOCK_K", 1) == config
        assert tuning.fitted(config, CPU, "BLOCK_K", 2).sizes == {"BLOCK_M": 64, "BLOCK_K": 16}
        smallest = tuning.fitted(config, CPU, "BLOCK_K", 8)
    assert smallest == Config.make(num_warps=4, num_stages=1, BLOCK_M=64, BLOCK_K=16)
    assert tuning.fitted(config, CPU, "BLOCK_K", 2) == config  # interpreted
