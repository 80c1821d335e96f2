"""A quantised checkpoint read as it is: FP8 in blocks, GPTQ, AWQ and compressed-tensors become QuantizedWeight.

Which modules are quantised is decided by the tensors that are there; quantization_config says how they are stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NoReturn

from torch import Tensor

from ..errors import ConfigError, WeightsError
from ..quantization import Weight
from .checkpoint import Checkpoint
from .compressed_config import CompressedConfig
from .packed import PackedSource, read_packed
from .quantized_config import (
    AwqConfig,
    Fp8Config,
    QuantizationConfig,
    read_legacy,
    read_quantization,
)
from .quantized_layouts import (
    COMPRESSED_ROLES,
    FP8_ROLES,
    PACKED_ROLES,
    Header,
    Layout,
    Scheme,
    layout_of,
)
from .quantized_unpack import unpack
from .strict_json import read_json_object, shown
from .weights import MAX_LISTED, TensorSource

# Values of these types in a tensor P.weight can only be those of a quantised module.
VALUE_DTYPES = ("I8", "F8_E4M3", "F8_E5M2")
DTYPE_NAMES = {"int4": "INT4", "int8": "INT8", "fp8": "FP8"}
MAX_LEGACY_BYTES = 2**20
LEGACY_FILES: dict[str, Literal["gptq", "awq"]] = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


class QuantizedCheckpoint:
    """A TensorSource over a Checkpoint whose linear layers are quantised.

    The tensors of a quantised module P appear as one, `P.weight`, a QuantizedWeight [N, K] of dtype "INT4", "INT8" or
    "FP8"; every other tensor (P.bias too) is passed on under its own name. Nothing but headers is read until `tensor`.

    Raises WeightsError listing the modules whose tensors are missing, or of a wrong shape or dtype (the first ten).
    """

    def __init__(self, checkpoint: Checkpoint, config: QuantizationConfig) -> None:
        self._checkpoint = checkpoint
        self._modules: dict[str, tuple[Layout, tuple[str, ...]]] = {}
        roles = _roles_by_module(checkpoint, config)
        faults: list[str] = []
        for module, found in roles.items():
            try:
                layout = self._layout_of(module, found, config)
            except WeightsError as error:
                faults.append(str(error))
                continue
            self._modules[f"{module}.weight"] = (layout, tuple(found))
        if faults:
            more = f"; and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
            listed = "; ".join(faults[:MAX_LISTED])
            raise WeightsError(
                f"the checkpoint does not fit its quantization_config: {listed}{more}; download both again together"
            )
        self._plain = {name for name in checkpoint.names() if not _is_part(name, roles)}

    def names(self) -> list[str]:
        return [*self._modules, *(name for name in self._checkpoint.names() if name in self._plain)]

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._modules:
            return self._modules[name][0].shape
        return self._checkpoint.shape(self._plain_name(name))

    def dtype(self, name: str) -> str:
        if name in self._modules:
            return DTYPE_NAMES[self._modules[name][0].scheme.kind]
        return self._checkpoint.dtype(self._plain_name(name))

    def tensor(self, name: str) -> Weight:
        """The values; the caller must not write to them. Raises WeightsError naming the tensor if they are damaged."""
        if name not in self._modules:
            return self._checkpoint.tensor(self._plain_name(name))
        layout, roles = self._modules[name]
        module = name.removesuffix(".weight")
        parts: dict[str, Tensor] = {role: self._checkpoint.tensor(f"{module}.{role}") for role in roles}
        return unpack(module, layout, parts)

    def release(self, name: str) -> None:
        """Give the pages of all tensors behind `name` back to the system."""
        if name not in self._modules:
            self._checkpoint.release(self._plain_name(name))
            return
        for role in self._modules[name][1]:
            self._checkpoint.release(f"{name.removesuffix('.weight')}.{role}")

    def _plain_name(self, name: str) -> str:
        if name not in self._plain:
            raise WeightsError(f"the checkpoint has no tensor {shown(name)}")
        return name

    def _layout_of(self, module: str, roles: list[str], config: QuantizationConfig) -> Layout:
        scheme = _scheme_of(module, config)
        names = {role: f"{module}.{role}" for role in roles}
        headers = {
            role: Header(self._checkpoint.shape(name), self._checkpoint.dtype(name)) for role, name in names.items()
        }
        return layout_of(module, scheme, headers)


def open_weights(checkpoint: Checkpoint, use_mmap: bool = True) -> TensorSource:
    """The tensors of a checkpoint for a model: the checkpoint itself, a QuantizedCheckpoint or a PackedSource.

    use_mmap  of a PackedSource

    Where config.json does not say so, but the tensors are those of GPTQ or AWQ, the folder's quantize_config.json or
    quant_config.json does. Raises ConfigError for a method or a value that is not implemented, and WeightsError as
    QuantizedCheckpoint does.
    """
    packed = read_packed(checkpoint.config)
    if packed is not None:
        return PackedSource(checkpoint, packed, use_mmap)
    config = read_quantization(checkpoint.config)
    if config is None and any(name.endswith(".qweight") for name in checkpoint.names()):
        config = _read_legacy_file(checkpoint.folder)
    return checkpoint if config is None else QuantizedCheckpoint(checkpoint, config)


def _read_legacy_file(folder: Path) -> QuantizationConfig:
    for file, method in LEGACY_FILES.items():

        def fail(reason: str, file: str = file) -> NoReturn:
            raise ConfigError(f"{file}: {reason}")

        if (folder / file).is_file():
            return read_legacy(read_json_object(folder / file, MAX_LEGACY_BYTES, fail), file, method)
    raise ConfigError(
        "config.json: quantization_config is missing, but the tensors are quantised (they are called qweight); add it, "
        f"or the {' or '.join(LEGACY_FILES)} that the checkpoint came with"
    )


def _roles_by_module(checkpoint: Checkpoint, config: QuantizationConfig) -> dict[str, list[str]]:
    """The roles that are present of every quantised module, modules in the order of the file."""
    helpers = {Fp8Config: FP8_ROLES, CompressedConfig: COMPRESSED_ROLES}.get(type(config), PACKED_ROLES)
    has_typed_values = isinstance(config, (Fp8Config, CompressedConfig))
    roles: dict[str, list[str]] = {}
    weights: list[str] = []
    for name in checkpoint.names():
        module, _, role = name.rpartition(".")
        if not module:
            continue
        if role in helpers:
            roles.setdefault(module, []).append(role)
        elif role == "weight":
            weights.append(module)
            if has_typed_values and checkpoint.dtype(name) in VALUE_DTYPES:
                roles.setdefault(module, [])
    for module in weights:
        if module in roles:
            roles[module].append("weight")
    return roles


def _is_part(name: str, roles: dict[str, list[str]]) -> bool:
    module, _, role = name.rpartition(".")
    return role in roles.get(module, ())


def _scheme_of(module: str, config: QuantizationConfig) -> Scheme:
    if isinstance(config, (Fp8Config, AwqConfig)):
        return config.scheme
    if isinstance(config, CompressedConfig):
        scheme = config.scheme_of(module)
        if scheme is None:
            raise WeightsError(f"{shown(module)} has quantised tensors, but no config group targets it")
        return scheme
    rule = config.rule_of(module)
    if rule is None:
        return config.scheme
    if rule.scheme is None:
        raise WeightsError(
            f"{shown(module)} has quantised tensors, but quantization_config.dynamic has {shown(rule.text)}"
        )
    return rule.scheme
