"""The built-in reader's sizes, the whole network for training, and its checkpoint with the official tensor names."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch import Tensor

from .decoder import Cache, DecoderLayer, Guide, Moe, RmsNorm, rope_table
from .towers import ClipEncoder, SamEncoder

if TYPE_CHECKING:
    from .data import Batch

BOS, EOS, PAD, IMAGE = 0, 1, 2, 3
PROMPTS = {"plain": "\nFree OCR.", "md": "\nConvert the document to markdown."}
DECODER: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 192,
    "intermediate_size": 512,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "use_mla": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "kv_lora_rank": None,
    "q_lora_rank": None,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0,
    "v_head_dim": 0,
}
SAM: dict[str, Any] = {
    "width": 128,
    "layers": 4,
    "heads": 4,
    "window_size": 7,
    "global_attn_indexes": [1, 3],
    "image_size": 256,
    "patch_size": 16,
    "mlp_ratio": 4.0,
    "out_channels": 64,
    "downsample_channels": [128, 256],
}
CLIP: dict[str, Any] = {"width": 256, "layers": 2, "heads": 8, "mlp_ratio": 4.0, "image_size": 16, "patch_size": 4}
GUIDED_LAYERS = (1, 2)  # decoder layers whose head 0 is taught where to look
BASE_SIZE, TILE_SIZE = 192, 192


def config(base_size: int = BASE_SIZE) -> dict[str, Any]:
    """config.json of the reader; `base_size` is the side of its whole-page view in pixels."""
    return dict(
        model_type="deepseek_vl_v2",
        architectures=["DeepseekOCRForCausalLM"],
        torch_dtype="bfloat16",
        tile_tag="2D",
        global_view_pos="head",
        image_token_id=IMAGE,
        language_config=DECODER,
        projector_config={
            "projector_type": "linear",
            "input_dim": CLIP["width"] + SAM["downsample_channels"][-1],
            "n_embed": DECODER["hidden_size"],
        },
        vision_config={"image_size": 256, "width": {"sam_vit_b": SAM, "clip-l-14-224": CLIP}},
        processor={
            "base_size": base_size,
            "image_size": TILE_SIZE,
            "crop_mode": False,
            "min_crops": 2,
            "max_crops": 4,
            "patch_size": 16,
            "downsample_ratio": 4,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "prompts": PROMPTS,
        },
        **DECODER,
    )


class Reader(nn.Module):
    """The network. The root holds `model` and `lm_head`, so that parameter names are the official ones."""

    def __init__(self) -> None:
        super().__init__()
        width, m = DECODER["hidden_size"], nn.Module()
        m.sam_model, m.vision_model = SamEncoder(SAM), ClipEncoder(CLIP)
        m.projector = nn.Module()
        m.projector.layers = nn.Linear(CLIP["width"] + SAM["downsample_channels"][-1], width)
        m.image_newline, m.view_seperator = (nn.Parameter(torch.randn(width) * 0.5) for _ in range(2))
        m.embed_tokens = nn.Embedding(DECODER["vocab_size"], width)
        nn.init.normal_(m.embed_tokens.weight, std=0.5)
        m.layers = nn.ModuleList(DecoderLayer(DECODER, i) for i in range(DECODER["num_hidden_layers"]))
        m.norm = RmsNorm(width, DECODER["rms_norm_eps"])
        self.model, self.lm_head = m, nn.Linear(width, DECODER["vocab_size"], bias=False)
        for name, p in self.named_parameters():  # residual branches start small
            if re.search(r"(attn\.proj|lin2|out_proj|fc2|o_proj|down_proj|\.down)(\.weight)?$", name):
                p.data.mul_(0.4)
        head_dim = width // DECODER["num_attention_heads"]
        cos, sin = rope_table(DECODER["max_position_embeddings"], head_dim, DECODER["rope_theta"])
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def encode(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, S, S] to vision tokens [N, S/64, S/64, hidden] and the neck [N, c, S/16, S/16]."""
        m = self.model
        neck, features = m.sam_model(views)
        clip = m.vision_model(features)
        rows = m.projector.layers(torch.cat([clip[:, 1:], features.flatten(2).transpose(1, 2)], -1))
        return rows.view(rows.shape[0], *features.shape[2:], -1), neck

    def image_rows(self, whole: Tensor, tiles: Tensor | None, grid: tuple[int, int] | None) -> Tensor:
        """Rows of the tiles together, then of the whole view, each row with its newline; then the separator."""
        m, n, width, parts = self.model, whole.shape[0], whole.shape[-1], []
        if tiles is not None and grid is not None:
            columns, rows = grid
            t = tiles.shape[1]
            joined = tiles.view(n, rows, columns, t, t, width).transpose(2, 3)
            parts.append(joined.reshape(n, rows * t, columns * t, width))
        parts = [
            torch.cat([p, m.image_newline.expand(n, p.shape[1], 1, width)], 2).flatten(1, 2) for p in [*parts, whole]
        ]
        return torch.cat([*parts, m.view_seperator.expand(n, 1, width)], 1)

    def vision(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(image rows [B, R, hidden], tokens and neck of the views that carry the labels: tiles if there are any)."""
        whole, neck = self.encode(batch.whole)
        if batch.tiles is None:
            return self.image_rows(whole, None, None), whole, neck
        tiles, tile_neck = self.encode(batch.tiles)
        return self.image_rows(whole, tiles, batch.grid), tiles, tile_neck

    def decode(
        self, x: Tensor, position: int = 0, caches: list[Cache] | None = None, guide: Guide | None = None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Embeddings [B, T, hidden] to (normed states, guide losses, text states of the guided layers)."""
        losses, middle = [], []
        cos, sin = (table[position : position + x.shape[1]] for table in (self.cos, self.sin))
        for i, layer in enumerate(self.model.layers):
            here = guide if i in GUIDED_LAYERS else None
            x, loss = layer(x, cos, sin, caches[i] if caches else None, here)
            if here is not None:
                losses.append(loss)
                middle.append(x[:, here[0] :])
        return self.model.norm(x), losses, middle

    def experts(self) -> list[Moe]:
        """The mixture-of-experts parts, for their balance loss."""
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, Moe)]

    @torch.no_grad()
    def generate(self, batch: Batch, max_new: int = 260) -> list[list[int]]:
        """Greedy ids of each page, up to but without EOS."""
        self.eval()
        embed = self.model.embed_tokens
        x = torch.cat([embed(batch.head), self.vision(batch)[0], embed(batch.prompt)], 1)
        caches: list[Cache] = [[] for _ in self.model.layers]
        done, position, out = torch.zeros(x.shape[0], dtype=torch.bool), 0, []
        for _ in range(max_new):
            states = self.decode(x, position, caches)[0]
            position += x.shape[1]
            ids = self.lm_head(states[:, -1]).argmax(-1)
            out.append(ids)
            done |= ids == EOS
            if done.all():
                break
            x = embed(ids)[:, None]
        answers = torch.stack(out, 1).tolist()
        return [ids[: ids.index(EOS)] if EOS in ids else ids for ids in answers]

    def export(self) -> dict[str, Tensor]:
        """The official tensors in bfloat16, experts split."""
        out, hidden = {}, DECODER["moe_intermediate_size"]
        for name, p in self.state_dict().items():
            base, kind = name.rsplit(".", 1)
            if kind not in ("gate_up", "down"):
                out[name] = p
                continue
            for e in range(p.shape[0]):
                split = (
                    {"gate_proj": p[e, :hidden], "up_proj": p[e, hidden:]} if kind == "gate_up" else {"down_proj": p[e]}
                )
                out.update({f"{base}.experts.{e}.{part}.weight": value for part, value in split.items()})
        return {name: p.to(torch.bfloat16).contiguous().clone() for name, p in out.items()}

    def load_export(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of export (up to bfloat16's rounding); every tensor must be there and no other."""
        tensors, own = dict(tensors), self.state_dict()
        for name in own:
            base, kind = name.rsplit(".", 1)
            if kind not in ("gate_up", "down"):
                continue
            rows = []
            for e in range(own[name].shape[0]):
                parts = ("gate_proj", "up_proj") if kind == "gate_up" else ("down_proj",)
                rows.append(torch.cat([tensors.pop(f"{base}.experts.{e}.{part}.weight") for part in parts]))
            tensors[name] = torch.stack(rows)
        self.load_state_dict({name: p.float() for name, p in tensors.items()})


def save_reader(model: Reader, folder: str) -> None:
    """Write model.safetensors, in place of an older one only when complete."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "model.safetensors")
    save_file(model.export(), path + ".tmp", metadata={"format": "pt"})
    os.chmod(path + ".tmp", 0o644)
    os.replace(path + ".tmp", path)


def load_reader(folder: str) -> Reader:
    """The network of a folder's model.safetensors, in float32, ready to read."""
    model = Reader()
    model.load_export(load_file(os.path.join(folder, "model.safetensors")))
    return model.eval()
