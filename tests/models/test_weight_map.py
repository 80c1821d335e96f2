"""The weight map is exactly the published checkpoint, and is applied strictly both ways."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import TINY, Session, make_plan, make_views, random_tensors
from safetensors.torch import save_file

from pagelens.config import (
    ClipConfig,
    DecoderConfig,
    DeepseekOcrConfig,
    MoeConfig,
    ProcessorConfig,
    SamConfig,
)
from pagelens.errors import ConfigError, WeightsError
from pagelens.loading.checkpoint import open_checkpoint
from pagelens.models.deepseek_ocr import DeepseekOcr
from pagelens.models.qwen3 import TextModel
from pagelens.models.registry import MODELS, model_class
from pagelens.ops.registry import as_ops, resolve_ops

REAL = DeepseekOcrConfig(
    SamConfig(),
    ClipConfig(),
    DecoderConfig(
        vocab_size=129280,
        hidden_size=1280,
        num_layers=12,
        num_heads=10,
        num_kv_heads=10,
        head_dim=128,
        intermediate_size=6848,
        moe=MoeConfig(64, 6, 896, 1792, dense_layers=(0,)),
    ),
    ProcessorConfig(),
)
# deepseek-ocr.md section 2: tensors by prefix, the unused patch embedding left out of the CLIP part.
COUNTS = {"model.sam_model.": 179, "model.vision_model.": 292, "bridge": 4, "language": 2234}
SHAPES = {
    "model.sam_model.pos_embed": (1, 64, 64, 768),
    "model.sam_model.blocks.0.attn.rel_pos_h": (27, 64),
    "model.sam_model.blocks.11.attn.rel_pos_w": (127, 64),
    "model.sam_model.net_3.weight": (1024, 512, 3, 3),
    "model.vision_model.embeddings.position_embedding.weight": (257, 1024),
    "model.vision_model.pre_layrnorm.weight": (1024,),
    "model.vision_model.transformer.layers.23.mlp.fc1.weight": (4096, 1024),
    "model.projector.layers.weight": (1280, 2048),
    "model.view_seperator": (1280,),
    "model.layers.0.mlp.down_proj.weight": (1280, 6848),
    "model.layers.11.mlp.gate.weight": (64, 1280),
    "model.layers.1.mlp.experts.63.up_proj.weight": (896, 1280),
    "model.layers.5.mlp.shared_experts.down_proj.weight": (1280, 1792),
    "lm_head.weight": (129280, 1280),
}


def kind(name: str) -> str:
    if name.startswith(("model.sam_model.", "model.vision_model.")):
        return ".".join(name.split(".")[:2]) + "."
    return "bridge" if name.split(".")[1] in ("projector", "image_newline", "view_seperator") else "language"


def test_the_real_checkpoint() -> None:
    """2,710 tensors with the one that is not used, 6,672,212,480 bytes in bfloat16."""
    named = [(n, s) for spec in DeepseekOcr.weight_specs(REAL) for n, s in zip(spec.sources, spec.shapes)]
    shapes = dict(named)
    twice = [name for name in shapes if sum(name == other for other, _ in named) > 1]
    # Its bias is what the padding of a window holds.
    assert twice == [f"model.sam_model.blocks.{i}.attn.qkv.bias" for i in range(12)]
    assert len(named) - 12 == len(shapes) == 2709
    assert {k: sum(kind(n) == k for n in shapes) for k in COUNTS} == COUNTS
    assert {name: shapes[name] for name in SHAPES} == SHAPES
    assert DeepseekOcr.UNUSED == ("model.vision_model.embeddings.patch_embedding.weight",)
    unused_bytes = 2 * 1024 * 3 * 14 * 14
    assert sum(2 * math.prod(shape) for shape in shapes.values()) + unused_bytes == 6_672_212_480


def test_a_folder_and_tensors_in_memory_give_the_same_model(tmp_path: Path) -> None:
    """A bfloat16 file run in float32 and in bfloat16, the unused tensor there and not there."""
    tensors = {name: value.bfloat16() for name, value in random_tensors(TINY).items()}
    (tmp_path / "config.json").write_text("{}")
    table = resolve_ops("native", num_threads=1)
    for dtype in (torch.float32, torch.bfloat16):
        in_file = tensors | {DeepseekOcr.UNUSED[0]: torch.zeros(48, 3, 14, 14, dtype=torch.bfloat16)}
        save_file(in_file if dtype == torch.float32 else tensors, tmp_path / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path)
        loaded = DeepseekOcr.load(checkpoint, TINY, dtype, as_ops(table))
        checkpoint.close()
        built = DeepseekOcr.from_tensors(TINY, in_file, dtype, as_ops(table))
        plan = make_plan(192, 128, 2, 1)
        rows = [model.encode_image(make_views(plan), plan) for model in (loaded, built)]
        assert rows[0].dtype == dtype
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(Session(loaded).feed([0, 5, 9]), Session(built).feed([0, 5, 9]))
    table.close()


@pytest.mark.parametrize("source", ["folder", "memory"])
def test_what_does_not_fit_is_listed(tmp_path: Path, source: str) -> None:
    tensors = random_tensors(TINY)
    del tensors["model.norm.weight"]
    tensors["model.view_separator"] = tensors.pop("model.view_seperator")
    tensors["model.layers.1.mlp.gate.weight"] = torch.zeros(8, 65)
    ops = as_ops(resolve_ops("reference"))
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    load = {
        "folder": lambda: DeepseekOcr.load(open_checkpoint(tmp_path), TINY, torch.float32, ops),
        "memory": lambda: DeepseekOcr.from_tensors(TINY, tensors, torch.float32, ops),
    }[source]
    with pytest.raises(WeightsError) as caught:
        load()
    message = str(caught.value)
    for word in ("model.norm.weight", "model.view_seperator", "model.view_separator", "mlp.gate.weight", "[8, 65]"):
        assert word in message, message


def test_models_are_found_by_architecture() -> None:
    assert model_class("deepseek_vl_v2") is DeepseekOcr
    assert model_class("anything", ["DeepseekOCRForCausalLM"]) is DeepseekOcr
    # DeepSeek-VL2 shares DeepSeek-OCR's model_type and is another network.
    with pytest.raises(ConfigError, match=r"DeepseekVLV2ForCausalLM.*known: .*DeepseekOCRForCausalLM"):
        model_class("deepseek_vl_v2", ["DeepseekVLV2ForCausalLM"])
    with pytest.raises(ConfigError, match="'gpt2' is not implemented"):
        model_class("gpt2")
    assert set(MODELS.values()) == {DeepseekOcr, TextModel}
