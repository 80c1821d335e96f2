"""A step on native computes nothing with torch, whose ops would start threads of their own, and a decode step allocates
nothing but its logits, counted as new torch storages and native scratch bytes.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from helpers.tiny_models import EVEN, Session, make_batch, random_tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pagelens.models.deepseek_ocr import DeepseekOcr
from pagelens.ops.registry import as_ops, resolve_ops


class StorageCounter(TorchDispatchMode):
    """Notes every torch op whose result lies in a storage that none of its arguments has."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.called.add(func.name().split(".")[0])
        known = set(storages((args, kwargs)))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.made.append((str(func), tuple(tensor.shape), tensor.dtype))
        return result


def storages(values: Any) -> Iterable[int]:
    return (t.untyped_storage().data_ptr() for t in tree_leaves(values) if isinstance(t, Tensor))


def counted_step(backend: str, dtype: torch.dtype) -> tuple[list[tuple[str, tuple[int, ...], torch.dtype]], Any, Any]:
    """One decode step of two sequences after a prefill and a warm-up step; its new storages, the model, the batch."""
    table = resolve_ops(backend, DeepseekOcr.op_cases(EVEN, dtype), num_threads=2)  # type: ignore[arg-type]
    model = DeepseekOcr.from_tensors(EVEN, random_tensors(EVEN), dtype, as_ops(table))
    session = Session(model, num_blocks=8)
    tables = [[0, 1, 2], [5, 4, 3]]
    model.forward(make_batch([([0, 5, 9, 33], 0), ([0, 61], 0)], tables, 8), session.cache)
    model.forward(make_batch([([7], 4), ([8], 2)], tables, 8), session.cache)
    batch = make_batch([([9], 5), ([10], 3)], tables, 8)
    counter = StorageCounter()
    with counter:
        model.forward(batch, session.cache)
    return counter.made, model, (batch, session.cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_logits_are_new(dtype: torch.dtype) -> None:
    made, model, step = counted_step("native", dtype)
    assert [(shape, kind) for _, shape, kind in made] == [((2, EVEN.decoder.vocab_size), torch.float32)], made
    native = model.ops.linear.__self__
    before = native.scratch_bytes
    for _ in range(5):
        model.forward(*step)
    assert native.scratch_bytes == before
    model.ops.close()


# New memory, other shapes of the same memory, and one number of it.
WITHOUT_WORK = {
    f"aten::{name}" for name in ("empty", "view", "as_strided", "slice", "select", "detach", "_local_scalar_dense")
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_computes_nothing_with_torch(dtype: torch.dtype) -> None:
    for backend in ("native", "reference"):
        _, model, (decode, cache) = counted_step(backend, dtype)
        prefill = make_batch([(list(range(20)), 0), ([0, 61], 0)], [[0, 1, 2], [5, 4, 3]], 8)
        for batch in (prefill, decode):
            with StorageCounter() as counter:
                model.forward(batch, cache)
            others = counter.called - WITHOUT_WORK
            assert bool(others) == (backend == "reference"), others
        model.ops.close()


def test_a_decode_step_leaves_no_python_objects() -> None:
    """Nothing grows from step to step: what 50 steps leave behind is less than one small object a step."""
    _, model, step = counted_step("native", torch.float32)
    for _ in range(10):
        model.forward(*step)
    gc.collect()
    tracemalloc.start()
    start = tracemalloc.get_traced_memory()[0]
    for _ in range(50):
        model.forward(*step)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    model.ops.close()
    assert grown < 50 * 16, f"{grown} bytes after 50 steps"


def test_the_counter_sees_allocations() -> None:
    """The reference backend makes temporaries, and the counter must see them; views and in-place ops it must not."""
    made, model, _ = counted_step("reference", torch.float32)
    assert len(made) > 20
    x = torch.zeros(4)
    counter = StorageCounter()
    with counter:
        x.add_(1)
        x.view(2, 2)[0].mul_(2)
        torch.add(x, 1, out=x)
    assert counter.made == []
    with counter:
        x + 1
    assert len(counter.made) == 1
    model.ops.close()
