"""Quantised checkpoints that are damaged or mislabelled: one clear WeightsError each, headers before data."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pagelens.errors import ConfigError, WeightsError
from pagelens.loading.checkpoint import open_checkpoint
from pagelens.loading.quantized import open_weights
from pagelens.loading.quantized_config import read_quantization
from pagelens.loading.quantized_layouts import COMPRESSED_ROLES, FP8_ROLES, PACKED_ROLES

from ..helpers.checkpoint_files import write_folder
from ..helpers.quantized_checkpoints import FORMATS, fp8
from ..helpers.text_models import edit_json

Tensors = dict[str, Tensor]
N, K = 64, 96


def module(fmt: str, name: str = "m") -> Tensors:
    parts, _ = FORMATS[fmt][0](np.random.default_rng(1), N, K)
    return {f"{name}.{role}": part for role, part in parts.items()}


def write(folder: Path, fmt: str, tensors: Tensors, **changes: Any) -> Path:
    write_folder(folder, {"model.safetensors": tensors})
    edit_json(folder / "config.json", quantization_config={**FORMATS[fmt][1], **changes})
    return folder


def without(role: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(f"m.{role}")


def changed(role: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"m.{role}": change(tensors[f"m.{role}"]).contiguous()})


def added(role: str, value: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"m.{role}": value})


def cut(tensor: Tensor) -> Tensor:
    return tensor[:-1]


# Seen in the headers: what was done to a module of 64 x 96, and what the message must say.
HEADERS: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "gptq no qweight": ("gptq_int4", without("qweight"), "'m.qweight' is missing (there is g_idx, qzeros, scales)"),
    "gptq no scales": ("gptq_int4", without("scales"), "'m.scales' is missing"),
    "gptq no qzeros": ("gptq_int4", without("qzeros"), "'m.qzeros' is missing"),
    "gptq no g_idx": ("gptq_int4_act_order", without("g_idx"), "'m.g_idx' is missing"),
    "gptq scales": ("gptq_int4", changed("scales", cut), "'m.scales' is [2, 64], needs [3, 64] for a matrix [64, 96]"),
    "gptq qzeros": ("gptq_int4", changed("qzeros", torch.t), "'m.qzeros' is [8, 3], needs [3, 8]"),
    "gptq g_idx": ("gptq_int4_act_order", changed("g_idx", cut), "'m.g_idx' is [95], needs [96]"),
    "gptq type": ("gptq_int4", changed("qweight", lambda t: t.long()), "'m.qweight' is I64, needs I32"),
    "gptq scale type": ("gptq_int4", changed("scales", lambda t: t.double()), "'m.scales' is F64, needs BF16 or F16"),
    "gptq outputs": ("gptq_int4", changed("qweight", lambda t: t[:, :-1]), "'m' has 63 outputs, needs a multiple of 8"),
    "gptq inputs": ("gptq_int4", changed("qweight", cut), "'m' has 88 inputs, which group_size=32 does not divide"),
    "gptq rank": ("gptq_int4", changed("qweight", lambda t: t[None]), "'m.qweight' is [1, 12, 64], needs two dim"),
    "gptq empty": ("gptq_int4", changed("qweight", lambda t: t[:0]), "'m.qweight' is [0, 64], needs two dim"),
    "gptq and plain": ("gptq_int4", added("weight", torch.ones(N, K)), "'m.weight' has no meaning beside m.qweight"),
    "awq no qzeros": ("awq", without("qzeros"), "'m.qzeros' is missing"),
    "awq scales": ("awq", changed("scales", torch.t), "'m.scales' is [64, 3], needs [3, 64]"),
    "awq g_idx": ("awq", added("g_idx", torch.zeros(K, dtype=torch.int32)), "'m.g_idx' has no meaning beside"),
    "fp8 no scales": ("fp8", without("weight_scale_inv"), "'m.weight_scale_inv' is missing"),
    "fp8 scales": ("fp8", changed("weight_scale_inv", cut), "'m.weight_scale_inv' is [1, 3], needs [2, 3]"),
    "fp8 scale type": ("fp8", changed("weight_scale_inv", lambda t: t.to(torch.uint8)), "is U8, needs BF16 or F16"),
    "fp8 plain": ("fp8", changed("weight", lambda t: t.float()), "'m.weight' is F32, needs F8_E4M3"),
    "fp8 e5m2": ("fp8", changed("weight", lambda t: t.float().to(torch.float8_e5m2)), "is F8_E5M2, needs F8_E4M3"),
    "fp8 no values": ("fp8", without("weight"), "'m.weight' is missing"),
    "ct no scales": ("ct_w4a16", without("weight_scale"), "'m.weight_scale' is missing"),
    "ct no shape": ("ct_w4a16", without("weight_shape"), "'m.weight_shape' is missing"),
    "ct no zeros": ("ct_w4a16_asym", without("weight_zero_point"), "'m.weight_zero_point' is missing"),
    "ct no order": ("ct_w4a16_act_order", without("weight_g_idx"), "'m.weight_g_idx' is missing"),
    "ct groups": (
        "ct_w4a16",
        changed("weight_scale", lambda t: t[:, :-1]),
        "'m.weight_packed' holds up to 96 inputs a row, but m.weight_scale has 2 groups of 32",
    ),
    "ct rows": ("ct_w4a16", changed("weight_scale", cut), "'m.weight_scale' is [63, 3], needs [64, 3]"),
    "ct zeros": ("ct_w4a16_asym", changed("weight_zero_point", cut), "'m.weight_zero_point' is [7, 3], needs [8, 3]"),
    "ct zeros of symmetric": (
        "ct_w4a16",
        added("weight_zero_point", torch.zeros(8, 3, dtype=torch.int32)),
        "'m.weight_zero_point' has no meaning beside m.weight_packed",
    ),
    "ct int8 scales": ("ct_w8a8", changed("weight_scale", torch.t), "is [1, 64], needs [64, 1] or [64] for"),
    "ct int8 type": ("ct_w8a8", changed("weight", lambda t: t.short()), "'m.weight' is I16, needs I8"),
    "ct unscaled": ("ct_w8a8", without("weight_scale"), "'m.weight_scale' is missing"),
    "ct of another kind": ("ct_fp8_dynamic", changed("weight", lambda t: t.char()), "'m.weight' is I8, needs F8_E4M3"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS, ids=lambda name: name.replace(" ", "_"))
def test_headers(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, damage, message = HEADERS[case]
    tensors = module(fmt)
    damage(tensors)
    with open_checkpoint(write(tmp_path, fmt, tensors)) as checkpoint:
        monkeypatch.setattr(checkpoint, "tensor", lambda name: pytest.fail(f"{name} was read"))
        with pytest.raises(WeightsError, match=re.escape(message)) as caught:
            open_weights(checkpoint)
    assert str(caught.value).startswith("the checkpoint does not fit its quantization_config: ")
    assert "\n" not in str(caught.value)


def with_value(index: tuple[int, ...], value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def with_byte(value: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: with_value((N - 1, K - 1), value)(tensor.view(torch.uint8)).view(tensor.dtype)


# Seen only in the values.
VALUES: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "gptq nan": ("gptq_int4", changed("scales", with_value((2, 63), float("nan"))), "'m.scales' holds NaN or infinity"),
    "awq inf": ("awq", changed("scales", with_value((0, 0), float("inf"))), "'m.scales' holds NaN or infinity"),
    "fp8 nan scale": ("fp8", changed("weight_scale_inv", with_value((1, 2), float("nan"))), "'m.weight_scale_inv' h"),
    "fp8 nan": ("fp8", changed("weight", with_byte(0x7F)), "'m.weight' holds NaN (byte 0x7F or 0xFF)"),
    "fp8 negative nan": ("ct_fp8_dynamic", changed("weight", with_byte(0xFF)), "'m.weight' holds NaN (byte"),
    "ct nan": ("ct_w8a8", changed("weight_scale", with_value((3, 0), float("nan"))), "'m.weight_scale' holds NaN"),
    "g_idx high": ("gptq_int4_act_order", changed("g_idx", with_value((5,), 3)), "'m.g_idx' holds groups 0 to 3; "),
    "g_idx huge": ("gptq_int4_act_order", changed("g_idx", with_value((5,), 2**31 - 1)), "groups 0 to 2147483647;"),
    "g_idx low": ("gptq_int4_act_order", changed("g_idx", with_value((5,), -1)), "'m.g_idx' holds groups -1 to 2"),
    "g_idx unequal": (
        "gptq_int4_act_order",
        changed("g_idx", lambda t: torch.where(torch.arange(K) == (t == 0).nonzero()[0], 1, t).int()),
        "'m.g_idx' gives group 0 31 inputs, needs 32 in every group",
    ),
    "ct order": ("ct_w4a16_act_order", changed("weight_g_idx", with_value((0,), 7)), "'m.weight_g_idx' holds group"),
    "ct shape": ("ct_w4a16", added("weight_shape", torch.tensor([64, 95])), "'m.weight_shape' says [64, 95],"),
    "ct shape of rows": ("ct_w8a16", added("weight_shape", torch.tensor([64, 93])), "says [64, 93]"),
    "ct negative shape": ("ct_w4a16", added("weight_shape", torch.tensor([-64, 96])), "says [-64, 96]"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES, ids=lambda name: name.replace(" ", "_"))
def test_values(case: str, tmp_path: Path) -> None:
    fmt, damage, message = VALUES[case]
    tensors = module(fmt)
    damage(tensors)
    with open_checkpoint(write(tmp_path, fmt, tensors)) as checkpoint:
        source = open_weights(checkpoint)
        with pytest.raises(WeightsError, match=re.escape(message)) as caught:
            source.tensor("m.weight")
    assert "\n" not in str(caught.value)


def refusal(folder: Path) -> str:
    """What is said when the folder is opened."""
    with open_checkpoint(folder) as checkpoint, pytest.raises(WeightsError) as caught:
        open_weights(checkpoint)
    return str(caught.value)


def test_a_group_size_of_another_file(tmp_path: Path) -> None:
    parts = module("gptq_int4")
    message = refusal(write(tmp_path / "64", "gptq_int4", parts, group_size=64))
    assert "'m' has 96 inputs, which group_size=64 does not divide" in message
    message = refusal(write(tmp_path / "16", "gptq_int4", parts, group_size=16))
    assert "is [3, 8], needs [6, 8]" in message


def test_the_method_of_another_file(tmp_path: Path) -> None:
    """Tensors that the method does not know are plain; the model then says that they are left over."""
    message = refusal(write(tmp_path / "awq", "awq", module("gptq_int8")))
    assert "'m' has 24 inputs, which group_size=32 does not divide" in message
    with open_checkpoint(write(tmp_path / "fp8", "fp8", module("gptq_int4"))) as checkpoint:
        assert sorted(open_weights(checkpoint).names()) == ["m.g_idx", "m.qweight", "m.qzeros", "m.scales"]


def test_many_faults_are_counted(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for index in range(30):
        tensors |= module("gptq_int4", f"m{index:02}")
        del tensors[f"m{index:02}.scales"]
    message = refusal(write(tmp_path, "gptq_int4", tensors))
    assert message.count("is missing") == 10
    assert "; and 20 more; " in message


def test_a_matrix_of_absurd_size(tmp_path: Path) -> None:
    tensors = {
        "m.weight": torch.zeros(2**20 + 1, 1, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "m.weight_scale_inv": torch.ones(2**15 + 1, 1),
    }
    message = refusal(write(tmp_path, "fp8", tensors))
    assert "'m' is a matrix [1048577, 1]; the limit is 1048576 a dimension" in message


def test_blocks_larger_than_the_matrix(tmp_path: Path) -> None:
    parts, meant = fp8(np.random.default_rng(0), 5, 7, "weight_scale_inv", (128, 128))
    folder = write(tmp_path, "fp8", {f"m.{r}": p for r, p in parts.items()}, weight_block_size=[2**20, 2**20])
    with open_checkpoint(folder) as checkpoint:
        assert torch.equal(open_weights(checkpoint).tensor("m.weight").float(), meant)


SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
DTYPES = st.sampled_from(
    [torch.int32, torch.float16, torch.int64, torch.int8, torch.float8_e4m3fn, torch.uint8, torch.float32, torch.bool]
)
ROLES = st.sampled_from(sorted(PACKED_ROLES | COMPRESSED_ROLES | FP8_ROLES | {"weight", "bias"}))


@settings(deadline=None, max_examples=150)
@given(fmt=st.sampled_from(sorted(FORMATS)), parts=st.dictionaries(ROLES, st.tuples(SHAPES, DTYPES), max_size=6))
def test_any_tensors_give_a_weight_or_an_error(
    fmt: str, parts: dict[str, tuple[tuple[int, ...], torch.dtype]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever shapes and dtypes stand there: nothing but our own errors, and what opens can be read."""
    tensors = {"x": torch.ones(1), **{f"m.{role}": torch.zeros(shape, dtype=d) for role, (shape, d) in parts.items()}}
    folder = write(tmp_path_factory.mktemp("any"), fmt, tensors)
    with open_checkpoint(folder) as checkpoint:
        try:
            source = open_weights(checkpoint)
        except WeightsError:
            return
        for name in source.names():
            try:
                weight = source.tensor(name)
            except WeightsError:
                continue
            assert tuple(weight.shape) == source.shape(name)


CONFIG_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 200), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_config_gives_a_config_or_an_error(data: Any) -> None:
    """One value at any depth of a good config replaced by anything: read, or refused in one line."""
    raw = copy.deepcopy(FORMATS[data.draw(st.sampled_from(sorted(FORMATS)))][1])
    place: Any = raw
    while True:
        key = data.draw(st.sampled_from(sorted(place))) if isinstance(place, dict) else None
        if key is None or not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(CONFIG_VALUES)
    message = ""
    try:
        read_quantization({"quantization_config": raw})
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
