"""Tokenizer: published vectors on the real vocabulary, control tokens in user text, the library as oracle, damage."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagelens.errors import PromptError, WeightsError
from pagelens.text.tokenizer import BOS_TEXT, EOS_TEXT, Tokenizer

from ..helpers.checkpoint_files import ocr_tokenizer, ocr_tokenizer_json

# deepseek-ocr.md section 13.
VECTORS = {
    "Hello": [19923],
    "The capital of France is": [671, 6102, 294, 8760, 344],
    "12345": [6895, 1883],
    "year 2026, price $1299.99": [24821, 223, 939, 24, 14, 5220, 957, 9603, 27, 16, 1977],
    "日本語のテキスト": [88768, 1576, 17383, 20367, 24552],
    "  spaced": [223, 48914],
    "def main():\n\tpass": [3465, 1840, 15536, 200, 9762],
    "\n<|grounding|>Convert the document to markdown.": [201, 128820, 21842, 270, 4940, 304, 2121, 7919, 16],
    "\nFree OCR.": [201, 21431, 126041, 16],
    "<image>\n<|grounding|>Convert the document to markdown.": [
        128815, 201, 128820, 21842, 270, 4940, 304, 2121, 7919, 16,
    ],
    "\n<|grounding|>OCR this image.": [201, 128820, 119316, 566, 4609, 16],
    "\nParse the figure.": [201, 68779, 270, 5991, 16],
    "\nDescribe this image in detail.": [201, 72188, 566, 4609, 295, 6271, 16],
    "document parsing.": [34030, 76466, 16],
    "Multi page parsing.": [37460, 4366, 76466, 16],
    "<|ref|>title<|/ref|><|det|>[[52, 38, 530, 71]]<|/det|>\n# Intro": [
        128816, 10212, 128817, 128818, 22663, 4157, 14, 223, 2080, 14, 223, 21767, 14, 223, 5863, 11621, 128819, 201,
        5, 61204,
    ],
    "<table><tr><td>a1</td></tr></table>": [114761, 32, 128823, 128821, 67, 19, 128822, 128824, 1718, 8603, 32],
}  # fmt: skip
# deepseek-ocr.md section 6.2.
TOKENS = {
    BOS_TEXT: 0, EOS_TEXT: 1, "<｜▁pad▁｜>": 2, "<｜User｜>": 128803, "<image>": 128815, "<|ref|>": 128816,
    "<|/ref|>": 128817, "<|det|>": 128818, "<|/det|>": 128819, "<|grounding|>": 128820, "<td>": 128821,
    "</td>": 128822, "<tr>": 128823, "</tr>": 128824, "<|User|>": 128825, "<|Assistant|>": 128826,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return ocr_tokenizer()


@functools.lru_cache(maxsize=1)
def library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(ocr_tokenizer_json())


@pytest.mark.parametrize("text", VECTORS)
def test_vectors(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(text, parse_special=True) == VECTORS[text]
    assert tokenizer.decode(VECTORS[text]) == text


def test_ids_by_text(tokenizer: Tokenizer) -> None:
    assert {text: tokenizer.token_id(text) for text in TOKENS} == TOKENS
    assert tokenizer.bos_id() == 0
    assert tokenizer.eos_id() == 1
    assert tokenizer.eos_id("<|User|>") == 128825
    assert tokenizer.bos_id("<s>") is None
    assert tokenizer.vocab_size == 128827
    assert tokenizer.token_id("Hello") == 19923
    assert tokenizer.token_id("\n") == 201
    assert tokenizer.token_id("Hello there, you") is None
    assert tokenizer.require_token_id("<td>") == 128821
    with pytest.raises(WeightsError, match="no token '<sep>', which the model needs"):
        tokenizer.require_token_id("<sep>")


def test_special_and_ordinary_added_tokens(tokenizer: Tokenizer) -> None:
    """All added tokens are special except the chat and tool ones (and two that only this base vocabulary has)."""
    thinking = {tokenizer.token_id("<think>"), tokenizer.token_id("</think>")}
    ordinary = {*range(128800, 128805), *range(128806, 128815), *thinking}
    assert tokenizer.special_ids == {0, 1, 2, *range(128000, 128827)} - ordinary


def test_control_tokens_in_user_text_are_ordinary_characters(tokenizer: Tokenizer) -> None:
    for text, id_ in TOKENS.items():
        plain = tokenizer.encode(f"a{text}b", parse_special=False)
        assert id_ not in plain
        assert tokenizer.decode(plain) == f"a{text}b"
        assert id_ in tokenizer.encode(f"a{text}b", parse_special=True)


fragments = st.sampled_from([*TOKENS, "<｜", "｜>", "<|", "|>", "▁", "<", "begin▁of▁sentence", " ", "\n", "td", "é"])


@settings(max_examples=150, deadline=None)
@given(st.lists(fragments | st.text(max_size=6), max_size=12).map("".join))
def test_no_added_id_comes_out_of_user_text(text: str) -> None:
    tokenizer = ocr_tokenizer()
    ids = tokenizer.encode(text, parse_special=False)
    assert all(2 < id_ < 128000 for id_ in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True)) == text


@pytest.mark.parametrize("special", [True, False])
def test_lone_surrogates_are_refused(special: bool) -> None:
    with pytest.raises(PromptError, match="lone surrogate at character 1"):
        ocr_tokenizer().encode("a\ud800b", special)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
@example("<think>")  # a control token of DeepSeek-V3's own vocabulary
def test_plain_and_full_agree_where_there_is_no_control_token(text: str) -> None:
    tokenizer = ocr_tokenizer()
    if not any(content in text for content in tokenizer.control_tokens):
        assert tokenizer.encode(text, parse_special=False) == tokenizer.encode(text, parse_special=True)


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, 129279) | st.sampled_from([0, 1, 128815, 128821, 223]), max_size=40), skip=st.booleans()
)
def test_decode_equals_the_library(ids: list[int], skip: bool) -> None:
    """Also for ids above the last token, for broken UTF-8, and for special tokens."""
    expected = library().decode(ids, skip_special_tokens=skip)
    assert ocr_tokenizer().decode(ids, skip_special_tokens=skip) == expected


def test_every_token_has_the_library_s_bytes(tokenizer: Tokenizer) -> None:
    """All 128,827 tokens: one token alone decodes to the same text (with U+FFFD for parts of characters)."""
    one = library()
    wrong = [id_ for id_ in range(128827) if tokenizer.decode([id_]) != one.decode([id_], skip_special_tokens=False)]
    assert wrong == []


@pytest.mark.parametrize("id_", [-1, 128827, 129279, 2**31, 2**40])
def test_ids_without_a_token_are_no_text(id_: int, tokenizer: Tokenizer) -> None:
    assert tokenizer.id_to_bytes(id_) == b""
    assert tokenizer.decode([19923, id_, 16]) == "Hello."


def test_skipping_special_tokens_loses_tables(tokenizer: Tokenizer) -> None:
    ids = VECTORS["<table><tr><td>a1</td></tr></table>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<table>a1</table>"


# ---- small tokenizers of our own: kinds that are refused, damage, and traps


def small(**changes: Any) -> dict[str, Any]:
    """Bytes a, b, c and space, "ab" merged, and a special token that also stands in the vocabulary."""
    return {
        "version": "1.0",
        "added_tokens": [added(5, "<x>")],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "c": 2, "Ġ": 3, "ab": 4, "<x>": 5, "<": 6, "x": 7, ">": 8, "<x": 9},
            "merges": [["a", "b"]],
        },
        **changes,
    }


def added(id_: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": content, **flags, "special": True}


def write(folder: Path, raw: object) -> Path:
    text = raw if isinstance(raw, str) else json.dumps(raw)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return folder


def test_a_small_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path, small()))
    assert tokenizer.encode("ab <x>c", True) == [4, 3, 5, 2]
    assert tokenizer.encode("ab <x>c", False) == [4, 3, 6, 7, 8, 2]


@pytest.mark.parametrize("as_text", [True, False])
def test_merges_that_build_a_control_token_are_taken_out(as_text: bool, tmp_path: Path) -> None:
    """A base vocabulary may spell "<x>" by merges: user text must not reach the id that way either."""
    raw = small()
    merges = [["<", "x"], ["<x", ">"], ["a", "b"]]
    raw["model"]["merges"] = [" ".join(merge) for merge in merges] if as_text else merges
    tokenizer = Tokenizer(write(tmp_path, raw))
    assert tokenizer.encode("ab<x>", False) == [4, 9, 8]
    raw["model"]["ignore_merges"] = True
    assert 5 not in Tokenizer(write(tmp_path, raw)).encode("<x>", False)


def test_settings_for_training_are_not_applied(tmp_path: Path) -> None:
    """Truncation, padding and templates in the file must not change a prompt."""
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<x>": {"id": "<x>", "ids": [5], "tokens": ["<x>"]}},
    }
    raw = small(
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "a",
        },
        post_processor=template,
    )  # fmt: skip
    tokenizer = Tokenizer(write(tmp_path, raw))
    for special in (True, False):
        assert tokenizer.encode("cccc", special) == [2, 2, 2, 2]


def without(key: str) -> Callable[[], dict[str, Any]]:
    return lambda: {name: value for name, value in small().items() if name != key}


def changed_model(**changes: Any) -> dict[str, Any]:
    return small(model={**small()["model"], **changes})


DAMAGED: dict[str, tuple[Any, str]] = {
    "empty": ("", "damaged"),
    "not JSON": ("{", "damaged"),
    "a list": ("[]", "damaged"),
    "deep": ("[" * 100_000, "damaged"),
    "no model": (without("model")(), "damaged"),
    "no vocab": (small(model={"type": "BPE", "merges": []}), "damaged"),
    "merge of unknown parts": (small(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["q", "r"]]}), "damaged"),
    "vocab ids are text": (small(model={"type": "BPE", "vocab": {"a": "0"}, "merges": []}), "damaged"),
    "negative id": (small(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}), "damaged"),
    "word level": (small(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "model 'WordLevel'"),
    "no type": (small(model={"vocab": {"a": 0}, "merges": []}), "model None is not supported"),
    "duplicate key": ('{"model": {}, "model": {}}', "duplicate key 'model'"),
    "huge id": (small(model={"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}), "id 4294967295 is not"),
    "huge added id": (small(added_tokens=[added(2**24, "<y>")]), "id 16777216 is not"),
    "added token without id": (small(added_tokens=[{"content": "<y>"}]), "id None is not"),
    # The library ends the whole process on this one.
    "prefix of subwords": (changed_model(continuing_subword_prefix="a"), "continuing_subword_prefix='a' is not"),
    "suffix of words": (changed_model(end_of_word_suffix="</w>"), "end_of_word_suffix='</w>' is not"),
    "random merges": (changed_model(dropout=0.5), "dropout=0.5 is not"),
    "unknown token": (changed_model(unk_token="a"), "unk_token='a' is not"),
    "byte fallback": (changed_model(byte_fallback=True), "byte_fallback=True is not"),
    "no decoder": (small(decoder=None), "decoder NoneType is not supported"),
    "another decoder": (small(decoder={"type": "Fuse"}), "decoder Fuse is not supported; only ByteLevel"),
    "bad regex": (
        small(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        "damaged",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage(name: str, tmp_path: Path) -> None:
    raw, message = DAMAGED[name]
    with pytest.raises(WeightsError, match=message) as caught:
        Tokenizer(write(tmp_path, raw))
    assert "tokenizer.json" in str(caught.value)


def test_empty_affixes_are_as_good_as_none(tmp_path: Path) -> None:
    """Qwen's file has empty strings where DeepSeek's has null."""
    raw = changed_model(continuing_subword_prefix="", end_of_word_suffix="", dropout=None, byte_fallback=False)
    assert Tokenizer(write(tmp_path, raw)).encode("ab<x>", True) == [4, 5]


def test_a_panic_inside_the_library_is_a_weights_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 0.23.3 panics on an empty Replace pattern, for one; the class of a panic is known by its name only."""

    class PanicException(BaseException):
        pass

    class Panicking:
        def encode(self, text: str, add_special_tokens: bool) -> None:
            raise PanicException("index out of bounds")

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    tokenizer = Tokenizer(write(tmp_path, small()))
    monkeypatch.setattr(tokenizer, "_full", Panicking())
    with pytest.raises(WeightsError, match="cannot encode this text"):
        tokenizer.encode("ab", True)
    monkeypatch.setattr(Panicking, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("ab", True)


def test_every_truncation_of_a_small_file_is_refused(tmp_path: Path) -> None:
    text = json.dumps(small())
    for length in range(len(text)):
        with pytest.raises(WeightsError):
            Tokenizer(write(tmp_path, text[:length]))


def test_changed_bytes_of_a_small_file_never_crash(tmp_path: Path) -> None:
    """Either a WeightsError or a tokenizer that still encodes and decodes."""
    text = json.dumps(small()).encode()
    refused = 0
    for position in range(len(text)):
        for value in (text[position] ^ 1, ord('"')):
            (tmp_path / "tokenizer.json").write_bytes(text[:position] + bytes([value]) + text[position + 1 :])
            try:
                tokenizer = Tokenizer(tmp_path)
                for special in (True, False):
                    tokenizer.decode(tokenizer.encode("ab <x>c", special))
            except WeightsError:
                refused += 1
    assert refused > len(text)


def test_missing_and_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"tokenizer\.json: cannot be read: No such file"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(WeightsError, match="not UTF-8 at byte 7"):
        Tokenizer(tmp_path)


def test_the_config_files_beside_it_are_not_read(tmp_path: Path) -> None:
    """tokenizer_config.json names a wrong class for the real model; nothing may depend on it."""
    write(tmp_path, small())
    (tmp_path / "tokenizer_config.json").write_text("not JSON at all")
    assert Tokenizer(tmp_path).encode(" ab", True) == [3, 4]
