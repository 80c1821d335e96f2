"""Presets have the published shapes; random weights are the same for a seed in any order, and of the promised size."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from pagelens.errors import ConfigError, WeightsError
from pagelens.loading.presets import PRESETS, find_description
from pagelens.loading.random_weights import POOL_SIZE, RandomWeights, spread_of
from pagelens.loading.weights import WeightSpec
from pagelens.models.registry import class_of

# qwen3.md section 1.1, "parameters, stored once"; deepseek-ocr.md section 2 without the tensor that is not used.
PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-ocr": (6_672_212_480 - 2 * 1024 * 3 * 14 * 14) // 2,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_published_number_of_parameters(preset: str) -> None:
    description = find_description(preset, random_weights=True)
    assert (description.folder, description.generation) == (None, {})
    network = class_of(description.config)
    specs = network.weight_specs(network.read_config(description.config))
    # By name: a tied table is a source of two parts.
    tensors = {name: shape for spec in specs for name, shape in zip(spec.sources, spec.shapes)}
    assert sum(math.prod(shape) for shape in tensors.values()) == PARAMETERS[preset]
    if preset == "qwen3-30b-a3b":
        assert len(tensors) == 18_867, "qwen3.md section 2"


def specs(*shapes: tuple[int, ...]) -> list[WeightSpec]:
    return [WeightSpec(f"t{i}", (f"layer.{i}.weight",), (shape,)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_depend_on_seed_and_name_alone(dtype: torch.dtype) -> None:
    made = RandomWeights(specs((40, 30), (40, 30), (7,)), dtype, seed=5)
    again = RandomWeights(specs((40, 30)), dtype, seed=5)
    other = RandomWeights(specs((40, 30)), dtype, seed=6)
    assert made.names() == ["layer.0.weight", "layer.1.weight", "layer.2.weight"]
    second, first = made.tensor("layer.1.weight"), made.tensor("layer.0.weight")
    made.release("layer.0.weight")
    assert torch.equal(first, again.tensor("layer.0.weight"))
    assert torch.equal(first, made.tensor("layer.0.weight"))
    assert not torch.equal(first, second)
    assert not torch.equal(first, other.tensor("layer.0.weight"))
    assert (first.shape, first.dtype) == (made.shape("layer.0.weight"), dtype)
    assert made.dtype("layer.0.weight") == {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    assert torch.equal(made.tensor("layer.2.weight"), torch.ones(7, dtype=dtype)), "a norm"
    with pytest.raises(WeightsError, match=r"no tensor 'layer\.9"):
        made.tensor("layer.9.weight")


def test_a_tensor_larger_than_the_pool() -> None:
    """Values have the promised spread to the end, and the rows that lie a pool apart differ."""
    made = RandomWeights(specs((4096, 1100)), torch.float32, seed=0).tensor("layer.0.weight")
    assert made.numel() > POOL_SIZE
    for part in (made[:64], made[-64:]):
        assert float(part.std()) == pytest.approx(1 / math.sqrt(1100), rel=0.02)
        assert abs(float(part.mean())) < 0.001
    distance = POOL_SIZE // 1100
    assert all(not torch.equal(made[i], made[i + d]) for i in range(8) for d in (distance, distance + 1))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_matrices_of_every_size(kind: Literal["int8", "int4"]) -> None:
    """The whole range of values, the spread of a random matrix, the same for a seed and a name."""
    shapes = ((40, 90), (4096, 1100), (3, 1))
    made = RandomWeights(specs(*shapes), torch.float32, seed=3)
    for i, shape in enumerate(shapes):
        weight = made.quantized(f"layer.{i}.weight", kind)
        assert (tuple(weight.shape), weight.kind, weight.dtype) == (shape, kind, torch.float32)
        again = RandomWeights(specs(*shapes), torch.float32, seed=3).quantized(f"layer.{i}.weight", kind)
        assert torch.equal(weight.values, again.values)
    large = made.quantized("layer.1.weight", kind)
    low, high = (-8, 7) if kind == "int4" else (-127, 127)
    assert (int(large.values.min()), int(large.values.max())) == (low, high)
    assert float(large.float().std()) == pytest.approx(1 / math.sqrt(1100), rel=0.01)
    assert not torch.equal(large.values[0], made.quantized("layer.0.weight", kind).values.flatten()[:1100])


def test_spread_of_each_kind() -> None:
    assert spread_of("model.norm.weight", (64,)) is None
    assert spread_of("model.layers.0.self_attn.q_norm.weight", (64,)) is None
    assert spread_of("a.bias", (64,)) == 0.02
    assert spread_of("model.embed_tokens.weight", (96, 64)) == 0.02
    assert spread_of("lm_head.weight", (96, 64)) == 1 / 8
    assert spread_of("conv.weight", (5, 4, 3, 3)) == 1 / 6


def test_a_preset_is_no_checkpoint() -> None:
    with pytest.raises(ConfigError, match=r"'qwen3-8b' is a preset, which has no weights; pass random_weights=True"):
        find_description("qwen3-8b", random_weights=False)
    with pytest.raises(ConfigError, match=r"'qwen3-7b' is neither .*presets for random weights: deepseek-ocr, qwen3-0"):
        find_description("qwen3-7b", random_weights=True)
