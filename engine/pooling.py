"""Texts in, vectors and scores out: what LLM.embed and LLM.rerank do around the engine.

The engine returns the hidden state of each text's last token after the final norm. Here is what goes before (prompts,
token ids) and after (truncation, length 1, two rows of the output head). Knows nothing of queues, threads or the
network. Source: qwen3.md section 1.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, EngineError, PromptError
from .text.chat import SegmentBuilder, encode_segments

if TYPE_CHECKING:
    from torch import Tensor

    from .text.tokenizer import Tokenizer
    from .types import RequestOutput

Vector = NDArray[np.float32]

NO_HEAD = "this checkpoint has no output head (no lm_head.weight, and tie_word_embeddings is not true)"
YES, NO = "yes", "no"

# Protocol text: the models were trained on exactly this.
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
_BEFORE_INSTRUCTION = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: '
)
_BEFORE_QUERY = "\n<Query>: "
_BEFORE_DOCUMENT = "\n<Document>: "
_AFTER_DOCUMENT = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


# ---- embedding -----------------------------------------------------------------------------------------------------
def encode_texts(tokenizer: Tokenizer, texts: str | Sequence[str], instruction: str | None) -> list[list[int]]:
    """Token ids of the texts, with what the post-processor of tokenizer.json puts around them.

    With an instruction they are queries, `Instruct: {instruction}\\nQuery:{text}`. No text becomes a control token.
    Raises PromptError naming the index of an empty text or of one that is no string.
    """
    listed = [texts] if isinstance(texts, str) else _as_texts("texts", texts)
    task = "" if instruction is None else f"Instruct: {_checked_instruction(instruction)}\nQuery:"
    encoded = []
    for index, text in enumerate(listed):
        _check_text(f"text {index}", text)
        ids = _encode_named(f"text {index}", tokenizer, task + text)
        encoded.append([*tokenizer.prefix_ids, *ids, *tokenizer.suffix_ids])
    return encoded


def resolve_dim(dim: int | None, hidden_size: int) -> int:
    """Length of the vectors; None = hidden_size. Raises ConfigError unless it is an integer from 1 to hidden_size."""
    if dim is None:
        return hidden_size
    if isinstance(dim, bool) or not isinstance(dim, Integral) or not 1 <= dim <= hidden_size:
        raise ConfigError(
            f"dim={dim!r} must be an integer from 1 to {hidden_size}, the model's hidden size; None gives all of it"
        )
    return int(dim)


def unit_vectors(hidden: Sequence[Vector], dim: int) -> Vector:
    """[n, dim] float32: the first `dim` values of each hidden state [C], divided by their length in float64.

    Vectors of zeros stay zeros.
    """
    cut = np.zeros((len(hidden), dim))
    for row, values in zip(cut, hidden):
        row[:] = values[:dim]
    lengths = np.sqrt((cut * cut).sum(axis=1, keepdims=True))
    return (cut / np.where(lengths == 0, 1, lengths)).astype(np.float32)


# ---- reranking -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class RerankResult:
    """One document's place in the list that was passed, and P(yes), the probability that it meets the query."""

    index: int
    score: float


@dataclass(frozen=True, slots=True)
class RerankOutput:
    """One result a document, in the order of the documents. `num_tokens` counts all prompts together."""

    results: list[RerankResult]
    num_tokens: int

    @property
    def scores(self) -> list[float]:
        return [result.score for result in self.results]

    def ranked(self, top_n: int | None = None) -> list[RerankResult]:
        """The results, best first and equal ones in the order of the documents; at most `top_n` of them."""
        if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, Integral) or top_n < 0):
            raise ConfigError(f"top_n={top_n!r} must be None or an integer of 0 or more")
        best_first = sorted(self.results, key=lambda result: -result.score)
        return best_first if top_n is None else best_first[: int(top_n)]

    def __iter__(self) -> Iterator[RerankResult]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: int) -> RerankResult:
        return self.results[index]


def encode_pairs(
    tokenizer: Tokenizer, query: str, documents: Sequence[str], instruction: str | None
) -> list[list[int]]:
    """Token ids of the prompt that asks whether a document meets the query, one a document.

    None = DEFAULT_INSTRUCTION. Control tokens come from the template alone, whatever the texts say.
    Raises PromptError naming what is empty or no string; WeightsError if the tokenizer lacks a token of the template.
    """
    task = DEFAULT_INSTRUCTION if instruction is None else _checked_instruction(instruction)
    _check_text("query", query)
    encoded = []
    for index, document in enumerate(_as_texts("documents", documents)):
        _check_text(f"document {index}", document)
        prompt = SegmentBuilder(_CONTROL_TOKENS)
        prompt.template(_BEFORE_INSTRUCTION)
        for text, template in ((task, _BEFORE_QUERY), (query, _BEFORE_DOCUMENT), (document, _AFTER_DOCUMENT)):
            prompt.text(text)
            prompt.template(template)
        encoded.append(encode_segments(tokenizer, prompt.segments()))
    return encoded


def find_judges(tokenizer: Tokenizer | None) -> tuple[int, int] | None:
    """The ids of "no" and "yes"; None if they are not single tokens."""
    if tokenizer is None:
        return None
    no, yes = tokenizer.token_id(NO), tokenizer.token_id(YES)
    return None if no is None or yes is None else (no, yes)


class Judge:
    """Scores hidden states by two rows of the output head instead of all of them."""

    def __init__(self, rows: Tensor) -> None:
        """rows [2, C] float32: those of "no" and "yes"."""
        no, yes = rows.numpy().astype(np.float64)
        self._direction: NDArray[np.float64] = yes - no

    @classmethod
    def open(cls, tokenizer: Tokenizer, rows: Tensor | None, has_head: bool) -> Judge:
        """rows: None where the model was loaded without them. Raises ConfigError that says why there are none."""
        lacking = next((token for token in _CONTROL_TOKENS if tokenizer.token_id(token) is None), None)
        if lacking is not None:
            raise ConfigError(
                f"rerank asks in the prompt of Qwen3-Reranker, and this tokenizer lacks its token {lacking!r}; "
                "use a reranking model"
            )
        if rows is not None:
            return cls(rows)
        if find_judges(tokenizer) is None:
            raise ConfigError(
                f'rerank compares the tokens "{YES}" and "{NO}", and this tokenizer has no such single tokens; '
                "use a reranking model"
            )
        if not has_head:
            raise ConfigError(f"{NO_HEAD}, so it cannot rerank; compare the vectors of embed()")
        raise ConfigError(
            f'the output head\'s rows of "{YES}" and "{NO}" cannot be read from this checkpoint; rerank needs '
            "lm_head.weight, or tied embeddings, in float32, float16 or bfloat16"
        )

    def results(self, hidden: Sequence[Vector], num_tokens: int) -> RerankOutput:
        """One result a hidden state [C], in their order."""
        return RerankOutput([RerankResult(i, self.score(state)) for i, state in enumerate(hidden)], num_tokens)

    def score(self, hidden: Vector) -> float:
        """P(yes) = softmax over the logits of "no" and "yes" = sigmoid(h . (W[yes] - W[no]))."""
        margin = float(np.dot(hidden.astype(np.float64), self._direction))
        # Of the two forms the one whose exponential cannot overflow.
        small = math.exp(-abs(margin))
        return 1 / (1 + small) if margin >= 0 else small / (1 + small)


# ---- both ----------------------------------------------------------------------------------------------------------
def hidden_states(what: str, outputs: Sequence[RequestOutput]) -> list[Vector]:
    """The pooled rows of finished requests. Raises EngineError naming the first that failed."""
    rows = []
    for index, output in enumerate(outputs):
        if output.pooled is None:
            raise EngineError(f"{what} {index}: {output.outputs[0].stop_reason}")
        rows.append(output.pooled)
    return rows


def _as_texts(name: str, texts: Any) -> list[Any]:
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise PromptError(f"{name} must be a list of strings, not {type(texts).__name__}")
    return list(texts)


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise PromptError(f"{name} must be a string, not {type(text).__name__}")
    if not text:
        raise PromptError(f"{name} is empty; leave it out or give at least one character")


def _checked_instruction(instruction: Any) -> str:
    if not isinstance(instruction, str) or not instruction:
        raise PromptError(f"instruction must be None or a non-empty string, got {instruction!r}")
    return instruction


def _encode_named(name: str, tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text, parse_special=False)
    except PromptError as error:
        raise PromptError(f"{name}: {error}") from error
