"""`pagelens quantize`: a checkpoint folder written again in the layout of the native kernels, int8, int4 or as it is.

The folder that comes out is mapped and used without conversion (loading/packed.py). It is read, packed and written
part by part, so memory stays near one shard.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .config import EngineConfig
from .core import DTYPES, check_weights_option
from .errors import ConfigError
from .loading.checkpoint import open_checkpoint
from .loading.packed import KEY, VERSION, PackedEntry
from .loading.presets import find_description
from .loading.quantized import open_weights
from .loading.safetensors_writer import FolderWriter
from .loading.weights import WeightSpec, load_weights
from .models.load_parts import choose_quantizer
from .models.packed_parts import write_part
from .models.registry import class_of
from .models.weight_map import Part, plain
from .ops.registry import as_ops, resolve_ops
from .quantization import Weight

COPIED = (".json", ".jinja", ".txt", ".model", ".md")  # and files without an ending, such as LICENSE
MAX_COPIED_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What was written: bytes of all tensors, files' bytes of the source's tensors, seconds, packed parts."""

    num_bytes: int
    source_bytes: int
    seconds: float
    num_packed_parts: int


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    weights: Literal["auto", "int8", "int4"] = "int8",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    num_threads: int | None = None,
) -> QuantizeReport:
    """Write `target`, a new or empty folder, from the checkpoint folder or hub id `source`.

    weights  "int8", "int4": the decoder's linear layers are quantised; "auto": they stay as the checkpoint has them
             (also one that is quantised already), in the kernels' layout
    dtype    of the activations to pack for; "auto" is the checkpoint's
    Raises ConfigError, WeightsError or UnsupportedError; nothing that looks like a model is left behind then.
    """
    started = time.perf_counter()
    config = EngineConfig(str(source), dtype, weights=weights, num_threads=num_threads, backend="native").resolve()
    folder = Path(target)
    _check_folder(folder)
    description = find_description(config.model, random_weights=False)
    if description.folder is None:
        raise ConfigError(f"{source} is a preset without weights; give the folder of a checkpoint")
    if KEY in description.config:
        raise ConfigError(f"{source} is already in the native layout; start from the original checkpoint")
    network = class_of(description.config)
    model_config = network.read_config(description.config, description.generation)
    chosen = model_config.torch_dtype if dtype == "auto" else dtype
    ops = resolve_ops("native", network.op_cases(model_config, DTYPES[chosen]), num_threads)
    try:
        with open_checkpoint(description.folder) as checkpoint, _new_folder(folder):
            weight_source = open_weights(checkpoint)
            check_weights_option(weights, weight_source, DTYPES[chosen])
            opened = network.open_parts(weight_source, model_config)
            writer = FolderWriter(folder)
            packer = _Packer(opened.parts, as_ops(ops), writer)
            quantizer = None if weights == "auto" else choose_quantizer(opened.source, as_ops(ops), weights)
            specs = [part.spec for part in opened.parts]
            load_weights(opened.source, specs, opened.unused, DTYPES[chosen], packer.consume, quantizer)
            writer.finish()
            _copy_small_files(description.folder, folder)
            settings = _settings(description.config, chosen, weights, packer.entries)
            # Last: without it the folder is no model.
            (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
            return QuantizeReport(
                writer.num_bytes, checkpoint.total_bytes, time.perf_counter() - started, len(packer.entries)
            )
    finally:
        ops.close()


class _Packer:
    """Packs and writes each part as its tensors are read."""

    def __init__(self, parts: Sequence[Part], ops: Any, writer: FolderWriter) -> None:
        self._parts = {part.spec.target: part for part in parts}
        self._ops, self._writer = ops, writer
        self._written: set[str] = set()
        self.entries: dict[str, list[PackedEntry]] = {}

    def consume(self, spec: WeightSpec, tensors: Sequence[Weight]) -> None:
        part = self._parts[spec.target]
        entries = write_part(part, part.pack(self._ops, tensors), self._ops, self._writer.add) if spec.linear else None
        if entries is not None:
            self.entries[spec.target] = entries
            return
        for name, tensor in zip(spec.sources, tensors):
            if name not in self._written:  # a tied table is a source of two parts
                self._writer.add(name, plain(tensor).clone())
                self._written.add(name)


def _check_folder(folder: Path) -> None:
    """Raises ConfigError unless `folder` is empty or does not exist."""
    try:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty; name a new folder")
    except OSError as error:
        raise _cannot_write(folder, error) from error


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make `folder`, which has nothing in it, and leave nothing in it on any failure. An OSError is a ConfigError."""
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if not existed and folder.is_dir():
            folder.rmdir()
        if isinstance(error, OSError):
            raise _cannot_write(folder, error) from error
        raise


def _cannot_write(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{folder} cannot be written: {error.strerror or error}; free space on its disk or choose another folder"
    )


def _copy_small_files(source: Path, target: Path) -> None:
    """Tokenizer, templates, generation settings, licence: everything small that holds no weights."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in (*COPIED, "") and not path.name.endswith(("config.json", ".index.json"))
        wanted = wanted or path.name in ("generation_config.json", "tokenizer_config.json", "modules.json")
        if wanted and path.is_file() and path.stat().st_size <= MAX_COPIED_BYTES:
            shutil.copyfile(path, target / path.name)
    # The modules of an embedding model. Those that are refused go along too, so that they still are.
    for module in sorted(path for path in source.glob("[0-9]*_*") if path.is_dir()):
        (target / module.name).mkdir(exist_ok=True)
        config = module / "config.json"
        if config.is_file() and config.stat().st_size <= MAX_COPIED_BYTES:
            shutil.copyfile(config, target / module.name / "config.json")


def _settings(
    config: dict[str, Any], dtype: str, weights: str, entries: dict[str, list[PackedEntry]]
) -> dict[str, Any]:
    dropped = ("quantization_config", "dtype", "torch_dtype")
    kept = {key: value for key, value in config.items() if key not in dropped}
    parts = {target: [entry.to_json() for entry in listed] for target, listed in entries.items()}
    packed = {"version": VERSION, "dtype": dtype, "weights": weights, "parts": parts}
    return {**kept, "torch_dtype": dtype, KEY: packed}


def describe(report: QuantizeReport, target: str | Path) -> str:
    """One line for people."""
    gigabytes = 1e-9 * report.num_bytes
    share = report.num_bytes / max(report.source_bytes, 1)
    return (
        f"wrote {target}: {gigabytes:.2f} GB ({share:.0%} of the source) in {report.seconds:.1f} s, "
        f"{report.num_packed_parts} packed parts"
    )
