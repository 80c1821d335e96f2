"""LLM: prompts in, RequestOutput out. One background thread runs the engine, and only while there is work.

No signal handlers, no logging set-up, no global state beyond a weak list of open engines, closed at exit.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .chat import ChatFormat, ChatStream, Conversation, Turn, as_conversations, with_answers
from .config import EngineConfig, ProcessorConfig
from .core import Engine, build_engine
from .errors import ConfigError, EngineClosedError, EngineError, PagelensError, PromptError
from .handle import RequestHandle, forked_message
from .inputs import Prompt, Request
from .loading.pooling_config import check_pooling
from .pooling import Judge, RerankOutput, encode_pairs, encode_texts, hidden_states, resolve_dim, unit_vectors
from .runtime.state import RequestState
from .types import PrefixCacheStats, RequestOutput, SamplingParams, require_one_answer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .text.tokenizer import Tokenizer

_open_llms: weakref.WeakSet[LLM] = weakref.WeakSet()


class LLM:
    """A model ready to answer. Use as a context manager, or call `close()`.

    model             folder or hub id
    dtype             "auto" (the checkpoint's), "float32", "bfloat16", "float16" (for "cuda" only)
    device            "cpu", or "cuda": an NVIDIA GPU, or an AMD one with a ROCm build of torch
    backend           "auto", "reference", "native"; on "cuda" also "triton", "cuda"; for tests "triton" on the CPU, and
                      "cuda-sim" (EngineConfig)
    cuda_ops          the ops that run on CUDA C++ kernels: names with commas, "all", "none" (docs/gpu-kernels.md)
    weights           "auto" (the checkpoint's), "int8", "int4", "int4-pure": linear layers quantised as they are read
    num_threads       of the native kernels; None = one a physical core (torch's own threads are left as they are)
    max_model_len     longest prompt + answer; None = the model's own limit
    max_num_seqs      most requests decoded together
    max_batch_tokens  most tokens in one pass; longer prompts are cut into chunks
    kv_cache_bytes    None = room for max_num_seqs requests, at most 1 GiB
    kv_cache_dtype    "auto" (that of the activations), "int8": half of the memory and of the reading (docs/text.md)
    prefix_cache      find what earlier prompts and answers begin with again instead of computing it (docs/text.md)
    use_mmap          of a folder that `pagelens quantize` wrote: True uses its weights where they are mapped, False
                      copies them into huge pages (starts later, decodes faster)
    low_memory        True frees the vision towers between pages (docs/memory.md)
    random_weights    True or a seed: `model` is a preset's name ("qwen3-0.6b") or a folder of which only config.json is
                      read, and the weights are noise
    Raises ConfigError naming an unknown option or a bad value; WeightsError; UnsupportedError.
    """

    def __init__(
        self,
        model: str | Path,
        dtype: str = "auto",
        device: str = "cpu",
        backend: str = "auto",
        weights: str = "auto",
        num_threads: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        max_batch_tokens: int = 2048,
        kv_cache_bytes: int | None = None,
        block_size: int = 16,
        kv_cache_dtype: str = "auto",
        check_blocks: bool = False,
        random_weights: bool | int = False,
        prefix_cache: bool = True,
        use_mmap: bool = True,
        low_memory: bool = False,
        cuda_ops: str | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            known = ", ".join(field.name for field in fields(EngineConfig))
            raise ConfigError(f"unknown option {next(iter(unknown))!r}; known: {known}")
        options: dict[str, Any] = {
            # A Path is never a hub id, not even one that looks like org/name.
            "model": str(model.expanduser().absolute()) if isinstance(model, Path) else str(model),
            "dtype": dtype,
            "device": device,
            "backend": backend,
            "weights": weights,
            "num_threads": num_threads,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_batch_tokens": max_batch_tokens,
            "kv_cache_bytes": kv_cache_bytes,
            "block_size": block_size,
            "kv_cache_dtype": kv_cache_dtype,
            "check_blocks": check_blocks,
            "random_weights": random_weights,
            "prefix_cache": prefix_cache,
            "use_mmap": use_mmap,
            "low_memory": low_memory,
            "cuda_ops": cuda_ops,
        }
        self._start(build_engine(EngineConfig(**options).resolve()))

    @classmethod
    def from_engine(cls, engine: Engine) -> LLM:
        """An LLM over an engine built by hand, which it then owns."""
        llm = cls.__new__(cls)
        llm._start(engine)
        return llm

    def _start(self, engine: Engine) -> None:
        self.config = engine.config
        self.model_config = engine.model_config
        self._description = engine.description
        self._chat_format: ChatFormat | None = None
        self.tokenizer: Tokenizer | None = engine.tokenizer
        self.max_model_len = engine.max_model_len
        self._engine: Engine | None = engine
        self._inputs = engine.inputs
        self._judge_rows, self._has_head = engine.judge_rows, engine.has_head
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._arrivals: deque[RequestHandle] = deque()
        self._cancels: deque[RequestHandle] = deque()
        self._handles: dict[RequestState, RequestHandle] = {}
        self._closed_because: str | None = None
        self._must_clear = False
        self._num_requests = 0
        _open_llms.add(self)

    @property
    def processor(self) -> ProcessorConfig:
        """How the model takes pages. Raises ConfigError if it reads text only."""
        processor: ProcessorConfig | None = self._inputs.processor
        if processor is None:
            raise ConfigError("this model reads text only; it has no page modes")
        return processor

    # ---- requests --------------------------------------------------------------------------------------------------
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts, batched; outputs in the order of the prompts.

        prompts          one prompt or a list: a string, a list of token ids, or {"prompt": ..., "images": [...],
                         "mode": ..., "max_crops": ...}
        sampling_params  one for all, or one each
        A bad prompt raises before anything runs, and the message names its index. A request that fails on its own
        while running (its logits are NaN, its image cannot be encoded) comes back with finish_reason "abort" and the
        sentence as stop_reason, and the others are unaffected; a failure of the engine itself is raised.
        """
        self._check_open()
        listed = _as_list(prompts)
        params = _as_params(sampling_params, len(listed))
        requests = []
        for index, (prompt, sampling) in enumerate(zip(listed, params)):
            try:
                requests.append(self._build(prompt, sampling, keep_views=False))
            except PagelensError as error:
                raise type(error)(f"prompt {index}: {error}") from error
        return self._run(requests)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        thinking_budget: int | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several together; outputs in their order, each with `reasoning`, `tool_calls`.

        messages         {"role": ..., "content": ...} mappings (text/chat_messages.py), or a list of such lists
        sampling         None = `chat_sampling(thinking)`; a mapping replaces some of those values; SamplingParams, all
        tools            function declarations; calls are then taken out of the answer
        thinking         False asks for an answer without a think block
        thinking_budget  most reasoning tokens, after which the model is made to answer; 0 is thinking=False
        Failures are as in `generate`.
        """
        chat = self._open_chat()
        listed = as_conversations(messages)
        requests, modes = [], []
        for index, conversation in enumerate(listed):
            try:
                turn = chat.prepare(conversation, sampling, tools, thinking, thinking_budget)
                requests.append(self._build_turn(turn))
            except PagelensError as error:
                if len(listed) == 1:
                    raise
                raise type(error)(f"conversation {index}: {error}") from error
            modes.append(turn.mode)
        return [with_answers(output, mode) for output, mode in zip(self._run(requests), modes)]

    def stream_chat(
        self,
        messages: Conversation,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        thinking_budget: int | None = None,
    ) -> ChatStream:
        """Start one answer and return at once: iterate the stream for its pieces. Arguments as in `chat`, but n = 1."""
        turn = self._open_chat().prepare(messages, sampling, tools, thinking, thinking_budget)
        require_one_answer(turn.sampling, "stream_chat")
        return ChatStream(self._enqueue([self._build_turn(turn)])[0], turn.mode)

    def chat_sampling(self, thinking: bool = True) -> SamplingParams:
        """What `chat` samples with by default: generation_config.json's values, as the mode asks (docs/text.md)."""
        return self._open_chat().default_sampling(thinking)

    def _open_chat(self) -> ChatFormat:
        self._check_open()
        if self._chat_format is None:
            self._chat_format = ChatFormat.open(self._description, self.tokenizer)
        return self._chat_format

    def _build_turn(self, turn: Turn) -> Request:
        request = self._build(turn.token_ids, turn.sampling, keep_views=False)
        request.prompt = turn.text
        return request

    def _run(self, requests: list[Request]) -> list[RequestOutput]:
        handles = self._enqueue(requests)
        try:
            for handle in handles:
                handle._wait()
        except BaseException:
            for handle in handles:
                self._cancel(handle)
            raise
        return [handle._output or handle._finished_output() for handle in handles]

    def embed(
        self, texts: str | Sequence[str], dim: int | None = None, instruction: str | None = None
    ) -> NDArray[np.float32]:
        """Vectors [n, dim] float32 of length 1, in the order of the texts; their dot products are cosines.

        The hidden state of a text's last token after the final norm, cut to its first `dim` values, then normalised.

        texts        a string or a list; what tokenizer.json's post-processor appends is appended
        dim          1 to the model's hidden size, which is None
        instruction  the texts are queries for this task: `Instruct: {instruction}\nQuery:{text}`; documents have none
        Raises PromptError or CapacityError naming the text's index, ConfigError; EngineError if a result is not finite.
        """
        tokenizer = self._pooling_tokenizer()
        if self._description is not None and self._description.folder is not None:
            check_pooling(self._description.folder)
        width = resolve_dim(dim, self.model_config.decoder.hidden_size)
        return unit_vectors(self._pool("text", encode_texts(tokenizer, texts, instruction)), width)

    def rerank(self, query: str, documents: Sequence[str], instruction: str | None = None) -> RerankOutput:
        """P(yes) for each document: whether it meets the query, by a Qwen3-Reranker; in the order of the documents.

        sigmoid(h . (W[yes] - W[no])) of the last hidden state h; `ranked()` of the result sorts.

        instruction  None = the published one, for passages that answer a web search
        Raises as `embed` does; ConfigError too if the model has no tokens "yes" and "no" or no output head.
        """
        tokenizer = self._pooling_tokenizer()
        judge = Judge.open(tokenizer, self._judge_rows, self._has_head)
        prompts = encode_pairs(tokenizer, query, documents, instruction)
        return judge.results(self._pool("document", prompts), num_tokens=sum(map(len, prompts)))

    def _pooling_tokenizer(self) -> Tokenizer:
        self._check_open()
        if self._inputs.processor is not None:
            raise ConfigError("embed and rerank are for text models; this one reads pages")
        if self.tokenizer is None:
            raise ConfigError("embed and rerank need a tokenizer.json in the model's folder")
        return self.tokenizer

    def _pool(self, what: str, prompts: list[list[int]]) -> list[NDArray[np.float32]]:
        requests = []
        for index, token_ids in enumerate(prompts):
            try:
                requests.append(self._build(token_ids, SamplingParams(), keep_views=False, is_pooled=True))
            except PagelensError as error:
                raise type(error)(f"{what} {index}: {error}") from error
        return hidden_states(what, self._run(requests))

    def submit(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> RequestHandle:
        """Start one request and return at once; any thread may call it.

        The prompt is as in `generate`; its images are preprocessed in the caller's thread.
        Raises PromptError, ImageError, CapacityError, ConfigError, or EngineClosedError.
        """
        self._check_open()
        return self._enqueue([self._build(prompt, sampling_params or SamplingParams(), keep_views=True)])[0]

    def prefix_cache_stats(self) -> PrefixCacheStats:
        """Counts since the model was loaded; RequestMetrics.num_cached_tokens has those of one request."""
        self._check_open()
        with self._lock:
            return self._require_engine().prefix_cache_stats()

    def clear_prefix_cache(self) -> None:
        """Make requests that start after this call find nothing of earlier ones; those that run are not disturbed."""
        self._check_open()
        with self._lock:
            if self._thread is None:
                self._require_engine().clear_prefix_cache()
            else:
                self._must_clear = True

    def _build(self, prompt: Prompt, sampling: SamplingParams, keep_views: bool, is_pooled: bool = False) -> Request:
        with self._lock:
            engine = self._require_engine()
            self._num_requests += 1
            request_id = str(self._num_requests - 1)
        request = self._inputs.build(prompt, sampling, request_id, keep_views)
        request.is_pooled = is_pooled
        engine.check_capacity(request)
        return request

    def _enqueue(self, requests: list[Request]) -> list[RequestHandle]:
        handles = [RequestHandle(self, request) for request in requests]
        with self._lock:
            self._require_engine()
            if self._thread is None and handles:
                # Only a thread that did start may be waited for; it takes the lock first, so it sees the arrivals.
                thread = threading.Thread(target=self._loop, name="pagelens-engine", daemon=True)
                thread.start()
                self._thread = thread
            self._arrivals.extend(handles)
        return handles

    def _cancel(self, handle: RequestHandle) -> None:
        with self._lock:
            if self._thread is not None and not handle._done:
                self._cancels.append(handle)

    # ---- the engine's thread ---------------------------------------------------------------------------------------
    def _loop(self) -> None:
        """Step until there is nothing to do. Whatever happens, no handle is left waiting."""
        while True:
            engine = self._engine
            try:
                with self._lock:
                    if engine is not None and self._closed_because is None:
                        self._take_in(engine)
                    if engine is None or self._closed_because is not None or not engine.has_work:
                        self._thread = None
                        return
                for state in engine.step():
                    self._publish(state)
            except BaseException as error:
                self._recover(engine, error)

    def _take_in(self, engine: Engine) -> None:
        """Hand arrivals and cancellations to the engine."""
        if self._must_clear:
            self._must_clear = False
            engine.clear_prefix_cache()
        while self._arrivals:
            handle = self._arrivals.popleft()
            try:
                handle._state = engine.add_request(handle.request)
            except Exception as error:
                handle._fail(error)
            else:
                self._handles[handle._state] = handle
        while self._cancels:
            state = self._cancels.popleft()._state
            if state is not None and state in self._handles:
                engine.cancel(state)
                self._publish(state)

    def _publish(self, state: RequestState) -> None:
        self._handles[state]._publish(state)
        if state.finished:
            del self._handles[state]

    def _recover(self, engine: Engine | None, cause: BaseException) -> None:
        """A pass failed: fail what is in flight. The engine goes on unless its blocks are no longer in order."""
        error = EngineError(f"a pass of the engine failed: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        try:
            if engine is not None:
                engine.abort_all(error)
        except Exception as broken:
            with self._lock:
                self._closed_because = f"the engine died: {error}; its block table is broken: {broken}"
        self._fail_in_flight(error)

    def _fail_in_flight(self, error: Exception) -> None:
        with self._lock:
            handles = [*self._handles.values()]
            if self._closed_because is not None:
                handles += self._arrivals
                self._arrivals.clear()
            self._handles.clear()
        for handle in handles:
            handle._fail(error)

    # ---- end -------------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Free the cache, the model and the threads. Requests in flight fail with EngineClosedError. Idempotent."""
        if os.getpid() != self._pid:
            return  # what a fork copied belongs to the parent; its thread does not exist here
        with self._lock:
            if self._closed_because is None:
                self._closed_because = "the engine was closed; make a new one"
            engine, thread, self._engine = self._engine, self._thread, None
        try:
            # A finaliser may run this on the engine's own thread, which ends by itself once `_engine` is None.
            if thread is not None and thread is not threading.current_thread():
                thread.join()
        finally:
            self._fail_in_flight(EngineClosedError("the engine was closed while the request ran"))
            if engine is not None:
                engine.close()
            _open_llms.discard(self)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _check_open(self) -> None:
        # The process comes first: after a fork the lock may be held by a thread that does not exist here.
        if os.getpid() != self._pid:
            raise EngineClosedError(forked_message(self._pid))
        with self._lock:
            self._require_engine()

    def _require_engine(self) -> Engine:
        if self._closed_because is not None or self._engine is None:
            raise EngineClosedError(self._closed_because or "the engine was closed; make a new one")
        return self._engine


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt in any form becomes a list of one; a non-empty list of integers is one prompt."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        return [prompts]  # type: ignore[list-item]
    if prompts and all(isinstance(item, Integral) for item in prompts):  # numpy's integers too
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _as_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if isinstance(params, Mapping):
        raise ConfigError(
            "sampling params must be SamplingParams, not a mapping; SamplingParams.from_mapping makes them"
        )
    listed = list(params)
    if len(listed) != count:
        raise PromptError(f"{len(listed)} sampling params were given for {count} prompts; give one, or one for each")
    return listed


@atexit.register
def _close_all() -> None:
    for llm in list(_open_llms):
        llm.close()
