"""Text <-> token ids with the byte-level BPE of a checkpoint's tokenizer.json (the `tokenizers` library does the work).

tokenizer.json itself is read, never tokenizer_config.json, whose class names are misleading for DeepSeek-OCR. Special
ids are looked up by their text. Knows nothing of prompts, images or chat templates.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import tokenizers

from ..errors import PromptError, WeightsError
from ..loading.strict_json import parse_json, shown

MAX_TOKENIZER_BYTES = 256 * 2**20
MAX_ID = 2**24
BOS_TEXT = "<｜begin▁of▁sentence｜>"
EOS_TEXT = "<｜end▁of▁sentence｜>"


class Tokenizer:
    """The tokenizer of one checkpoint folder. Thread-safe.

    Only byte-level decoders are accepted (all DeepSeek and Qwen models have one), so that every token is a string of
    bytes and text can be built piece by piece. Raises WeightsError if tokenizer.json is missing, damaged or of another
    kind.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / "tokenizer.json"
        self._label = f"{self._path.parent.name}/tokenizer.json"
        text = self._read_text()
        _check_file(text, self._fail)
        self._full = self._build(text)
        decoder = self._full.decoder
        if not isinstance(decoder, tokenizers.decoders.ByteLevel):
            self._fail(f"decoder {type(decoder).__name__} is not supported; only ByteLevel is")
        added = self._full.get_added_tokens_decoder()
        self._added_ids = {token.content: id_ for id_, token in added.items()}
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Token ids of `text`; nothing is put before or after it.

        parse_special  True: control tokens written in the text, such as "<image>", become their ids. False: they are
                       ordinary characters, and no added token's id can come out (use it for text from strangers).
        Raises PromptError if the text holds lone surrogates.
        """
        chosen = self._full if parse_special else self._plain
        try:
            text.encode("utf-8")  # the library only says that a text with lone surrogates is no string
        except UnicodeEncodeError as error:
            raise PromptError(f"text has a lone surrogate at character {error.start}; it is not Unicode") from error
        try:
            ids: list[int] = chosen.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise WeightsError(f"{self._label}: damaged: it cannot encode this text") from error
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing.

        DeepSeek-OCR needs skip_special_tokens False: its table and grounding tags are special tokens.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.id_to_bytes(id_) for id_ in ids if id_ not in skipped).decode("utf-8", "replace")

    def id_to_bytes(self, id_: int) -> bytes:
        """The bytes of one token, which may be part of a character; b"" if the id has no token."""
        known = self._bytes.get(id_)
        if known is None:
            token = self._full.id_to_token(id_) if 0 <= id_ < 2**32 else None
            known = self._bytes[id_] = b"" if token is None else _token_bytes(token)
        return known

    def token_id(self, text: str) -> int | None:
        """The id of the single token that stands for exactly this text, added tokens first; None if there is none."""
        added = self._added_ids.get(text)
        if added is not None:
            return added
        found: int | None = self._full.token_to_id("".join(_BYTE_TO_CHAR[byte] for byte in text.encode("utf-8")))
        return found

    def require_token_id(self, text: str) -> int:
        """As `token_id`, but raises WeightsError if there is no such token."""
        id_ = self.token_id(text)
        if id_ is None:
            self._fail(f"there is no token {text!r}, which the model needs")
        return id_

    def bos_id(self, text: str = BOS_TEXT) -> int | None:
        """The id of the token that begins every prompt, looked up by its text."""
        return self._added_ids.get(text)

    def eos_id(self, text: str = EOS_TEXT) -> int | None:
        """The id of the token that ends every answer, looked up by its text."""
        return self._added_ids.get(text)

    @functools.cached_property
    def control_tokens(self) -> frozenset[str]:
        """The texts that `encode` turns into single tokens with parse_special True and not with False."""
        return frozenset(self._added_ids)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id that has a token; a model's table may be larger."""
        vocab: dict[str, int] = self._full.get_vocab(with_added_tokens=True)
        return max(vocab.values(), default=-1) + 1

    @functools.cached_property
    def prefix_ids(self) -> list[int]:
        """What tokenizer.json's post-processor puts before every text: a begin token for Llama 3, nothing for Qwen3."""
        return self._surroundings[0]

    @functools.cached_property
    def suffix_ids(self) -> list[int]:
        """What the post-processor puts after every text: <|endoftext|> for Qwen3-Embedding, nothing for Qwen3.

        It is part of a text that is embedded, never of a prompt that is continued.
        """
        return self._surroundings[1]

    @functools.cached_property
    def _surroundings(self) -> tuple[list[int], list[int]]:
        plain = self.encode("a", parse_special=True)
        ids: list[int] = self._full.encode("a").ids
        found = (i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
        return next(((ids[:i], ids[i + len(plain) :]) for i in found), ([], []))

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same model without its added tokens, so that nothing in a text can become one.

        Added tokens that also stand in the base vocabulary (as bos and eos do) are taken out of it, with the merges
        that would build them. Built on first use: it costs as much as loading the tokenizer.
        """
        raw = json.loads(self._read_text())
        # One character is a byte of the alphabet: without it that byte could not be encoded at all.
        hidden = {content for content in self._added_ids if len(content) > 1}
        model = raw["model"]
        model["vocab"] = {token: id_ for token, id_ in model["vocab"].items() if token not in hidden}
        model["merges"] = [merge for merge in model["merges"] if not hidden.intersection(_merge_parts(merge))]
        raw["added_tokens"], raw["post_processor"] = [], None
        return self._build(json.dumps(raw, ensure_ascii=False))

    def _fail(self, reason: str) -> NoReturn:
        raise WeightsError(f"{self._label}: {reason}")

    def _read_text(self) -> str:
        try:
            if self._path.stat().st_size > MAX_TOKENIZER_BYTES:
                raise WeightsError(f"{self._label}: larger than the limit of {MAX_TOKENIZER_BYTES} bytes")
            return self._path.read_text(encoding="utf-8")
        except OSError as error:
            raise WeightsError(f"{self._label}: cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise WeightsError(f"{self._label}: not UTF-8 at byte {error.start}") from error

    def _build(self, text: str) -> tokenizers.Tokenizer:
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except BaseException as error:
            # The library raises bare Exception for every fault of the file.
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            raise WeightsError(f"{self._label}: damaged: {str(error)[:200]}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def _check_file(text: str, fail: Callable[[str], NoReturn]) -> None:
    """Refuse what the library would not: settings that change texts unseen, and values on which it ends the process."""

    def damaged(reason: str) -> NoReturn:
        fail(f"damaged: {reason}")

    raw = parse_json(text, damaged)
    model = raw.get("model") if isinstance(raw, dict) else None
    if not isinstance(model, dict):
        damaged("it has no model")
    if model.get("type") != "BPE":
        fail(f"model {shown(model.get('type'))} is not supported; only BPE is")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            fail(f"model.{key}={shown(model[key])} is not supported; it must be null")
    vocab, added = model.get("vocab"), raw.get("added_tokens", [])
    if not isinstance(vocab, dict) or not isinstance(model.get("merges"), list) or not isinstance(added, list):
        damaged("vocab must be an object, merges and added_tokens lists")
    added_ids = [token.get("id") if isinstance(token, dict) else None for token in added]
    for id_ in (*vocab.values(), *added_ids):
        if type(id_) is not int or not 0 <= id_ < MAX_ID:
            damaged(f"token id {shown(id_)} is not an integer from 0 to {MAX_ID - 1}")


def _is_panic(error: BaseException) -> bool:
    """A panic of the library's Rust code arrives as a BaseException of a class that cannot be imported."""
    return type(error).__name__ == "PanicException"


def _merge_parts(merge: str | list[str]) -> tuple[str, str, str]:
    """Both parts and the result of a merge, written "a b" or ["a", "b"]."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


def _byte_alphabet() -> list[str]:
    """GPT-2's byte alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


_BYTE_TO_CHAR = _byte_alphabet()
_CHAR_TO_BYTE = {char: byte for byte, char in enumerate(_BYTE_TO_CHAR)}


def _token_bytes(token: str) -> bytes:
    """Bytes of a vocabulary entry; one with any character outside the alphabet (an added token) stands for itself."""
    try:
        return bytes(_CHAR_TO_BYTE[char] for char in token)
    except KeyError:
        return token.encode("utf-8")
