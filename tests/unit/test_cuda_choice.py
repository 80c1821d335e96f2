"""Which ops run on the CUDA C++ kernels, on a device that is faked and without one."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from pagelens.cli import main
from pagelens.config import CUDA_OPS, EngineConfig
from pagelens.errors import ConfigError, UnsupportedError
from pagelens.ops import OpCase, registry
from pagelens.ops.cuda_choice import BY_DEFAULT, IN_CUDA
from pagelens.ops.registry import OpsTable, resolve_ops

PARTS = {"moe_routing", "grouped_gemm"}


class FakeKernels(ModuleType):
    """The extension where it is built; it computes nothing."""

    def __init__(self, name: str, devices: tuple[int, str] = (1, "a card, sm_90")) -> None:
        super().__init__(name)
        self.found = devices

    def devices(self) -> tuple[int, str]:
        return self.found


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A device, and the extension built for it."""
    pytest.importorskip("triton", reason="triton is not installed: there are wheels for Linux only")
    monkeypatch.setattr(registry, "find_device", lambda name: torch.device("meta"))
    monkeypatch.setitem(sys.modules, "pagelens._cuda", FakeKernels("pagelens._cuda"))
    return monkeypatch


def without_kernels(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, f"pagelens.{name}", None)


def on_cuda(table: OpsTable) -> set[str]:
    return {op for op, backend in table.backend_of.items() if backend == "cuda"}


@pytest.mark.parametrize(
    ("backend", "asked", "expected"),
    [
        ("auto", None, {*BY_DEFAULT, *PARTS}),
        ("auto", "none", set()),
        ("auto", "all", IN_CUDA),
        ("auto", "paged_attention", {"paged_attention"}),
        ("auto", "window_attention, moe_ffn", {"window_attention", "moe_ffn", *PARTS}),
        ("cuda", None, IN_CUDA),
        ("cuda", "conv_downsample", {"conv_downsample"}),
        ("triton", "all", set()),
    ],
)
def test_ops_on_a_card(card: pytest.MonkeyPatch, backend: Any, asked: str | None, expected: set[str]) -> None:
    table = resolve_ops(backend, device="cuda", cuda_ops=asked)
    assert on_cuda(table) == expected
    assert set(table.backend_of.values()) <= {"cuda", "triton", "reference"}
    for op in IN_CUDA if backend != "triton" else ():
        assert [c.backend for c in table.explain() if c.op == op and c.chosen] == [table.backend_of[op]]
    if asked is not None:  # the variable says the same
        card.setenv("PAGELENS_CUDA_OPS", asked)
        assert on_cuda(resolve_ops(backend, device="cuda")) == expected
    assert on_cuda(resolve_ops("auto", device="cuda", cuda_ops="none")) == set()  # the option comes first


def test_packing_goes_with_the_op(card: pytest.MonkeyPatch) -> None:
    table: Any = resolve_ops("auto", device="cuda", cuda_ops="moe_ffn")
    owners = {pack: getattr(table, pack).__self__.name for pack in ("pack_moe", "pack_swiglu", "pack_conv_downsample")}
    assert owners == {"pack_moe": "cuda", "pack_swiglu": "triton", "pack_conv_downsample": "triton"}


def test_decode_steps_are_recorded_with_kernels_of_both(card: pytest.MonkeyPatch) -> None:
    for asked in ("none", "moe_ffn", "all"):
        table: Any = resolve_ops("auto", device="cuda", cuda_ops=asked)
        assert table.new_program.__self__.name == "triton"


def test_what_a_kernel_does_not_take(card: pytest.MonkeyPatch) -> None:
    """By default triton runs it; an op that was asked for by name must run."""
    cases = [OpCase("moe_ffn", torch.float16), OpCase("window_attention", torch.bfloat16, (("head_dim", 48),))]
    table = resolve_ops("auto", cases, device="cuda")
    assert on_cuda(table) == set()
    reasons = {c.op: c.reason for c in table.explain() if c.backend == "cuda"}
    assert reasons["moe_ffn"] == reasons["grouped_gemm"] == "the CUDA kernels take bfloat16, not float16"
    assert on_cuda(resolve_ops("auto", cases, device="cuda", cuda_ops="all")) == IN_CUDA - {
        "moe_ffn",
        "window_attention",
        *PARTS,
    }
    with pytest.raises(UnsupportedError, match="cannot run window_attention: head_dim 48 is not one of"):
        resolve_ops("auto", cases, device="cuda", cuda_ops="window_attention")


def test_without_the_extension_or_a_driver(card: pytest.MonkeyPatch) -> None:
    for kernels in (None, FakeKernels("pagelens._cuda", (0, "no GPU: the driver is too old"))):
        card.setitem(sys.modules, "pagelens._cuda", kernels)
        words = "not built" if kernels is None else "no GPU: the driver is too old"
        table = resolve_ops("auto", device="cuda")
        assert on_cuda(table) == set()
        assert all(words in c.reason for c in table.explain() if c.backend == "cuda")
        for options in ({"backend": "cuda"}, {"backend": "auto", "cuda_ops": "moe_ffn"}):
            with pytest.raises(UnsupportedError, match=words) as caught:
                resolve_ops(device="cuda", **options)  # type: ignore[arg-type]
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cuda_ops": "linear"}, "cuda_ops='linear': 'linear' is not one of window_attention, "),
        ({"cuda_ops": ""}, "cuda_ops=''"),
        ({"backend": "cuda"}, "needs device='cuda'"),
        ({"backend": "cuda-sim", "device": "cuda"}, "runs on the CPU"),
        ({"backend": "cuda-sim", "kv_cache_dtype": "int8"}, "kv_cache_dtype='int8'"),
        ({"backend": "cuda-sim", "dtype": "float16"}, "dtype='float16'"),
    ],
    ids=str,
)
def test_what_does_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig("m", **options).resolve()


def test_the_variable_is_named_in_its_error(card: pytest.MonkeyPatch) -> None:
    card.setenv("PAGELENS_CUDA_OPS", "window_attention,linear")
    with pytest.raises(ConfigError, match="PAGELENS_CUDA_OPS='window_attention,linear': 'linear' is not one of"):
        resolve_ops("auto", device="cuda")


def test_the_simulator_runs_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pagelens._cuda_sim", FakeKernels("pagelens._cuda_sim"))
    table = resolve_ops("cuda-sim")
    assert {op for op, backend in table.backend_of.items() if backend == "cuda-sim"} == IN_CUDA
    assert set(table.backend_of.values()) == {"cuda-sim", "reference"}
    assert resolve_ops("cuda-sim", cuda_ops="none").name == "reference"
    assert len(CUDA_OPS) == len(IN_CUDA - PARTS)
    without_kernels(monkeypatch, "_cuda_sim")
    with pytest.raises(UnsupportedError, match=r"not built .*PAGELENS_CUDA=sim pip install"):
        resolve_ops("cuda-sim")


def test_doctor_says_what_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pagelens._cuda_sim", FakeKernels("pagelens._cuda_sim"))
    monkeypatch.setitem(sys.modules, "pagelens._cuda", FakeKernels("pagelens._cuda", (0, "no GPU: none")))
    monkeypatch.setenv("PAGELENS_BACKEND", "cuda-sim")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["CUDA C++ kernels"] == "built; no GPU: none"
    assert {row["op"] for row in report["ops"] if row["backend"] == "cuda-sim" and row["chosen"]} == IN_CUDA
    without_kernels(monkeypatch, "_cuda")
    monkeypatch.setenv("PAGELENS_BACKEND", "auto")
    assert main(["doctor", "--json"]) == 0
    assert "not built" in json.loads(capsys.readouterr().out)["machine"]["CUDA C++ kernels"]
