"""Tiny Qwen3 checkpoints in every quantised format, and the float weights that they mean.

The packers here follow qwen3.md section 7 word by word and share nothing with engine/: values, zeros, scales and orders
are drawn at random (nothing is quantised), then written in the format, and multiplied out in numpy.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .text_models import edit_json, make_oracle, save

GROUP = 32
Parts = dict[str, Tensor]
Array = np.ndarray[Any, Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds this column of its eight
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


class Matrix(NamedTuple):
    """Whole numbers [N, K] as unsigned, zeros and scales [N, G], the group of each input [K], and what they mean."""

    values: Array
    zeros: Array
    scales: Tensor
    groups: Array

    def weight(self) -> Tensor:
        """(value - zero) * scale in float32, element by element of its group."""
        whole = self.values.astype(np.float32) - self.zeros.astype(np.float32)[:, self.groups]
        return torch.from_numpy(whole * self.scales.float().numpy()[:, self.groups])


def draw(
    rng: np.random.Generator, n: int, k: int, bits: int, size: int, symmetric: bool, ordered: bool, dtype: torch.dtype
) -> Matrix:
    top = 2**bits
    groups = np.arange(k) // size
    if ordered:
        groups = rng.permutation(groups)
    grid = (n, k // size)
    zeros = np.full(grid, top // 2) if symmetric else rng.integers(1, top + 1, grid)
    return Matrix(rng.integers(0, top, (n, k)), zeros, draw_scales(rng, grid, k, 0.3 * top, dtype), groups)


def draw_scales(rng: np.random.Generator, shape: tuple[int, ...], k: int, spread: float, dtype: torch.dtype) -> Tensor:
    """Such that a product with K inputs of size 1 has size 1, if values have this spread."""
    return torch.from_numpy(rng.uniform(0.5, 1.5, shape) / (spread * k**0.5)).to(dtype)


def pack(values: Array, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Unsigned values along an axis into words of 32 bits: the i-th of a word, or the order[i]-th, at bit i * bits."""
    values = np.moveaxis(values, axis, -1).astype(np.uint32)
    count = 32 // bits
    values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % count)])
    words = np.zeros((*values.shape[:-1], values.shape[-1] // count), dtype=np.uint32)
    for i, place in enumerate(order or range(count)):
        words |= values[..., place::count] << np.uint32(i * bits)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32))


def gptq(rng: np.random.Generator, n: int, k: int, bits: int, v2: bool, ordered: bool, symmetric: bool) -> Any:
    m = draw(rng, n, k, bits, GROUP, symmetric, ordered, torch.float16)
    if v2:  # which cannot store 16
        m = m._replace(zeros=np.minimum(m.zeros, 2**bits - 1))
    parts = {
        "qweight": pack(m.values.T, bits, 0),
        "qzeros": pack((m.zeros - (0 if v2 else 1)).T, bits, 1),
        "scales": m.scales.t().contiguous(),
        "g_idx": torch.from_numpy(m.groups.astype(np.int32)),
    }
    return parts, m.weight()


def awq(rng: np.random.Generator, n: int, k: int) -> Any:
    m = draw(rng, n, k, 4, GROUP, False, False, torch.float16)
    m = m._replace(zeros=np.minimum(m.zeros, 15))
    parts = {
        "qweight": pack(m.values.T, 4, 1, AWQ_ORDER),
        "qzeros": pack(m.zeros.T, 4, 1, AWQ_ORDER),
        "scales": m.scales.t().contiguous(),
    }
    return parts, m.weight()


def packed(rng: np.random.Generator, n: int, k: int, bits: int, size: int, symmetric: bool, ordered: bool) -> Any:
    """compressed-tensors pack-quantized; size -1: a scale a row."""
    m = draw(rng, n, k, bits, k if size == -1 else size, symmetric, ordered, torch.bfloat16)
    m = m._replace(zeros=np.minimum(m.zeros, 2**bits - 1))
    parts = {
        "weight_packed": pack(m.values, bits, 1),
        "weight_scale": m.scales,
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        parts["weight_zero_point"] = pack(m.zeros, bits, 0)
    if ordered:
        parts["weight_g_idx"] = torch.from_numpy(m.groups.astype(np.int32))
    return parts, m.weight()


def int8_rows(rng: np.random.Generator, n: int, k: int) -> Any:
    values = torch.from_numpy(rng.integers(-128, 128, (n, k)).astype(np.int8))
    scales = draw_scales(rng, (n, 1), k, 74.0, torch.bfloat16)
    return {"weight": values, "weight_scale": scales}, values.float() * scales.float()


def e4m3(byte: int) -> float:
    """The formula of section 7.1."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return -size if sign else size


E4M3 = np.array([e4m3(byte) for byte in range(256)], dtype=np.float32)


def fp8(rng: np.random.Generator, n: int, k: int, role: str, block: tuple[int, int] | None) -> Any:
    """block None: a scale a row."""
    data = rng.integers(0, 256, (n, k)).astype(np.uint8)
    data[np.isnan(E4M3[data])] = 0
    rows, columns = block or (1, k)
    scales = draw_scales(rng, (-(-n // rows), -(-k // columns)), k, 120.0, torch.bfloat16)
    grid = scales.float().numpy()[np.arange(n) // rows][:, np.arange(k) // columns]
    parts = {"weight": torch.from_numpy(data).view(torch.float8_e4m3fn), role: scales}
    return parts, torch.from_numpy(E4M3[data] * grid)


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
    }


def group_weights(bits: int, size: int = GROUP, symmetric: bool = True, actorder: str | None = None) -> dict[str, Any]:
    kind = "channel" if size == -1 else "group"
    known = {"num_bits": bits, "type": "int", "strategy": kind, "symmetric": symmetric, "dynamic": False}
    return {**known, "group_size": None if size == -1 else size, "actorder": actorder}


def gptq_config(bits: int, **changes: Any) -> dict[str, Any]:
    base = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": True}
    return {**base, "checkpoint_format": "gptq", "pack_dtype": "int32", "lm_head": False, **changes}


FLOAT_ROWS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
FLOAT_BLOCKS = {**FLOAT_ROWS, "strategy": "block", "block_structure": [GROUP, GROUP]}
PER_TOKEN = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
PER_GROUP = {**PER_TOKEN, "type": "float", "strategy": "group", "group_size": GROUP}
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [GROUP, GROUP]}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
BLOCK = (GROUP, GROUP)

Build = Callable[[np.random.Generator, int, int], Any]
# How a matrix [N, K] is drawn and stored, and the quantization_config.
FORMATS: dict[str, tuple[Build, dict[str, Any]]] = {
    "fp8": (lambda r, n, k: fp8(r, n, k, "weight_scale_inv", BLOCK), FP8_CONFIG),
    "gptq_int4": (lambda r, n, k: gptq(r, n, k, 4, False, False, True), gptq_config(4)),
    "gptq_int4_asym": (lambda r, n, k: gptq(r, n, k, 4, False, False, False), gptq_config(4, sym=False)),
    "gptq_int4_v2": (
        lambda r, n, k: gptq(r, n, k, 4, True, False, False),
        gptq_config(4, sym=False, checkpoint_format="gptq_v2"),
    ),
    "gptq_int4_act_order": (lambda r, n, k: gptq(r, n, k, 4, False, True, True), gptq_config(4, desc_act=True)),
    "gptq_int8": (lambda r, n, k: gptq(r, n, k, 8, False, False, True), gptq_config(8)),
    "gptq_int8_act_order": (
        lambda r, n, k: gptq(r, n, k, 8, False, True, False),
        gptq_config(8, desc_act=True, sym=False),
    ),
    "awq": (awq, AWQ_CONFIG),
    "ct_w4a16": (
        lambda r, n, k: packed(r, n, k, 4, GROUP, True, False),
        compressed("pack-quantized", group_weights(4)),
    ),
    "ct_w4a16_asym": (
        lambda r, n, k: packed(r, n, k, 4, GROUP, False, False),
        compressed("pack-quantized", group_weights(4, symmetric=False)),
    ),
    "ct_w4a16_act_order": (
        lambda r, n, k: packed(r, n, k, 4, GROUP, True, True),
        compressed("pack-quantized", group_weights(4, actorder="group")),
    ),
    "ct_w8a16": (
        lambda r, n, k: packed(r, n, k, 8, -1, True, False),
        compressed("pack-quantized", group_weights(8, -1)),
    ),
    "ct_w8a8": (int8_rows, compressed("int-quantized", group_weights(8, -1), {**PER_TOKEN, "type": "int"})),
    "ct_fp8_dynamic": (
        lambda r, n, k: fp8(r, n, k, "weight_scale", None),
        compressed("float-quantized", FLOAT_ROWS, {**PER_TOKEN, "type": "float"}),
    ),
    "ct_fp8_block": (
        lambda r, n, k: fp8(r, n, k, "weight_scale", BLOCK),
        compressed("float-quantized", FLOAT_BLOCKS, PER_GROUP),
    ),
}


class Dice(np.random.Generator):
    """Random numbers; `permutation` gives the same one for the same `key`, if there is one."""

    key: str | None = None

    def permutation(self, x: Any, axis: int = 0) -> Any:
        if self.key is None:
            return super().permutation(x, axis)
        return np.random.default_rng(zlib.crc32(self.key.encode())).permutation(x, axis)


def input_of(name: str) -> str:
    """The same for matrices that read the same input: a quantiser sorts the inputs of all of them in one way."""
    for part in ("k_proj", "v_proj"):
        name = name.replace(part, "q_proj")
    return name.replace("up_proj", "gate_proj")


def make_quantized_checkpoint(
    folder: Path,
    fmt: str,
    model_kind: str = "qwen3",
    seed: int = 0,
    order_key: Callable[[str], str] | None = None,
) -> dict[str, Tensor]:
    """Write a tiny checkpoint whose decoder's linear layers are in a format of FORMATS; all else is bfloat16.

    order_key  act-order: matrices for whose names this is the same have the same order; None: each has its own
    Returns every weight by its name in an unquantised checkpoint (experts one by one), multiplied out in float32.
    """
    build, config = FORMATS[fmt]
    rng = Dice(np.random.PCG64(seed))
    save(make_oracle(ARCHITECTURES[model_kind], seed), folder)
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = value.to(torch.bfloat16)
            meant[name] = stored[name].float()
            continue
        rng.key = None if order_key is None else order_key(name)
        parts, meant[name] = build(rng, *value.shape)
        stored |= {f"{name.removesuffix('weight')}{role}": part for role, part in parts.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", quantization_config=config)
    return meant


def load_oracle(quantized: Path, weights: dict[str, Tensor], folder: Path) -> Any:
    """The transformers model in float32 of what `make_quantized_checkpoint` returned, by way of a plain folder."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((quantized / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
