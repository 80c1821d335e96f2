"""A model that says what a test has written down, over the small tokenizer of chat_cases.py; one request at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers.chat_cases import ADDED_TOKENS, small_tokenizer
from torch import Tensor

from pagelens import LLM
from pagelens.config import DecoderConfig, EngineConfig, TextModelConfig
from pagelens.core import Engine
from pagelens.loading.presets import ModelDescription
from pagelens.text.tokenizer import Tokenizer
from pagelens.types import ForwardBatch, KVCacheView

FIRST_ADDED = 257
END = FIRST_ADDED + ADDED_TOKENS.index("<|im_end|>")
VOCAB = FIRST_ADDED + len(ADDED_TOKENS)


@dataclass
class ScriptModel:
    """Every request gets the next of `answers` (control tokens in them are control tokens), then <|im_end|>."""

    tokenizer: Tokenizer
    answers: list[str]
    config: TextModelConfig = field(
        default_factory=lambda: TextModelConfig(
            DecoderConfig(VOCAB, 8, 1, 1, 1, 8, 8, max_position_embeddings=4096, eos_token_ids=(END,))
        )
    )
    rest: list[int] = field(default_factory=list)

    def encode_image(self, views: Any, plan: Any) -> Tensor:
        raise NotImplementedError

    def forward(self, batch: ForwardBatch, kv: KVCacheView) -> Tensor:
        if int(batch.positions[0]) == 0:
            self.rest = [*self.tokenizer.encode(self.answers.pop(0), parse_special=True), END]
        logits = torch.zeros(len(batch.logit_rows), VOCAB)
        if len(logits):
            # What was fed into the answer does not count: the script goes on after it.
            logits[0, self.rest.pop(0) if self.rest else END] = 100
        return logits


def scripted_llm(folder: Path, answers: list[str], generation: dict[str, Any] | None = None, **options: Any) -> LLM:
    """An LLM that looks like a Qwen3 folder; max_model_len is 4096 bytes of text, nearly."""
    tokenizer = small_tokenizer(folder)
    # A script starts over at position 0, which a prompt with a cached beginning never computes.
    config = EngineConfig(model=str(folder), max_batch_tokens=4096, prefix_cache=False, **options).resolve()
    description = ModelDescription({"model_type": "qwen3"}, generation or {}, folder)
    model = ScriptModel(tokenizer, answers)
    return LLM.from_engine(Engine(config, model, torch.float32, tokenizer, description=description))
