"""Models by name: the config.json of published checkpoints, for `random_weights`; and where a model's settings are.

A preset has a shape and no weights. Sources: deepseek-ocr.md section 1, qwen3.md section 1.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .checkpoint import read_config, read_generation_config
from .hub import resolve_model

_LANGUAGE = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_size": 1280,
    "intermediate_size": 6848,
    "kv_lora_rank": None,
    "lm_head": True,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 896,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 10,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 12,
    "num_key_value_heads": 10,
    "q_lora_rank": None,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0,
    "rm_head": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "use_mla": False,
    "v_head_dim": 0,
    "vocab_size": 129280,
}
# The settings of deepseek-ai/DeepSeek-OCR, language settings twice as there; `auto_map` (remote code) is left out.
DEEPSEEK_OCR: dict[str, Any] = {
    **_LANGUAGE,
    "architectures": ["DeepseekOCRForCausalLM"],
    "candidate_resolutions": [[1024, 1024]],
    "global_view_pos": "head",
    "language_config": {"architectures": ["DeepseekV2ForCausalLM"], "torch_dtype": "bfloat16", **_LANGUAGE},
    "model_type": "deepseek_vl_v2",
    "projector_config": {"input_dim": 2048, "model_type": "mlp_projector", "n_embed": 1280, "projector_type": "linear"},
    "tile_tag": "2D",
    "torch_dtype": "bfloat16",
    "vision_config": {
        "image_size": 1024,
        "mlp_ratio": 3.7362,
        "model_name": "deeplip_b_l",
        "model_type": "vision",
        "width": {
            "clip-l-14-224": {"heads": 16, "image_size": 224, "layers": 24, "patch_size": 14, "width": 1024},
            "sam_vit_b": {
                "downsample_channels": [512, 1024],
                "global_attn_indexes": [2, 5, 8, 11],
                "heads": 12,
                "layers": 12,
                "width": 768,
            },
        },
    },
}
# The id of "<image>" in DeepSeek-OCR's tokenizer.json, the first of its own tokens.
FIRST_OCR_TOKEN = 128815

_QWEN3_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# layers, hidden size, query heads, key-value heads, feed-forward size, tied embeddings, experts' size (128 of them)
_QWEN3_SIZES: dict[str, tuple[int, int, int, int, int, bool, int | None]] = {
    "qwen3-0.6b": (28, 1024, 16, 8, 3072, True, None),
    "qwen3-1.7b": (28, 2048, 16, 8, 6144, True, None),
    "qwen3-4b": (36, 2560, 32, 8, 9728, True, None),
    "qwen3-8b": (36, 4096, 32, 8, 12288, False, None),
    "qwen3-14b": (40, 5120, 40, 8, 17408, False, None),
    "qwen3-32b": (64, 5120, 64, 8, 25600, False, None),
    "qwen3-30b-a3b": (48, 2048, 32, 4, 6144, False, 768),
    "qwen3-235b-a22b": (94, 4096, 64, 4, 12288, False, 1536),
}


def _qwen3(
    layers: int, hidden: int, heads: int, kv_heads: int, inner: int, tied: bool, expert: int | None
) -> dict[str, Any]:
    config = {
        **_QWEN3_COMMON,
        "architectures": ["Qwen3ForCausalLM" if expert is None else "Qwen3MoeForCausalLM"],
        "model_type": "qwen3" if expert is None else "qwen3_moe",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
    }
    if expert is None:
        return config
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert, "norm_topk_prob": True}
    return {**config, **experts, "decoder_sparse_step": 1, "mlp_only_layers": []}


PRESETS: dict[str, dict[str, Any]] = {
    # Its config.json leaves the image token to tokenizer.json, which a preset does not have.
    "deepseek-ocr": {**DEEPSEEK_OCR, "image_token_id": FIRST_OCR_TOKEN},
    **{name: _qwen3(*sizes) for name, sizes in _QWEN3_SIZES.items()},
}


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """config.json and generation_config.json of a model, and the folder that they stand in (None for a preset)."""

    config: dict[str, Any]
    generation: dict[str, Any]
    folder: Path | None


def find_description(model: str, random_weights: bool) -> ModelDescription:
    """The settings of a folder, a hub id or, if its weights are to be random, a preset; a folder goes before a preset.

    Raises ConfigError if there is no such model, or its JSON is damaged.
    """
    if model in PRESETS and not Path(model).is_dir():
        if not random_weights:
            raise ConfigError(
                f"model {model!r} is a preset, which has no weights; pass random_weights=True, or a checkpoint's folder"
            )
        return ModelDescription(PRESETS[model], {}, None)
    try:
        folder = resolve_model(model)
    except ConfigError as error:
        if not random_weights:
            raise
        raise ConfigError(f"{error}; presets for random weights: {', '.join(PRESETS)}") from error
    return ModelDescription(read_config(folder), read_generation_config(folder), folder)
