"""Qwen's real vocabulary: the ids of qwen3.md 5.1, 1.3 and 6, and two independent encoders as oracles."""

from __future__ import annotations

import functools
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Tokenizer

from pagelens.runtime.thinking import STOP_TEXT, find_thinking_tokens
from pagelens.text.tokenizer import Tokenizer

from ..helpers.qwen_vocabulary import (
    ADDED_TOKENS,
    NUM_RANKS,
    merge_parts,
    qwen_ranks,
    qwen_tokenizer,
    vocabulary_and_merges,
)
from ..helpers.random_conversations import LOOK_ALIKES, WORDS
from ..helpers.rank_bpe import encode_by_rank

# qwen3.md: section 5.1, and 1.3 for "test", "yes" and "no".
IDS = {
    "\n": [198], "\n\n": [271], "system": [8948], "user": [872], "assistant": [77091], "Hi": [13048], "yes": [9693],
    "no": [2152], " /think": [608, 26865], " /no_think": [608, 2152, 5854, 766], "test": [1944],
}  # fmt: skip
TOKENS = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652,
    "<|video_pad|>": 151656, "<tool_call>": 151657, "</tool_call>": 151658, "<|fim_prefix|>": 151659,
    "<|file_sep|>": 151664, "<tool_response>": 151665, "</tool_response>": 151666, "<think>": 151667,
    "</think>": 151668,
}  # fmt: skip
# qwen3.md section 6.
STOP_IDS = (
    271, 82796, 279, 7199, 882, 553, 279, 1196, 11, 358, 614, 311, 2968, 279, 6291, 3118, 389, 279, 7274, 5961, 1431,
    624, 151668, 271,
)  # fmt: skip
TEXTS = [
    *WORDS,
    *LOOK_ALIKES,
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure you'll say it's THEY'RE; 'tis we'D y'all've",
    "中文分词测试，一二三四五。日本語とカタカナ　한국어 텍스트",
    "🏳️‍🌈🇫🇷👍🏽 ✨∑∂ℝ ½ ⅷ ٣٤ ①",
    "1234567890 3.14e-10 0xFF 1,000,000",
    "  two   three    four\t\ttabs \n \n\n  \r\n\r\n\n x \n",
    "a\u00a0b\u200bc\u3000d\u2028e",
    "Å A\u030a ﬁ \u1e9b\u0323 \u2260 =\u0338",
    "\x00\x01\x7f\u0080\uffff\U0010ffff",
    "for (int i = 0; i < n; ++i) {\n    sum += a[i];\n}\n",
    "x" * 300 + " " * 100 + "!" * 50 + "\n" * 20,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return qwen_tokenizer()


@functools.lru_cache(maxsize=1)
def transformers_tokenizer() -> Qwen2Tokenizer:
    """transformers' own idea of the splitting and the normaliser, with our merges."""
    vocab, merges = vocabulary_and_merges(qwen_ranks())
    return Qwen2Tokenizer(vocab=vocab, merges=merges)


@pytest.mark.parametrize("special", [True, False])
def test_ids_of_the_spec(special: bool, tokenizer: Tokenizer) -> None:
    for text, ids in IDS.items():
        assert tokenizer.encode(text, parse_special=special) == ids
        assert tokenizer.decode(ids) == text


def test_tokens_of_the_spec(tokenizer: Tokenizer) -> None:
    assert {text: tokenizer.token_id(text) for text in TOKENS} == TOKENS
    assert [tokenizer.token_id(text) for text in ADDED_TOKENS] == list(range(151643, 151669))
    assert tokenizer.vocab_size == 151669
    assert tokenizer.special_ids == set(range(151643, 151657))
    assert tokenizer.prefix_ids == []
    ids = tokenizer.encode("<|im_start|>a<think>b</think><|im_end|>", parse_special=True)
    assert ids == [151644, 64, 151667, 65, 151668, 151645]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b</think>"


def test_the_stop_text(tokenizer: Tokenizer) -> None:
    tokens = find_thinking_tokens(tokenizer)
    assert tokens is not None
    assert (tokens.stop_ids, tokens.open_id, tokens.close_id) == (STOP_IDS, 151667, 151668)
    assert tokenizer.decode(STOP_IDS) == STOP_TEXT


def test_every_token_has_its_merge(tokenizer: Tokenizer) -> None:
    """Encoding the text of a token gives that token, wherever its bytes are a word of their own."""
    ranks = qwen_ranks()
    assert sorted(ranks.values()) == list(range(NUM_RANKS))
    checked = 0
    for token, id_ in list(ranks.items())[::97]:
        text = token.decode("utf-8", "replace")
        if "\ufffd" in text or encode_by_rank(text, ranks) != [id_]:
            continue
        assert tokenizer.encode(text, parse_special=False) == [id_]
        assert tokenizer.id_to_bytes(id_) == token
        checked += 1
    assert checked > 1500
    with pytest.raises(ValueError, match="3 pieces"):
        merge_parts(b"abc", {b"a": 0, b"b": 1, b"c": 2, b"abc": 3})


@pytest.mark.parametrize("text", TEXTS)
def test_both_oracles_agree(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text, parse_special=False)
    assert ids == encode_by_rank(text, qwen_ranks())
    assert ids == transformers_tokenizer().encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert max(ids, default=0) < NUM_RANKS


# Whether a code point that is not assigned yet is a letter depends on the Unicode version of a library: tokenizers and
# regex differ, for one, about U+323B0 (assigned in Unicode 17), and then a word ends where the other's goes on.
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(TEXTS) | st.text(ASSIGNED, max_size=8), max_size=6).map("".join))
def test_any_text(text: str) -> None:
    ids = qwen_tokenizer().encode(text, parse_special=False)
    assert ids == encode_by_rank(text, qwen_ranks())
    assert qwen_tokenizer().decode(ids) == unicodedata.normalize("NFC", text)
