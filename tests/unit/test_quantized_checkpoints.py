"""Quantised checkpoints in every format: names, shapes, exact values, pages given back, and small modules at scale."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pagelens.errors import ConfigError, WeightsError
from pagelens.loading import quantized_unpack
from pagelens.loading.checkpoint import Checkpoint, open_checkpoint
from pagelens.loading.quantized import QuantizedCheckpoint, open_weights
from pagelens.loading.qwen3_config import read_text_config
from pagelens.loading.weights import WeightSpec, load_weights
from pagelens.quantization import QuantizedWeight

from ..helpers.checkpoint_files import write_folder
from ..helpers.quantized_checkpoints import FORMATS, load_oracle, make_quantized_checkpoint, pack
from ..helpers.text_models import edit_json

KINDS = {"fp8": "FP8", "gptq_int8": "INT8", "ct_w8": "INT8", "ct_fp8": "FP8"}


def dtype_of(fmt: str) -> str:
    return next((name for prefix, name in KINDS.items() if fmt.startswith(prefix)), "INT4")


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_weight_is_what_the_format_says(fmt: str, tmp_path: Path) -> None:
    meant = make_quantized_checkpoint(tmp_path, fmt)
    with open_checkpoint(tmp_path) as checkpoint:
        read_text_config(checkpoint.config)
        source = open_weights(checkpoint)
        assert isinstance(source, QuantizedCheckpoint)
        assert sorted(source.names()) == sorted(meant)
        for name, expected in meant.items():
            assert source.shape(name) == tuple(expected.shape)
            found = source.tensor(name)
            if not name.endswith("_proj.weight"):
                assert isinstance(found, Tensor)
                assert source.dtype(name) == "BF16"
            else:
                assert isinstance(found, QuantizedWeight)
                assert source.dtype(name) == dtype_of(fmt)
                assert found.values.is_contiguous()
                assert found.scales.is_contiguous()
                assert (found.input_order is not None) == ("act_order" in fmt)
                assert (found.zeros is not None) == (fmt in ASYMMETRIC)
                assert found.activation == {"ct_w8a8": "int8", "ct_fp8_dynamic": "fp8"}.get(fmt)
                assert found.group_size == (expected.shape[1] if fmt in ROWS else 32)
            assert torch.equal(found.float(), expected)
            source.release(name)
            again = source.tensor(name)
            assert torch.equal(again.float(), expected)


ASYMMETRIC = ("gptq_int4_asym", "gptq_int4_v2", "gptq_int8_act_order", "awq", "ct_w4a16_asym")
ROWS = ("ct_w8a16", "ct_w8a8", "ct_fp8_dynamic")


@pytest.mark.parametrize("fmt", ["gptq_int4", "fp8", "ct_w4a16"])
def test_experts_are_modules_like_others(fmt: str, tmp_path: Path) -> None:
    meant = make_quantized_checkpoint(tmp_path, fmt, "qwen3_moe")
    with open_checkpoint(tmp_path) as checkpoint:
        source = open_weights(checkpoint)
        assert set(source.names()) == set(meant)
        names = [name for name in meant if ".experts." in name]
        assert len(names) == 3 * 8 * 3
        for name in names:
            assert torch.equal(source.tensor(name).float(), meant[name])
        assert source.dtype("model.layers.0.mlp.gate.weight") == "BF16"


def test_the_helpers_oracle_has_the_same_weights(tmp_path: Path) -> None:
    meant = make_quantized_checkpoint(tmp_path / "a", "gptq_int4_act_order", "qwen3_moe")
    oracle = load_oracle(tmp_path / "a", meant, tmp_path / "b")
    found = oracle.state_dict()
    assert torch.equal(found["model.layers.1.self_attn.q_proj.weight"], meant["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(
        found["model.layers.2.mlp.experts.down_proj"][5], meant["model.layers.2.mlp.experts.5.down_proj.weight"]
    )


def test_a_plain_checkpoint_is_passed_on_itself(tmp_path: Path) -> None:
    with open_checkpoint(write_folder(tmp_path, {"model.safetensors": {"w": torch.ones(2, 2)}})) as checkpoint:
        assert open_weights(checkpoint) is checkpoint


def test_through_load_weights(tmp_path: Path) -> None:
    """A linear source may be quantised and arrives for the dtype of the model; a source that is not linear may not."""
    meant = make_quantized_checkpoint(tmp_path, "awq")
    name = "model.layers.0.mlp.down_proj.weight"
    shape = tuple(meant[name].shape)
    with open_checkpoint(tmp_path) as checkpoint:
        source = open_weights(checkpoint)
        unused = set(meant) - {name}
        got: list[Any] = []
        spec = WeightSpec("x", (name,), (shape,), frozenset({name}))
        load_weights(source, [spec], unused, torch.float32, lambda _, tensors: got.extend(tensors))
        assert got[0].dtype == torch.float32
        assert torch.equal(got[0].float(), meant[name])
        with pytest.raises(WeightsError, match=r"is quantised \(INT4\), but only linear layers may be"):
            load_weights(source, [WeightSpec("x", (name,), (shape,))], unused, torch.float32, lambda *_: None)


def test_helper_tensors_are_hidden_and_a_bias_is_not(tmp_path: Path) -> None:
    tensors = gptq_module("m") | {"m.bias": torch.ones(8), "n.weight": torch.ones(8, 8), "scales": torch.ones(1)}
    with open_gptq(tmp_path, tensors) as checkpoint:
        source = open_weights(checkpoint)
        assert sorted(source.names()) == ["m.bias", "m.weight", "n.weight", "scales"]
        for hidden in ("m.qweight", "m.scales", "nothing"):
            for ask in (source.shape, source.dtype, source.tensor, source.release):
                with pytest.raises(WeightsError, match=rf"has no tensor '{hidden}'"):
                    ask(hidden)


def gptq_module(name: str) -> dict[str, Tensor]:
    return {
        f"{name}.qweight": torch.zeros(4, 8, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(1, 1, dtype=torch.int32),
        f"{name}.scales": torch.ones(1, 8, dtype=torch.float16),
    }


def open_gptq(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    write_folder(folder, {"model.safetensors": tensors})
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_legacy_files(file: str, text: dict[str, Any], tmp_path: Path) -> None:
    fmt = "gptq_int4" if file == "quantize_config.json" else "awq"
    meant = make_quantized_checkpoint(tmp_path, fmt)
    edit_json(tmp_path / "config.json", quantization_config=...)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(ConfigError, match=r"quantization_config is missing"):
        open_weights(checkpoint)
    edit_json(tmp_path / file, **text)
    name = "model.layers.0.self_attn.q_proj.weight"
    with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(open_weights(checkpoint).tensor(name).float(), meant[name])
    (tmp_path / file).write_text("[]", encoding="utf-8")
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(ConfigError, match=f"{file}: is not a JSON object"):
        open_weights(checkpoint)


def test_groups_of_a_mixed_file(tmp_path: Path) -> None:
    """compressed-tensors with a scheme for each kind of module: by name, by pattern, by class, in this order."""
    rows = {"num_bits": 8, "strategy": "channel"}
    four = {"num_bits": 4, "strategy": "group", "group_size": 32}
    groups = {
        "a": {"targets": ["Linear"], "weights": rows, "format": "int-quantized"},
        "b": {"targets": [r"re:.*\.(down|up)_proj$"], "weights": four, "format": "pack-quantized"},
        "c": {"targets": ["x.up_proj"], "weights": {**four, "group_size": 16}, "format": "pack-quantized"},
    }
    tensors: dict[str, Tensor] = {
        "x.gate_proj.weight": torch.ones(8, 32, dtype=torch.int8),
        "x.gate_proj.weight_scale": torch.ones(8, 1),
    }
    for name, size in (("x.down_proj", 32), ("x.up_proj", 16)):
        tensors |= {
            f"{name}.weight_packed": torch.zeros(8, 4, dtype=torch.int32),
            f"{name}.weight_scale": torch.ones(8, 32 // size),
            f"{name}.weight_shape": torch.tensor([8, 32]),
        }
    write_folder(tmp_path, {"model.safetensors": tensors})
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    edit_json(tmp_path / "config.json", quantization_config=config)
    with open_checkpoint(tmp_path) as checkpoint:
        source = open_weights(checkpoint)
        sizes = {name: source.tensor(name) for name in source.names()}
        found = {name: (w.kind, w.group_size) for name, w in sizes.items() if isinstance(w, QuantizedWeight)}
    assert found == {
        "x.gate_proj.weight": ("int8", 32),
        "x.down_proj.weight": ("int4", 32),
        "x.up_proj.weight": ("int4", 16),
    }
    del groups["a"]
    edit_json(tmp_path / "config.json", quantization_config=config)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(WeightsError, match=r"'x.gate_proj'.*no config group"):
        open_weights(checkpoint)


def test_gptq_rules_for_single_modules(tmp_path: Path) -> None:
    tensors = gptq_module("layers.0.q_proj")
    eight = {
        "layers.1.q_proj.qweight": pack(torch.arange(32).repeat(8, 1).numpy().T, 8, 0),
        "layers.1.q_proj.qzeros": torch.full((2, 2), 0x7F7F7F7F, dtype=torch.int32),
        "layers.1.q_proj.scales": torch.ones(2, 8, dtype=torch.float16),
    }
    config: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    write_folder(tmp_path, {"model.safetensors": tensors | eight})
    config["dynamic"] = {r"-:.*\.2\.": {}, r"+:.*\.1\..*": {"bits": 8, "group_size": 16}, ".*": {}}
    edit_json(tmp_path / "config.json", quantization_config=config)
    with open_checkpoint(tmp_path) as checkpoint:
        source = open_weights(checkpoint)
        weight = source.tensor("layers.1.q_proj.weight")
        assert isinstance(weight, QuantizedWeight)
        assert (weight.kind, weight.group_size, weight.zeros) == ("int8", 16, None)
        assert torch.equal(weight.float(), (torch.arange(32.0) - 128).repeat(8, 1))
        assert source.dtype("layers.0.q_proj.weight") == "INT4"
    config["dynamic"] = {r"-:.*\.1\..*": {}}
    edit_json(tmp_path / "config.json", quantization_config=config)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(WeightsError, match=r"'layers.1.q_proj' has quantised"):
        open_weights(checkpoint)


def test_many_modules_open_quickly(tmp_path: Path) -> None:
    """As many as Qwen3-30B-A3B has, with a rule to match: names are gone through once, not once a module."""
    count = 48 * (4 + 3 * 128)
    tensors: dict[str, Tensor] = {}
    for index in range(count):
        tensors |= gptq_module(f"model.layers.{index % 48}.mlp.experts.{index // 48}.gate_proj")
    with open_gptq(tmp_path, tensors) as checkpoint:
        checkpoint.config["quantization_config"]["dynamic"] = {r"-:.*\.(shared|lm)_[a-z]+$": {}}
        started = time.process_time()
        source = open_weights(checkpoint)
        assert len(source.names()) == count
        elapsed = time.process_time() - started
    assert elapsed < 20, f"{elapsed:.1f} s for {count} modules"  # 1 s here; a quadratic search takes many minutes


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that torch had allocated at a time while `run` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes))


# Times the values as bytes: the values themselves, words that are turned around (half, or one at 8 bits).
PEAKS = {"gptq_int4_act_order": 1.5, "gptq_int8": 2.0, "awq": 1.5, "ct_w4a16_asym": 1.0, "fp8": 0.0, "ct_w8a8": 0.0}


@pytest.mark.parametrize("fmt", PEAKS)
def test_peak_memory_of_one_tensor(fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result, the words once more where they must be turned around, pieces, and scales and zeros of few bytes."""
    n, k, piece = 1024, 2048, 1 << 16
    monkeypatch.setattr(quantized_unpack, "PIECE", piece)
    build, config = FORMATS[fmt]
    parts = build(np.random.default_rng(0), n, k)[0]
    write_folder(tmp_path, {"model.safetensors": {f"m.{role}": part for role, part in parts.items()}})
    edit_json(tmp_path / "config.json", quantization_config=config)
    with open_checkpoint(tmp_path) as checkpoint:
        source = open_weights(checkpoint)
        peak = peak_bytes(lambda: source.tensor("m.weight"))
    grid = n * k // 32
    # A piece takes int64 indexes at most; for each group scales, zeros of 16 bits and what they are made of.
    assert peak <= PEAKS[fmt] * n * k + 12 * piece + 16 * grid
