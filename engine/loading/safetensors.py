"""Reader of one safetensors file: the header is checked in full, tensors are views of the mapped file.

Knows nothing of models, shards or configuration. Everything in a header is taken as hostile: it is checked against the
format's rules before a byte of data is touched, so that no tensor can reach outside the file. The rules are those of
the reference implementation (github.com/safetensors/safetensors); where the two differ, ours refuses more:
- white space before the header's '{' is refused, and so is a tensor that is named twice (the library keeps the last);
- a tensor entry with fields other than dtype, shape and data_offsets, or given as a list, is refused;
- `__metadata__: null` is refused;
- a dimension product that overflows is refused even if another dimension is zero; ranks above 32 are refused.
"""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch

from ..errors import WeightsError
from .strict_json import is_unicode, parse_json, shown

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 32
# Torch counts elements and bytes in int64; staying below 2**60 bytes leaves room for its own stride products.
MAX_TENSOR_BITS = 2**63

# Bits an element, for every dtype name of the format (safetensors 0.8). A file may hold a dtype that torch cannot
# show; such a file opens, and only asking for that tensor is refused.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a header. `start` and `end` count bytes from the beginning of the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: tensors in the order of the header, and the file's string-to-string metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def header_length(file_len: int, first_bytes: bytes, file: str) -> int:
    """Length in bytes of the JSON header, from the first 8 bytes of a file that is `file_len` bytes long.

    Raises WeightsError if the file is too short to hold it, or the length is above MAX_HEADER_BYTES.
    """
    if file_len < 8 or len(first_bytes) < 8:
        raise WeightsError(f"{file}: {file_len} bytes is too short for a safetensors file (8 bytes and a header)")
    length = int.from_bytes(first_bytes[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise WeightsError(
            f"{file}: header of {length} bytes exceeds the limit of {MAX_HEADER_BYTES}; not a safetensors file?"
        )
    if 8 + length > file_len:
        raise WeightsError(
            f"{file}: header of {length} bytes does not fit in a file of {file_len} bytes; truncated download?"
        )
    return length


def parse_header(data_len: int, header: bytes, file: str = "header") -> Header:
    """Check a header against every rule of the format and return its contents; touches no file.

    data_len  bytes of the data section, that is, file length - 8 - len(header); the tensors must fill it exactly
    header    the JSON bytes
    file      name for messages
    Raises    WeightsError, one line, naming the file and the fault.
    """
    raw = _parse_json(header, file)
    metadata = _check_metadata(raw.pop("__metadata__", {}), file)
    tensors = {name: _check_tensor(name, entry, file) for name, entry in raw.items()}
    _check_layout(tensors, data_len, file)
    return Header(tensors, metadata)


def _parse_json(header: bytes, file: str) -> dict[str, Any]:
    def fail(reason: str) -> NoReturn:
        raise WeightsError(f"{file}: damaged safetensors header: {reason}")

    if not header.startswith(b"{"):
        fail("it does not start with '{'")
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as error:
        fail(f"not UTF-8 at byte {error.start}")
    raw = parse_json(text, fail, unsigned=True)
    if not isinstance(raw, dict):
        fail("it is not an object")
    return raw


def _check_metadata(raw: object, file: str) -> dict[str, str]:
    if not isinstance(raw, dict):
        raise WeightsError(f"{file}: __metadata__ must be an object")
    for key, value in raw.items():
        if not isinstance(value, str) or not is_unicode(value):
            raise WeightsError(f"{file}: __metadata__[{shown(key)}] must be a string")
    return raw


def _check_tensor(name: str, entry: object, file: str) -> TensorInfo:
    def fail(reason: str) -> NoReturn:
        raise WeightsError(f"{file}: tensor {shown(name)}: {reason}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        fail("needs exactly the fields dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        fail(f"unknown dtype {shown(dtype)}; known: {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        fail("shape must be a list of unsigned integers")
    if len(shape) > MAX_RANK:
        fail(f"{len(shape)} dimensions exceed the limit of {MAX_RANK}")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        fail("data_offsets must be two unsigned integers")
    bits, bound = DTYPE_BITS[dtype], DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
        # A zero dimension must not hide an overflow of the others: strides are computed from them.
        bound *= max(size, 1)
        if bound >= MAX_TENSOR_BITS:
            fail("shape overflows: too many elements")
    if bits % 8:
        fail(f"{bits} bits are not whole bytes")
    start, end = offsets
    if end < start:
        fail(f"data_offsets end before they start ({start}, {end})")
    if end - start != bits // 8:
        fail(f"data_offsets span {end - start} bytes, but its dtype and shape need {bits // 8}")
    return TensorInfo(dtype, tuple(shape), start, end)


def _check_layout(tensors: dict[str, TensorInfo], data_len: int, file: str) -> None:
    """Sorted by offset the tensors start at 0, touch, and end with the file. Zero-size ones may share an offset."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            kind = "a hole before" if info.start > position else "an overlap with"
            raise WeightsError(f"{file}: {kind} tensor {shown(name)}: starts at {info.start}, expected {position}")
        position = info.end
    if position != data_len:
        kind = "truncated" if position > data_len else "trailing bytes"
        raise WeightsError(f"{file}: {kind}: tensors need {position} bytes of data, the file holds {data_len}")


class SafetensorsFile:
    """An open safetensors file. The header is checked when opening; data is paged in from disk when first touched.

    Thread-safe for reading. The file must not be shortened by others while it is open (the system would end the
    process with SIGBUS; no reader of mapped files can prevent that).

    Raises WeightsError, naming the file, if it cannot be opened or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._label = shown(self.path.name)[1:-1]
        try:
            with open(self.path, "rb", opener=_open_regular) as file:
                file_len = os.fstat(file.fileno()).st_size
                length = header_length(file_len, file.read(8), self._label)
                header = file.read(length)
                if len(header) != length:
                    raise WeightsError(f"{self._label}: the file became shorter while it was read")
                self._header = parse_header(file_len - 8 - length, header, self._label)
                self._map: mmap.mmap | None = _map_private(file.fileno(), file_len)
        except WeightsError:
            raise
        except (OSError, ValueError) as error:
            # ValueError: the file became shorter before it was mapped, or the path holds a NUL.
            reason = getattr(error, "strerror", None) or error
            raise WeightsError(f"{self._label}: cannot be opened: {reason}") from error
        self._data_start = 8 + length

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def metadata(self) -> dict[str, str]:
        """The file's string-to-string metadata (a copy)."""
        return dict(self._header.metadata)

    def names(self) -> list[str]:
        """Tensor names in the order of the header."""
        return list(self._header.tensors)

    def info(self, name: str) -> TensorInfo:
        """What the header says of a tensor. Raises WeightsError if there is none of that name."""
        try:
            return self._header.tensors[name]
        except KeyError:
            raise WeightsError(f"{self._label}: there is no tensor {shown(name)}") from None

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as a view of the mapped file: nothing is copied, pages are read when touched.

        Treat it as read-only: a write stays in this process's private pages, never reaches the file, and is lost by
        `release`. The view stays valid after `close`. A tensor whose offset in the file is not a multiple of its
        element size is copied instead. Raises WeightsError if torch has no such dtype, or the file is closed.
        """
        info = self.info(name)
        if self._map is None:
            raise WeightsError(f"{self._label}: the file is closed")
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None:
            raise WeightsError(f"{self._label}: tensor {shown(name)} has dtype {info.dtype}, which cannot be read")
        if info.num_bytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        start = self._data_start + info.start
        if start % dtype.itemsize:
            data = torch.frombuffer(self._map, dtype=torch.uint8, count=info.num_bytes, offset=start)
            return data.clone().view(dtype).view(info.shape)
        count = info.num_bytes // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(info.shape)

    def release(self, name: str) -> None:
        """Give a tensor's pages back to the system once it has been copied; a later read fetches them again.

        Keeps a load from holding the file and its converted weights in memory at once. A no-op where unsupported.
        """
        info = self.info(name)
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        # Only whole pages inside the tensor: a neighbour's pages are not ours to drop.
        start = -(-(self._data_start + info.start) // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (self._data_start + info.end) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Close the file. Views handed out stay valid: the mapping goes when the last of them goes."""
        # Never mmap.close(): torch keeps the mapping alive but holds no buffer lock on it, so closing would succeed
        # and leave every view pointing at unmapped memory.
        self._map = None


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file only: opening a FIFO would wait for a writer forever, a device has no length."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"not a regular file: {shown(path)}")
    return descriptor


def _map_private(descriptor: int, length: int) -> mmap.mmap:
    """Map a file copy-on-write: torch wants writable memory; a stray write must neither crash nor reach the disk."""
    if os.name == "nt":
        return mmap.mmap(descriptor, length, access=mmap.ACCESS_COPY)
    # Without NORESERVE the whole file would count as memory that might be needed.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(descriptor, length, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
