"""config.json of Qwen3, Qwen3-MoE and Llama checkpoints -> TextModelConfig, every value checked.

Both spellings are read: rope_theta and rope_scaling or rope_parameters, num_experts or num_local_experts, torch_dtype
or dtype (transformers 5 writes the second ones). Sizes have no defaults where transformers' own are another model's.
Keys that mean nothing here are ignored with a debug log; a known key with a value that is not implemented is refused
by name. Source: qwen3.md sections 1 and 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import DecoderConfig, MoeConfig, TextModelConfig, YarnConfig
from ..errors import ConfigError
from .config_reader import MAX_SIZE, ConfigReader
from .quantized_config import read_quantization

MODEL_TYPES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "LlamaForCausalLM": "llama",
}
MAX_POSITIONS = 2**24


def read_text_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> TextModelConfig:
    """Check the objects in config.json and generation_config.json and return them as frozen dataclasses.

    generation  its end tokens, if it has any, replace those of config.json (a chat model ends at more than one)
    Raises ConfigError naming the key, its value and what is accepted.
    """
    top = ConfigReader(raw, "config.json")
    model_type = _read_family(top)
    _refuse_unimplemented(top, model_type)
    # How weights are stored changes nothing here; what cannot be read is refused early.
    top.ignore("quantization_config")
    read_quantization(raw)
    decoder = _read_decoder(top, model_type, ConfigReader(generation or {}, "generation_config.json"))
    config = TextModelConfig(decoder, top.get_dtype(), model_type)
    top.log_unread()
    return config


def _read_family(top: ConfigReader) -> str:
    model_type: str = top.require("model_type", str, only=tuple(MODEL_TYPES.values()))
    architectures = top.get("architectures", (str,), None)
    expected = next(name for name, kind in MODEL_TYPES.items() if kind == model_type)
    # transformers names the decoder without its head, as fine-tuned embedding models are saved, ...Model.
    if architectures is not None and not {expected, expected.replace("ForCausalLM", "Model")} & set(architectures):
        top.refuse("architectures", list(architectures), f"[{expected!r}] for model_type {model_type!r}")
    return model_type


def _refuse_unimplemented(top: ConfigReader, model_type: str) -> None:
    """Settings that change the network and of which one value is implemented."""
    top.get("hidden_act", str, "silu", only=("silu",))
    for key in ("attention_bias", "mlp_bias", "qkv_bias", "use_sliding_window"):
        top.get(key, bool, False, only=(False,))
    # A window's size alone does nothing: Qwen3 files hold it beside use_sliding_window false.
    for key in ("sliding_window", "max_window_layers", "attention_dropout"):
        top.ignore(key)
    for kind in top.get("layer_types", (str,), ()):
        if kind != "full_attention":
            top.refuse("layer_types", kind, "full_attention in every layer")
    top.get("dual_chunk_attention_config", object, None, only=(None,))
    top.get("partial_rotary_factor", float, 1.0, only=(1.0,))
    top.get("shared_expert_intermediate_size", int, 0, only=(0,))
    top.get("use_qk_norm", bool, True, only=(model_type != "llama",))


def _read_decoder(top: ConfigReader, model_type: str, generation: ConfigReader) -> DecoderConfig:
    hidden = top.require("hidden_size", int, low=1, high=MAX_SIZE)
    layers = top.require("num_hidden_layers", int, low=1, high=1024)
    heads = top.require("num_attention_heads", int, low=1, high=MAX_SIZE)
    kv_heads = top.get("num_key_value_heads", int, heads, low=1, high=MAX_SIZE)
    top.require_divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
    head_dim = top.get("head_dim", int, None, low=2, high=MAX_SIZE)
    if head_dim is None:
        top.require_divides("num_attention_heads", heads, "hidden_size", hidden)
        head_dim = hidden // heads
    if head_dim % 2:
        top.refuse("head_dim", head_dim, "an even number (rotary positions come in pairs)")
    vocab = top.require("vocab_size", int, low=1, high=MAX_SIZE)
    moe = _read_moe(top, layers) if model_type == "qwen3_moe" else None
    has_dense_layer = moe is None or bool(moe.dense_layers)
    inner = top.get("intermediate_size", int, None, low=1, high=MAX_SIZE)
    if inner is None and has_dense_layer:
        top.missing("intermediate_size")
    positions = top.require("max_position_embeddings", int, low=1, high=MAX_POSITIONS)
    rope = _read_rope(top, model_type, positions)
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner or 0,
        moe=moe,
        rms_norm_eps=top.get("rms_norm_eps", float, 1e-6, low=0.0, high=1.0),
        rope_theta=rope.theta,
        qk_norm=model_type != "llama",
        tie_word_embeddings=top.get("tie_word_embeddings", bool, False),
        max_position_embeddings=rope.positions,
        # config.json names one, but Qwen3 puts nothing before a prompt: tokenizer.json decides.
        bos_token_id=None,
        eos_token_ids=generation.get_ids("eos_token_id", vocab) or top.get_ids("eos_token_id", vocab),
        yarn=rope.yarn,
    )


def _read_moe(top: ConfigReader, layers: int) -> MoeConfig | None:
    """None if the rule of sparse layers leaves no layer with experts."""
    spellings = [key for key in ("num_experts", "num_local_experts") if top.has(key)]
    counts = [top.get(key, int, None, low=0, high=65536) for key in spellings]
    if not counts:
        top.missing("num_experts (or num_local_experts)")
    experts = counts[0]
    if counts[-1] != experts:
        top.refuse("num_local_experts", counts[-1], f"the same as num_experts ({experts})")
    step = top.get("decoder_sparse_step", int, 1, low=1, high=1024)
    mlp_only = set(top.get("mlp_only_layers", (int,), (), low=0, high=layers - 1))
    dense = tuple(i for i in range(layers) if i in mlp_only or not experts or (i + 1) % step)
    if len(dense) == layers:
        return None
    top_k = top.require("num_experts_per_tok", int, low=1, high=65536)
    if top_k > experts:
        top.refuse("num_experts_per_tok", top_k, f"at most num_experts ({experts})")
    return MoeConfig(
        num_experts=experts,
        top_k=top_k,
        intermediate_size=top.require("moe_intermediate_size", int, low=1, high=MAX_SIZE),
        # transformers' default is false, every released Qwen3 has true: a file must say which.
        renormalize=top.require("norm_topk_prob", bool),
        dense_layers=dense,
    )


@dataclass(frozen=True, slots=True)
class _Rope:
    theta: float
    positions: int
    yarn: YarnConfig | None


def _read_rope(top: ConfigReader, model_type: str, positions: int) -> _Rope:
    legacy, new = top.section("rope_scaling"), top.section("rope_parameters")
    if top.has("rope_scaling") and top.has("rope_parameters"):
        raise ConfigError("config.json: has both rope_scaling and rope_parameters; keep the one that is meant")
    scaling = new if top.has("rope_parameters") else legacy
    for key in ("full_attention", "sliding_attention"):
        scaling.get(key, object, None, only=(None,))
    scaling.get("partial_rotary_factor", float, 1.0, only=(1.0,))
    theta = scaling.get("rope_theta", float, None, low=1.0, high=1e12)
    if theta is None:
        theta = top.get("rope_theta", float, 10000.0 if model_type == "llama" else None, low=1.0, high=1e12)
    if theta is None:
        top.missing("rope_theta (or rope_parameters.rope_theta)")
    kinds = ("default", "yarn")
    kind = scaling.get("rope_type", str, None, only=kinds) or scaling.get("type", str, "default", only=kinds)
    if kind == "default":
        scaling.get("factor", float, 1.0, only=(1.0,))
        return _Rope(theta, positions, None)
    if theta <= 1.0:
        top.refuse("rope_theta", theta, "more than 1 with YaRN")
    yarn = _read_yarn(scaling, positions)
    # People add rope_scaling and leave max_position_embeddings; the factor says how long a text may be, too.
    extended = int(yarn.factor * yarn.original_max_position_embeddings)
    return _Rope(theta, min(max(positions, extended), MAX_POSITIONS), yarn)


def _read_yarn(scaling: ConfigReader, positions: int) -> YarnConfig:
    original = scaling.get("original_max_position_embeddings", int, positions, low=1, high=MAX_POSITIONS)
    # Where the file does not say, the two lengths do; a factor that it does say wins over their ratio.
    factor = scaling.get("factor", float, max(1.0, positions / original), low=1.0, high=1e6)
    given = scaling.get("attention_factor", float, None, low=1e-3, high=1e6)
    mscale, mscale_all_dim = (scaling.get(key, float, 0.0, low=0.0, high=1e6) for key in ("mscale", "mscale_all_dim"))

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    if given is None:
        both = mscale and mscale_all_dim
        given = growth(mscale) / growth(mscale_all_dim) if both else growth(1.0)
    fast, slow = (
        scaling.get(key, float, default, low=1e-6, high=1e6)
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    return YarnConfig(factor, original, given, fast, slow, scaling.get("truncate", bool, True))
