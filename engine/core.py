"""The engine: one loop over schedule, batch, run, sample, commit. Not thread-safe; llm.py gives it one thread."""

from __future__ import annotations

import time
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from .config import DecoderConfig, EngineConfig, TextModelConfig
from .errors import ConfigError
from .inputs import InputBuilder, Request
from .ops.devices import on_device, wait_for
from .pooling import NO_HEAD, find_judges
from .runtime.answer import Answer
from .runtime.batch import BatchBuilder
from .runtime.blocks import BlockPool
from .runtime.kv_cache import allocate, plan_num_blocks
from .runtime.prefix_cache import PrefixCache
from .runtime.runner import Model, Runner
from .runtime.sampler import Sampler
from .runtime.scheduler import Scheduler
from .runtime.sequence import Schedule, Sequence
from .runtime.state import RequestState
from .types import NgramGuard, PrefixCacheStats

if TYPE_CHECKING:
    from .loading.presets import ModelDescription
    from .loading.weights import TensorSource
    from .text.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


LOOK_AHEAD = 2  # waiting requests whose pages are preprocessed; their pixels are held meanwhile


class Engine:
    """A model with its cache and queues.

    Call `add_request` any number of times, then `step` while `has_work`. `closeables` are closed with the engine.
    `description` is what the model was built from; None if it was built by hand. `judge_rows` [2, C] float32 are the
    output head's rows of "no" and "yes", for reranking; None if the model has no such tokens or no head.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: Model,
        dtype: torch.dtype,
        tokenizer: Tokenizer | None = None,
        closeables: tuple[Any, ...] = (),
        description: ModelDescription | None = None,
        judge_rows: torch.Tensor | None = None,
    ) -> None:
        decoder = model.config.decoder
        self.config = config
        self.model_config = model.config
        self.tokenizer = tokenizer
        self.description = description
        self.judge_rows = judge_rows
        self.has_head: bool = getattr(model, "has_head", True)
        self.max_model_len = resolve_max_model_len(config, decoder.max_position_embeddings)
        num_blocks = plan_num_blocks(config, decoder, dtype, self.max_model_len)
        ops: Any = getattr(model, "ops", None)
        device = torch.device("cpu") if ops is None else ops.device
        self._device = device
        kv = allocate(decoder, dtype, num_blocks, config.block_size, config.kv_cache_dtype, device)
        pool = BlockPool(num_blocks, config.block_size)
        cache = PrefixCache(pool) if config.prefix_cache else None
        self.scheduler = Scheduler(
            pool,
            config.max_num_seqs,
            config.max_batch_tokens,
            self.max_model_len,
            cache,
            decoder.max_position_embeddings,
        )
        self.runner = Runner(model, kv)
        # Pages are preprocessed while a device computes; on the CPU the thread would only take cores from the kernels.
        self._preprocessing = ThreadPoolExecutor(1, "pagelens-pages") if device.type != "cpu" else None
        max_blocks = min(num_blocks, pool.num_needed(self.max_model_len))
        self.batches = BatchBuilder(
            config.max_batch_tokens, config.max_num_seqs, max_blocks, config.block_size, self.runner.image_rows, device
        )
        bos_token_id, self._eos_token_ids = find_special_ids(decoder, tokenizer)
        sampling = getattr(ops, "sampling", None)
        self.sampler = Sampler(count_tokens(tokenizer, self._eos_token_ids), ops, sampling)
        self.inputs = InputBuilder(
            decoder.vocab_size,
            tokenizer,
            bos_token_id,
            getattr(model.config, "image_token_id", None),
            getattr(model.config, "processor", None),
            digest_images=config.prefix_cache,
        )
        self._closeables = closeables
        self._answers: dict[Sequence, tuple[RequestState, Answer]] = {}

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def check_capacity(self, request: Request) -> int:
        """Tokens that the answer may have, 0 for a pooled request. Safe in any thread.

        Raises CapacityError if the request can never fit, ConfigError if the model has no head to answer with.
        """
        if request.is_pooled:
            return self.scheduler.resolve_max_tokens(len(request.token_ids), 0)
        if not self.has_head:
            raise ConfigError(f"{NO_HEAD}, so it cannot generate; use embed()")
        return self.scheduler.resolve_max_tokens(len(request.token_ids), request.sampling.max_tokens)

    def add_request(self, request: Request) -> RequestState:
        """Queue a request. Raises CapacityError if it can never fit."""
        if request.sampling.ngram_guard is True:
            request.sampling = replace(request.sampling, ngram_guard=NgramGuard())
        state = RequestState(request, self.check_capacity(request), self._eos_token_ids, self.tokenizer)
        for answer in state.answers:
            self.scheduler.add(answer.sequence)
            self._answers[answer.sequence] = state, answer
        return state

    def cancel(self, state: RequestState) -> None:
        """End a request with finish_reason "abort", keeping what it has; harmless if it has ended."""
        state.cancel()
        self._retire(state)

    def step(self) -> list[RequestState]:
        """One pass: each scheduled request moves on by a chunk of its prompt (or of fed text) or by one token.

        Returns the requests that got a token or ended. An error of one request ends that request only (`state.error`).
        An error of the pass itself is raised; the requests are then still queued, and the caller decides.
        """
        with on_device(self._device):
            return self._step()

    def _step(self) -> list[RequestState]:
        schedule = self.scheduler.schedule()
        if self._preprocessing is not None:
            self._look_ahead(self._preprocessing)
        changed = self._encode_images(schedule)
        if schedule:
            started = time.perf_counter()
            logits, hidden = self.runner.run(self.batches.build(schedule))
            if len(schedule) < sum(chunk.count for chunk in schedule):
                wait_for(self._device)  # a prompt's pass is timed; after a decode the tokens are waited for
            seconds = time.perf_counter() - started
            for state in dict.fromkeys(self._answers[chunk.sequence][0] for chunk in schedule):
                state.count_pass(seconds)
            changed += self._accept(schedule, logits, hidden)
            # Only now is it known whose keys and values are not to be trusted.
            sequences = [chunk.sequence for chunk in schedule]
            self.scheduler.commit(schedule, {s for s in sequences if self._answers[s][0].error is not None})
            changed = list(dict.fromkeys(changed))
        for state in changed:
            self._retire(state)
        if self.config.check_blocks:
            self.scheduler.check_integrity()
        return changed

    def _accept(self, schedule: Schedule, logits: torch.Tensor, hidden: torch.Tensor | None) -> list[RequestState]:
        """Give each request what the pass made of its chunk: a token, or its hidden state. Returns those requests."""
        sampling = [self._answers[chunk.sequence] for chunk in schedule if chunk.samples]
        chosen = self.sampler.sample(logits, [answer.sampler for _, answer in sampling])
        for (state, answer), sampled in zip(sampling, chosen, strict=True):
            state.accept(answer, sampled)
        changed = [state for state, _ in sampling]
        if hidden is not None:
            pooling = [self._answers[chunk.sequence][0] for chunk in schedule if chunk.pools]
            for state, row in zip(pooling, hidden.cpu().numpy(), strict=True):
                state.accept_pooled(row)
            changed += pooling
        return changed

    def abort_all(self, error: Exception) -> list[RequestState]:
        """Fail every request with an error and free its blocks. Returns them. Raises EngineError if blocks are lost."""
        states = list(dict.fromkeys(state for state, _ in self._answers.values()))
        for state in states:
            state.fail(error)
            self._retire(state)
        self.clear_prefix_cache()  # what a broken pass has left in it is not known
        self.scheduler.check_integrity()
        return states

    def clear_prefix_cache(self) -> None:
        """Make later requests find nothing of what was computed until now; those that run are not disturbed."""
        if self.scheduler.cache is not None:
            self.scheduler.cache.clear()

    def prefix_cache_stats(self) -> PrefixCacheStats:
        cache = self.scheduler.cache
        return PrefixCacheStats(self.scheduler.pool.num_blocks) if cache is None else cache.stats()

    def close(self) -> None:
        """Free the cache, the model and its thread pool. The engine cannot be used afterwards."""
        del self.runner, self.batches
        if self._preprocessing is not None:
            self._preprocessing.shutdown(wait=False, cancel_futures=True)
        for closeable in self._closeables:
            closeable.close()
        self._closeables = ()

    def _look_ahead(self, executor: Executor) -> None:
        """Begin to preprocess the images of the requests that come next."""
        for sequence in islice(self.scheduler.waiting, LOOK_AHEAD):
            for image in self._answers[sequence][0].request.images:
                image.prefetch(executor)

    def _encode_images(self, schedule: Schedule) -> list[RequestState]:
        """Encode the images that a pass needs; a request whose images fail leaves the schedule and is returned.

        An image whose rows are all in the prefix cache is not needed.
        """
        try:
            return self._encode_missing(schedule)
        finally:
            self.runner.free_encoder()

    def _encode_missing(self, schedule: Schedule) -> list[RequestState]:
        failed = []
        for chunk in list(schedule):
            state, _ = self._answers[chunk.sequence]
            state.mark_scheduled()
            missing = self.runner.find_missing(chunk.sequence, state.request.images, chunk.start)
            if not missing or state.finished:
                continue
            try:
                preprocess_s, encode_s = self.runner.encode(chunk.sequence, missing)
            except Exception as error:
                state.fail(error)
                schedule[:] = [other for other in schedule if self._answers[other.sequence][0] is not state]
                failed.append(state)
                continue
            state.metrics.preprocess_s += preprocess_s
            state.metrics.encode_s += encode_s
        return failed

    def _retire(self, state: RequestState) -> None:
        """Free what the answers that have ended hold, and the images once all have."""
        for answer in state.answers:
            if answer.finished and self._answers.pop(answer.sequence, None) is not None:
                self.scheduler.remove(answer.sequence)
        if state.finished:
            self.runner.release(state.sequence)
            for image in state.request.images:
                image.release()


def resolve_max_model_len(config: EngineConfig, max_position_embeddings: int) -> int:
    """config.max_model_len, or the model's limit; asking for more than the model was made for is a ConfigError."""
    if config.max_model_len is None:
        return max_position_embeddings
    if config.max_model_len > max_position_embeddings:
        raise ConfigError(
            f"max_model_len={config.max_model_len} is above the model's limit of {max_position_embeddings} positions; "
            "lower it"
        )
    return config.max_model_len


def find_special_ids(decoder: DecoderConfig, tokenizer: Tokenizer | None) -> tuple[int | None, tuple[int, ...]]:
    """The ids that begin a prompt and end an answer: config.json's, else those of their texts in tokenizer.json."""
    bos, eos = decoder.bos_token_id, decoder.eos_token_ids
    if tokenizer is not None and bos is None:
        bos = tokenizer.bos_id()
    if tokenizer is not None and not eos and (found := tokenizer.eos_id()) is not None:
        eos = (found,)
    return bos, eos


def count_tokens(tokenizer: Tokenizer | None, eos_token_ids: tuple[int, ...]) -> int | None:
    """Ids below this may be chosen; None = all. Tables are padded: Qwen3 has 151,936 rows for 151,669 tokens."""
    return None if tokenizer is None else max(tokenizer.vocab_size, *(id_ + 1 for id_ in eos_token_ids), 1)


def read_judge_rows(
    source: TensorSource, model_config: Any, tokenizer: Tokenizer | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """The output head's rows of "no" and "yes" (see Engine); None where there are none."""
    from .models.qwen3 import TextModel

    judges = find_judges(tokenizer)
    if judges is None or not isinstance(model_config, TextModelConfig):
        return None
    return TextModel.head_rows(source, model_config, judges, dtype)


def check_weights_option(weights: str, source: TensorSource, dtype: torch.dtype) -> None:
    """Nothing is quantised twice, and a packed folder runs as it was packed. Raises ConfigError."""
    from .loading.packed import PackedSource
    from .loading.quantized import QuantizedCheckpoint

    if isinstance(source, QuantizedCheckpoint) and weights != "auto":
        raise ConfigError(f"weights={weights!r}, but the checkpoint is quantised already; use weights='auto'")
    if not isinstance(source, PackedSource):
        return
    folder = source.folder
    if weights not in ("auto", folder.weights) or DTYPES[folder.dtype] != dtype:
        asked = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"the folder was packed with weights={folder.weights!r} for dtype={folder.dtype!r}, not with "
            f"weights={weights!r} for dtype={asked!r}; leave both at 'auto', or quantise the original checkpoint again"
        )


def check_low_memory(config: EngineConfig, model_config: Any) -> None:
    """Raises ConfigError if a text model is to free what it does not have."""
    if config.low_memory and isinstance(model_config, TextModelConfig):
        raise ConfigError("low_memory=True frees vision towers between pages, and a text model has none; leave it out")


def build_engine(config: EngineConfig) -> Engine:
    """Load a model and make an engine of it: the one place where files, ops, network and runtime meet.

    Raises ConfigError, WeightsError or UnsupportedError, each naming the option, key or tensor.
    """
    from .loading.checkpoint import open_checkpoint
    from .loading.presets import find_description
    from .loading.quantized import open_weights
    from .loading.random_weights import RandomWeights
    from .models.registry import class_of
    from .ops.registry import as_ops, resolve_ops
    from .text.tokenizer import Tokenizer

    config = config.resolve()
    random_seed = None if config.random_weights is False else int(config.random_weights)
    description = find_description(config.model, random_weights=random_seed is not None)
    network = class_of(description.config)
    model_config = network.read_config(description.config, description.generation)
    dtype = DTYPES[model_config.torch_dtype if config.dtype == "auto" else config.dtype]
    # Before the weights are read: what cannot be should not take minutes to say.
    plan_num_blocks(
        config, model_config.decoder, dtype, resolve_max_model_len(config, model_config.decoder.max_position_embeddings)
    )
    folder = description.folder
    tokenizer = Tokenizer(folder) if folder and (folder / "tokenizer.json").is_file() else None
    quantize_to = None if config.weights == "auto" else config.weights
    check_low_memory(config, model_config)
    ops = resolve_ops(
        config.backend, network.op_cases(model_config, dtype), config.num_threads, config.device, config.cuda_ops
    )
    files = ExitStack()
    try:
        source: TensorSource
        if random_seed is not None or folder is None:
            source = RandomWeights(network.weight_specs(model_config), dtype, random_seed or 0)
        else:
            source = open_weights(files.enter_context(open_checkpoint(folder)), config.use_mmap)
            check_weights_option(config.weights, source, dtype)
        model = network.load(source, model_config, dtype, as_ops(ops), quantize_to, config.low_memory)
        rows = read_judge_rows(source, model_config, tokenizer, dtype)
        if not config.low_memory:
            files.close()  # views of the mapped files stay valid
        return Engine(config, model, dtype, tokenizer, (ops, files), description, rows)
    except BaseException as error:
        files.close()
        ops.close()
        if isinstance(error, torch.OutOfMemoryError):
            raise ConfigError(
                f"model={config.model!r} and its cache do not fit into the GPU's memory "
                f"({str(error).splitlines()[0]}); use weights='int8' or 'int4', or a smaller kv_cache_bytes"
            ) from error
        raise
