"""transformers' UnlimitedOcrForConditionalGeneration as an oracle for our DeepSeek-OCR.

With every text layer set to full attention it is the same network; only its names differ. Its weights are made from
ours by the renames of deepseek-ocr.md section 13.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import torch
from torch import Tensor

from pagelens.config import DeepseekOcrConfig
from pagelens.vision.tiling import TilePlan

from .tiny_models import PageViews

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RENAMES = (
    (r"^model\.sam_model\.blocks\.(\d+)\.norm([12])\.", r"model.vision_tower.sam_encoder.layers.\1.layer_norm\2."),
    (r"^model\.sam_model\.blocks\.", "model.vision_tower.sam_encoder.layers."),
    (r"^model\.sam_model\.neck\.0\.", "model.vision_tower.sam_encoder.neck.conv1."),
    (r"^model\.sam_model\.neck\.1\.", "model.vision_tower.sam_encoder.neck.layer_norm1."),
    (r"^model\.sam_model\.neck\.2\.", "model.vision_tower.sam_encoder.neck.conv2."),
    (r"^model\.sam_model\.neck\.3\.", "model.vision_tower.sam_encoder.neck.layer_norm2."),
    (r"^model\.sam_model\.net_2\.", "model.vision_tower.sam_encoder.proj.conv1."),
    (r"^model\.sam_model\.net_3\.", "model.vision_tower.sam_encoder.proj.conv2."),
    (r"^model\.sam_model\.patch_embed\.proj\.", "model.vision_tower.sam_encoder.patch_embed.projection."),
    (r"^model\.sam_model\.", "model.vision_tower.sam_encoder."),
    (r"^model\.vision_model\.transformer\.", "model.vision_tower.vision_encoder.encoder."),
    (r"^model\.vision_model\.", "model.vision_tower.vision_encoder."),
    (r"^model\.projector\.layers\.", "model.multi_modal_projector."),
    (r"^model\.view_seperator$", "model.view_separator"),
    (r"^model\.(embed_tokens|norm|layers)\.", r"model.language_model.\1."),
)
EXPERT = re.compile(r"^(model\.language_model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


def rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def split_qkv(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The port keeps CLIP's q, k and v apart; SAM's stay fused."""
    if ".vision_encoder." not in name or ".qkv_proj." not in name:
        return {name: tensor}
    return {name.replace("qkv_proj", f"{n}_proj"): piece for n, piece in zip("qkv", tensor.chunk(3))}


def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DeepSeek-OCR names to the port's: renamed, experts stacked (gate rows first, then up)."""
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in tensors.items():
        new = rename(name)
        match = EXPERT.match(new)
        if match:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            state |= split_qkv(new, tensor)
    for prefix, found in experts.items():
        count = 1 + max(e for e, _ in found)
        gate_up = [torch.cat([found[e, "gate"], found[e, "up"]]) for e in range(count)]
        state[f"{prefix}.gate_up_proj"] = torch.stack(gate_up)
        state[f"{prefix}.down_proj"] = torch.stack([found[e, "down"] for e in range(count)])
    return state


def build_oracle(config: DeepseekOcrConfig, tensors: dict[str, Tensor]) -> torch.nn.Module:
    """The port in float32 with these weights. Every tensor of ours is used and every one of its own is given."""
    from transformers import UnlimitedOcrConfig, UnlimitedOcrForConditionalGeneration

    sam, clip, text, moe = config.sam, config.clip, config.decoder, config.decoder.moe
    assert moe is not None
    oracle_config = UnlimitedOcrConfig(
        image_token_id=config.image_token_id,
        vision_config={
            "sam_config": {
                "hidden_size": sam.width,
                "output_channels": sam.out_channels,
                "num_hidden_layers": sam.layers,
                "num_attention_heads": sam.heads,
                "image_size": sam.image_size,
                "patch_size": sam.patch_size,
                "window_size": sam.window_size,
                "global_attn_indexes": list(sam.global_attn_indexes),
                "mlp_dim": int(sam.width * sam.mlp_ratio),
                "downsample_channels": list(sam.downsample_channels),
            },
            "encoder_config": {
                "hidden_size": clip.width,
                "intermediate_size": int(clip.width * clip.mlp_ratio),
                "num_hidden_layers": clip.layers,
                "num_attention_heads": clip.heads,
                "image_size": clip.image_size,
                "patch_size": clip.patch_size,
            },
        },
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "max_position_embeddings": text.max_position_embeddings,
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.intermediate_size,
            "n_shared_experts": moe.shared_intermediate_size // moe.intermediate_size,
            "mlp_layer_types": ["dense" if i in moe.dense_layers else "sparse" for i in range(text.num_layers)],
            "layer_types": ["full_attention"] * text.num_layers,
        },
    )
    oracle_config._attn_implementation = "eager"
    oracle = UnlimitedOcrForConditionalGeneration(oracle_config).eval()
    oracle.load_state_dict(convert(tensors), strict=True)
    return oracle


def oracle_inputs(views: PageViews, plan: TilePlan) -> dict[str, object]:
    inputs: dict[str, object] = {"pixel_values": views.global_view}
    if views.tiles is not None:
        inputs["pixel_values_local"] = views.tiles
        inputs["num_local_patches"] = [plan.num_tiles]
        inputs["patches_grid"] = [[plan.columns, plan.rows]]
    return inputs


@torch.no_grad()
def record(oracle: torch.nn.Module, run: Callable[[], object], modules: dict[str, str]) -> dict[str, list[Tensor]]:
    """Run and return the outputs of some modules, one entry a call. modules: our stage name -> the module's path."""
    seen: dict[str, list[Tensor]] = {stage: [] for stage in modules}

    def keep(stage: str) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: object) -> None:
            if hasattr(output, "last_hidden_state"):
                output = output.last_hidden_state
            value = output[0] if isinstance(output, tuple) else output
            assert isinstance(value, Tensor)
            seen[stage].append(value.clone())

        return hook

    handles = [oracle.get_submodule(path).register_forward_hook(keep(stage)) for stage, path in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen
