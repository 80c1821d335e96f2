"""DeepSeek-OCR at miniature sizes with random weights, and what a test needs to run it: views, batches, a cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pagelens.config import ClipConfig, DecoderConfig, DeepseekOcrConfig, MoeConfig, ProcessorConfig, SamConfig
from pagelens.models.deepseek_ocr import DeepseekOcr
from pagelens.types import ForwardBatch, KVCacheView
from pagelens.vision.tiling import TilePlan

IMAGE_TOKEN = 7
DECODER = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    intermediate_size=96,
    moe=MoeConfig(num_experts=8, top_k=3, intermediate_size=32, shared_intermediate_size=64, dense_layers=(0,)),
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_ids=(1,),
)
# Tables for a 192-pixel view (grid 12, q 3); windows of 5 so that 8, 12 and 16 all need padding; both kinds of block.
SAM = SamConfig(
    width=32,
    layers=3,
    heads=2,
    window_size=5,
    global_attn_indexes=(1,),
    image_size=192,
    patch_size=16,
    out_channels=24,
    downsample_channels=(32, 48),
)
CLIP = ClipConfig(width=48, layers=2, heads=3, image_size=42, patch_size=14)
TINY = DeepseekOcrConfig(SAM, CLIP, DECODER, ProcessorConfig(scaled=True), image_token_id=IMAGE_TOKEN)
# The same with every size a multiple of 16 and 32, for backends that want it.
EVEN = replace(
    TINY,
    sam=replace(SAM, width=64, out_channels=32, downsample_channels=(48, 64)),
    clip=replace(CLIP, width=64, heads=4),
)


@dataclass(frozen=True)
class PageViews:
    """A preprocessed page made of noise."""

    global_view: Tensor
    tiles: Tensor | None


def random_tensors(config: DeepseekOcrConfig, seed: int = 0) -> dict[str, Tensor]:
    """Every checkpoint tensor, float32, scaled so that each term of the network matters (a fault in one shows up).

    Matrices have about unit gain; norm weights lie near 1 and differ; biases, position tables and relative tables are
    of the same order as what they are added to.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in DeepseekOcr.weight_specs(config):
        for name, shape in zip(spec.sources, spec.shapes):
            noise = torch.randn(shape, generator=generator)
            if len(shape) == 1 and "norm" in name and name.endswith("weight"):
                tensors[name] = 1 + 0.2 * noise
            elif len(shape) == 1:
                tensors[name] = 0.5 * noise
            elif "pos_embed" in name or "position_embedding" in name or "embed_tokens" in name:
                tensors[name] = noise
            elif "rel_pos" in name:
                tensors[name] = 0.3 * noise
            elif ".gate.weight" in name:
                tensors[name] = noise * 2 / math.sqrt(shape[1])
            else:
                tensors[name] = noise / math.sqrt(math.prod(shape[1:]))
    return tensors


def make_views(plan: TilePlan, seed: int = 0) -> PageViews:
    generator = torch.Generator().manual_seed(seed)
    page = torch.randn(1, 3, plan.base_size, plan.base_size, generator=generator)
    shape = (plan.num_tiles, 3, plan.tile_size, plan.tile_size)
    return PageViews(page, torch.randn(shape, generator=generator) if plan.num_tiles else None)


def make_plan(base: int, tile: int = 0, columns: int = 1, rows: int = 1) -> TilePlan:
    return TilePlan(columns * 100, rows * 100, "test", columns, rows, base, tile, False)


def make_cache(
    config: DecoderConfig, num_blocks: int, block_size: int, dtype: torch.dtype, kv_cache_dtype: str = "auto"
) -> KVCacheView:
    """A cache full of NaN: a read of a slot that nobody wrote shows up in the logits."""
    is_int8 = kv_cache_dtype == "int8"
    shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)

    def layers() -> tuple[Tensor, ...]:
        if is_int8:
            return tuple(torch.full(shape, 77, dtype=torch.uint8) for _ in range(config.num_layers))
        return tuple(torch.full(shape, torch.nan, dtype=dtype) for _ in range(config.num_layers))

    def scales() -> tuple[Tensor, ...] | None:
        shape = (num_blocks, config.num_kv_heads, block_size)
        return tuple(torch.full(shape, torch.nan) for _ in range(config.num_layers)) if is_int8 else None

    return KVCacheView(layers(), layers(), block_size, scales(), scales())


def ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_batch(
    pieces: list[tuple[list[int], int]],
    tables: list[list[int]],
    block_size: int,
    rows: dict[int, Tensor] | None = None,
    all_logits: bool = False,
) -> ForwardBatch:
    """One pass over several sequences.

    pieces  (new token ids, position of the first of them) for each sequence; tables: its block ids
    rows    flat row -> the image row that replaces its embedding
    """
    ids, positions, slots, starts = [], [], [], [0]
    for (new, first), table in zip(pieces, tables):
        ids += new
        positions += range(first, first + len(new))
        slots += [table[p // block_size] * block_size + p % block_size for p in range(first, first + len(new))]
        starts.append(len(ids))
    width = max(len(table) for table in tables)
    return ForwardBatch(
        token_ids=ints(ids),
        positions=ints(positions),
        slots=ints(slots),
        query_starts=ints(starts),
        context_lens=ints([first + len(new) for new, first in pieces]),
        block_tables=ints([table + [0] * (width - len(table)) for table in tables]),
        logit_rows=ints(range(len(ids)) if all_logits else [s - 1 for s in starts[1:]]),
        image_index=ints(sorted(rows)) if rows else None,
        image_rows=torch.stack([rows[i] for i in sorted(rows)]) if rows else None,
    )


class Session:
    """One sequence over its own cache, blocks in a scattered order. `feed` returns the logits of all fed tokens."""

    def __init__(self, model: DeepseekOcr, num_blocks: int = 40, block_size: int = 8) -> None:
        self.model, self.block_size = model, block_size
        self.cache = make_cache(model.decoder.config, num_blocks, block_size, model.decoder.dtype)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(5))
        self.table: list[int] = order.tolist()
        self.length = 0

    def feed(self, ids: list[int], rows: dict[int, Tensor] | None = None, stages: Any = None) -> Tensor:
        batch = make_batch([(ids, self.length)], [self.table], self.block_size, rows, all_logits=True)
        self.length += len(ids)
        return self.model.forward(batch, self.cache, stages)

    def greedy(self, prompt: list[int], rows: dict[int, Tensor] | None, count: int) -> tuple[list[int], list[Tensor]]:
        """`count` tokens, and the logits that each was chosen from."""
        logits = [self.feed(prompt, rows)[-1]]
        tokens = [int(logits[0].argmax())]
        while len(tokens) < count:
            logits.append(self.feed([tokens[-1]])[-1])
            tokens.append(int(logits[-1].argmax()))
        return tokens, logits


def prompt_with_image(image_rows: Tensor, text: list[int]) -> tuple[list[int], dict[int, Tensor]]:
    """BOS, the image's places, the text; and the rows by place."""
    ids = [0] + [IMAGE_TOKEN] * image_rows.shape[0] + text
    return ids, {1 + i: row for i, row in enumerate(image_rows)}
