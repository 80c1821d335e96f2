"""quantization_config of a compressed-tensors checkpoint (llm-compressor): groups of modules, each with its scheme.

Source: qwen3.md section 7.5 and the configuration classes of github.com/neuralmagic/compressed-tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError
from ..quantization import Kind
from .config_reader import MAX_SIZE, ConfigReader
from .name_patterns import NamePattern
from .strict_json import shown

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")
MAX_GROUPS = 64
MAX_TARGETS = 512

Activation = Literal["int8", "fp8"]


@dataclass(frozen=True, slots=True)
class CompressedScheme:
    """How compressed-tensors stores a matrix: values [N, K], or packed along K; scales by `strategy`.

    strategy    "tensor": one scale; "channel": one a row; "group": one for `group_size` inputs of a row; "block": one
                for block[0] rows and block[1] inputs
    needs_order a tensor weight_g_idx must be there; where it is not needed it may be there
    activation  how the inputs are quantised
    """

    kind: Kind
    packed: bool
    strategy: Literal["tensor", "channel", "group", "block"]
    group_size: int
    block: tuple[int, int]
    symmetric: bool
    needs_order: bool
    activation: Activation | None

    @property
    def bits(self) -> int:
        return 4 if self.kind == "int4" else 8


@dataclass(frozen=True, slots=True)
class CompressedConfig:
    """The schemes by what they are for: the names of modules, patterns of names, and class names such as "Linear"."""

    schemes: tuple[CompressedScheme, ...]
    names: dict[str, CompressedScheme]
    patterns: tuple[tuple[NamePattern, CompressedScheme], ...]

    def scheme_of(self, module: str) -> CompressedScheme | None:
        """The scheme of a module that has quantised tensors: by name, else by pattern, else by class; None if none.

        A file of one group is of one scheme, whatever its targets are.
        """
        if len(self.schemes) == 1:
            return self.schemes[0]
        if module in self.names:
            return self.names[module]
        for pattern, scheme in self.patterns:
            if pattern.matches(module):
                return scheme
        is_table = module.endswith("embed_tokens")
        return self.names.get("Embedding" if is_table else "Linear")


def read_compressed(reader: ConfigReader) -> CompressedConfig:
    """Check the object. Raises ConfigError naming the key, its value and what is accepted."""
    reader.get("quantization_status", str, "compressed", only=("compressed",))
    _refuse_unimplemented(reader)
    # Which modules are left out is seen from their tensors; the list need not be matched (nor its patterns run).
    reader.get("ignore", (str,), ())
    default = reader.get("format", str, None, only=(*FORMATS, "mixed-precision"))
    groups = reader.require("config_groups", dict)
    if not 1 <= len(groups) <= MAX_GROUPS:
        reader.refuse("config_groups", f"{len(groups)} groups", f"1 to {MAX_GROUPS}")
    section = reader.section("config_groups")
    schemes: list[CompressedScheme] = []
    targets: dict[str, CompressedScheme] = {}
    for name in groups:
        group = section.section(name)
        schemes.append(_read_group(group, default))
        targets |= dict.fromkeys(group.require("targets", (str,)), schemes[-1])
    if len(targets) > MAX_TARGETS:
        section.refuse("targets", f"{len(targets)} entries", f"at most {MAX_TARGETS}")
    patterns = sorted(text for text in targets if text.startswith("re:")) if len(schemes) > 1 else []
    if len(patterns) > MAX_GROUPS:
        section.refuse("targets", f"{len(patterns)} patterns", f"at most {MAX_GROUPS}")
    return CompressedConfig(
        tuple(schemes),
        {text: scheme for text, scheme in targets.items() if not text.startswith("re:")},
        # In the library's order: of several patterns that fit a name, the first in the alphabet counts.
        tuple((NamePattern(text[3:], "quantization_config.config_groups"), targets[text]) for text in patterns),
    )


def _refuse_unimplemented(reader: ConfigReader) -> None:
    """Settings beside the groups that change the network, or how its weights are stored."""
    reader.get("kv_cache_scheme", object, None, only=(None,))
    reader.get("moe_sparsity_config", object, None, only=(None,))
    for key in ("sparsity_config", "transform_config"):
        inner = reader.get(key, dict, {})
        if inner and inner != {"format": "dense"}:
            reader.refuse(key, inner, "null or {}; use a checkpoint without it")
    for key in ("global_compression_ratio", "version"):
        reader.ignore(key)


def _read_group(group: ConfigReader, default: str | None) -> CompressedScheme:
    group.get("output_activations", object, None, only=(None,))
    form = group.get("format", str, default, only=FORMATS)
    if form not in FORMATS:
        group.missing("format (mixed-precision needs one in every group)")
    weights = group.section("weights")
    number = weights.get("type", str, "int", only=("int", "float")) if group.has("weights") else None
    if number is None:
        group.missing("weights")
    is_packed = form == "pack-quantized"
    wrong = {"pack-quantized": "float", "int-quantized": "float", "float-quantized": "int"}.get(form)
    if number == wrong:
        weights.refuse("type", number, f"{'int' if wrong == 'float' else 'float'!r} with format {form}")
    bits = weights.get("num_bits", int, 8, only=(4, 8) if is_packed else (8,))
    weights.get("dynamic", object, False, only=(False,))
    symmetric = weights.get("symmetric", bool, True, only=(True,) if number == "float" else None)
    strategy, group_size, block = _read_strategy(weights)
    if is_packed and strategy in ("tensor", "block"):
        weights.refuse("strategy", strategy, "'channel' or 'group' with format pack-quantized")
    if number == "int" and strategy == "block":
        weights.refuse("strategy", strategy, "'tensor', 'channel' or 'group' with integers")
    order = weights.get("actorder", object, None)
    # "weight" and "static" order the inputs only while quantising; the file is as if there was no order.
    if order not in (None, False, True, "weight", "static", "group", "dynamic"):
        weights.refuse("actorder", order, "null, a bool, 'weight', 'static', 'group' or 'dynamic'")
    kind: Kind = "fp8" if number == "float" else "int4" if bits == 4 else "int8"
    activation = _read_activation(group, kind, strategy)
    needs_order = order in (True, "group", "dynamic")
    if needs_order and not (is_packed and strategy == "group"):
        weights.refuse("actorder", order, "null or 'weight' unless format is pack-quantized and strategy is group")
    return CompressedScheme(kind, is_packed, strategy, group_size, block, symmetric, needs_order, activation)


def _read_strategy(weights: ConfigReader) -> tuple[Any, int, tuple[int, int]]:
    """Strategy, group size (-1: all inputs) and block; a strategy that is not said follows from the group size."""
    size = weights.get("group_size", int, None, low=-1, high=MAX_SIZE)
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.get("strategy", str, implied, only=STRATEGIES)
    if strategy == "group" and (size is None or size < 1):
        weights.refuse("group_size", size, f"1 to {MAX_SIZE} with strategy group")
    if strategy != "block":
        weights.get("block_structure", object, None, only=(None,))
        return strategy, size if strategy == "group" else -1, (0, 0)
    block = _read_block(weights)
    return strategy, block[1], block


def _read_block(weights: ConfigReader) -> tuple[int, int]:
    raw = weights.get("block_structure", object, None)
    # Older files hold the text "128x128".
    parts = raw.split("x") if isinstance(raw, str) and len(raw) < 20 else raw
    try:
        rows, columns = (int(part) for part in parts if type(part) in (int, str))
    except (TypeError, ValueError):
        rows = columns = 0
    if not (1 <= rows <= MAX_SIZE and 1 <= columns <= MAX_SIZE):
        weights.refuse("block_structure", raw, f"two numbers, 1 to {MAX_SIZE}")
    return rows, columns


def _read_activation(group: ConfigReader, kind: Kind, strategy: str) -> Activation | None:
    """None too for blocks: their values are 8-bit floats either way, and inputs as they are lose nothing."""
    if not group.has("input_activations"):
        return None
    inputs = group.section("input_activations")
    dynamic = inputs.get("dynamic", object, False)
    if dynamic is not True:
        inputs.refuse("dynamic", dynamic, "true (scales from the inputs); a checkpoint with static scales is not read")
    inputs.get("num_bits", int, 8, only=(8,))
    inputs.get("symmetric", bool, True, only=(True,))
    number = inputs.get("type", str, "int", only=("float" if kind == "fp8" else "int",))
    if strategy == "block":
        inputs.get("strategy", str, "token", only=("token", "group"))
        return None
    inputs.get("strategy", str, "token", only=("token",))
    if kind == "int4" or strategy not in ("tensor", "channel"):
        raise ConfigError(
            f"quantization_config: input_activations of type {shown(number)} are supported with 8-bit weights of "
            f"strategy tensor or channel, not with {kind} and strategy {shown(strategy)}; use a weights-only checkpoint"
        )
    return "int8" if number == "int" else "fp8"
