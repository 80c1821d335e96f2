"""Memory of the KV-cache: bytes of a block, form of the tensors, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import DECODER

from pagelens.config import EngineConfig
from pagelens.errors import ConfigError
from pagelens.runtime.kv_cache import allocate, block_bytes, plan_num_blocks

LAYERS, HEADS, DIM = DECODER.num_layers, DECODER.num_kv_heads, DECODER.head_dim
INT8 = EngineConfig("model", kv_cache_dtype="int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_cache(dtype: torch.dtype) -> None:
    view = allocate(DECODER, dtype, 3, 5)
    tensors = (*view.keys, *view.values)
    assert {(tuple(t.shape), t.dtype) for t in tensors} == {((3, 5, HEADS, DIM), dtype)}
    assert sum(t.nbytes for t in tensors) == 3 * block_bytes(DECODER, dtype, 5)
    assert view.scales(1) == (None, None)
    assert len({t.data_ptr() for t in tensors}) == 2 * LAYERS
    assert not any(t.data_ptr() % 64 or t.any() for t in tensors)


def test_an_int8_cache() -> None:
    view = allocate(DECODER, torch.bfloat16, 3, 5, "int8")
    assert view.key_scales is not None
    assert view.value_scales is not None
    tensors, scales = (*view.keys, *view.values), (*view.key_scales, *view.value_scales)
    assert {(tuple(t.shape), t.dtype) for t in tensors} == {((3, 5, HEADS, DIM), torch.uint8)}
    assert {(tuple(t.shape), t.dtype) for t in scales} == {((3, HEADS, 5), torch.float32)}
    assert sum(t.nbytes for t in (*tensors, *scales)) == 3 * block_bytes(DECODER, torch.bfloat16, 5, "int8")
    assert view.scales(1) == (view.key_scales[1], view.value_scales[1])
    assert len({t.data_ptr() for t in (*tensors, *scales)}) == 4 * LAYERS


def test_the_same_bytes_hold_more_blocks_of_int8() -> None:
    """A row of 128 bfloat16 is 256 bytes, of int8 132."""
    decoder = replace(DECODER, head_dim=128)
    given = 100 * block_bytes(decoder, torch.bfloat16, 16)
    plain, small = (
        plan_num_blocks(config, decoder, torch.bfloat16, 512)
        for config in (
            EngineConfig("model", kv_cache_bytes=given),
            INT8.with_options(kv_cache_bytes=given),
        )
    )
    assert (plain, small) == (100, 100 * 256 // 132)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype='int4' is not one of auto, int8"):
        INT8.with_options(kv_cache_dtype="int4").resolve()
    with pytest.raises(ConfigError, match=r"head size that is a multiple of 4, and the model's is 22; use .*'auto'"):
        plan_num_blocks(INT8, replace(DECODER, head_dim=22), torch.bfloat16, 512)
