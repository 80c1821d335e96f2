"""A checkpoint folder: config.json as a plain dict, and the tensors of one file or of several shards under one roof.

Knows nothing of what the tensors mean. Only safetensors is read, never pickle, and no file outside the folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, NoReturn

import torch

from ..errors import ConfigError, WeightsError
from .safetensors import SafetensorsFile
from .strict_json import read_json_object, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 16 * 2**20
MAX_INDEX_BYTES = 100_000_000
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class Checkpoint:
    """The tensors of all files of a checkpoint by name, and its config. Made by `open_checkpoint`; a context manager.

    config   the object in config.json, unchecked beyond being JSON
    folder   the folder, symlinks resolved
    """

    def __init__(self, folder: Path, config: dict[str, Any], files: list[SafetensorsFile]) -> None:
        self.folder = folder
        self.config = config
        self._files = files
        self._owner = {name: file for file in files for name in file.names()}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together, headers not counted."""
        return sum(file.info(name).num_bytes for name, file in self._owner.items())

    def names(self) -> list[str]:
        return list(self._owner)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).info(name).shape

    def dtype(self, name: str) -> str:
        """The dtype by its name in the file, such as "BF16"."""
        return self._file(name).info(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A read-only view of the mapped file (see SafetensorsFile.tensor)."""
        return self._file(name).tensor(name)

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system (see SafetensorsFile.release)."""
        self._file(name).release(name)

    def close(self) -> None:
        """Close all files; views handed out stay valid."""
        for file in self._files:
            file.close()

    def _file(self, name: str) -> SafetensorsFile:
        try:
            return self._owner[name]
        except KeyError:
            raise WeightsError(f"the checkpoint has no tensor {shown(name)}") from None


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open every file of a checkpoint folder and check all headers; no tensor data is read yet.

    Tensors come from `model.safetensors`; else from the shards that `model.safetensors.index.json` names; else from
    the only *.safetensors file there is. Shard names must stay inside the folder, symlinks included (the layout of the
    Hugging Face cache, whose snapshots are links to blobs, is recognised).

    Raises ConfigError if the folder or a readable config.json is missing, WeightsError if files are missing or damaged,
    if a name leaves the folder, or if the index and the shards disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; a model is a folder with config.json and *.safetensors files")
    folder = folder.resolve()
    config = read_config(folder)
    files: list[SafetensorsFile] = []
    try:
        if not (folder / SINGLE_FILE).exists() and (folder / INDEX_FILE).exists():
            weight_map = _read_weight_map(folder)
            for shard in sorted(set(weight_map.values())):
                files.append(SafetensorsFile(_path_inside(folder, shard, INDEX_FILE)))
                _check_shard(files[-1], shard, weight_map)
        else:
            files.append(SafetensorsFile(_path_inside(folder, _only_file(folder), folder.name)))
    except BaseException:
        for file in files:
            file.close()
        raise
    return Checkpoint(folder, config, files)


def read_config(folder: Path) -> dict[str, Any]:
    """The object in the folder's config.json. Raises ConfigError if it is missing or damaged."""

    def fail(reason: str) -> NoReturn:
        raise ConfigError(f"{folder.name}/config.json: {reason}")

    if not (folder / "config.json").exists():
        fail("missing; a model is a folder with config.json and *.safetensors files")
    return read_json_object(folder / "config.json", MAX_CONFIG_BYTES, fail)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The object in the folder's generation_config.json, {} if there is no such file. Raises ConfigError if damaged."""

    def fail(reason: str) -> NoReturn:
        raise ConfigError(f"{folder.name}/generation_config.json: {reason}")

    path = folder / "generation_config.json"
    return read_json_object(path, MAX_CONFIG_BYTES, fail) if path.exists() else {}


def _read_weight_map(folder: Path) -> dict[str, str]:
    def fail(reason: str) -> NoReturn:
        raise WeightsError(f"{INDEX_FILE}: {reason}")

    weight_map = read_json_object(folder / INDEX_FILE, MAX_INDEX_BYTES, fail).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        fail("weight_map must be an object that maps tensor names to files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            fail(f"weight_map[{shown(name)}] must be a file name")
    return weight_map


def _path_inside(folder: Path, name: str, source: str) -> Path:
    """The path of a file named by a checkpoint. Raises WeightsError if it is missing or leaves the folder."""

    def fail(reason: str) -> NoReturn:
        raise WeightsError(f"{source}: file {shown(name)} {reason}")

    # Read the name by the rules of both families of systems: a checkpoint must not mean different files on them.
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    if not name.endswith(".safetensors") or not name.isprintable():
        fail("is not the name of a safetensors file")
    if windows.is_absolute() or windows.anchor or posix.is_absolute() or ".." in windows.parts:
        fail("leaves the folder of the checkpoint")
    path = folder.joinpath(*windows.parts)
    # os.path, not Path: a name that is too long is an absent file here, not an OSError.
    if not os.path.exists(path):
        fail("is missing; download the checkpoint again")
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in _allowed_roots(folder)):
        fail("is a link to a place outside the folder of the checkpoint; put the file itself there")
    return path


def _allowed_roots(folder: Path) -> Iterable[Path]:
    """Where the files of a checkpoint may really lie: in its folder, or in the blob stores of a Hugging Face cache.

    The cache's layout is CACHE/models--ORG--NAME/snapshots/REVISION/FILE, a link to ../../blobs/HASH, which may itself
    be a link to CACHE/blobs.
    """
    yield folder
    repository = folder.parent.parent
    if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
        yield repository / "blobs"
        yield repository.parent / "blobs"


def _check_shard(file: SafetensorsFile, shard: str, weight_map: dict[str, str]) -> None:
    """The index and one shard name the same tensors."""
    here = set(file.names())
    named = {name for name, owner in weight_map.items() if owner == shard}
    if here == named:
        return
    name = min(here ^ named)
    if name in named:
        raise WeightsError(f"{INDEX_FILE}: says tensor {shown(name)} is in {shown(shard)}, which does not have it")
    raise WeightsError(
        f"{INDEX_FILE}: {shown(shard)} has tensor {shown(name)}, which the index "
        + (f"places in {shown(weight_map[name])}" if name in weight_map else "does not list")
    )


def _only_file(folder: Path) -> str:
    """The name of the file that holds the whole checkpoint, where there is no index."""
    if (folder / SINGLE_FILE).exists():
        return SINGLE_FILE
    entries = sorted(entry.name for entry in folder.iterdir())
    found = [name for name in entries if name.endswith(".safetensors")]
    if len(found) > 1:
        listed = ", ".join(shown(name) for name in found[:4])
        raise WeightsError(f"{folder.name}: {len(found)} safetensors files ({listed}) and no {INDEX_FILE}")
    if found:
        part = re.search(r"-(\d+)-of-(\d+)\.safetensors$", found[0])
        if part and int(part[2]) != 1:
            raise WeightsError(
                f"{folder.name}: {shown(found[0])} is one shard of {int(part[2])}; {INDEX_FILE} is missing"
            )
        return found[0]
    pickles = [name for name in entries if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise WeightsError(
            f"{folder.name}: holds {shown(pickles[0])} but no safetensors file; pickle files can run code when loaded "
            "and are never read; convert the checkpoint to safetensors"
        )
    raise WeightsError(f"{folder.name}: no safetensors file; expected {SINGLE_FILE} or {INDEX_FILE}")
