"""config.json of Qwen3, Qwen3-MoE and Llama -> TextModelConfig: both spellings, and what must be refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pagelens.config import DecoderConfig, MoeConfig, YarnConfig
from pagelens.errors import ConfigError
from pagelens.loading.checkpoint import read_generation_config
from pagelens.loading.presets import PRESETS
from pagelens.loading.qwen3_config import read_text_config
from pagelens.models.qwen3 import TextModel
from pagelens.models.registry import class_of

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def dense() -> dict[str, Any]:
    return dict(PRESETS["qwen3-0.6b"])


def moe() -> dict[str, Any]:
    return dict(PRESETS["qwen3-30b-a3b"])


def test_dense() -> None:
    config = read_text_config(dense())
    assert config.decoder == DecoderConfig(
        vocab_size=151936,
        hidden_size=1024,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=3072,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        qk_norm=True,
        tie_word_embeddings=True,
        max_position_embeddings=40960,
        bos_token_id=None,
        eos_token_ids=(151645,),
    )
    assert (config.torch_dtype, config.model_type) == ("bfloat16", "qwen3")


def test_experts() -> None:
    config = read_text_config(moe()).decoder
    assert config.moe == MoeConfig(128, 8, 768, 0, renormalize=True, routed_scale=1.0, dense_layers=())
    assert (config.num_kv_heads, config.head_dim, config.tie_word_embeddings) == (4, 128, False)


def test_llama_has_defaults_of_its_own() -> None:
    config = read_text_config(LLAMA)
    decoder = config.decoder
    assert (decoder.head_dim, decoder.rope_theta, decoder.qk_norm, decoder.moe) == (64, 10000.0, False, None)
    assert (decoder.eos_token_ids, decoder.rms_norm_eps, config.torch_dtype) == ((2,), 1e-5, "float32")
    del (raw := dict(LLAMA))["num_key_value_heads"]
    assert read_text_config(raw).decoder.num_kv_heads == 9


def test_keys_of_transformers_5() -> None:
    """The same models in the other spelling, as transformers 5.23 writes them."""
    raw = moe()
    expected = read_text_config(raw)
    new = {key: value for key, value in raw.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new["num_local_experts"] = new.pop("num_experts")
    new |= {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}}
    assert read_text_config(new) == expected
    both = {**new, "num_experts": 128}
    assert read_text_config(both) == expected
    with pytest.raises(ConfigError, match=r"num_local_experts=128 is not supported; accepted: .*num_experts \(64\)"):
        read_text_config({**both, "num_experts": 64})

    yarn = read_text_config({**dense(), "rope_scaling": {**YARN, "type": "yarn"}})
    legacy = {key: value for key, value in YARN.items() if key != "rope_type"} | {"type": "yarn"}
    assert read_text_config({**dense(), "rope_scaling": legacy}) == yarn
    without = {key: value for key, value in dense().items() if key not in ("rope_theta", "rope_scaling")}
    assert read_text_config({**without, "rope_parameters": {**YARN, "rope_theta": 1e6}}) == yarn
    assert yarn.decoder.yarn == YarnConfig(4.0, 32768, pytest.approx(1.138629436111989, rel=1e-15))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scaling", "positions", "expected", "limit"),
    [
        ({}, 131072, (4.0, 32768, 1.1386294361119891), 131072),
        ({"factor": None}, 65536, (2.0, 32768, 1.0693147180559945), 65536),
        ({"factor": 2.0}, 131072, (2.0, 32768, 1.0693147180559945), 131072),
        ({"original_max_position_embeddings": None}, 8192, (4.0, 8192, 1.1386294361119891), 32768),
        ({"factor": 1.0}, 40960, (1.0, 32768, 1.0), 40960),
        ({"attention_factor": 1.5}, 40960, (4.0, 32768, 1.5), 131072),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 40960, (4.0, 32768, 1.0), 131072),
        ({"mscale": 2.0}, 40960, (4.0, 32768, 1.1386294361119891), 131072),
    ],
)
def test_yarn(scaling: dict[str, Any], positions: int, expected: tuple[float, int, float], limit: int) -> None:
    raw = {**dense(), "max_position_embeddings": positions, "rope_scaling": {**YARN, **scaling}}
    config = read_text_config(raw).decoder
    yarn = config.yarn
    assert yarn is not None
    found = (yarn.factor, yarn.original_max_position_embeddings, yarn.attention_factor)
    assert found == pytest.approx(expected, rel=1e-12)
    assert config.max_position_embeddings == limit


def test_which_layers_have_experts() -> None:
    raw = {**moe(), "num_hidden_layers": 6}
    layers = {
        (1, ()): (),
        (2, ()): (0, 2, 4),
        (3, (5,)): (0, 1, 3, 4, 5),
        (1, (0, 4)): (0, 4),
    }
    for (step, mlp_only), dense_layers in layers.items():
        config = read_text_config({**raw, "decoder_sparse_step": step, "mlp_only_layers": list(mlp_only)}).decoder
        assert config.moe is not None
        assert config.moe.dense_layers == dense_layers
    assert read_text_config({**raw, "mlp_only_layers": list(range(6))}).decoder.moe is None
    assert read_text_config({**raw, "num_experts": 0}).decoder.moe is None
    assert read_text_config({**raw, "intermediate_size": None}).decoder.intermediate_size == 0
    with pytest.raises(ConfigError, match="intermediate_size is missing"):
        read_text_config({**raw, "intermediate_size": None, "decoder_sparse_step": 2})


def test_end_tokens_come_from_generation_config(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [151645, 151643], "temperature": 0.6}))
    assert read_text_config(dense(), read_generation_config(tmp_path)).decoder.eos_token_ids == (151645, 151643)
    assert read_text_config(dense(), {"temperature": 0.6}).decoder.eos_token_ids == (151645,)
    assert read_text_config({**dense(), "eos_token_id": [3, 4]}).decoder.eos_token_ids == (3, 4)
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id=\[151936\] is not supported"):
        read_text_config(dense(), {"eos_token_id": [151936]})
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json: "):
        read_generation_config(tmp_path)


def test_unknown_and_irrelevant_keys_change_nothing() -> None:
    """qwen3.md section 1.1: Qwen3-Coder's extra keys, a window that is not used, settings of training."""
    extra = {
        "qkv_bias": False,
        "use_qk_norm": True,
        "shared_expert_intermediate_size": 0,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 20,
        "layer_types": ["full_attention"] * 48,
        "router_aux_loss_coef": 0.001,
        "something_new": {"a": 1},
    }
    assert read_text_config({**moe(), **extra}) == read_text_config(moe())


@pytest.mark.parametrize(("raw", "name"), [(dense(), "Qwen3Model"), (moe(), "Qwen3MoeModel"), (LLAMA, "LlamaModel")])
def test_the_decoder_alone_is_an_architecture_too(raw: dict[str, Any], name: str) -> None:
    assert read_text_config({**raw, "architectures": [name]}) == read_text_config(raw)
    assert class_of({**raw, "architectures": [name]}) is TextModel


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another family": ({"model_type": "mistral"}, "model_type='mistral' is not supported; accepted: 'qwen3'"),
    "another architecture": (
        {"architectures": ["Qwen3ForSequenceClassification"]},
        r"architectures=\['Qwen3ForSequenceClassification'\]",
    ),
    "experts under a dense type": (
        {"architectures": ["Qwen3MoeForCausalLM"]},
        r"\['Qwen3ForCausalLM'\] for model_type",
    ),
    "quantised": ({"quantization_config": {"quant_method": "mxfp4"}}, "quant_method='mxfp4' .*use the original"),
    "sliding window": ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window=True"),
    "sliding layers": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types='sliding_attention' is not supported; accepted: full_attention",
    ),
    "dual chunk attention": ({"dual_chunk_attention_config": {"chunk_size": 1}}, "dual_chunk_attention_config"),
    "bias": ({"attention_bias": True}, "attention_bias=True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; accepted: 'silu'"),
    "no qk-norm": ({"use_qk_norm": False}, "use_qk_norm=False"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "linear scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: type='linear'"),
    "llama3 scaling": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
        "rope_parameters: rope_type='llama3' is not supported; accepted: 'default' or 'yarn'",
    ),
    "a factor without a type": ({"rope_scaling": {"factor": 4.0}}, r"rope_scaling: factor=4.0"),
    "two scalings": ({"rope_scaling": YARN, "rope_parameters": YARN}, "both rope_scaling and rope_parameters"),
    "a scaling for each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        r"rope_parameters: full_attention=.* is not supported",
    ),
    "a shrinking factor": ({"rope_scaling": {**YARN, "factor": 0.5}}, r"rope_scaling: factor=0.5 .*1.0 to"),
    "no theta": ({"rope_theta": None}, "rope_theta .* is missing"),
    "no size": ({"hidden_size": None}, "hidden_size is missing"),
    "no length": ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
    "heads do not divide": ({"num_key_value_heads": 3}, "num_attention_heads=16 must be a multiple of .*=3"),
    "odd heads": ({"head_dim": 33}, "head_dim=33 .*even"),
    "heads of no whole size": ({"head_dim": None, "num_attention_heads": 24}, "hidden_size=1024 must be a multiple"),
    "a size that is text": ({"hidden_size": "1024"}, "hidden_size='1024' .*type int"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda name: name.replace(" ", "_"))
def test_refused_by_name(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=rf"config\.json.*{message}"):
        read_text_config({**dense(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ({"num_experts": None}, "num_experts .* is missing"),
        ({"norm_topk_prob": None}, "norm_topk_prob is missing"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ({"num_experts_per_tok": 129}, r"num_experts_per_tok=129 .*at most num_experts \(128\)"),
        ({"mlp_only_layers": [48]}, r"mlp_only_layers=\[48\] .*0 to 47"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ({"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size=512"),
    ],
)
def test_experts_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {message}"):
        read_text_config({**moe(), **changes})
