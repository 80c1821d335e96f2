"""Tiny Qwen3, Qwen3-MoE and Llama models of transformers with random weights: oracles, and the folders they save."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")

BEGIN, END = 256, 257  # of write_tokenizer; the 256 bytes come first
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 320,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


def make_oracle(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model in float32, every term of which matters: unit gains, norm weights that differ."""
    import transformers

    config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    extra = EXPERTS if "Moe" in architecture else {}
    config = config_class(**{**SIZES, **extra, **changes}, attn_implementation="eager")
    oracle = getattr(transformers, architecture)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in oracle.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            gain = 2.0 if name.endswith((".gate.weight", "embed_tokens.weight")) else 1.0
            value.copy_(1 + 0.3 * noise if "norm" in name else gain * noise / value.shape[-1] ** 0.5)
    return oracle


def save(oracle: Any, folder: Path, stacked_experts: bool = False) -> Path:
    """Save as transformers does by default, or with the experts stacked."""
    oracle.save_pretrained(folder, save_original_format=not stacked_experts)
    return folder


def write_tokenizer(folder: Path, begins: bool = False, ends: bool = False) -> None:
    """One token a byte, a begin and an end token; the post-processor puts them around a text if asked."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|begin|>"), AddedToken("<|end|>")])
    template = f"{'<|begin|> ' if begins else ''}$A{' <|end|>' if ends else ''}"
    made.post_processor = processors.TemplateProcessing(template, None, [("<|begin|>", BEGIN), ("<|end|>", END)])
    made.save(str(folder / "tokenizer.json"))


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object in a file; a value of ... removes the key."""
    raw = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = {key: value for key, value in {**raw, **changes}.items() if value is not ...}
    path.write_text(json.dumps(kept), encoding="utf-8")


def all_logits(oracle: Any, ids: list[int]) -> Tensor:
    """[len(ids), V] in one pass."""
    with torch.no_grad():
        logits: Tensor = oracle(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """On tiny tensors torch's threads only wait for each other and for other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def greedy(oracle: Any, prompt: list[int], count: int) -> list[int]:
    """`count` tokens by argmax. Fails if a choice was so close that rounding may decide it: take another seed then."""
    ids, past = torch.tensor([prompt]), None
    tokens: list[int] = []
    with torch.no_grad(), one_torch_thread():
        while len(tokens) < count:
            output = oracle(input_ids=ids, past_key_values=past, use_cache=True)
            logits, past = output.logits[0, -1], output.past_key_values
            first, second = logits.topk(2).values.tolist()
            assert first - second > 1e-4 * float(logits.abs().max()), f"step {len(tokens)} is a near-tie"
            tokens.append(int(logits.argmax()))
            ids = torch.tensor([[tokens[-1]]])
    return tokens
