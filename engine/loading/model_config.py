"""config.json of a DeepSeek-OCR checkpoint -> DeepseekOcrConfig, every value checked.

Sizes come from the file, with the real model's as defaults. Keys that mean nothing here are ignored with a debug log; a
known key with a value that is not implemented is refused by name, because ignoring it would give fluent nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import (
    MAX_TILES,
    ClipConfig,
    DecoderConfig,
    DeepseekOcrConfig,
    MoeConfig,
    ProcessorConfig,
    SamConfig,
)
from ..errors import ConfigError
from .config_reader import MAX_SIZE, ConfigReader
from .quantized_config import read_quantization

MODEL_TYPE = "deepseek_vl_v2"
# DeepSeek-VL2 has the same model_type, so the architecture decides.
ARCHITECTURE = "DeepseekOCRForCausalLM"
# The encoder turns DOWNSAMPLE x DOWNSAMPLE patches into one vision token (two stride-2 convolutions).
DOWNSAMPLE = 4


def read_model_config(raw: Mapping[str, Any]) -> DeepseekOcrConfig:
    """Check the object in config.json and return it as frozen dataclasses.

    Raises ConfigError naming the key, its value and what is accepted.
    """
    top = ConfigReader(raw, "config.json")
    _check_family(top)
    top.ignore("quantization_config")
    read_quantization(raw)
    vision = top.section("vision_config")
    width = vision.section("width")
    # Wrong for both towers in the real file (3.7362; the towers use 4), so it must never become a size.
    vision.ignore("mlp_ratio")
    sam = _read_sam(width.section("sam_vit_b"), vision.get("image_size", int, 1024, low=1, high=MAX_SIZE))
    clip = _read_clip(width.section("clip-l-14-224"))
    decoder = _read_decoder(top.section("language_config", fallback=top))
    _check_bridge(top.section("projector_config"), sam, clip, decoder)
    processor = _read_processor(top, sam)
    image_token_id = top.get("image_token_id", int, None, low=0, high=decoder.vocab_size - 1)
    torch_dtype = top.get_dtype()
    top.log_unread()
    return DeepseekOcrConfig(
        sam=sam,
        clip=clip,
        decoder=decoder,
        processor=processor,
        image_token_id=image_token_id,
        torch_dtype=torch_dtype,
        model_type=MODEL_TYPE,
    )


def _check_family(top: ConfigReader) -> None:
    top.require("model_type", str, only=(MODEL_TYPE,))
    architectures = top.get("architectures", (str,), None)
    if architectures is not None and ARCHITECTURE not in architectures:
        top.refuse("architectures", list(architectures), f"[{ARCHITECTURE!r}]")


def _read_sam(sam: ConfigReader, image_size: int) -> SamConfig:
    default = SamConfig()
    layers = sam.get("layers", int, default.layers, low=1, high=1024)
    # A tower of another depth without its own list would silently get the real model's.
    indexes = default.global_attn_indexes if layers == default.layers else None
    indexes = sam.get("global_attn_indexes", (int,), indexes, low=0, high=layers - 1)
    if indexes is None:
        sam.missing("global_attn_indexes")
    channels = sam.get("downsample_channels", (int,), default.downsample_channels, low=1, high=MAX_SIZE)
    if len(channels) != 2:
        sam.refuse("downsample_channels", list(channels), "two channel counts")
    config = SamConfig(
        width=sam.get("width", int, default.width, low=1, high=MAX_SIZE),
        layers=layers,
        heads=sam.get("heads", int, default.heads, low=1, high=MAX_SIZE),
        window_size=sam.get("window_size", int, default.window_size, low=1, high=MAX_SIZE),
        global_attn_indexes=tuple(indexes),
        image_size=sam.get("image_size", int, image_size, low=1, high=MAX_SIZE),
        patch_size=sam.get("patch_size", int, default.patch_size, low=1, high=MAX_SIZE),
        mlp_ratio=sam.get("mlp_ratio", float, default.mlp_ratio, low=0.01, high=1024),
        out_channels=sam.get("out_channels", int, default.out_channels, low=1, high=MAX_SIZE),
        downsample_channels=(channels[0], channels[1]),
    )
    sam.require_divides("heads", config.heads, "width", config.width)
    sam.require_divides("patch_size", config.patch_size, "image_size", config.image_size)
    _check_mlp(sam, config.width, config.mlp_ratio)
    return config


def _read_clip(clip: ConfigReader) -> ClipConfig:
    default = ClipConfig()
    config = ClipConfig(
        width=clip.get("width", int, default.width, low=1, high=MAX_SIZE),
        layers=clip.get("layers", int, default.layers, low=1, high=1024),
        heads=clip.get("heads", int, default.heads, low=1, high=MAX_SIZE),
        mlp_ratio=clip.get("mlp_ratio", float, default.mlp_ratio, low=0.01, high=1024),
        image_size=clip.get("image_size", int, default.image_size, low=1, high=MAX_SIZE),
        patch_size=clip.get("patch_size", int, default.patch_size, low=1, high=MAX_SIZE),
    )
    clip.require_divides("heads", config.heads, "width", config.width)
    clip.require_divides("patch_size", config.patch_size, "image_size", config.image_size)
    _check_mlp(clip, config.width, config.mlp_ratio)
    return config


def _check_mlp(tower: ConfigReader, width: int, ratio: float) -> None:
    hidden = width * ratio
    if not hidden.is_integer() or not 1 <= hidden <= MAX_SIZE:
        tower.refuse("mlp_ratio", ratio, f"a ratio that makes width * mlp_ratio a whole number up to {MAX_SIZE}")


def _read_decoder(language: ConfigReader) -> DecoderConfig:
    _refuse_unimplemented(language)
    hidden = language.require("hidden_size", int, low=1, high=MAX_SIZE)
    layers = language.require("num_hidden_layers", int, low=1, high=1024)
    heads = language.require("num_attention_heads", int, low=1, high=MAX_SIZE)
    kv_heads = language.get("num_key_value_heads", int, heads, low=1, high=MAX_SIZE)
    language.require_divides("num_attention_heads", heads, "hidden_size", hidden)
    language.require_divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
    head_dim = hidden // heads
    if head_dim % 2:
        language.refuse("num_attention_heads", heads, "a head size that is even (rotary positions come in pairs)")
    # The real file holds zeros for the sizes that only MLA has; they must never become head sizes.
    for key in ("qk_nope_head_dim", "qk_rope_head_dim"):
        language.get(key, int, 0, only=(0,))
    language.get("v_head_dim", int, 0, only=(0, head_dim))
    language.get("head_dim", int, head_dim, only=(head_dim,))
    vocab = language.require("vocab_size", int, low=1, high=MAX_SIZE)
    bos = language.get("bos_token_id", int, None, low=0, high=vocab - 1)
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=language.require("intermediate_size", int, low=1, high=MAX_SIZE),
        moe=_read_moe(language, layers),
        rms_norm_eps=language.get("rms_norm_eps", float, 1e-6, low=0.0, high=1.0),
        rope_theta=_read_rope(language),
        qk_norm=False,
        tie_word_embeddings=language.get("tie_word_embeddings", bool, False),
        max_position_embeddings=language.get("max_position_embeddings", int, 8192, low=1, high=2**24),
        bos_token_id=bos,
        eos_token_ids=language.get_ids("eos_token_id", vocab),
    )


def _refuse_unimplemented(language: ConfigReader) -> None:
    """Settings that change the network and of which one value is implemented."""
    language.get("use_mla", bool, False, only=(False,))
    language.get("hidden_act", str, "silu", only=("silu",))
    language.get("attention_bias", bool, False, only=(False,))
    language.get("mlp_bias", bool, False, only=(False,))
    language.get("lm_head", bool, True, only=(True,))
    language.get("rm_head", bool, False, only=(False,))
    language.get("topk_method", str, "greedy", only=("greedy",))
    language.get("n_group", int, 1, only=(1,))
    language.get("topk_group", int, 1, only=(1,))
    language.get("scoring_func", str, "softmax", only=("softmax",))
    language.get("moe_layer_freq", int, 1, only=(1,))
    for key in ("q_lora_rank", "kv_lora_rank", "rope_scaling", "sliding_window", "sliding_window_size"):
        language.get(key, object, None, only=(None,))


def _read_rope(language: ConfigReader) -> float:
    # Files saved by transformers 5 hold the theta inside rope_parameters.
    parameters = language.section("rope_parameters")
    parameters.get("rope_type", str, "default", only=("default",))
    theta = language.get("rope_theta", float, 10000.0, low=1.0, high=1e12)
    chosen: float = parameters.get("rope_theta", float, theta, low=1.0, high=1e12)
    return chosen


def _read_moe(language: ConfigReader, layers: int) -> MoeConfig:
    experts = language.require("n_routed_experts", int, low=1, high=65536)
    top_k = language.require("num_experts_per_tok", int, low=1, high=65536)
    if top_k > experts:
        language.refuse("num_experts_per_tok", top_k, f"at most n_routed_experts ({experts})")
    width = language.require("moe_intermediate_size", int, low=1, high=MAX_SIZE)
    shared = language.get("n_shared_experts", int, 0, low=0, high=1024)
    num_dense = language.get("first_k_dense_replace", int, 0, low=0, high=layers)
    renormalize = language.get("norm_topk_prob", bool, False)
    scale = language.get("routed_scaling_factor", float, 1.0, low=0.0, high=1e6)
    if renormalize and scale != 1.0:
        # Published implementations disagree on whether the scale applies to renormalised weights.
        language.refuse("routed_scaling_factor", scale, "1.0 together with norm_topk_prob true")
    return MoeConfig(
        num_experts=experts,
        top_k=top_k,
        intermediate_size=width,
        shared_intermediate_size=shared * width,
        renormalize=renormalize,
        routed_scale=scale,
        dense_layers=tuple(range(num_dense)),
    )


def _check_bridge(projector: ConfigReader, sam: SamConfig, clip: ClipConfig, decoder: DecoderConfig) -> None:
    """SAM's features enter CLIP in place of patches, then both together enter one linear layer."""
    sam_channels = sam.downsample_channels[-1]
    if clip.width != sam_channels:
        raise ConfigError(
            f"config.json: vision_config.width.clip-l-14-224.width={clip.width} must equal the last of "
            f"sam_vit_b.downsample_channels ({sam_channels}): the second tower reads the first one's features"
        )
    projector.get("projector_type", str, "linear", only=("linear",))
    both = clip.width + sam_channels
    projector.get("input_dim", int, both, only=(both,))
    projector.get("n_embed", int, decoder.hidden_size, only=(decoder.hidden_size,))


def _read_processor(top: ConfigReader, sam: SamConfig) -> ProcessorConfig:
    default = ProcessorConfig()
    scaled = top.has("processor")
    processor = top.section("processor")
    # Where these exist they describe the towers above; preprocessing implements these values only.
    processor.get("patch_size", int, sam.patch_size, only=(sam.patch_size,))
    processor.get("downsample_ratio", int, DOWNSAMPLE, only=(DOWNSAMPLE,))
    for key in ("image_mean", "image_std"):
        processor.get(key, (float,), (0.5, 0.5, 0.5), only=((0.5, 0.5, 0.5),))
    min_crops = processor.get("min_crops", int, default.min_crops, low=1, high=MAX_TILES)
    sizes = {}
    for key in ("base_size", "image_size"):
        sizes[key] = processor.get(key, int, getattr(default, key), low=1, high=16384)
        processor.require_divides("patch_size * 4", sam.patch_size * DOWNSAMPLE, key, sizes[key])
    modes = processor.get("modes", (str,), None)
    prompts = processor.get("prompts", dict, {})
    for key, value in prompts.items():
        if not isinstance(value, str):
            processor.refuse(f"prompts.{key}", value, "a string")
    return ProcessorConfig(
        base_size=sizes["base_size"],
        image_size=sizes["image_size"],
        crop_mode=processor.get("crop_mode", bool, default.crop_mode),
        min_crops=min_crops,
        max_crops=processor.get("max_crops", int, max(default.max_crops, min_crops), low=min_crops, high=MAX_TILES),
        modes=modes,
        prompts=dict(prompts),
        scaled=scaled,
    )
