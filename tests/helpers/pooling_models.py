"""Folders of tiny embedding and reranking models: a tokenizer with the tokens they need, and ways to save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from torch import Tensor

from .text_models import make_oracle

YES, NO, END_OF_TEXT = 257, 258, 259
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
ROWS = 272
SIZES: dict[str, Any] = {"vocab_size": ROWS, "max_position_embeddings": 1024}


def pooling_oracle(architecture: str = "Qwen3ForCausalLM", seed: int = 0, **changes: Any) -> Any:
    return make_oracle(architecture, seed, **{**SIZES, **changes})


def write_tokenizer(
    folder: Path, template: str = "$A <|endoftext|>", merges: tuple[str, ...] = ("y e", "ye s", "n o")
) -> None:
    """A token a byte, "ye", "yes" (257) and "no" (258), control tokens from 259; `template` is the post-processor."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for merge in merges:
        vocab[merge.replace(" ", "")] = len(vocab)
    made = tokenizers.Tokenizer(models.BPE(vocab, [tuple(merge.split()) for merge in merges]))  # type: ignore[misc]
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text) for text in CONTROL[:3]])
    made.add_tokens([AddedToken(text) for text in CONTROL[3:]])
    ids = [(text, made.token_to_id(text)) for text in CONTROL]
    made.post_processor = processors.TemplateProcessing(template, None, ids)
    made.save(str(folder / "tokenizer.json"))


def save_model(oracle: Any, folder: Path, prefix: bool = True, head: bool = True) -> Path:
    """Save with the tokenizer; prefix False drops `model.` from the names, head False the output head."""
    oracle.save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if head or not name.startswith("lm_head."):
            tensors[name if prefix else name.removeprefix("model.")] = tensor
    save_file(tensors, folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def ids_of(text: str) -> list[int]:
    """The ids that embed should make of a text without "ye" and "no": one a byte, in the order of their characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [alphabet.index(char) for piece, _ in splitter.pre_tokenize_str(text) for char in piece] + [END_OF_TEXT]


def last_hidden(oracle: Any, ids: list[int]) -> Tensor:
    """[C] after the final norm, at the last token."""
    with torch.no_grad():
        state: Tensor = oracle.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
    return state


def unit(oracle: Any, texts: list[list[int]], dim: int | None = None) -> np.ndarray:
    rows = torch.stack([last_hidden(oracle, ids)[:dim] for ids in texts]).double()
    return (rows / rows.norm(dim=1, keepdim=True)).numpy()
