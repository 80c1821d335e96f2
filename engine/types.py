"""Plain data shared by all layers: what a request asks, what it returns, and what a forward pass is given.

Knows nothing of files, tokenizers, scheduling or kernels. Shape letters used in the whole repository: N tokens in a
batch, S sequences, H query heads, K key/value heads, D head size, C hidden size, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

MAX_ANSWERS = 64  # to one prompt
FINISH_REASONS = ("stop", "length", "repetition", "abort")


def _refuse(where: str, rule: str, value: object) -> NoReturn:
    raise ConfigError(f"{where} must be {rule}, got {value!r}")


def _real(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        _refuse(where, "a number", value)
    return float(value)


def _integer(where: str, value: Any) -> int:
    """numpy's integers count; bools and 1.0 do not."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        _refuse(where, "an integer", value)
    return int(value)


def _optional_integer(where: str, value: Any) -> int | None:
    return None if value is None else _integer(where, value)


def _integers(where: str, value: Any) -> tuple[int, ...]:
    if value is not None and (isinstance(value, (str, bytes)) or not hasattr(value, "__iter__")):
        _refuse(where, "a list of integers", value)
    return () if value is None else tuple(_integer(where, item) for item in value)


def _texts(where: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(texts, (tuple, list)) or not all(isinstance(text, str) and text for text in texts):
        _refuse(where, "a non-empty string or a list of them", value)
    return tuple(texts)


def _switch(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _refuse(where, "True or False", value)
    return value


def _check_fields(owner: object, checks: Mapping[str, Callable[[str, Any], Any]]) -> None:
    """Replace fields of a frozen dataclass by plain ints, floats and tuples; ConfigError for another type."""
    for name, check in checks.items():
        object.__setattr__(owner, name, check(f"{type(owner).__name__}.{name}", getattr(owner, name)))


@dataclass(frozen=True, slots=True)
class NgramGuard:
    """Windowed no-repeat n-gram rule over generated tokens (deepseek-ocr.md section 8).

    A token is forbidden if it would complete an n-gram of `size` tokens that starts within the last `window` generated
    tokens. Tokens in `whitelist` (texts such as "<td>", resolved by the tokenizer) are never forbidden.
    """

    size: int = 30
    window: int = 90
    whitelist: tuple[str, ...] = ("<td>", "</td>")

    def __post_init__(self) -> None:
        _check_fields(self, {"size": _integer, "window": _integer, "whitelist": _texts})
        if self.size < 2 or self.window < self.size:
            raise ConfigError(f"NgramGuard needs 2 <= size <= window, got size={self.size}, window={self.window}")


def _guard(where: str, value: Any) -> NgramGuard | bool | None:
    if value is not None and not isinstance(value, (bool, NgramGuard)):
        _refuse(where, "None, True, False or an NgramGuard", value)
    return value


_SAMPLING_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), _real),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), _real),
    **dict.fromkeys(("top_k", "min_tokens"), _integer),
    **dict.fromkeys(("max_tokens", "seed", "logprobs", "thinking_budget"), _optional_integer),
    **dict.fromkeys(("ignore_eos", "detect_repetition", "skip_special_tokens"), _switch),
    "n": _integer,
    "stop": _texts,
    "stop_token_ids": _integers,
    "ngram_guard": _guard,
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is decoded. Names and meanings follow vLLM's SamplingParams.

    temperature 0 means greedy (lowest id wins ties). `max_tokens` None means: up to the context limit.
    `logprobs` = n returns the n most likely tokens' log probabilities (and the chosen one's) at every step.
    `n` answers are given to a prompt that is computed once; each draws from its own seed, made of `seed` and its index
    (answer 0 is the one that n=1 gives), and max_tokens, stop rules and budget hold for each on its own.
    `ngram_guard` None means the default of the caller: on in Reader, off in LLM; False turns it off.
    `thinking_budget` = n: after n reasoning tokens the stop text is fed (docs/text.md); 0: <think> is never chosen.
    Numbers may be numpy's. Raises ConfigError naming the field, its value and what is accepted.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] | list[str] | str | None = ()
    stop_token_ids: tuple[int, ...] | list[int] | None = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    ngram_guard: NgramGuard | bool | None = None
    detect_repetition: bool = True
    skip_special_tokens: bool = False
    thinking_budget: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        _check_fields(self, _SAMPLING_FIELDS)
        checks = (
            ("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k >= -1, "positive, or 0 or -1 (off)"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "above 0 and at most 100"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "None or at least 1"),
            ("min_tokens", self.min_tokens >= 0, "0 or more"),
            ("min_tokens", self.min_tokens <= (self.max_tokens or self.min_tokens), "at most max_tokens"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "None or between 0 and 20"),
            ("n", 1 <= self.n <= MAX_ANSWERS, f"between 1 and {MAX_ANSWERS}"),
            ("thinking_budget", self.thinking_budget is None or self.thinking_budget >= 0, "None or 0 or more"),
        )
        for name, good, rule in checks:
            if not good:
                raise ConfigError(f"SamplingParams.{name} must be {rule}, got {getattr(self, name)!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from a mapping; an unknown key is a ConfigError that names it and the known ones."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown sampling option {unknown[0]!r}; known: {', '.join(sorted(known))}")
        return cls(**values)


def require_one_answer(sampling: SamplingParams, caller: str) -> None:
    """Raises ConfigError if n asks for more than the one answer that the caller can handle."""
    if sampling.n != 1:
        raise ConfigError(f"{caller} gives one answer, but n={sampling.n}; use LLM.generate or LLM.chat")


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log probability at a step, before penalties and truncation, and its rank counted from 1."""

    logprob: float
    rank: int


@dataclass(slots=True)
class CompletionOutput:
    """One answer. `finish_reason` is None while running, then one of FINISH_REASONS.

    logprobs    one mapping a token; an empty one for a token that was fed (a thinking budget's stop text), not chosen
    reasoning   in chat what the model thought, None if it opened no think block; `text` is then the answer without it
    tool_calls  in chat with tools the calls (name, arguments) that were taken out of `text`
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    reasoning: str | None = None
    tool_calls: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class RequestMetrics:
    """Seconds by stage and counts of one request. Times are durations, not clock readings.

    queue_s is the wait before the first pass; prefill_s the passes before the first token, shared with other requests;
    decode_s runs from the first token to the last. num_cached_tokens are those of the prompt that were found in the
    prefix cache when the request was first admitted. Several answers to one prompt are clocked together.
    """

    queue_s: float = 0.0
    preprocess_s: float = 0.0
    encode_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    time_to_first_token_s: float = 0.0
    num_image_tokens: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PrefixCacheStats:
    """State of the prefix cache, and totals since the engine was made; all 0 but num_blocks if there is none.

    num_blocks         in the KV-cache
    num_cached_blocks  of these a new prompt can find now, in use or not
    num_queried_tokens tokens of all prompts admitted so far
    num_cached_tokens  those of them that were found (the sum of RequestMetrics.num_cached_tokens)
    num_evictions      cached blocks that were given out for other tokens
    """

    num_blocks: int
    num_cached_blocks: int = 0
    num_queried_tokens: int = 0
    num_cached_tokens: int = 0
    num_evictions: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the queried tokens that were found, 0 to 1."""
        return self.num_cached_tokens / self.num_queried_tokens if self.num_queried_tokens else 0.0


@dataclass(slots=True)
class RequestOutput:
    """The state of one request; `finished` tells whether it will change again.

    pooled  [C] float32, for a request that asks for its last token's final hidden state instead of an answer
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    pooled: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class KVCacheView:
    """The paged KV-cache as the models see it.

    keys, values              one tensor per layer, [num_blocks, block_size, K, D], activation dtype, or uint8 in an
                              int8 cache; how a block's elements are arranged is known to the ops alone
    key_scales, value_scales  of an int8 cache, one tensor per layer, [num_blocks, K, block_size] float32; else None
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    block_size: int
    key_scales: tuple[torch.Tensor, ...] | None = None
    value_scales: tuple[torch.Tensor, ...] | None = None

    def scales(self, layer: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The scales of keys and of values of a layer; None and None unless it is an int8 cache."""
        if self.key_scales is None or self.value_scales is None:
            return None, None
        return self.key_scales[layer], self.value_scales[layer]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Everything a forward pass needs, as flat tensors; several sequences, prefill chunks and decodes mixed.

    token_ids     [N] int32   all sequences' new tokens, one after another
    positions     [N] int32   position of each token in its own sequence
    slots         [N] int32   where its key and value go: block_id * block_size + offset
    query_starts  [S+1] int32 sequence s owns rows query_starts[s] : query_starts[s+1]
    context_lens  [S] int32   tokens of sequence s in the cache once this pass has stored its own
    block_tables  [S, M] int32 block ids of each sequence, padded with 0
    logit_rows    [L] int32   rows of which logits are wanted
    image_index   [I] int32   rows whose embedding is replaced by image_rows (None if no image rows in this pass)
    image_rows    [I, C]      vision rows, activation dtype
    pooled_rows   [P] int32   rows of which the final hidden state is wanted instead of logits (None if there are none)
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    logit_rows: torch.Tensor
    image_index: torch.Tensor | None = None
    image_rows: torch.Tensor | None = None
    pooled_rows: torch.Tensor | None = None
