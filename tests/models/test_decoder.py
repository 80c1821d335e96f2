"""The decoder over the paged cache: any cutting of a prompt, any company in the batch and both backends.

`native` promises batch invariance (a row's bits do not depend on the other rows), so there the comparison is bit for
bit; torch's matrix products depend on their shape, so for `reference` it is 1e-5 of the largest logit (float32) or
two bfloat16 roundings a layer (2^-8 each, 3 layers, so 2^-5 with what a router's near-tie may add).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import (
    EVEN,
    IMAGE_TOKEN,
    TINY,
    Session,
    ints,
    make_batch,
    make_cache,
    random_tensors,
)
from torch import Tensor

from pagelens.errors import ShapeError
from pagelens.models.deepseek_ocr import DeepseekOcr
from pagelens.ops.registry import OpsTable, as_ops, resolve_ops
from pagelens.types import KVCacheView

PROMPT = [0, IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN, 5, 9, 33, 4, 61, 80, 2, 17, 90, 33, 8, 12, 71, 64, 29, 3, 50]


def image_rows(dtype: torch.dtype) -> dict[int, Tensor]:
    noise = torch.randn(3, TINY.decoder.hidden_size, generator=torch.Generator().manual_seed(1))
    return {1 + i: row.to(dtype) for i, row in enumerate(noise)}


def build(backend: str, dtype: torch.dtype) -> tuple[DeepseekOcr, OpsTable]:
    table = resolve_ops(backend, DeepseekOcr.op_cases(EVEN, dtype), num_threads=2)  # type: ignore[arg-type]
    return DeepseekOcr.from_tensors(EVEN, random_tensors(EVEN), dtype, as_ops(table)), table


@pytest.fixture(
    scope="module",
    params=[(b, d) for b in ("reference", "native") for d in (torch.float32, torch.bfloat16)],
    ids=lambda p: f"{p[0]}-{p[1]}".replace("torch.", ""),
)
def model(request: pytest.FixtureRequest) -> Iterator[DeepseekOcr]:
    made, table = build(*request.param)
    if request.param[0] == "native":
        assert table.backend_of["paged_attention"] == table.backend_of["moe_ffn"] == "native"
    yield made
    table.close()


def same(model: DeepseekOcr, result: Tensor, expected: Tensor) -> None:
    assert result.shape == expected.shape
    if "native" in model.ops.name:
        assert torch.equal(result, expected)
        return
    tolerance = 1e-5 if model.dtype == torch.float32 else 2.0**-5
    assert float((result - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("cuts", [[1], [8, 8], [3, 1, 1, 9], [2] * 10, [1] * 20])
def test_a_prompt_in_pieces(model: DeepseekOcr, cuts: list[int]) -> None:
    """Pieces that end inside the image, at block borders and after every token give the logits of one pass."""
    rows = image_rows(model.dtype)
    whole = Session(model).feed(PROMPT, rows)
    session, first, pieces = Session(model), 0, []
    for size in [*cuts, len(PROMPT) - sum(cuts)]:
        ids = PROMPT[first : first + size]
        inside = {i - first: row for i, row in rows.items() if first <= i < first + size}
        pieces.append(session.feed(ids, inside or None))
        first += size
    same(model, torch.cat(pieces), whole)


def test_sequences_together_and_alone(model: DeepseekOcr) -> None:
    """A prefill, a continued prefill and two decodes in one pass, in two orders: each as if it were alone."""
    size, rows = 4, image_rows(model.dtype)
    prompts = [PROMPT, [0, 5, 9, 33, 4, 61, 80], [0, 90, 2, 7, 7, 7, 3, 1, 1], [0, 40]]
    pasts = [0, 3, 8, 1]
    alone = [Session(model).feed(p, rows if i == 0 else None) for i, p in enumerate(prompts)]
    for order in ([0, 1, 2, 3], [3, 1, 2, 0]):
        cache = make_cache(model.decoder.config, 24, size, model.dtype)
        blocks = iter(torch.randperm(24, generator=torch.Generator().manual_seed(3)).tolist())
        tables = [[next(blocks) for _ in range(-(-len(p) // size))] for p in prompts]
        for i in (1, 2, 3):
            model.forward(make_batch([(prompts[i][: pasts[i]], 0)], [tables[i]], size), cache)
        pieces = [(prompts[i][pasts[i] :], pasts[i]) for i in order]
        start = sum(len(p) for p, _ in pieces[: order.index(0)])
        batch = make_batch(pieces, [tables[i] for i in order], size, {start + i: r for i, r in rows.items()})
        together = model.forward(batch, cache)
        for row, i in zip(together, order):
            same(model, row, alone[i][-1])


def test_logits_only_of_the_rows_asked(model: DeepseekOcr) -> None:
    batch = make_batch([(PROMPT, 0)], [[0, 1, 2]], 8, image_rows(model.dtype), all_logits=True)
    everything = model.forward(batch, make_cache(model.decoder.config, 3, 8, model.dtype))
    some = model.forward(
        replace(batch, logit_rows=ints([20, 0, 7])), make_cache(model.decoder.config, 3, 8, model.dtype)
    )
    assert some.dtype == torch.float32
    same(model, some, everything[[20, 0, 7]])
    none = model.forward(replace(batch, logit_rows=ints([])), make_cache(model.decoder.config, 3, 8, model.dtype))
    assert none.shape == (0, TINY.decoder.vocab_size)


def test_the_logits_are_new_memory(model: DeepseekOcr) -> None:
    session = Session(model)
    first = session.feed([0, 5])
    kept = first.clone()
    session.feed([9])
    assert torch.equal(first, kept)


def test_broken_batches_are_refused(model: DeepseekOcr) -> None:
    rows = image_rows(model.dtype)
    cache = make_cache(model.decoder.config, 3, 8, model.dtype)
    good = make_batch([(PROMPT, 0)], [[0, 1, 2]], 8, rows)
    assert good.image_rows is not None
    limit = model.decoder.config.max_position_embeddings
    broken = {
        "vocabulary": replace(good, token_ids=good.token_ids + 90),
        "image_rows must be": replace(good, image_rows=good.image_rows[:, :-1]),
        "position": replace(good, positions=good.positions + limit),
        "slot": replace(good, slots=good.slots + 24),
        "block": replace(good, context_lens=good.context_lens + 24),
        "query_starts": replace(good, query_starts=ints([0, 3])),
    }
    for word, batch in broken.items():
        with pytest.raises(ShapeError, match=word):
            model.forward(batch, cache)
    with pytest.raises(ShapeError, match="layers"):
        model.forward(good, KVCacheView(cache.keys[:1], cache.values[:1], 8))
    assert bool(torch.isfinite(model.forward(good, cache)).all())


def test_stages_see_every_layer(model: DeepseekOcr) -> None:
    names: list[str] = []
    Session(model).feed([0, 5], stages=lambda name, _value: names.append(name))
    assert names == ["embed", "layer.0", "layer.1", "layer.2"]
