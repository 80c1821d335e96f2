"""The native backend's promise for whole models: one sequence's logits are the same bits whatever else is in the batch,
however its prefill is cut and whatever the number of threads; under every instruction set of this machine, with plain
and int8 weights, with plain and int8 caches.

test_decoder.py shows it for short prompts; here a prompt reaches over several of the chunks that attention works in.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from helpers.tiny_models import DECODER, make_batch, make_cache
from torch import Tensor

from pagelens import _native
from pagelens.config import DecoderConfig, MoeConfig
from pagelens.models.decoder import Decoder, decoder_cases, decoder_parts
from pagelens.models.weight_map import pack_parts
from pagelens.ops.registry import OpsTable, as_ops, resolve_ops

CHOSEN = _native.isa()
LENGTH = 530  # more than four of attention's chunks of 128 keys
CUTS = (1, 2, 3, 5, 7, 16, 31, 64, 100, 512)
THREADS = (1, 2, 4)
BLOCK = 16
# Two long sequences, the others on both sides of the edges of blocks and chunks.
LENGTHS = (300, 1, 2, 15, 16, 17, 31, 33, 64, 100, 127, 128, 129, 160, 257, 200)
QWEN3 = DecoderConfig(
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
    max_position_embeddings=640,
)
EXPERTS = MoeConfig(num_experts=8, top_k=3, intermediate_size=32, renormalize=True)
MODELS = {
    "qwen3": QWEN3,
    "qwen3-moe": replace(QWEN3, tie_word_embeddings=False, moe=EXPERTS),
    "deepseek-ocr": replace(DECODER, num_layers=2, head_dim=32, max_position_embeddings=640),
}


@dataclass(frozen=True)
class Variant:
    """A model in bfloat16 with one form of weights and of the cache, on pools of THREADS threads."""

    config: DecoderConfig
    decoders: dict[int, Decoder]
    kv_cache_dtype: str

    def feed(self, ids: list[int], cut: int, threads: int) -> Tensor:
        """Logits of all tokens of one sequence that comes in pieces of `cut` tokens."""
        blocks = -(-LENGTH // BLOCK)
        cache = make_cache(self.config, blocks, BLOCK, torch.bfloat16, self.kv_cache_dtype)
        table = torch.randperm(blocks, generator=torch.Generator().manual_seed(5)).tolist()
        rows = []
        for first in range(0, len(ids), cut):
            batch = make_batch([(ids[first : first + cut], first)], [table], BLOCK, all_logits=True)
            rows.append(self.decoders[threads].forward(batch, cache))
        return torch.cat(rows)

    def together(self, sequences: list[list[int]], threads: int) -> Iterator[list[Tensor]]:
        """Of batches of 1, 2, ... sequences: the logits that each chooses its next token from."""
        counts = [-(-len(ids) // BLOCK) for ids in sequences]
        cache = make_cache(self.config, sum(counts), BLOCK, torch.bfloat16, self.kv_cache_dtype)
        blocks = iter(torch.randperm(sum(counts), generator=torch.Generator().manual_seed(6)).tolist())
        tables = [[next(blocks) for _ in range(count)] for count in counts]
        for ids, table in zip(sequences, tables):
            self.decoders[threads].forward(make_batch([(ids, 0)], [table], BLOCK), cache)
        last = [([ids[-1]], len(ids) - 1) for ids in sequences]
        for size in range(1, len(sequences) + 1):
            yield list(self.decoders[threads].forward(make_batch(last[:size], tables[:size], BLOCK), cache))
        # Decodes beside a prefill that goes on.
        mixed = [(sequences[0][250:], 250), *last[1:]]
        yield list(self.decoders[threads].forward(make_batch(mixed, tables, BLOCK), cache))


def random_tensors(config: DecoderConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for part in decoder_parts(config):
        for name, shape in zip(part.spec.sources, part.spec.shapes):
            noise = torch.randn(shape, generator=generator)
            tensors[name] = 1 + 0.2 * noise if "norm" in name else noise / shape[-1] ** 0.5
    return tensors


@pytest.fixture(
    scope="module",
    params=[
        *((name, weights, "auto") for name in MODELS for weights in (None, "int8")),
        ("qwen3", None, "int8"),
        ("deepseek-ocr", "int8", "int8"),
    ],
    ids=lambda p: f"{p[0]}-{p[1] or 'bf16'}-cache_{p[2]}",
)
def variant(request: pytest.FixtureRequest) -> Iterator[Variant]:
    name, weights, kv_cache_dtype = request.param
    config, decoders, tables = MODELS[name], {}, list[OpsTable]()
    for threads in THREADS:
        table = resolve_ops("native", decoder_cases(config, torch.bfloat16), num_threads=threads)
        tables.append(table)
        packed = pack_parts(decoder_parts(config), random_tensors(config), torch.bfloat16, as_ops(table), weights)
        decoders[threads] = Decoder(config, packed, as_ops(table))
    yield Variant(config, decoders, kv_cache_dtype)
    for table in tables:
        table.close()


@pytest.fixture(params=_native.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(CHOSEN)


def random_ids(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(QWEN3.vocab_size), k=length)


def test_no_cutting_and_no_number_of_threads_changes_a_bit(variant: Variant, isa: str) -> None:
    ids = random_ids(LENGTH, 1)
    whole = variant.feed(ids, LENGTH, threads=1)
    assert whole.isfinite().all()
    assert len(whole.unique(dim=0)) == LENGTH, "the logits tell the tokens apart"
    for cut in CUTS:
        assert torch.equal(variant.feed(ids, cut, threads=1), whole), f"pieces of {cut}"
    for threads in THREADS:
        for cut in (LENGTH, 100):
            assert torch.equal(variant.feed(ids, cut, threads), whole), f"{threads} threads, pieces of {cut}"
        decoded = variant.feed(ids[:40], 1, threads)
        assert torch.equal(decoded, whole[:40]), f"{threads} threads, token by token"


def test_no_company_changes_a_bit(variant: Variant, isa: str) -> None:
    sequences = [random_ids(length, 10 + i) for i, length in enumerate(LENGTHS)]
    alone = [variant.feed(ids, LENGTH, threads=1)[-1] for ids in sequences]
    for threads in THREADS:
        for step, logits in enumerate(variant.together(sequences, threads)):
            for i, row in enumerate(logits):
                assert torch.equal(row, alone[i]), f"{threads} threads, step {step}, sequence {i}"
