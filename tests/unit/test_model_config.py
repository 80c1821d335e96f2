"""config.json -> DeepseekOcrConfig: the real file, the scaled one, and every value that must be refused by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from pagelens.config import ClipConfig, DecoderConfig, MoeConfig, ProcessorConfig, SamConfig
from pagelens.errors import ConfigError
from pagelens.loading.config_reader import ConfigReader
from pagelens.loading.model_config import read_model_config

from ..helpers.checkpoint_files import random_checkpoint_tool, read_data


def real() -> dict[str, Any]:
    return read_data("checkpoint_deepseek_ocr_config.json")


def demo() -> dict[str, Any]:
    return read_data("checkpoint_demo_config.json")


def test_the_real_config() -> None:
    """The numbers of deepseek-ocr.md sections 1.2 and 1.3."""
    config = read_model_config(real())
    assert config.sam == SamConfig()
    assert config.sam == SamConfig(768, 12, 12, 14, (2, 5, 8, 11), 1024, 16, 4.0, 256, (512, 1024), 1e-6)
    assert config.clip == ClipConfig() == ClipConfig(1024, 24, 16, 4.0, 224, 14, 1e-5)
    assert config.decoder == DecoderConfig(
        vocab_size=129280,
        hidden_size=1280,
        num_layers=12,
        num_heads=10,
        num_kv_heads=10,
        head_dim=128,
        intermediate_size=6848,
        moe=MoeConfig(64, 6, 896, 1792, renormalize=False, routed_scale=1.0, dense_layers=(0,)),
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        qk_norm=False,
        tie_word_embeddings=False,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_ids=(1,),
    )
    assert config.processor == ProcessorConfig(1024, 640, True, 2, 9, None, {}, scaled=False)
    assert config.image_token_id is None
    assert config.torch_dtype == "bfloat16"


def test_the_tool_writes_the_real_config() -> None:
    assert read_model_config(random_checkpoint_tool().DEEPSEEK_OCR) == read_model_config(real())


def test_the_scaled_config() -> None:
    config = read_model_config(demo())
    assert config.sam == SamConfig(128, 4, 4, 7, (1, 3), 256, 16, 4.0, 64, (128, 256), 1e-6)
    assert config.clip == ClipConfig(256, 2, 8, 4.0, 16, 4, 1e-5)
    assert (config.decoder.head_dim, config.decoder.num_layers, config.decoder.vocab_size) == (32, 4, 384)
    assert config.decoder.moe == MoeConfig(8, 2, 96, 192, dense_layers=(0,))
    assert config.image_token_id == 3
    prompts = {"plain": "\nFree OCR.", "md": "\nConvert the document to markdown."}
    assert config.processor == ProcessorConfig(192, 192, False, 2, 4, None, prompts, scaled=True)


def test_language_config_comes_first_and_the_top_level_fills_in() -> None:
    raw = real()
    raw["num_hidden_layers"] = 99
    assert read_model_config(raw).decoder.num_layers == 12
    del raw["language_config"]["num_hidden_layers"]
    assert read_model_config(raw).decoder.num_layers == 99
    del raw["language_config"]
    assert read_model_config(raw).decoder.hidden_size == 1280
    for key in ("num_hidden_layers", "hidden_size"):
        broken = real()
        del broken[key], broken["language_config"][key]
        with pytest.raises(ConfigError, match=f"language_config: {key} is missing"):
            read_model_config(broken)


def test_the_zeros_and_the_wrong_ratio_are_not_sizes() -> None:
    raw = real()
    raw["vision_config"]["mlp_ratio"] = 99.0
    raw["language_config"] |= {"v_head_dim": 0, "qk_rope_head_dim": 0, "qk_nope_head_dim": 0}
    config = read_model_config(raw)
    assert config.decoder.head_dim == 128
    assert config.sam.mlp_ratio == config.clip.mlp_ratio == 4.0
    raw["language_config"]["v_head_dim"] = 128
    assert read_model_config(raw) == config


def test_optional_values_are_read() -> None:
    raw = demo()
    raw["language_config"] |= {
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "eos_token_id": [1, 2],
        "first_k_dense_replace": 2,
        "n_shared_experts": None,
    }
    raw["processor"] |= {"modes": ["base", "tiny"], "max_crops": 6, "min_crops": 1, "crop_mode": True, "base_size": 256}
    raw["vision_config"]["width"]["sam_vit_b"]["mlp_ratio"] = 2
    config = read_model_config(raw)
    assert (config.decoder.rms_norm_eps, config.decoder.rope_theta) == (1e-5, 50000.0)
    assert isinstance(config.decoder.rope_theta, float)
    assert config.decoder.moe == MoeConfig(8, 2, 96, 0, renormalize=True, dense_layers=(0, 1))
    assert config.decoder.tie_word_embeddings
    assert config.decoder.eos_token_ids == (1, 2)
    assert config.sam.mlp_ratio == 2.0
    assert config.processor.modes == ("base", "tiny")
    assert (config.processor.base_size, config.processor.min_crops, config.processor.max_crops) == (256, 1, 6)


def test_sam_size_falls_back_to_the_vision_config() -> None:
    raw = demo()
    del raw["vision_config"]["width"]["sam_vit_b"]["image_size"]
    assert read_model_config(raw).sam.image_size == 256


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [("torch_dtype", "float32", "float32"), ("torch_dtype", "float16", "float32"), ("dtype", "float32", "float32")],
)
def test_dtype(key: str, value: str, expected: str) -> None:
    raw = real()
    del raw["torch_dtype"]
    assert read_model_config(raw).torch_dtype == "bfloat16"
    assert read_model_config({**raw, key: value}).torch_dtype == expected


def test_rope_parameters_of_newer_files() -> None:
    raw = real()
    raw["language_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert read_model_config(raw).decoder.rope_theta == 5e5
    raw["language_config"]["rope_parameters"]["rope_type"] = "yarn"
    with pytest.raises(ConfigError, match=r"rope_parameters: rope_type='yarn' is not supported"):
        read_model_config(raw)


REFUSED_LANGUAGE = {
    "use_mla": True,
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "scoring_func": "sigmoid",
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "rope_scaling": {"type": "yarn", "factor": 4},
    "moe_layer_freq": 2,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 64,
    "head_dim": 64,
    "lm_head": False,
    "rm_head": True,
    "sliding_window": 128,
    "sliding_window_size": 128,
}


@pytest.mark.parametrize("key", REFUSED_LANGUAGE)
def test_unimplemented_language_values_are_refused_by_name(key: str) -> None:
    """In language_config, and at the top level alone."""
    for nested in (True, False):
        raw = real()
        raw["language_config"].pop(key, None)
        (raw["language_config"] if nested else raw)[key] = REFUSED_LANGUAGE[key]
        with pytest.raises(ConfigError, match=f"language_config: {key}=.* is not supported; accepted: "):
            read_model_config(raw)


def sam(raw: dict[str, Any]) -> dict[str, Any]:
    return raw["vision_config"]["width"]["sam_vit_b"]  # type: ignore[no-any-return]


def clip(raw: dict[str, Any]) -> dict[str, Any]:
    return raw["vision_config"]["width"]["clip-l-14-224"]  # type: ignore[no-any-return]


def language(raw: dict[str, Any]) -> dict[str, Any]:
    return raw["language_config"]  # type: ignore[no-any-return]


def projector(raw: dict[str, Any]) -> dict[str, Any]:
    return raw["projector_config"]  # type: ignore[no-any-return]


def processor(raw: dict[str, Any]) -> dict[str, Any]:
    return raw.setdefault("processor", {})  # type: ignore[no-any-return]


def top(raw: dict[str, Any]) -> dict[str, Any]:
    return raw


Part = Callable[[dict[str, Any]], dict[str, Any]]
BAD: list[tuple[Part, str, Any, str]] = [
    (top, "model_type", "qwen3", "model_type='qwen3'"),
    (top, "model_type", None, "model_type is missing"),
    (top, "architectures", ["DeepseekVLV2ForCausalLM"], "architectures="),
    (top, "quantization_config", {"quant_method": "exl9"}, "quantization_config: quant_method='exl9'"),
    (top, "torch_dtype", "float64", "torch_dtype='float64'"),
    (top, "image_token_id", 129280, "image_token_id=129280 .* 0 to 129279"),
    (top, "image_token_id", -1, "image_token_id=-1"),
    (top, "vision_config", [], "vision_config="),
    (top, "language_config", "x", "language_config='x'"),
    (language, "hidden_size", 0, "hidden_size=0"),
    (language, "hidden_size", 2**20 + 10, "hidden_size=1048586"),
    (language, "hidden_size", 1281, "hidden_size=1281 must be a multiple of num_attention_heads=10"),
    (language, "hidden_size", True, "hidden_size=True"),
    (language, "hidden_size", 1280.0, "hidden_size=1280.0"),
    (language, "hidden_size", "1280", "hidden_size='1280'"),
    (language, "hidden_size", [1280], "hidden_size="),
    (language, "hidden_size", 10**300, "hidden_size=1000"),
    (language, "hidden_size", 1290, "a head size that is even"),
    (language, "num_key_value_heads", 3, "num_attention_heads=10 must be a multiple of num_key_value_heads=3"),
    (language, "num_hidden_layers", 100_000, "num_hidden_layers=100000"),
    (language, "vocab_size", 2**21, "vocab_size="),
    (language, "num_experts_per_tok", 65, "at most n_routed_experts"),
    (language, "n_routed_experts", None, "n_routed_experts is missing"),
    (language, "first_k_dense_replace", 13, "first_k_dense_replace=13"),
    (language, "rms_norm_eps", "1e-6", "rms_norm_eps='1e-6'"),
    (language, "rms_norm_eps", float("nan"), "rms_norm_eps=nan"),
    (language, "rope_theta", float("inf"), "rope_theta=inf"),
    (language, "rope_theta", 10**400, "rope_theta=1000"),
    (language, "eos_token_id", [1, 129280], "eos_token_id="),
    (language, "eos_token_id", "1", "eos_token_id='1'"),
    (language, "max_position_embeddings", 2**25, "max_position_embeddings="),
    (sam, "heads", 5, "width=768 must be a multiple of heads=5"),
    (sam, "image_size", 1000, "image_size=1000 must be a multiple of patch_size=16"),
    (sam, "global_attn_indexes", [2, 12], "global_attn_indexes="),
    (sam, "global_attn_indexes", [2, "5"], "global_attn_indexes='5'"),
    (sam, "global_attn_indexes", 2, "a list of int"),
    (sam, "layers", 6, "global_attn_indexes=|global_attn_indexes is missing"),
    (sam, "downsample_channels", [512], "two channel counts"),
    (sam, "downsample_channels", [512, 896], "must equal the last of sam_vit_b.downsample_channels"),
    (sam, "mlp_ratio", 1.0001, "mlp_ratio=1.0001"),
    (sam, "mlp_ratio", -4, "mlp_ratio=-4"),
    (sam, "window_size", 0, "window_size=0"),
    (clip, "heads", 7, "width=1024 must be a multiple of heads=7"),
    (clip, "width", 2048, "width=2048 must equal"),
    (clip, "image_size", 225, "image_size=225 must be a multiple of patch_size=14"),
    (projector, "projector_type", "mlp_gelu", "projector_type='mlp_gelu'"),
    (projector, "input_dim", 896, "input_dim=896 .* accepted: 2048"),
    (projector, "n_embed", 896, "n_embed=896 .* accepted: 1280"),
    (processor, "base_size", 1000, "base_size=1000 must be a multiple of patch_size \\* 4=64"),
    (processor, "image_size", 64 * 1024, "image_size=65536"),
    (processor, "patch_size", 14, "patch_size=14"),
    (processor, "downsample_ratio", 2, "downsample_ratio=2"),
    (processor, "image_mean", [0.48, 0.45, 0.4], "image_mean="),
    (processor, "image_std", [0.5], "image_std="),
    (processor, "min_crops", 0, "min_crops=0"),
    (processor, "max_crops", 1, "max_crops=1 .* 2 to 32"),
    (processor, "max_crops", 1000, "max_crops=1000"),
    (processor, "crop_mode", 1, "crop_mode=1"),
    (processor, "modes", "base", "modes='base'"),
    (processor, "modes", [1], "modes=1"),
    (processor, "prompts", {"plain": 3}, "prompts.plain=3"),
]


@pytest.mark.parametrize(("part", "key", "value", "message"), BAD, ids=lambda x: getattr(x, "__name__", None))
def test_bad_values_are_refused_by_name(part: Part, key: str, value: Any, message: str) -> None:
    raw = real()
    part(raw)[key] = value
    with pytest.raises(ConfigError, match=message) as caught:
        read_model_config(raw)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_another_depth_needs_its_own_global_layers() -> None:
    raw = real()
    del sam(raw)["global_attn_indexes"]
    assert read_model_config(raw).sam.global_attn_indexes == (2, 5, 8, 11)
    sam(raw)["layers"] = 24
    with pytest.raises(ConfigError, match="global_attn_indexes is missing"):
        read_model_config(raw)


def test_renormalised_weights_with_a_scale_are_refused() -> None:
    raw = real()
    language(raw).update(norm_topk_prob=True, routed_scaling_factor=2.5)
    with pytest.raises(ConfigError, match=r"routed_scaling_factor=2.5 .*norm_topk_prob"):
        read_model_config(raw)
    language(raw)["norm_topk_prob"] = False
    moe = read_model_config(raw).decoder.moe
    assert moe is not None
    assert moe.routed_scale == 2.5


def test_unknown_keys_are_ignored_with_a_debug_log(caplog: pytest.LogCaptureFixture) -> None:
    raw = real()
    raw["brand_new"] = {"deep": 1}
    language(raw)["aux_loss_alpha"] = 0.001
    sam(raw)["colour"] = "blue"
    with caplog.at_level(logging.DEBUG, logger="pagelens"):
        assert read_model_config(raw) == read_model_config(real())
    text = caplog.text
    assert "config.json: key 'brand_new' is not used" in text
    assert "config.json.language_config: key 'aux_loss_alpha' is not used" in text
    assert "sam_vit_b: key 'colour' is not used" in text
    for known in ("hidden_size", "mlp_ratio", "use_mla", "processor"):
        assert f"key '{known}'" not in text


def test_the_result_is_frozen() -> None:
    config = read_model_config(real())
    with pytest.raises(FrozenInstanceError):
        config.decoder.hidden_size = 1  # type: ignore[misc]


def test_reader_lists_and_null() -> None:
    reader = ConfigReader({"a": None, "b": [1, 2], "c": False}, "x")
    assert reader.get("a", int, 5) == 5
    assert reader.get("b", (int,), ()) == (1, 2)
    assert reader.get("c", bool, True) is False
    assert not reader.has("a")
    with pytest.raises(ConfigError, match="x: a is missing"):
        reader.require("a", int)
    with pytest.raises(ConfigError, match="x: c=False is not supported; accepted: a value of type int"):
        reader.require("c", int)
