"""Byte-level BPE as tiktoken does it: of all neighbours that are a token together, the one of lowest rank is merged.

Knows nothing of merges: an oracle for a tokenizer.json that was made from ranks.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Mapping

import regex
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX


def encode_by_rank(text: str, ranks: Mapping[bytes, int]) -> list[int]:
    """Ids of a text without control tokens, for Qwen's vocabulary."""
    ids: list[int] = []
    for word in regex.findall(PRETOKENIZE_REGEX, unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in word.encode("utf-8")]
        while len(parts) > 1:
            found = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
            at = found.index(min(found))
            if found[at] == len(ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids
