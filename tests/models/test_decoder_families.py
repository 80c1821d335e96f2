"""The decoder's declared differences (grouped heads, QK-norm, tied embeddings, renormalised experts) against
transformers' Qwen3 in float32: the same decoder will run that family. Tolerance as in test_against_transformers.
"""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import Session

from pagelens.config import DecoderConfig, MoeConfig
from pagelens.models.decoder import Decoder, decoder_cases, decoder_parts
from pagelens.models.weight_map import pack_parts
from pagelens.ops.registry import as_ops, resolve_ops

DENSE = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=96,
    rope_theta=1e6,
    qk_norm=True,
    tie_word_embeddings=True,
    max_position_embeddings=128,
)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
IDS = [0, 5, 9, 33, 4, 61, 80, 2, 17, 90, 33, 8]


class Holder:
    """What a Session needs of a model."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.forward = decoder.forward


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.3 * noise if "norm" in name else noise / value.shape[-1] ** 0.5)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_qwen3_dense(backend: str) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    oracle = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True, attn_implementation="eager")).eval()
    randomise(oracle)
    tensors = {name: value for name, value in oracle.state_dict().items() if name != "lm_head.weight"}
    compare(oracle, tensors, DENSE, backend)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_qwen3_mixture_of_experts(backend: str) -> None:
    from dataclasses import replace

    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    extra = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}
    oracle = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, **extra, tie_word_embeddings=False, attn_implementation="eager")
    ).eval()
    randomise(oracle)
    tensors = {}
    for name, value in oracle.state_dict().items():
        prefix, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for e in range(8):
                tensors[f"{prefix}.experts.{e}.gate_proj.weight"] = value[e, :32]
                tensors[f"{prefix}.experts.{e}.up_proj.weight"] = value[e, 32:]
        elif kind == "down_proj":
            tensors |= {f"{prefix}.experts.{e}.down_proj.weight": value[e] for e in range(8)}
        else:
            tensors[name] = value
    moe = MoeConfig(num_experts=8, top_k=3, intermediate_size=32, renormalize=True)
    compare(oracle, tensors, replace(DENSE, tie_word_embeddings=False, moe=moe), backend)


def compare(oracle: torch.nn.Module, tensors: dict[str, torch.Tensor], config: DecoderConfig, backend: str) -> None:
    table = resolve_ops(backend, decoder_cases(config, torch.float32), num_threads=2)  # type: ignore[arg-type]
    ops = as_ops(table)
    decoder = Decoder(config, pack_parts(decoder_parts(config), tensors, torch.float32, ops), ops)
    with torch.no_grad():
        expected = oracle(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    session = Session(Holder(decoder))  # type: ignore[arg-type]
    logits = torch.cat([session.feed(IDS[:7]), session.feed(IDS[7:])])
    worst = float((logits - expected).abs().max() / expected.abs().max())
    print(f"error {worst:.1e} of the largest logit")
    assert worst <= 1e-5
    table.close()
