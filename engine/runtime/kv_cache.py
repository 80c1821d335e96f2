"""Memory of the paged KV-cache: how many blocks, and their tensors."""

from __future__ import annotations

import os

import numpy as np
import torch

from ..config import DecoderConfig, EngineConfig
from ..errors import ConfigError
from ..types import KVCacheView

DEFAULT_MAX_BYTES = 1 << 30
MEMORY_SHARE = 0.5
ALIGNMENT = 64
CPU = torch.device("cpu")


def block_bytes(decoder: DecoderConfig, dtype: torch.dtype, block_size: int) -> int:
    """Bytes of one block: keys and values of all layers."""
    return 2 * decoder.num_layers * block_size * decoder.num_kv_heads * decoder.head_dim * dtype.itemsize


def plan_num_blocks(config: EngineConfig, decoder: DecoderConfig, dtype: torch.dtype, max_model_len: int) -> int:
    """Blocks that config.kv_cache_bytes pays for.

    None = room for max_num_seqs sequences of max_model_len tokens, at most 1 GiB or one such sequence, whichever is
    more, and never above half of the memory of the machine, or of the GPU. Raises ConfigError if not even one block
    fits, or if max_model_len was asked for and does not fit into the kv_cache_bytes that were asked for.
    """
    one_block = block_bytes(decoder, dtype, config.block_size)
    one_sequence = -(-max_model_len // config.block_size)
    if config.kv_cache_bytes is None:
        blocks = min(config.max_num_seqs * one_sequence, max(DEFAULT_MAX_BYTES // one_block, one_sequence))
        return max(1, min(blocks, int(_memory_of(config.device) * MEMORY_SHARE) // one_block))
    blocks = config.kv_cache_bytes // one_block
    if blocks == 0 or (config.max_model_len is not None and blocks < one_sequence):
        wanted = 1 if config.max_model_len is None else one_sequence
        remedy = "" if config.max_model_len is None else ", or lower max_model_len"
        raise ConfigError(
            f"kv_cache_bytes={config.kv_cache_bytes} has room for {blocks * config.block_size} tokens, but "
            f"{wanted * config.block_size} are needed; raise it to {wanted * one_block}{remedy}"
        )
    return min(blocks, config.max_num_seqs * one_sequence)


def allocate(
    decoder: DecoderConfig,
    dtype: torch.dtype,
    num_blocks: int,
    block_size: int,
    device: torch.device = CPU,
) -> KVCacheView:
    """Zeroed key and value tensors, [num_blocks, block_size, K, D] a layer, each starting on a 64-byte line.

    On the CPU numpy's zeros come from calloc, so that the system hands out the pages only as they are first written.
    """
    shape = (num_blocks, block_size, decoder.num_kv_heads, decoder.head_dim)
    if device.type != "cpu":
        layers = [torch.zeros((2, *shape), dtype=dtype, device=device) for _ in range(decoder.num_layers)]
        return KVCacheView(tuple(both[0] for both in layers), tuple(both[1] for both in layers), block_size)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    stride = -(-num_bytes // ALIGNMENT) * ALIGNMENT
    memory = np.zeros(2 * decoder.num_layers * stride + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    tensors = [
        torch.from_numpy(memory[offset : offset + num_bytes]).view(dtype).view(shape)
        for offset in range(start, start + 2 * decoder.num_layers * stride, stride)
    ]
    return KVCacheView(tuple(tensors[0::2]), tuple(tensors[1::2]), block_size)


def _memory_of(device: str) -> int:
    if device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 4 * DEFAULT_MAX_BYTES
