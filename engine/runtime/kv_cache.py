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
ALIGNMENT = 4096  # a page: in blocks of 16 tokens, 16 bfloat16 keys of a head of 128 are one
SCALE_BYTES = 4
INT8_MULTIPLE = 4  # bytes of a word in the native layout
CPU = torch.device("cpu")


def block_bytes(decoder: DecoderConfig, dtype: torch.dtype, block_size: int, kv_cache_dtype: str = "auto") -> int:
    """Bytes of one block: keys and values of all layers, and their scales."""
    row = decoder.head_dim + SCALE_BYTES if kv_cache_dtype == "int8" else decoder.head_dim * dtype.itemsize
    return 2 * decoder.num_layers * block_size * decoder.num_kv_heads * row


def plan_num_blocks(config: EngineConfig, decoder: DecoderConfig, dtype: torch.dtype, max_model_len: int) -> int:
    """Blocks that config.kv_cache_bytes pays for.

    None = room for max_num_seqs sequences of max_model_len tokens, at most 1 GiB or one such sequence, whichever is
    more (with low_memory: for one), and never above half of the memory of the machine, or of the GPU. Raises
    ConfigError if not even one block fits, if max_model_len was asked for and does not fit into the kv_cache_bytes that
    were asked for, or if kv_cache_dtype does not suit the model.
    """
    if config.kv_cache_dtype == "int8" and decoder.head_dim % INT8_MULTIPLE:
        raise ConfigError(
            f"kv_cache_dtype='int8' needs a head size that is a multiple of {INT8_MULTIPLE}, and the model's is "
            f"{decoder.head_dim}; use kv_cache_dtype='auto'"
        )
    one_block = block_bytes(decoder, dtype, config.block_size, config.kv_cache_dtype)
    one_sequence = -(-max_model_len // config.block_size)
    if config.kv_cache_bytes is None:
        most = 0 if config.low_memory else DEFAULT_MAX_BYTES // one_block
        blocks = min(config.max_num_seqs * one_sequence, max(most, one_sequence))
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
    kv_cache_dtype: str = "auto",
    device: torch.device = CPU,
) -> KVCacheView:
    """Zeroed key and value tensors, [num_blocks, block_size, K, D] a layer, each starting on a page.

    kv_cache_dtype "int8" makes them uint8, with scales [num_blocks, K, block_size] float32; on the CPU only.
    There numpy's zeros come from calloc, so that the system hands out the pages only as they are first written.
    """
    heads, layers = decoder.num_kv_heads, decoder.num_layers
    shape = (num_blocks, block_size, heads, decoder.head_dim)
    if device.type != "cpu":
        pairs = [torch.zeros((2, *shape), dtype=dtype, device=device) for _ in range(layers)]
        return KVCacheView(tuple(both[0] for both in pairs), tuple(both[1] for both in pairs), block_size)
    if kv_cache_dtype != "int8":
        tensors = _zeros(2 * layers, shape, dtype)
        return KVCacheView(tuple(tensors[0::2]), tuple(tensors[1::2]), block_size)
    tensors = _zeros(2 * layers, shape, torch.uint8)
    scales = _zeros(2 * layers, (num_blocks, heads, block_size), torch.float32)
    return KVCacheView(tuple(tensors[0::2]), tuple(tensors[1::2]), block_size, tuple(scales[0::2]), tuple(scales[1::2]))


def _zeros(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    stride = -(-num_bytes // ALIGNMENT) * ALIGNMENT
    memory = np.zeros(count * stride + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return [
        torch.from_numpy(memory[offset : offset + num_bytes]).view(dtype).view(shape)
        for offset in range(start, start + count * stride, stride)
    ]


def _memory_of(device: str) -> int:
    if device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 4 * DEFAULT_MAX_BYTES
