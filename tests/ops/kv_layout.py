"""The native layout of a KV-cache block (csrc/cpu/kv_layout.h) and the plain one [num_blocks, block_size, K, D]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KEY_GROUP = 16
KEY_OFFSET = 128  # of the int8 keys


def order(shape: tuple[int, int, int], element: int, values: bool) -> Tensor:
    """Place in a plain block [block_size, K, D] of each element of a native one; `element` is its size in bytes."""
    size, heads, dim = shape
    word = 4 // element
    places = torch.arange(size * heads * dim).view(size, heads, dim).transpose(0, 1)  # [K, tokens, D]
    parts = []
    for group in places.split(word if values else KEY_GROUP, dim=1):
        if values:
            parts.append(group.transpose(1, 2).reshape(heads, -1))
        else:
            words = group.view(heads, group.shape[1], dim // word, word)
            parts.append(words.transpose(1, 2).reshape(heads, -1))
    return torch.cat(parts, 1).flatten()


def to_backend(ops: Any, plain: Tensor, values: bool) -> Tensor:
    """A cache [num_blocks, block_size, K, D] (int8 numbers as int8) as the backend keeps it."""
    moved = plain.view(torch.uint8) if plain.dtype == torch.int8 else plain
    if ops.name != "native":
        return moved
    if plain.dtype == torch.int8 and not values:
        moved = (plain.int() + KEY_OFFSET).to(torch.uint8)
    places = order(tuple(plain.shape[1:]), plain.element_size(), values)  # type: ignore[arg-type]
    return moved.flatten(1)[:, places].view(plain.shape).contiguous()


def from_backend(ops: Any, cache: Tensor, values: bool) -> Tensor:
    """The inverse of to_backend; an int8 cache (uint8) comes as int8 numbers."""
    is_int8 = cache.dtype == torch.uint8
    if ops.name != "native":
        return cache.view(torch.int8) if is_int8 else cache
    places = order(tuple(cache.shape[1:]), cache.element_size(), values)  # type: ignore[arg-type]
    plain = torch.empty_like(cache).flatten(1)
    plain[:, places] = cache.flatten(1)
    plain = plain.view(cache.shape)
    if not is_int8:
        return plain
    return plain.view(torch.int8) if values else (plain.int() - KEY_OFFSET).to(torch.int8)
