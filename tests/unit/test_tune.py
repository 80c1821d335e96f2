"""pagelens tune without a card: one clear line, or a dry run through all of its code; choosing and writing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pagelens.cli import main
from pagelens.errors import UnsupportedError
from pagelens.tune import CudaTimer, DryTimer, Trial, choose, prepare_folder, tune, write

NO_GPU = not torch.cuda.is_available()


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU here: nothing to complain of")
def test_no_gpu_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedError, match="no GPU"):
        CudaTimer()
    assert main(["tune"]) != 0
    error = capsys.readouterr().err.strip()
    assert "no GPU" in error
    assert len(error.splitlines()) == 1


def test_a_dry_run_never_overwrites_the_real_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--dry-run"]) != 0
    assert "--output" in capsys.readouterr().err


def test_a_dry_run_covers_every_workload(tmp_path: Path) -> None:
    """In a process of its own, as it imports triton to compile."""
    pytest.importorskip("triton", reason="triton is not installed: there are wheels for Linux only")
    code = "import sys; from pagelens.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "tune", "--dry-run", "--repeats", "2", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "sm_80.json").read_text(encoding="utf-8"))
    assert (found["target"], found["measured"], found["by"]) == ("sm_80", False, "no device: dry run")
    assert {"linear", "window_attention", "paged_attention_decode", "grouped_gemm", "conv"} <= set(found["kernels"])
    assert [rule.get("when") for rule in found["kernels"]["linear"]] == [{"rows": 16}, {"rows": 64}, None]
    assert all("does not run" not in line for rules in found["kernels"].values() for r in rules for line in r["others"])


class BrokenTimer(DryTimer):
    """A card that an illegal access has brought down: every call fails from then on."""

    def seconds(self, call: Any, repeats: int) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")

    def check(self) -> None:
        raise UnsupportedError("the card failed")


def test_a_card_that_fails_ends_the_search() -> None:
    """All candidates would be called slow or impossible, and a file without rules written."""
    pytest.importorskip("triton", reason="triton is not installed: there are wheels for Linux only")
    with pytest.raises(UnsupportedError, match="the card failed"):
        tune(BrokenTimer(), 1, lambda line: None)


def test_a_candidate_that_does_not_run_is_left_out() -> None:
    pytest.importorskip("triton", reason="triton is not installed: there are wheels for Linux only")

    class Narrow(DryTimer):
        def seconds(self, call: Any, repeats: int) -> float:
            from pagelens.kernels import tuning

            if any(config.sizes.get("BLOCK_M", 0) > 64 for config in tuning._trial.values()):
                raise RuntimeError("out of resource: shared memory\nmore")
            return super().seconds(call, repeats)

    found = tune(Narrow(), 1, lambda line: None)
    rules = [rule for rules in found["kernels"].values() for rule in rules]
    assert max(rule.get("BLOCK_M", 0) for rule in rules) == 64
    assert any(line.endswith("does not run: out of resource: shared memory") for r in rules for line in r["others"])


def trial(seconds: float, failure: str | None = None, m: int = 16) -> Trial:
    return Trial({"num_warps": 4, "num_stages": 3}, {"BLOCK_M": m}, seconds, failure)


def test_the_fastest_that_ran_is_kept_with_its_reasons() -> None:
    trials = [trial(3e-6, m=16), trial(1e-6, m=32), trial(0.0, "does not run: out of shared memory", m=64)]
    rule = choose({"rows": 16}, trials)
    assert rule["BLOCK_M"] == 32
    assert rule["when"] == {"rows": 16}
    assert rule["why"] == ["32, 4 warps, 3 stages: 1.0 us"]
    assert rule["others"] == [
        "16, 4 warps, 3 stages: 3.0 us",
        "64, 4 warps, 3 stages: does not run: out of shared memory",
    ]
    assert choose({}, [trial(0.0, "does not run: x")]) == {}


def test_a_written_file_is_read_as_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pagelens.kernels import tuning

    found = {"target": "sm_99", "measured": True, "by": "a card", "kernels": {"linear": [choose({}, [trial(1e-6)])]}}
    assert write(found, tmp_path) == tmp_path / "sm_99.json"
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    ((when, config),) = tuning.load_rules("sm_99")["linear"]
    tuning.load_rules.cache_clear()
    assert when == {}
    assert config.sizes == {"BLOCK_M": 16}


def test_a_folder_that_cannot_hold_the_file_is_found_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pagelens.cli import main

    assert prepare_folder(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    monkeypatch.setattr("pagelens.tune.tune", lambda *_: pytest.fail("something was measured"))
    assert main(["tune", "--dry-run", "--output", str(file)]) == 2
    assert (
        "cannot hold the file (File exists); name a folder that can be written with --output" in capsys.readouterr().err
    )
    assert file.read_text(encoding="utf-8") == "mine"
