"""A model that knows exactly which tokens it has seen, and only through the paged cache.

It stores every token's id and position in the cache, and its logits are a pseudo-random function of the whole history
read back through the block tables. A wrong slot, a lost or shared block, a wrong position or a chunk computed twice
changes the tokens that follow. Vision rows count as part of the history.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagelens.config import DecoderConfig, EngineConfig, ProcessorConfig
from pagelens.core import Engine
from pagelens.types import ForwardBatch, KVCacheView

VOCAB = 64
EOS = 1
IMAGE = 3
ROW_WIDTH = 4


@dataclass
class FakeConfig:
    decoder: DecoderConfig
    processor: ProcessorConfig | None = None
    image_token_id: int | None = None


def fake_config(images: bool = False, max_positions: int = 512) -> FakeConfig:
    decoder = DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=ROW_WIDTH,
        num_layers=2,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        intermediate_size=4,
        max_position_embeddings=max_positions,
        eos_token_ids=(EOS,),
    )
    if not images:
        return FakeConfig(decoder)
    return FakeConfig(decoder, ProcessorConfig(192, 192, False, 2, 4, scaled=True), IMAGE)


@dataclass
class FakeModel:
    """`passes` lists (number of tokens, number of sequences) of every forward; `encoded` counts encoder calls.

    poison    token id whose presence as the newest token makes its sequence's logits NaN
    fail_at   number of the forward (from 0) that raises
    pause     called in every forward, to let a test stop the engine's thread there
    """

    config: FakeConfig = field(default_factory=fake_config)
    passes: list[tuple[int, int]] = field(default_factory=list)
    encoded: int = 0
    poison: int | None = None
    fail_at: int | None = None
    fail_encode: bool = False
    pause: Any = None
    eos_bias: float = 0.0

    def encode_image(self, views: Any, plan: Any) -> Tensor:
        self.encoded += 1
        if self.fail_encode:
            raise ValueError("this encoder is broken")
        count = plan.num_image_tokens
        mean = int(views.global_view.double().mean() * 1000)
        rows = torch.zeros(count, ROW_WIDTH)
        rows[:, 0] = torch.arange(count) + 1000
        rows[:, 1] = mean
        return rows

    def forward(self, batch: ForwardBatch, kv: KVCacheView) -> Tensor:
        if self.pause is not None:
            self.pause()
        if self.fail_at == len(self.passes):
            self.passes.append((0, 0))
            raise RuntimeError("this model is broken")
        n = len(batch.token_ids)
        self.passes.append((n, len(batch.context_lens)))
        entries = torch.zeros(n, 4)
        entries[:, 0] = batch.token_ids
        entries[:, 1] = batch.positions
        if batch.image_index is not None and batch.image_rows is not None:
            entries[batch.image_index.long(), 2:] = batch.image_rows[:, :2]
        for keys, values in zip(kv.keys, kv.values):
            keys.view(-1, 4)[batch.slots.long()] = entries
            values.view(-1, 4)[batch.slots.long()] = -entries
        owners = np.searchsorted(batch.query_starts.numpy(), batch.logit_rows.numpy(), side="right") - 1
        rows = [self._logits(batch, kv, int(s), int(r)) for s, r in zip(owners, batch.logit_rows)]
        return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, VOCAB)

    def _logits(self, batch: ForwardBatch, kv: KVCacheView, sequence: int, row: int) -> np.ndarray:
        end = int(batch.query_starts[sequence + 1])
        position = int(batch.context_lens[sequence]) - (end - row)
        places = torch.arange(position + 1)
        blocks = batch.block_tables[sequence][places // kv.block_size].long()
        slots = blocks * kv.block_size + places % kv.block_size
        history = kv.keys[0].view(-1, 4)[slots]
        for layer in range(len(kv.keys)):
            assert torch.equal(kv.keys[layer].view(-1, 4)[slots], history), "layers disagree"
            assert torch.equal(kv.values[layer].view(-1, 4)[slots], -history), "keys and values disagree"
        assert torch.equal(history[:, 1], places.float()), f"the cache holds positions {history[:, 1].tolist()}"
        logits = np.random.default_rng(zlib.crc32(history.numpy().tobytes())).standard_normal(VOCAB)
        logits[EOS] += self.eos_bias
        if self.poison is not None and int(history[-1, 0]) == self.poison:
            logits[7] = np.nan
        return logits.astype(np.float32)


def fake_engine(model: FakeModel | None = None, tokenizer: Any = None, **options: Any) -> Engine:
    """An engine over a fake model; the block table is checked after every step unless an option says otherwise."""
    options = {"check_blocks": True, "block_size": 4, **options}
    return Engine(EngineConfig(model="fake", **options).resolve(), model or FakeModel(), torch.float32, tokenizer)


def kv_bytes(num_blocks: int, block_size: int = 4) -> int:
    """kv_cache_bytes for so many blocks of the fake model."""
    return num_blocks * block_size * 2 * 2 * 4 * 4
