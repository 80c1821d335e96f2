"""Qwen's real vocabulary as tokenizer.json: the 151,643 published ranks as a byte-level BPE, and Qwen3's own tokens.

The ranks come from the package dashscope, in tiktoken's format: a line "base64(bytes) rank" for each token. Source of
the added tokens: qwen3.md section 5.1.
"""

from __future__ import annotations

import atexit
import base64
import functools
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from pagelens.text.tokenizer import Tokenizer

from .package_data import package_file

NUM_RANKS = 151643
ADDED_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>",
    "</think>",
)  # fmt: skip
NUM_SPECIAL = 14  # the others survive skip_special_tokens
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.lru_cache(maxsize=1)
def qwen_ranks() -> dict[bytes, int]:
    """Every ordinary token's bytes and its rank, which is also its id."""
    lines = package_file("dashscope", "dashscope/resources/qwen.tiktoken").read_bytes().splitlines()
    pairs = (line.split() for line in lines if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def merge_parts(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that a longer one is merged from: what is left when only merges of lower rank are done.

    A file of ranks says which tokens there are, tokenizer.json which pairs are merged. Raises ValueError if more than
    two pieces are left: no order of merges would make this token.
    """
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        best = min(found)
        if best >= limit:
            raise ValueError(f"{token!r} is left in {len(parts)} pieces")
        at = found.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def byte_alphabet() -> list[str]:
    """GPT-2's characters for the bytes 0 to 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]


def vocabulary_and_merges(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """`vocab` and `merges` of tokenizer.json, in the order of the ranks."""
    alphabet = byte_alphabet()

    def written(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    ordered = sorted(ranks, key=ranks.__getitem__)
    merges = [merge_parts(token, ranks) for token in ordered if len(token) > 1]
    return {written(token): ranks[token] for token in ordered}, [(written(a), written(b)) for a, b in merges]


def qwen_tokenizer_json() -> dict[str, Any]:
    """tokenizer.json as Qwen3 has it, but for the post-processor, which adds nothing there."""
    vocab, merges = vocabulary_and_merges(qwen_ranks())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": NUM_RANKS + index, "content": content, **flags, "special": index < NUM_SPECIAL}
            for index, content in enumerate(ADDED_TOKENS)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocab, "merges": merges},
    }


@functools.lru_cache(maxsize=1)
def qwen_folder() -> Path:
    """A folder with that tokenizer.json, which lasts as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="pagelens-qwen-")
    atexit.register(folder.cleanup)
    text = json.dumps(qwen_tokenizer_json(), ensure_ascii=False)
    (Path(folder.name) / "tokenizer.json").write_text(text, encoding="utf-8")
    return Path(folder.name)


@functools.lru_cache(maxsize=1)
def qwen_tokenizer() -> Tokenizer:
    return Tokenizer(qwen_folder())
