"""Writes checkpoint folders whose tensors lie on 64-byte lines: packed weights can then be used where they are mapped.

The usual writer aligns to 8 bytes. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .checkpoint import INDEX_FILE, SINGLE_FILE
from .safetensors import TORCH_DTYPES

LINE = 64
SHARD_BYTES = 1 << 30
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class FolderWriter:
    """Collects tensors and writes a shard whenever `shard_bytes` are together; `finish` names them, writes the index.

    `folder` must exist and hold no weights yet. Raises OSError if a file cannot be written; what was written stays.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor until its shard is written; it must not change until then."""
        self._waiting[name] = tensor.contiguous()
        self.num_bytes += tensor.numel() * tensor.element_size()
        if sum(t.numel() * t.element_size() for t in self._waiting.values()) >= self._shard_bytes:
            self._flush()

    def finish(self) -> None:
        """Write what waits, give the shards their names and write the index."""
        if self._waiting or not self._shards:
            self._flush()
        count = len(self._shards)
        names = [SINGLE_FILE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            os.replace(self._part(i), self._folder / name)
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, self._shards) for tensor in shard}
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _part(self, index: int) -> Path:
        return self._folder / f"unfinished-{index:05}.part"

    def _flush(self) -> None:
        with open(self._part(len(self._shards)), "wb") as file:
            write_safetensors(file, self._waiting)
        self._shards.append(list(self._waiting))
        self._waiting = {}


def write_safetensors(file: BinaryIO, tensors: dict[str, Tensor]) -> None:
    """One file. Tensors whose size is a multiple of 64 bytes come first and so lie on 64-byte lines."""
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    order = sorted(tensors, key=lambda name: sizes[name] % LINE != 0)
    header, position = {}, 0
    for name in order:
        entry = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name] = {**entry, "data_offsets": [position, position + sizes[name]]}
        position += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % LINE)  # the format allows spaces at the end of the header
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        data = tensors[name].contiguous().reshape(-1).view(torch.uint8)
        file.write(data.numpy().data)
