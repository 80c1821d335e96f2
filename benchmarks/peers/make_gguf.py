"""Write a GGUF file for llama.cpp.

    python -m benchmarks.peers.make_gguf MODEL FORMAT OUT [--checkpoint FOLDER]

MODEL is qwen3-0.6b, deepseek-ocr (its text model) or qwen3-30b-a3b; FORMAT is bf16, q8_0 or q4_0. With --checkpoint the
folder's weights are converted; without, random blocks are written (to round 30 billion weights would take long).
Every matrix gets FORMAT, table and head too, which is llama.cpp's fastest; its own tool keeps more bits there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open

from .models import OCR, QWEN3, QWEN3_30B, DecoderSizes

KINDS = {"bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}
MODELS = {sizes.name: sizes for sizes in (QWEN3, OCR, QWEN3_30B)}
ARCHITECTURES = {"qwen3-0.6b": "qwen3", "deepseek-ocr": "deepseek2-ocr", "qwen3-30b-a3b": "qwen3moe"}
POOL_BLOCKS = 1 << 17
ATTENTION = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
FFN = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file; `sources` are the checkpoint's tensors that are stacked for it. Vectors are float32."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    plain: bool = False


def tensors_of(sizes: DecoderSizes) -> Iterator[Tensor]:
    yield Tensor("token_embd.weight", (sizes.vocab, sizes.hidden), ("model.embed_tokens.weight",))
    yield Tensor("output_norm.weight", (sizes.hidden,), ("model.norm.weight",), plain=True)
    if sizes.name != "qwen3-0.6b":
        yield Tensor("output.weight", (sizes.vocab, sizes.hidden), ("lm_head.weight",))
    for layer in range(sizes.layers):
        yield from attention_of(sizes, layer)
        yield from ffn_of(sizes, layer)


def attention_of(sizes: DecoderSizes, layer: int) -> Iterator[Tensor]:
    to, of = f"blk.{layer}", f"model.layers.{layer}"
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    yield Tensor(f"{to}.attn_norm.weight", (sizes.hidden,), (f"{of}.input_layernorm.weight",), plain=True)
    yield Tensor(f"{to}.ffn_norm.weight", (sizes.hidden,), (f"{of}.post_attention_layernorm.weight",), plain=True)
    outputs = {"attn_q": q, "attn_k": kv, "attn_v": kv}
    for name, source in ATTENTION.items():
        shape = (outputs[name], sizes.hidden) if name in outputs else (sizes.hidden, q)
        yield Tensor(f"{to}.{name}.weight", shape, (f"{of}.self_attn.{source}.weight",))
    if sizes.name.startswith("qwen3"):
        for part in "qk":
            source = f"{of}.self_attn.{part}_norm.weight"
            yield Tensor(f"{to}.attn_{part}_norm.weight", (sizes.head_dim,), (source,), plain=True)


def ffn_of(sizes: DecoderSizes, layer: int) -> Iterator[Tensor]:
    to, of = f"blk.{layer}", f"model.layers.{layer}.mlp"

    def parts(suffix: str, inner: int, prefixes: list[str], stacked: tuple[int, ...] = ()) -> Iterator[Tensor]:
        for name, source in FFN.items():
            shape = (sizes.hidden, inner) if name == "ffn_down" else (inner, sizes.hidden)
            sources = tuple(f"{prefix}.{source}.weight" for prefix in prefixes)
            yield Tensor(f"{to}.{name}{suffix}.weight", (*stacked, *shape), sources)

    if layer < sizes.dense_layers:
        yield from parts("", sizes.inner, [of])
        return
    count = sizes.num_experts
    yield Tensor(f"{to}.ffn_gate_inp.weight", (count, sizes.hidden), (f"{of}.gate.weight",), plain=True)
    yield from parts("_exps", sizes.expert, [f"{of}.experts.{e}" for e in range(count)], (count,))
    if sizes.shared:
        yield from parts("_shexp", sizes.shared, [f"{of}.shared_experts"])


def write_settings(writer: gguf.GGUFWriter, sizes: DecoderSizes) -> None:
    writer.add_name(sizes.name)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(sizes.vocab)
    writer.add_block_count(sizes.layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(sizes.inner)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4 if sizes is OCR else 1e6)
    if sizes.num_experts:
        writer.add_expert_count(sizes.num_experts)
        writer.add_expert_used_count(sizes.experts)
        writer.add_expert_feed_forward_length(sizes.expert)
    if sizes is OCR:
        writer.add_rope_dimension_count(sizes.head_dim)
        writer.add_leading_dense_block_count(sizes.dense_layers)
        writer.add_expert_shared_count(2)


class Checkpoint:
    """Tensors of a folder's safetensors files, as float32, quantised matrix by matrix."""

    def __init__(self, folder: Path) -> None:
        files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dictionary

    def pieces(self, tensor: Tensor, kind: Kind) -> Iterator[np.ndarray]:
        for source in tensor.sources:
            values = self._files[source].get_tensor(source).float().numpy()
            yield values if tensor.plain else gguf.quants.quantize(values, kind)


class RandomBlocks:
    """Blocks of random bytes with small scales, drawn once."""

    def __init__(self, kind: Kind) -> None:
        draw = np.random.default_rng(0)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        bytes_ = draw.integers(0, 256, (POOL_BLOCKS, size), dtype=np.uint8)
        if kind == Kind.BF16:
            values = draw.standard_normal(POOL_BLOCKS).astype(np.float32) * 0.02
            bytes_ = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(POOL_BLOCKS, size)
        else:
            scale = np.float16(3e-3 if kind == Kind.Q4_0 else 2e-4)
            bytes_[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
        self._pool, self._block, self._draw = bytes_, block, draw

    def pieces(self, tensor: Tensor, kind: Kind) -> Iterator[np.ndarray]:
        if tensor.plain:
            norm = len(tensor.shape) == 1
            yield np.ones(tensor.shape, np.float32) if norm else self._router(tensor.shape)
            return
        left = int(np.prod(tensor.shape)) // self._block
        while left:
            start = int(self._draw.integers(POOL_BLOCKS // 2))
            piece = self._pool[start : start + left]
            left -= len(piece)
            yield piece

    def _router(self, shape: tuple[int, ...]) -> np.ndarray:
        return (self._draw.standard_normal(shape) * 0.02).astype(np.float32)


def write(out: Path, sizes: DecoderSizes, kind: Kind, pieces: Callable[[Tensor, Kind], Iterator[np.ndarray]]) -> None:
    """Tensor by tensor, so that the memory used is that of the largest."""
    writer = gguf.GGUFWriter(out, ARCHITECTURES[sizes.name])
    write_settings(writer, sizes)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    tensors = list(tensors_of(sizes))
    for tensor in tensors:
        count = int(np.prod(tensor.shape))
        if tensor.plain:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), 4 * count)
        else:
            rows = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
            writer.add_tensor_info(tensor.name, rows, np.dtype(np.uint8), count // block * size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        found = [np.ascontiguousarray(piece).view(np.uint8).ravel() for piece in pieces(tensor, kind)]
        writer.write_tensor_data(found[0] if len(found) == 1 else np.concatenate(found))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("format", choices=sorted(KINDS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    kind = KINDS[options.format]
    source = Checkpoint(options.checkpoint) if options.checkpoint else RandomBlocks(kind)
    write(options.out, MODELS[options.model], kind, source.pieces)


if __name__ == "__main__":
    main()
