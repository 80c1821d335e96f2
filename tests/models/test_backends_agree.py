"""Reference and native read a page into the same tokens, from pixels to greedy text.

In float32 all tokens are equal. In bfloat16 the two round at the same places but sum in other orders, so a near-tie may
fall either way: tokens are equal, or the first difference lies where the reference's two best logits are closer than
the logit error between the two, measured on other steps (the same tokens fed to both, this step left out).
"""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import EVEN, Session, make_plan, make_views, prompt_with_image, random_tensors
from torch import Tensor

from pagelens.models.deepseek_ocr import DeepseekOcr
from pagelens.ops.registry import as_ops, resolve_ops

PAGES = [(192, 0, 1, 1), (128, 0, 1, 1), (192, 128, 2, 1), (128, 128, 2, 3)]
SEEDS = [0, 1, 2]
STEPS = 24
# Largest error between the backends in bfloat16, of the largest logit. The float32 network differs from the bfloat16
# one by about 2^-5 at these sizes (asserted below); two orders of summation must stay under that.
BFLOAT16_ERROR = 2.0**-5


def read(backend: str, dtype: torch.dtype, seed: int, page: tuple[int, int, int, int]) -> tuple[list[int], Tensor]:
    """STEPS greedy tokens and the logits [STEPS, V] they were chosen from."""
    table = resolve_ops(backend, DeepseekOcr.op_cases(EVEN, dtype), num_threads=2)  # type: ignore[arg-type]
    model = DeepseekOcr.from_tensors(EVEN, random_tensors(EVEN, seed), dtype, as_ops(table))
    plan = make_plan(*page)
    ids, rows = prompt_with_image(model.encode_image(make_views(plan, seed), plan), [5, 9, 33])
    tokens, logits = Session(model, num_blocks=64).greedy(ids, rows, STEPS)
    table.close()
    return tokens, torch.stack(logits)


def first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))


@pytest.mark.parametrize("page", PAGES)
def test_float32_tokens_are_equal(page: tuple[int, int, int, int]) -> None:
    for seed in SEEDS:
        reference, logits = read("reference", torch.float32, seed, page)
        native, native_logits = read("native", torch.float32, seed, page)
        assert native == reference
        assert float((native_logits - logits).abs().max()) <= 1e-5 * float(logits.abs().max())


@pytest.mark.parametrize("page", PAGES)
def test_bfloat16_tokens_differ_only_at_near_ties(page: tuple[int, int, int, int]) -> None:
    equal = 0
    for seed in SEEDS:
        reference, logits = read("reference", torch.bfloat16, seed, page)
        native, native_logits = read("native", torch.bfloat16, seed, page)
        exact = read("reference", torch.float32, seed, page)[1]
        step = first_difference(reference, native)
        scale = float(logits[0].abs().max())
        # Step 0 of all three follows the same prompt; later ones only while the tokens agree.
        assert float((native_logits[0] - logits[0]).abs().max()) <= BFLOAT16_ERROR * scale
        assert float((logits[0] - exact[0]).abs().max()) <= 2 * BFLOAT16_ERROR * scale
        equal += step == STEPS
        if step == STEPS:
            continue
        assert step > 0, "no step before the difference to measure the error on"
        measured = float((native_logits[:step] - logits[:step]).abs().max())
        best, second = logits[step].topk(2).values.tolist()
        print(f"seed {seed}: step {step}, gap {best - second:.2e}, measured error {measured:.2e}")
        assert best - second <= measured
    print(f"{page}: {equal} of {len(SEEDS)} readings of {STEPS} tokens equal in bfloat16")
