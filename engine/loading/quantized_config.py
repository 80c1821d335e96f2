"""quantization_config of a config.json -> how each quantised matrix lies in the checkpoint, every value checked.

Only what is said is read here, no tensor. A known key with a value that is not implemented is refused by name, because
ignoring it would give fluent nonsense. Source: qwen3.md section 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import ConfigError
from ..quantization import Kind
from .compressed_config import CompressedConfig, read_compressed
from .config_reader import MAX_SIZE, ConfigReader
from .name_patterns import NamePattern
from .strict_json import shown

METHODS = ("fp8", "gptq", "awq", "compressed-tensors")
MAX_RULES = 64
GPTQ_FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True)
class Fp8Scheme:
    """float8_e4m3fn values [N, K] with one scale for each block of block[0] rows and block[1] columns."""

    block: tuple[int, int]
    kind: Kind = "fp8"


@dataclass(frozen=True, slots=True)
class GptqScheme:
    """Integers packed along K, zeros along N. `zero_offset` is what is added to a stored zero: v1 stores zero - 1.

    group_size  -1: one group over all of K
    act_order   g_idx says to which group an input belongs; else input k is of group k // group_size
    """

    bits: Literal[4, 8]
    group_size: int
    act_order: bool
    zero_offset: Literal[0, 1]

    @property
    def kind(self) -> Kind:
        return "int4" if self.bits == 4 else "int8"


@dataclass(frozen=True, slots=True)
class AwqScheme:
    """4-bit integers and zeros packed along N, eight columns of a word in AutoAWQ's order. group_size -1: all of K."""

    group_size: int
    has_zeros: bool
    kind: Kind = "int4"


@dataclass(frozen=True, slots=True)
class Fp8Config:
    scheme: Fp8Scheme


@dataclass(frozen=True, slots=True)
class AwqConfig:
    scheme: AwqScheme


@dataclass(frozen=True, slots=True)
class GptqRule:
    """Of the modules whose name the pattern fits (the first rule that fits counts); scheme None: not quantised."""

    text: str
    pattern: NamePattern
    scheme: GptqScheme | None


@dataclass(frozen=True, slots=True)
class GptqConfig:
    scheme: GptqScheme
    rules: tuple[GptqRule, ...] = ()

    def rule_of(self, module: str) -> GptqRule | None:
        return next((rule for rule in self.rules if rule.pattern.matches(module)), None)


QuantizationConfig = Fp8Config | GptqConfig | AwqConfig | CompressedConfig


def read_quantization(config: Mapping[str, Any]) -> QuantizationConfig | None:
    """Check `quantization_config` of the object in a config.json; None if it is absent or null.

    Raises ConfigError naming the key, its value and what is accepted: for an unknown quant_method, and for every known
    key whose value is not implemented.
    """
    raw = ConfigReader(config, "config.json").get("quantization_config", dict, None)
    return None if raw is None else read_method(raw, "config.json.quantization_config")


def read_legacy(raw: Mapping[str, Any], file: str, method: Literal["gptq", "awq"]) -> QuantizationConfig:
    """The same of a quantize_config.json (AutoGPTQ) or a quant_config.json (AutoAWQ, whose keys have other names)."""
    renamed = {{"w_bit": "bits", "q_group_size": "group_size"}.get(key, key): value for key, value in raw.items()}
    return read_method({"quant_method": method, **renamed}, file)


def read_method(raw: Mapping[str, Any], where: str) -> QuantizationConfig:
    reader = ConfigReader(raw, where)
    method = reader.require("quant_method", str)
    if method not in METHODS:
        raise ConfigError(
            f"{where}: quant_method={shown(method)} is not supported; accepted: {', '.join(METHODS)}; use the original "
            "checkpoint (bfloat16), or one that is quantised in one of these formats"
        )
    readers: dict[str, Callable[[ConfigReader], QuantizationConfig]] = {
        "fp8": _read_fp8,
        "gptq": _read_gptq,
        "awq": _read_awq,
        "compressed-tensors": read_compressed,
    }
    result = readers[method](reader)
    reader.log_unread()
    return result


def _read_fp8(reader: ConfigReader) -> Fp8Config:
    reader.get("fmt", str, "e4m3", only=("e4m3",))
    # "static" puts activation scales into the file; here the weights are multiplied with inputs as they are.
    reader.get("activation_scheme", str, "dynamic", only=("dynamic",))
    # "ue8m0" rounds scales to powers of two; as bfloat16 or float32 they are read like any others.
    reader.get("scale_fmt", str, "float", only=("float", "ue8m0"))
    reader.get("expert_dtype", str, "fp8", only=("fp8",))
    for key in ("modules_to_not_convert", "ignored_layers", "modules_to_convert", "dequantize"):
        reader.ignore(key)  # the tensors that are there decide
    block = reader.require("weight_block_size", (int,), low=1, high=MAX_SIZE)
    if len(block) != 2:
        reader.refuse("weight_block_size", list(block), "two numbers: rows and columns of a block")
    return Fp8Config(Fp8Scheme((block[0], block[1])))


def _read_awq(reader: ConfigReader) -> AwqConfig:
    reader.require("bits", int, only=(4,))
    for key in ("version", "format"):
        version = reader.get(key, str, "gemm")
        # AutoAWQ writes it in either case. Its other versions pack in other orders.
        if version.lower() != "gemm":
            reader.refuse(key, version, "'gemm'; convert it, or use a GPTQ or compressed-tensors checkpoint")
    backend = reader.get("backend", str, "autoawq")
    if backend == "llm-awq":
        reader.refuse("backend", backend, "one that packs as AutoAWQ does, such as 'autoawq'")
    reader.get("pack_dtype", str, "int32", only=("int32",))
    for key in ("modules_to_not_convert", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config"):
        reader.ignore(key)
    return AwqConfig(AwqScheme(_read_group_size(reader, None), reader.get("zero_point", bool, True)))


def _read_gptq(reader: ConfigReader) -> GptqConfig:
    formats = [reader.get(key, str, None, only=GPTQ_FORMATS) for key in ("checkpoint_format", "format")]
    reader.get("pack_dtype", str, "int32", only=("int32",))
    reader.get("is_marlin_format", bool, False, only=(False,))
    # A low-rank correction and a rotation of the inputs would be part of the network.
    for key in ("adapter", "rotation"):
        reader.get(key, object, None, only=(None,))
    for key in ("lm_head", "true_sequential", "damp_percent", "static_groups", "meta", "modules_in_block_to_quantize"):
        reader.ignore(key)
    is_v2 = "gptq_v2" in (formats[0] or formats[1] or "gptq",)
    scheme = _read_gptq_scheme(reader, None, 0 if is_v2 else 1)
    dynamic = reader.get("dynamic", dict, {})
    if len(dynamic) > MAX_RULES:
        reader.refuse("dynamic", f"{len(dynamic)} rules", f"at most {MAX_RULES}")
    rules = tuple(_read_rule(text, dynamic, scheme, reader) for text in dynamic)
    return GptqConfig(scheme, rules)


def _read_rule(text: str, dynamic: Mapping[str, Any], base: GptqScheme, reader: ConfigReader) -> GptqRule:
    where = "quantization_config.dynamic"
    pattern = NamePattern(text[2:] if text.startswith(("+:", "-:")) else text, where)
    if text.startswith("-:"):
        return GptqRule(text, pattern, None)
    overrides = ConfigReader(ConfigReader(dynamic, where).get(text, dict, {}), f"{where}[{shown(text)}]")
    overrides.get("adapter", object, None, only=(None,))
    return GptqRule(text, pattern, _read_gptq_scheme(overrides, base, base.zero_offset))


def _read_gptq_scheme(reader: ConfigReader, base: GptqScheme | None, zero_offset: Literal[0, 1]) -> GptqScheme:
    bits = reader.get("bits", int, base.bits if base else None, only=(4, 8))
    if bits is None:
        reader.missing("bits")
    reader.get("sym", bool, True)  # the zeros are read from the file either way
    act_order = reader.get("desc_act", bool, base.act_order if base else False)
    scheme = GptqScheme(bits, 0, act_order, zero_offset)
    return replace(scheme, group_size=_read_group_size(reader, base.group_size if base else None))


def _read_group_size(reader: ConfigReader, default: int | None) -> int:
    """-1 or a number of inputs."""
    size: int | None = reader.get("group_size", int, default, low=-1, high=MAX_SIZE)
    if size is None:
        reader.missing("group_size")
    if size == 0:
        reader.refuse("group_size", size, f"-1 (all inputs), or 1 to {MAX_SIZE}")
    return size
