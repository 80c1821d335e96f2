"""quantization_config: what is read of each method, and every refusal with its key, value and remedy."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pagelens.errors import ConfigError
from pagelens.loading.compressed_config import CompressedConfig, CompressedScheme
from pagelens.loading.model_config import read_model_config
from pagelens.loading.presets import DEEPSEEK_OCR, PRESETS
from pagelens.loading.quantized_config import (
    AwqConfig,
    AwqScheme,
    Fp8Config,
    Fp8Scheme,
    GptqConfig,
    GptqScheme,
    read_quantization,
)
from pagelens.loading.qwen3_config import read_text_config

from ..helpers.quantized_checkpoints import FORMATS

FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "true_sequential": True,
    "damp_percent": 0.01,
    "lm_head": False,
    "checkpoint_format": "gptq",
    "pack_dtype": "int32",
    "meta": {"quantizer": ["gptqmodel:2.2.0"]},
}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "backend": "autoawq",
    "do_fuse": False,
    "modules_to_not_convert": None,
}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "dynamic": False}
GROUP: dict[str, Any] = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": GROUP},
    "ignore": ["lm_head", "re:.*mlp.gate$", "re:(a+)+b"],
    "kv_cache_scheme": None,
    "quantization_status": "compressed",
    "global_compression_ratio": 1.9,
    "sparsity_config": {},
    "transform_config": {},
}
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}


def read(raw: dict[str, Any], **changes: Any) -> Any:
    return read_quantization({"quantization_config": {**raw, **changes}})


def with_group(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = copy.deepcopy(COMPRESSED)
    raw["config_groups"]["group_0"]["weights"] |= values
    raw["config_groups"]["group_0"] |= changes
    return raw


def test_methods() -> None:
    assert read_quantization({}) is None
    assert read_quantization({"quantization_config": None}) is None
    assert read(FP8) == Fp8Config(Fp8Scheme((128, 128)))
    assert read(FP8, ignored_layers=["x"], scale_fmt="ue8m0", weight_block_size=[64, 32]).scheme.block == (64, 32)
    assert read(GPTQ) == GptqConfig(GptqScheme(4, 128, False, 1))
    assert read(GPTQ, bits=8, desc_act=True, group_size=-1).scheme == GptqScheme(8, -1, True, 1)
    assert read(GPTQ, checkpoint_format="gptq_v2").scheme.zero_offset == 0
    assert read(GPTQ, checkpoint_format=None, format="gptq_v2").scheme.zero_offset == 0
    assert read(GPTQ, checkpoint_format=None).scheme.zero_offset == 1
    assert read(AWQ) == AwqConfig(AwqScheme(128, True))
    assert read(AWQ, version="GEMM", zero_point=False).scheme.has_zeros is False
    found = read(COMPRESSED)
    assert isinstance(found, CompressedConfig)
    assert found.schemes == (CompressedScheme("int4", True, "group", 128, (0, 0), True, False, None),)


@pytest.mark.parametrize("fmt", FORMATS)
def test_model_configurations_accept_them(fmt: str) -> None:
    config = FORMATS[fmt][1]
    plain = read_text_config(PRESETS["qwen3-0.6b"])
    assert read_text_config({**PRESETS["qwen3-0.6b"], "quantization_config": config}) == plain
    assert read_model_config({**DEEPSEEK_OCR, "quantization_config": config}) == read_model_config(DEEPSEEK_OCR)


def test_strategies_and_activations() -> None:
    rows = {"num_bits": 8, "strategy": "channel", "group_size": None}
    int8 = with_group(rows, input_activations=TOKEN) | {"format": "int-quantized"}
    assert read(int8).schemes[0] == CompressedScheme("int8", False, "channel", -1, (0, 0), True, False, "int8")
    fp8 = with_group({**rows, "type": "float"}, input_activations={**TOKEN, "type": "float"})
    assert read(fp8, format="float-quantized").schemes[0].activation == "fp8"
    assert read(fp8, format="naive-quantized").schemes[0].kind == "fp8"
    for block in ([128, 64], "128x64"):
        blocks = with_group({**rows, "type": "float", "strategy": "block", "block_structure": block})
        inputs = {**TOKEN, "type": "float", "strategy": "group", "group_size": 128}
        blocks["config_groups"]["group_0"]["input_activations"] = inputs
        scheme = read(blocks, format="float-quantized").schemes[0]
        assert (scheme.strategy, scheme.block, scheme.activation) == ("block", (128, 64), None)
    assert read(with_group({"strategy": None, "group_size": -1})).schemes[0].strategy == "channel"
    assert read(with_group({"actorder": "group"})).schemes[0].needs_order
    assert not read(with_group({"actorder": "static"})).schemes[0].needs_order


def test_the_first_rule_that_fits_counts() -> None:
    dynamic = {r"-:.*\.gate$": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": 32}, r".*\.0\..*": {"desc_act": True}}
    config = read(GPTQ, dynamic=dynamic)
    found = {name: config.rule_of(name) for name in ("x.0.gate", "x.0.down_proj", "x.0.q_proj", "x.1.q_proj")}
    assert found["x.0.gate"].scheme is None
    assert found["x.0.down_proj"].scheme == GptqScheme(8, 32, False, 1)
    assert found["x.0.q_proj"].scheme == GptqScheme(4, 128, True, 1)
    assert found["x.1.q_proj"] is None


BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "group_size": None}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no method": ({}, {}, "quant_method is missing"),
    "not text": ({"quant_method": 4}, {}, "quant_method=4 .* type str"),
    **{
        f"method {name}": (
            {"quant_method": name},
            {},
            f"quant_method='{name}' is not supported; accepted: fp8, gptq, awq, compressed-tensors; use the original",
        )
        for name in ("bitsandbytes", "mxfp4", "auto-round", "exl9", "nvfp4", "torchao")
    },
    "fp8 of another kind": (FP8, {"fmt": "e5m2"}, "fmt='e5m2' is not supported; accepted: 'e4m3'"),
    "fp8 static": (FP8, {"activation_scheme": "static"}, "activation_scheme='static' .*'dynamic'"),
    "fp8 no block": (FP8, {"weight_block_size": None}, "weight_block_size is missing"),
    "fp8 block of one": (FP8, {"weight_block_size": [128]}, r"weight_block_size=\[128\] .*two numbers"),
    "fp8 block of 0": (FP8, {"weight_block_size": [128, 0]}, r"weight_block_size=\[128, 0\] .*1 to 1048576"),
    "fp8 block of text": (FP8, {"weight_block_size": "128"}, "weight_block_size='128' .*list of int"),
    "fp8 experts of 4 bits": (FP8, {"expert_dtype": "fp4"}, "expert_dtype='fp4'"),
    "gptq 2 bits": (GPTQ, {"bits": 2}, "bits=2 is not supported; accepted: 4 or 8"),
    "gptq 3 bits": (GPTQ, {"bits": 3}, "bits=3 is not supported; accepted: 4 or 8"),
    "gptq no bits": (GPTQ, {"bits": None}, "bits is missing"),
    "gptq true bits": (GPTQ, {"bits": True}, "bits=True"),
    "gptq group 0": (GPTQ, {"group_size": 0}, r"group_size=0 .*-1 \(all inputs\), or 1 to"),
    "gptq group -2": (GPTQ, {"group_size": -2}, "group_size=-2"),
    "gptq no group": (GPTQ, {"group_size": None}, "group_size is missing"),
    "gptq marlin": (GPTQ, {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' .*'gptq' or 'gptq_v2'"),
    "gptq old marlin": (GPTQ, {"is_marlin_format": True}, "is_marlin_format=True"),
    "gptq pack": (GPTQ, {"pack_dtype": "int16"}, "pack_dtype='int16' .*'int32'"),
    "gptq adapter": (GPTQ, {"adapter": {"rank": 8}}, "adapter="),
    "gptq rotation": (GPTQ, {"rotation": "hadamard"}, "rotation='hadamard'"),
    "gptq rules": (GPTQ, {"dynamic": [1]}, r"dynamic=\[1\] .*type dict"),
    "gptq many rules": (GPTQ, {"dynamic": {f"a{i}": {} for i in range(65)}}, "dynamic='65 rules' .*at most 64"),
    "gptq bad rule": (GPTQ, {"dynamic": {"+:a": {"bits": 3}}}, r"dynamic\['\+:a'\]: bits=3"),
    "gptq rule text": (GPTQ, {"dynamic": {"+:a": "x"}}, "'x'.* type dict"),
    "gptq bad pattern": (GPTQ, {"dynamic": {"+:(?!a)": {}}}, "pattern .*is not supported"),
    "gptq long pattern": (GPTQ, {"dynamic": {"a" * 300: {}}}, "300 characters, more than 256"),
    "awq gemv": (AWQ, {"version": "gemv"}, "version='gemv' .*'gemm'; convert it"),
    "awq marlin": (AWQ, {"version": "marlin"}, "version='marlin'"),
    "awq exllama": (AWQ, {"version": "exllama"}, "version='exllama'"),
    "awq fast": (AWQ, {"version": None, "format": "gemv_fast"}, "format='gemv_fast'"),
    "awq llm-awq": (AWQ, {"backend": "llm-awq"}, "backend='llm-awq'"),
    "awq 8 bits": (AWQ, {"bits": 8}, "bits=8 is not supported; accepted: 4"),
    "awq group 0": (AWQ, {"group_size": 0}, "group_size=0"),
    "ct 4-bit floats": (COMPRESSED, {"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized' .*'pack-quant"),
    "ct mxfp4": (COMPRESSED, {"format": "mxfp4-pack-quantized"}, "format='mxfp4-pack-quantized'"),
    "ct sparse": (COMPRESSED, {"format": "marlin-24"}, "format='marlin-24'"),
    "ct no format": (COMPRESSED, {"format": None}, "format .* is missing"),
    "ct mixed": (COMPRESSED, {"format": "mixed-precision"}, "format .*mixed-precision needs one in every group"),
    "ct not compressed": (COMPRESSED, {"quantization_status": "frozen"}, "quantization_status='frozen'"),
    "ct cache": (COMPRESSED, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme="),
    "ct sparsity": (COMPRESSED, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config="),
    "ct rotations": (COMPRESSED, {"transform_config": {"config_groups": {"u": {}}}}, "transform_config="),
    "ct no groups": (COMPRESSED, {"config_groups": {}}, "config_groups='0 groups' .*1 to 64"),
    "ct group list": (COMPRESSED, {"config_groups": []}, "config_groups="),
    "ct ignore": (COMPRESSED, {"ignore": "lm_head"}, "ignore='lm_head' .*list of str"),
    "ct 2 bits": (with_group({"num_bits": 2}), {}, "num_bits=2 is not supported; accepted: 4 or 8"),
    "ct 4 bits in bytes": (with_group({}), {"format": "int-quantized"}, "num_bits=4 is not supported; accepted: 8"),
    "ct type": (with_group({"type": "float"}), {}, "type='float' .*'int' with format pack-quantized"),
    "ct group 0": (with_group({"group_size": 0}), {}, "group_size=0 .*1 to 1048576 with strategy group"),
    "ct no size": (with_group({"group_size": None}), {}, "group_size=None"),
    "ct strategy": (with_group({"strategy": "tensor_group"}), {}, "strategy='tensor_group'"),
    "ct packed tensor": (with_group({"strategy": "tensor"}), {}, "strategy='tensor' .*'channel' or 'group'"),
    "ct no weights": (with_group({}, weights=None), {}, "weights is missing"),
    "ct no targets": (with_group({}, targets=None), {}, "targets is missing"),
    "ct order": (with_group({"actorder": "random"}), {}, "actorder='random'"),
    "ct outputs": (with_group({}, output_activations=TOKEN), {}, "output_activations="),
    "ct static": (with_group({}, input_activations={**TOKEN, "dynamic": False}), {}, "dynamic=False .*static scales"),
    "ct local": (with_group({}, input_activations={**TOKEN, "dynamic": "local"}), {}, "dynamic='local'"),
    "ct 4-bit inputs": (with_group({}, input_activations={**TOKEN, "num_bits": 4}), {}, "num_bits=4"),
    "ct float inputs": (with_group({}, input_activations={**TOKEN, "type": "float"}), {}, "type='float'"),
    "ct W4A8": (with_group({}, input_activations=TOKEN), {}, "supported with 8-bit weights .*use a weights-only"),
    "ct skewed inputs": (with_group({}, input_activations={**TOKEN, "symmetric": False}), {}, "symmetric=False"),
    "ct block": (with_group({**BLOCKS, "block_structure": [0, 1]}), {"format": "float-quantized"}, "block_structure="),
    "ct block text": (with_group({**BLOCKS, "block_structure": "ax2"}), {"format": "float-quantized"}, "block_struct"),
    "ct no block": (with_group(BLOCKS), {"format": "float-quantized"}, "block_structure=None"),
    "ct int blocks": (
        with_group({**BLOCKS, "type": "int", "block_structure": [4, 4]}),
        {"format": "int-quantized"},
        "strategy='block' .*with integers",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda name: name.replace(" ", "_"))
def test_refused_by_name(case: str) -> None:
    raw, changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        read(raw, **changes)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=message):
        read_text_config({**PRESETS["qwen3-0.6b"], "quantization_config": {**raw, **changes}})


def test_a_pattern_that_explodes_is_refused_or_never_run() -> None:
    """Two groups make the targets matter; the list of ignored modules is not matched at all."""
    raw: dict[str, Any] = copy.deepcopy(COMPRESSED)
    raw["config_groups"]["group_1"] = {**GROUP, "targets": ["re:(a+)+b$", "re:(x+x+)+y"]}
    config = read(raw)
    assert config.scheme_of("a" * 5000 + "c") == config.schemes[0]
    raw["config_groups"]["group_1"]["targets"] = ["re:(?=a)b"]
    with pytest.raises(ConfigError, match="is not supported"):
        read(raw)
    raw["config_groups"]["group_1"]["targets"] = [f"re:{i}" for i in range(65)]
    with pytest.raises(ConfigError, match="65 patterns"):
        read(raw)
    raw["config_groups"]["group_1"]["targets"] = [f"m{i}" for i in range(513)]
    with pytest.raises(ConfigError, match="514 entries"):
        read(raw)


@pytest.mark.parametrize("raw", [[], 3, "fp8", True])
def test_not_an_object(raw: object) -> None:
    with pytest.raises(ConfigError, match=r"quantization_config=.* type dict"):
        read_quantization({"quantization_config": raw})
