"""Values of quantised matrices against packers that are not ours: golden words, formulas, and compressed-tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pagelens.loading.checkpoint import open_checkpoint
from pagelens.loading.compressed_config import CompressedScheme
from pagelens.loading.quantized import open_weights
from pagelens.loading.quantized_config import AwqScheme, Fp8Scheme, GptqScheme, read_method
from pagelens.loading.quantized_layouts import Header, Scheme, layout_of
from pagelens.loading.quantized_unpack import unpack
from pagelens.quantization import QuantizedWeight

from ..helpers.checkpoint_files import write_folder
from ..helpers.text_models import edit_json

NAMES = {
    torch.int32: "I32", torch.int64: "I64", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
}  # fmt: skip


def read(scheme: Scheme, **parts: Tensor) -> QuantizedWeight:
    headers = {role: Header(tuple(part.shape), NAMES[part.dtype]) for role, part in parts.items()}
    return unpack("m", layout_of("m", scheme, headers), parts)


def words(*rows: list[int]) -> Tensor:
    """Unsigned words of 32 bits as int32."""
    return torch.tensor([[word - (word >> 31 << 32) for word in row] for row in rows], dtype=torch.int32)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float16)


# ---- words derived by hand (qwen3.md section 7.7) --------------------------------------------------------------------
def gptq(bits: Any, group: int, act_order: bool = False, offset: Any = 1) -> GptqScheme:
    return GptqScheme(bits, group, act_order, offset)


@pytest.mark.parametrize(("offset", "zero_word"), [(1, 0x77777777), (0, 0x88888888)])
def test_gptq_int4_golden_words(offset: Any, zero_word: int) -> None:
    weight = read(
        gptq(4, 8, offset=offset), qweight=words([0x76543210] * 8), qzeros=words([zero_word]), scales=ones(1, 8)
    )
    assert weight.zeros is None  # 8 is the middle
    assert weight.float().tolist() == [[-8.0, -7, -6, -5, -4, -3, -2, -1]] * 8
    assert weight.values.tolist() == [[-8, -7, -6, -5, -4, -3, -2, -1]] * 8


@pytest.mark.parametrize(("offset", "first"), [(1, 1), (0, 0)])
def test_gptq_zeros_lie_along_the_outputs(offset: Any, first: int) -> None:
    weight = read(
        gptq(4, 8, offset=offset), qweight=words([0x76543210] * 8), qzeros=words([0x76543210]), scales=ones(1, 8)
    )
    assert weight.float().tolist() == [[k - (n + first) for k in range(8)] for n in range(8)]


def test_gptq_every_nibble_of_a_word() -> None:
    """Each of the eight places holds each of the sixteen values once."""
    for place in range(8):
        for value in range(16):
            weight = read(
                gptq(4, 8), qweight=words([value << 4 * place] * 8), qzeros=words([0xFFFFFFFF]), scales=ones(1, 8)
            )
            # A stored zero of 15 means 16; it does not wrap to 0.
            expected = [-16.0] * 8
            expected[place] += value
            assert weight.float().tolist() == [expected] * 8


@pytest.mark.parametrize(("offset", "zero_word"), [(1, 0x7F7F7F7F), (0, 0x80808080)])
def test_gptq_int8_golden_words(offset: Any, zero_word: int) -> None:
    weight = read(
        gptq(8, 4, offset=offset), qweight=words([0x04030201] * 4), qzeros=words([zero_word]), scales=ones(1, 4)
    )
    assert weight.zeros is None
    assert weight.float().tolist() == [[1.0 - 128, 2 - 128, 3 - 128, 4 - 128]] * 4


def test_gptq_int8_bytes_up_to_255_and_a_zero_of_256() -> None:
    weight = read(gptq(8, 4), qweight=words([0xFF80017F] * 4), qzeros=words([0xFF00FE80]), scales=ones(1, 4))
    zeros = [0x81, 0xFF, 0x01, 0x100]
    assert weight.float().tolist() == [[float(k - zero) for k in (0x7F, 0x01, 0x80, 0xFF)] for zero in zeros]


def test_gptq_act_order() -> None:
    """Sixteen inputs, groups of 8 that alternate: input k belongs to group k % 2, and scales tell them apart."""
    g_idx = torch.tensor([0, 1] * 8, dtype=torch.int32)
    parts = {
        "qweight": words([0x76543210] * 8, [0xFEDCBA98] * 8),
        "qzeros": words([0x77777777], [0x00000000]),
        "scales": torch.tensor([[1.0] * 8, [0.5] * 8], dtype=torch.float16),
    }
    weight = read(gptq(4, 8, act_order=True), g_idx=g_idx, **parts)
    assert weight.input_order is not None
    assert weight.input_order.tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]
    assert weight.float().tolist() == [[(k - 8) * 1.0 if k % 2 == 0 else (k - 1) * 0.5 for k in range(16)]] * 8
    assert (weight.values[0] + 8).tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]

    trivial = torch.tensor([0] * 8 + [1] * 8, dtype=torch.int32)
    for scheme, order in ((gptq(4, 8, act_order=True), trivial), (gptq(4, 8), trivial), (gptq(4, 8), g_idx)):
        plain = read(scheme, g_idx=order, **parts)
        assert plain.input_order is None
        assert plain.float().tolist() == [[(k - 8) * 1.0 if k < 8 else (k - 1) * 0.5 for k in range(16)]] * 8


def test_awq_golden_words() -> None:
    scheme = AwqScheme(8, True)
    weight = read(scheme, qweight=words(*[[0x75316420]] * 8), qzeros=words([0]), scales=ones(1, 8))
    assert weight.float().tolist() == [[float(n)] * 8 for n in range(8)]
    weight = read(scheme, qweight=words(*[[0]] * 8), qzeros=words([0x75316420]), scales=ones(1, 8))
    assert weight.float().tolist() == [[-float(n)] * 8 for n in range(8)]
    weight = read(AwqScheme(-1, False), qweight=words(*[[0x88888888]] * 8), scales=ones(1, 8))
    assert weight.zeros is None
    assert not weight.float().any()


def test_compressed_golden_words() -> None:
    four = CompressedScheme("int4", True, "group", 8, (0, 0), True, False, None)
    said = torch.tensor([1, 8])
    weight = read(four, weight_packed=words([0x76543210]), weight_scale=ones(1, 1), weight_shape=said)
    assert weight.float().tolist() == [[-8.0, -7, -6, -5, -4, -3, -2, -1]]
    eight = CompressedScheme("int8", True, "channel", -1, (0, 0), True, False, None)
    weight = read(eight, weight_packed=words([0x03020100]), weight_scale=ones(1, 1), weight_shape=torch.tensor([1, 4]))
    assert weight.float().tolist() == [[-128.0, -127, -126, -125]]


# ---- 8-bit floats ----------------------------------------------------------------------------------------------------
def e4m3(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent > 0 else mantissa / 8 * 2.0**-6
    return (-1.0) ** sign * size


def test_all_bytes_of_e4m3() -> None:
    codes = [byte for byte in range(256) if byte & 127 != 127]
    data = torch.tensor([codes], dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = read(Fp8Scheme((128, 128)), weight=data, weight_scale_inv=torch.tensor([[1.0, 1.0]]))
    assert weight.float().tolist() == [[e4m3(byte) for byte in codes]]
    assert max(e4m3(byte) for byte in codes) == 448


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n", "k", "block"), [(300, 200, (128, 128)), (128, 256, (128, 128)), (5, 7, (128, 128)), (33, 50, (16, 32))]
)
def test_scales_of_blocks(n: int, k: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    data = torch.randint(0, 127, (n, k), generator=generator, dtype=torch.uint8)
    grid = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=generator).to(dtype)
    weight = read(Fp8Scheme(block), weight=data.view(torch.float8_e4m3fn), weight_scale_inv=grid)
    assert weight.scales.dtype == dtype
    assert weight.group_size == min(block[1], k)
    for row, column in [(0, 0), (n - 1, k - 1), (n // 2, k // 3), (n - 1, 0), (0, k - 1)]:
        scale = grid[row // block[0], column // block[1]].double().item()
        exact = e4m3(int(data[row, column])) * scale
        # Exact but for float32 scales, whose 24 bits times 4 are rounded once.
        assert weight.float()[row, column].item() == (exact if dtype != torch.float32 else torch.tensor(exact).item())


# ---- random words against the formulas, element by element -----------------------------------------------------------
WORDS = st.integers(0, 2**32 - 1)


def random_words(draw: Any, rows: int, columns: int) -> list[list[int]]:
    return [[draw(WORDS) for _ in range(columns)] for _ in range(rows)]


def random_scales(draw: Any, rows: int, columns: int) -> Tensor:
    seed = draw(st.integers(0, 2**31))
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(torch.float16)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_gptq_random_words(data: Any) -> None:
    draw = data.draw
    bits, v2, act_order = draw(st.sampled_from([4, 8])), draw(st.booleans()), draw(st.booleans())
    per_word = 32 // bits
    groups, size = draw(st.integers(1, 3)), per_word * draw(st.integers(1, 2))
    k, n = groups * size, per_word * draw(st.integers(1, 2))
    qweight, qzeros = random_words(draw, k // per_word, n), random_words(draw, groups, n // per_word)
    scales = random_scales(draw, groups, n)
    g_idx = draw(st.permutations([index // size for index in range(k)])) if act_order else [i // size for i in range(k)]
    found = read(
        gptq(bits, size, act_order, 0 if v2 else 1),
        qweight=words(*qweight),
        qzeros=words(*qzeros),
        scales=scales,
        g_idx=torch.tensor(g_idx, dtype=torch.int32),
    ).float()
    mask = 2**bits - 1
    for row in range(n):
        for column in range(k):
            group = g_idx[column]
            q = (qweight[column // per_word][row] >> (bits * (column % per_word))) & mask
            stored = (qzeros[group][row // per_word] >> (bits * (row % per_word))) & mask
            zero = stored if v2 else stored + 1
            assert found[row, column].item() == scales[group, row].item() * (q - zero)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_awq_random_words(data: Any) -> None:
    draw = data.draw
    groups, size, n = draw(st.integers(1, 3)), draw(st.integers(1, 9)), 8 * draw(st.integers(1, 3))
    k = groups * size
    qweight, qzeros = random_words(draw, k, n // 8), random_words(draw, groups, n // 8)
    scales = random_scales(draw, groups, n)
    found = read(AwqScheme(size, True), qweight=words(*qweight), qzeros=words(*qzeros), scales=scales).float()
    shifts = [0, 16, 4, 20, 8, 24, 12, 28]
    for row in range(n):
        for column in range(k):
            q = (qweight[column][row // 8] >> shifts[row % 8]) & 15
            zero = (qzeros[column // size][row // 8] >> shifts[row % 8]) & 15
            assert found[row, column].item() == (q - zero) * scales[column // size, row].item()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_compressed_random_words(data: Any) -> None:
    """Widths and heights that end in the middle of a word, with zeros and with an order of the inputs."""
    draw = data.draw
    bits, symmetric, ordered = draw(st.sampled_from([4, 8])), draw(st.booleans()), draw(st.booleans())
    per_word, offset = 32 // bits, 2 ** (bits - 1)
    groups, size, n = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    k = groups * size
    packed = random_words(draw, n, -(-k // per_word))
    zeros = random_words(draw, -(-n // per_word), groups)
    g_idx = draw(st.permutations([index // size for index in range(k)])) if ordered else [i // size for i in range(k)]
    parts = {"weight_packed": words(*packed), "weight_scale": random_scales(draw, n, groups)}
    parts["weight_shape"] = torch.tensor([n, k])
    if not symmetric:
        parts["weight_zero_point"] = words(*zeros)
    if ordered:
        parts["weight_g_idx"] = torch.tensor(g_idx, dtype=torch.int32)
    kind: Any = f"int{bits}"
    found = read(CompressedScheme(kind, True, "group", size, (0, 0), symmetric, ordered, None), **parts).float()
    mask = 2**bits - 1
    for row in range(n):
        for column in range(k):
            group = g_idx[column]
            value = ((packed[row][column // per_word] >> (bits * (column % per_word))) & mask) - offset
            zero = 0 if symmetric else ((zeros[row // per_word][group] >> (bits * (row % per_word))) & mask) - offset
            assert found[row, column].item() == (value - zero) * parts["weight_scale"][row, group].item()


def test_an_order_of_minus_ones_is_none() -> None:
    scheme = CompressedScheme("int4", True, "group", 8, (0, 0), True, False, None)
    order = torch.full((8,), -1, dtype=torch.int32)
    parts = {"weight_packed": words([5]), "weight_scale": ones(1, 1), "weight_shape": torch.tensor([1, 8])}
    assert read(scheme, weight_g_idx=order, **parts).input_order is None


# ---- the compressed-tensors library ----------------------------------------------------------------------------------
INT_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
FLOAT_TOKEN = {**INT_TOKEN, "type": "float"}
SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "W4A16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "W4A16_ASYM": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}, None),
    "W4A16_static_order": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "weight"},
        None,
    ),
    "W4A16_rows": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, None),
    "W4A16_rows_asym": ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}, None),
    "W8A16": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}, None),
    "W8A16_asym": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False}, None),
    "W8A8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, INT_TOKEN),
    "W8A8_asym": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, INT_TOKEN),
    "W8_tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}, None),
    "FP8_DYNAMIC": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, FLOAT_TOKEN),
    "FP8_tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, FLOAT_TOKEN),
    "FP8_BLOCK": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
        {**FLOAT_TOKEN, "strategy": "group", "group_size": 32},
    ),
}


def grid_of(args: dict[str, Any], n: int, k: int) -> tuple[int, ...]:
    if args["strategy"] == "group":
        return (n, k // args["group_size"])
    if args["strategy"] == "block":
        return (-(-n // args["block_structure"][0]), -(-k // args["block_structure"][1]))
    return (n, 1) if args["strategy"] == "channel" else (1,)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_against_the_library(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Compressed by compressed-tensors, config and all; read by us; equal to what the library decompresses."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors needs Python 3.11")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    form, weights, inputs = SCHEMES[name]
    n, k = (40, 96) if weights["strategy"] != "block" else (72, 80)
    generator = torch.Generator().manual_seed(7)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, format=form)
    grid = grid_of(weights, n, k)
    top = 448.0 if weights.get("type") == "float" else 2.0 ** (weights["num_bits"] - 1)
    state = {
        "weight": torch.randn(n, k, generator=generator).to(dtype),
        # Some values do not fit the scales, so that the ends of the range occur.
        "weight_scale": (2.5 * (0.5 + torch.rand(grid, generator=generator)) / top).to(dtype),
    }
    if not weights.get("symmetric", True):
        low, high = -(2 ** (weights["num_bits"] - 1)), 2 ** (weights["num_bits"] - 1)
        state["weight_zero_point"] = torch.randint(low, high, grid, generator=generator, dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    parts = compressor.compress(state, scheme)
    # The library multiplies out in the dtype of the scales; in float32 that is exact.
    wide = {role: part.float() if role == "weight_scale" else part for role, part in parts.items()}
    expected = compressor.decompress(wide, scheme)["weight"]

    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, quantization_status="compressed", ignore=["lm_head"]
    )
    write_folder(tmp_path, {"model.safetensors": {f"m.{role}": part for role, part in parts.items()}})
    edit_json(tmp_path / "config.json", quantization_config=config.model_dump(mode="json"))
    with open_checkpoint(tmp_path) as checkpoint:
        source = open_weights(checkpoint)
        assert source.names() == ["m.weight"]
        assert source.shape("m.weight") == (n, k)
        weight = source.tensor("m.weight")
    assert isinstance(weight, QuantizedWeight)
    assert torch.equal(weight.float(), expected)
    assert weight.scales.dtype == dtype
    if "FP8" in name and name != "FP8_BLOCK":
        assert weight.activation == "fp8"
    else:
        assert weight.activation == ("int8" if inputs and form == "int-quantized" else None)


@pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_presets_of_the_library_are_accepted(preset: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors needs Python 3.11")
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig(config_groups={preset: ["Linear"]}, quantization_status="compressed")
    raw = config.model_dump(mode="json")
    packed = preset in ("W4A16", "W4A16_ASYM", "W8A16")
    raw["format"] = "pack-quantized" if packed else "int-quantized" if preset == "W8A8" else "float-quantized"
    read_method(raw, "x")


@pytest.mark.parametrize("preset", ["NVFP4", "NVFP4A16", "MXFP4", "MXFP8", "FP8", "W4A8", "W3A16", "W4AFP8"])
def test_other_presets_are_refused(preset: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors needs Python 3.11")
    from compressed_tensors.quantization import QuantizationConfig

    from pagelens.errors import ConfigError

    config = QuantizationConfig(config_groups={preset: ["Linear"]}, quantization_status="compressed")
    for form in ("pack-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized"):
        with pytest.raises(ConfigError, match=r"is not supported|are supported with"):
            read_method({**config.model_dump(mode="json"), "format": form}, "x")
