"""Engine and LLM over a fake model whose tokens depend on every cached token: paging, preemption, threads, failures."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from helpers.fake_model import EOS, IMAGE, FakeModel, fake_config, fake_engine, kv_bytes

from pagelens import LLM, RequestHandle, SamplingParams
from pagelens.core import Engine
from pagelens.errors import CapacityError, ConfigError, EngineClosedError, EngineError, PagelensError, PromptError
from pagelens.inputs import Prompt
from pagelens.types import NgramGuard, RequestOutput

WAIT_S = 20  # far above what any of these tests needs; reached only if something hangs


def params(max_tokens: int = 12, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **options)


@contextmanager
def fake_llm(model: FakeModel | None = None, **options: Any) -> Iterator[LLM]:
    with LLM.from_engine(fake_engine(model, **options)) as llm:
        yield llm


def drain(engine: Engine) -> None:
    for _ in range(100_000):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def tokens_alone(prompt: Prompt, sampling: SamplingParams, images: bool = False) -> list[int]:
    """What a request gives in an engine of its own with room for everything in one pass."""
    with fake_llm(FakeModel(fake_config(images))) as llm:
        return llm.generate([prompt], sampling)[0].outputs[0].token_ids


def page(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def traffic(seed: int, images: bool) -> list[tuple[Prompt, SamplingParams]]:
    """Eight requests of mixed lengths; some sampled, some with a guard, some with pictures."""
    rng = random.Random(seed)
    requests: list[tuple[Prompt, SamplingParams]] = []
    for index in range(8):
        prompt: Any = [rng.randrange(4, 60) for _ in range(rng.randint(1, 25))]
        if images and index % 2:
            prompt = {"prompt": [*prompt, IMAGE, *prompt[:3]], "images": [page(seed * 10 + index)]}
        max_tokens = rng.randint(1, 20)
        options: dict[str, Any] = [
            {},
            {"temperature": 1.0, "seed": index},
            {"ngram_guard": NgramGuard(2, 8)},
            {"repetition_penalty": 1.3, "min_tokens": min(9, max_tokens)},
        ][index % 4]
        requests.append((prompt, params(max_tokens, **options)))
    return requests


# ---- exactness -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
@pytest.mark.parametrize("seed", range(4))
def test_requests_in_flight_give_the_tokens_each_gives_alone(seed: int, images: bool) -> None:
    requests = traffic(seed, images)
    expected = [tokens_alone(prompt, sampling, images) for prompt, sampling in requests]
    rng = random.Random(seed)
    preemptions = chunks = 0
    for _ in range(4):
        order = rng.sample(range(len(requests)), len(requests))
        model = FakeModel(fake_config(images))
        # Sixteen blocks of four: just more than the longest request (41 + 20 tokens) needs.
        engine = fake_engine(
            model,
            kv_cache_bytes=kv_bytes(16),
            max_num_seqs=5,
            max_batch_tokens=rng.choice([3, 7, 16, 64]),
        )
        states = {}
        for index in order:
            prompt, sampling = requests[index]
            states[index] = engine.add_request(engine.inputs.build(prompt, sampling, str(index)))
            for _ in range(rng.randint(0, 6)):
                engine.step()
        drain(engine)
        assert [states[i].output().outputs[0].token_ids for i in range(len(requests))] == expected
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
        assert model.encoded == (4 if images else 0), "a recompute does not encode again"
        assert not any(engine.runner.has_images(state.sequence) for state in states.values()), "rows are freed"
        preemptions += engine.scheduler.num_preemptions
        chunks += sum(tokens > sequences for tokens, sequences in model.passes)
        assert sum(s.metrics.num_preemptions for s in states.values()) == engine.scheduler.num_preemptions
    assert preemptions > 0, "the pool is so small that some request must give way"
    assert chunks > len(requests), "prompts were cut into chunks"


def test_cancelling_neighbours_changes_nothing() -> None:
    requests = traffic(11, images=False)
    expected = [tokens_alone(prompt, sampling) for prompt, sampling in requests]
    engine = fake_engine(kv_cache_bytes=kv_bytes(12), max_num_seqs=4, max_batch_tokens=9)
    states = [engine.add_request(engine.inputs.build(p, s, str(i))) for i, (p, s) in enumerate(requests)]
    for step in range(12):
        if step % 3 == 0:
            engine.cancel(states[1 + step // 3])
        engine.step()
    drain(engine)
    for index, state in enumerate(states):
        answer = state.output().outputs[0]
        if answer.finish_reason == "abort":
            assert answer.token_ids == expected[index][: len(answer.token_ids)]
        else:
            assert answer.token_ids == expected[index]
    assert sum(state.finish_reason == "abort" for state in states) >= 2
    assert engine.scheduler.pool.num_free == 12


def test_a_wrong_slot_would_be_noticed() -> None:
    """The fake model does its job: one disturbed cache entry changes the tokens or is reported."""
    engine = fake_engine()
    state = engine.add_request(engine.inputs.build([5, 6, 7, 8, 9], params(), "0"))
    engine.step()
    slot = state.sequence.block_table[0] * 4 + 2
    for tensor, sign in [(t, 1) for t in engine.runner.kv.keys] + [(t, -1) for t in engine.runner.kv.values]:
        tensor.view(-1, 4)[slot, 0] = sign * 33.0
    drain(engine)
    assert state.output().outputs[0].token_ids != tokens_alone([5, 6, 7, 8, 9], params())


# ---- how an answer ends ----------------------------------------------------------------------------------------------
def test_length_stop_token_eos_and_min_tokens() -> None:
    full = tokens_alone([9, 8], params(12, ignore_eos=True, detect_repetition=False))
    assert len(full) == 12
    with fake_llm() as llm:
        answer = llm.generate([9, 8], params(12, stop_token_ids=[full[4]]))[0].outputs[0]
        end = full.index(full[4]) + 1
        assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == (full[:end], "stop", full[4])
        assert llm.generate([9, 8], params(5))[0].outputs[0].finish_reason == "length"
    with fake_llm(FakeModel(eos_bias=100.0)) as llm:
        ended = llm.generate([9, 8], params(12))[0].outputs[0]
        assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([EOS], "stop", None)
        later = llm.generate([9, 8], params(12, min_tokens=3))[0].outputs[0]
        assert later.token_ids[3:] == [EOS]
        assert EOS not in later.token_ids[:3]
        ignored = llm.generate([9, 8], params(12, ignore_eos=True))[0].outputs[0]
        assert (ignored.token_ids, ignored.finish_reason) == ([EOS] * 8, "repetition")
        all_of_it = llm.generate([9, 8], params(12, ignore_eos=True, detect_repetition=False))[0].outputs[0]
        assert (all_of_it.token_ids, all_of_it.finish_reason) == ([EOS] * 12, "length")


def test_max_tokens_none_fills_the_context() -> None:
    model = FakeModel(fake_config(max_positions=40), eos_bias=-100.0)
    with fake_llm(model) as llm:
        output = llm.generate([4, 5, 6], SamplingParams(detect_repetition=False))[0]
    assert len(output.outputs[0].token_ids) == 37
    assert output.outputs[0].finish_reason == "length"


def test_logprobs_and_fields_of_the_output() -> None:
    with fake_llm() as llm:
        output = llm.generate([[4, 5]], params(3, logprobs=2, ignore_eos=True))[0]
    answer = output.outputs[0]
    assert isinstance(output, RequestOutput)
    assert (output.finished, output.prompt, output.prompt_token_ids) == (True, None, [4, 5])
    assert answer.logprobs is not None
    assert [len(step) for step in answer.logprobs] == [2, 2, 2]
    assert [step[token].rank for step, token in zip(answer.logprobs, answer.token_ids)] == [1, 1, 1]
    total = sum(step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids))
    assert answer.cumulative_logprob == pytest.approx(total)
    assert answer.text == "", "no tokenizer, no text"


# ---- many threads ----------------------------------------------------------------------------------------------------
def test_generate_keeps_the_order_and_the_thread_ends_with_the_work() -> None:
    requests = traffic(3, images=False)
    with fake_llm(max_num_seqs=2) as llm:
        outputs = llm.generate([p for p, _ in requests], [s for _, s in requests])
        assert [o.outputs[0].token_ids for o in outputs] == [tokens_alone(p, s) for p, s in requests]
        wait_until(lambda: llm._thread is None)
        assert not llm._handles
        assert llm.generate([], params()) == []


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def test_submit_from_many_threads() -> None:
    requests = traffic(5, images=False) * 3
    expected = [tokens_alone(prompt, sampling) for prompt, sampling in requests]
    found: list[list[int] | None] = [None] * len(requests)
    with fake_llm(max_num_seqs=3, kv_cache_bytes=kv_bytes(16)) as llm:

        def ask(index: int) -> None:
            prompt, sampling = requests[index]
            found[index] = llm.submit(prompt, sampling).result(WAIT_S).outputs[0].token_ids

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    assert found == expected


def test_iterating_a_handle_gives_growing_snapshots() -> None:
    with fake_llm() as llm:
        handle = llm.submit([4, 5], params(9, ignore_eos=True))
        snapshots = list(handle)
        lengths = [len(s.outputs[0].token_ids) for s in snapshots]
        assert lengths == sorted(lengths)
        assert lengths[-1] == 9
        assert [s.finished for s in snapshots] == [False] * (len(snapshots) - 1) + [True]
        assert handle.done
        assert list(handle)[-1].finished, "iterating again gives the end"


class Gate:
    """Holds the engine's thread at the start of a forward until `open` is called."""

    def __init__(self) -> None:
        self.arrived, self.opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.arrived.set()
        assert self.opened.wait(WAIT_S)

    def open(self) -> None:
        self.opened.set()


def test_cancel_running_and_waiting_requests() -> None:
    gate = Gate()
    with fake_llm(FakeModel(pause=gate, eos_bias=-100.0), max_num_seqs=1) as llm:
        sampling = params(400, detect_repetition=False)
        running, waiting, last = (llm.submit([4, 5, i], sampling) for i in (6, 7, 8))
        assert gate.arrived.wait(WAIT_S)
        with pytest.raises(TimeoutError, match=r"did not end within 0\.01 s"):
            running.result(0.01)
        for handle in (running, waiting):
            handle.cancel()
        gate.open()
        outputs = [handle.result(WAIT_S).outputs[0] for handle in (running, waiting, last)]
        assert [answer.finish_reason for answer in outputs] == ["abort", "abort", "length"]
        assert len(outputs[0].token_ids) < 400
        assert outputs[1].token_ids == []
        last.cancel()
        assert last.result().outputs[0].finish_reason == "length"


# ---- failures --------------------------------------------------------------------------------------------------------
def test_bad_prompts_raise_before_anything_runs_and_name_their_index() -> None:
    model = FakeModel()
    with fake_llm(model, max_model_len=20) as llm:
        with pytest.raises(PromptError, match="prompt 1: token id 64 is outside the vocabulary"):
            llm.generate([[4], [64]], params())
        with pytest.raises(CapacityError, match=r"prompt 2: prompt needs 15 \+ 12 tokens but max_model_len is 20;"):
            llm.generate([[4], [5], [6] * 15], params())
        with pytest.raises(CapacityError, match="prompt has 20 tokens but max_model_len is 20"):
            llm.submit([6] * 20, SamplingParams())
        with pytest.raises(PromptError, match="2 sampling params were given for 1 prompts"):
            llm.generate([[4]], [params(), params()])
        with pytest.raises(ConfigError, match=r"not a mapping; SamplingParams\.from_mapping"):
            llm.generate([[4]], {"max_tokens": 3})  # type: ignore[arg-type]
        with pytest.raises(PromptError, match="prompt 0: this model's folder has no tokenizer"):
            llm.generate(["text"], params())
    assert model.passes == []


def test_nan_logits_end_one_request_and_no_other() -> None:
    prompts = [[4, 5], [6, 60], [7, 8]]
    sampling = params(6, ignore_eos=True, stop_token_ids=[60])
    expected = [tokens_alone(prompt, sampling) for prompt in prompts]
    with fake_llm(FakeModel(poison=60)) as llm:
        outputs = llm.generate(prompts, sampling)
        assert [o.outputs[0].finish_reason == "abort" for o in outputs] == [False, True, False]
        assert "the model returned NaN for 1 of 64 logits" in str(outputs[1].outputs[0].stop_reason)
        assert [outputs[i].outputs[0].token_ids for i in (0, 2)] == [expected[0], expected[2]]
        handle = llm.submit(prompts[1], sampling)
        with pytest.raises(EngineError, match="NaN"):
            handle.result(WAIT_S)
        with pytest.raises(EngineError, match="NaN"):
            list(handle)


def test_an_image_that_cannot_be_encoded_ends_its_request_only() -> None:
    with fake_llm(FakeModel(fake_config(images=True), fail_encode=True)) as llm:
        outputs = llm.generate([{"prompt": [IMAGE, 5], "images": [page(0)]}, [4, 5]], params(4, ignore_eos=True))
    assert outputs[0].outputs[0].finish_reason == "abort"
    assert outputs[0].outputs[0].stop_reason == "this encoder is broken"
    assert outputs[1].outputs[0].finish_reason == "length"


def test_a_failed_pass_fails_what_is_in_flight_and_the_engine_goes_on() -> None:
    model = FakeModel(fail_at=2)
    with fake_llm(model) as llm:
        handles = [llm.submit([4, 5 + i], params(9, ignore_eos=True)) for i in range(3)]
        errors = [error for handle in handles if (error := ended_by(handle)) is not None]
        assert errors
        assert {str(error) for error in errors} == {"a pass of the engine failed: RuntimeError: this model is broken"}
        assert all(isinstance(error, EngineError) for error in errors)
        again = llm.generate([4, 5], params(9, ignore_eos=True))[0]
        assert again.outputs[0].token_ids == tokens_alone([4, 5], params(9, ignore_eos=True))
        model.fail_at = len(model.passes)
        with pytest.raises(EngineError, match="this model is broken"):
            llm.generate([[4, 5], [6]], params(9))


def test_a_thread_that_cannot_start_leaves_the_engine_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with fake_llm() as llm:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="start new thread"):
                llm.submit([4, 5], params(3))
        assert llm.submit([4, 5], params(3, ignore_eos=True)).result(WAIT_S).finished


def test_a_fault_between_passes_hangs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(state: Any) -> None:
        raise MemoryError("no room for a snapshot")

    with fake_llm() as llm:
        monkeypatch.setattr(llm, "_publish", broken)
        handle = llm.submit([4, 5], params(3, ignore_eos=True))
        with pytest.raises(EngineError, match="MemoryError: no room for a snapshot"):
            handle.result(WAIT_S)
        monkeypatch.undo()
        assert llm.submit([4, 5], params(3, ignore_eos=True)).result(WAIT_S).finished


def test_a_cancel_survives_the_failure_of_another_request() -> None:
    gate = Gate()
    with fake_llm(FakeModel(pause=gate, fail_at=0, eos_bias=-100.0)) as llm:
        first = llm.submit([4, 5], params(9))
        assert gate.arrived.wait(WAIT_S)
        late = llm.submit([4, 6], params(400, detect_repetition=False))
        late.cancel()
        gate.open()
        with pytest.raises(EngineError, match="this model is broken"):
            first.result(WAIT_S)
        assert late.result(WAIT_S).outputs[0].finish_reason == "abort"


def test_prompts_of_numpy_integers() -> None:
    with fake_llm() as llm:
        expected = llm.generate([4, 5], params(4))[0].outputs[0].token_ids
        for prompts in ([np.int64(4), np.int64(5)], np.array([4, 5]), [np.array([4, 5])]):
            outputs = llm.generate(prompts, params(4))  # type: ignore[arg-type]
            assert [output.outputs[0].token_ids for output in outputs] == [expected]


def ended_by(handle: RequestHandle) -> Exception | None:
    try:
        handle.result(WAIT_S)
    except PagelensError as error:
        return error
    return None


def test_a_broken_block_table_closes_the_engine_and_hangs_nobody() -> None:
    gate = Gate()
    with fake_llm(FakeModel(pause=gate), max_num_seqs=1) as llm:
        handles = [llm.submit([4, 5, i], params(9)) for i in (6, 7)]
        assert gate.arrived.wait(WAIT_S)
        assert llm._engine is not None
        llm._engine.scheduler.pool._free.append(0)
        gate.open()
        for handle in handles:
            with pytest.raises(EngineError, match="block 0 counts"):
                handle.result(WAIT_S)
        wait_until(lambda: llm._thread is None)
        with pytest.raises(EngineClosedError, match="the engine died"):
            llm.generate([4], params())


# ---- close and fork --------------------------------------------------------------------------------------------------
def test_close_fails_what_is_in_flight_and_is_idempotent() -> None:
    gate = Gate()
    llm = LLM.from_engine(fake_engine(FakeModel(pause=gate), max_num_seqs=1))
    handles = [llm.submit([4, 5, i], params(9)) for i in (6, 7)]
    assert gate.arrived.wait(WAIT_S)
    threading.Timer(0.05, gate.open).start()
    llm.close()
    llm.close()
    for handle in handles:
        with pytest.raises(EngineClosedError, match="was closed while the request ran"):
            handle.result(WAIT_S)
        handle.cancel()
    for use in (lambda: llm.generate([4], params()), lambda: llm.submit([4], params())):
        with pytest.raises(EngineClosedError, match="the engine was closed; make a new one"):
            use()
    assert not [thread for thread in threading.enumerate() if thread.name == "pagelens-engine"]


def test_a_forked_child_gets_a_clear_error_and_the_parent_goes_on() -> None:
    gate = Gate()
    with fake_llm(FakeModel(pause=gate)) as llm:
        handle = llm.submit([4, 5], params(3, ignore_eos=True))
        assert gate.arrived.wait(WAIT_S)
        llm._lock.acquire()  # the worst moment to fork: another thread holds the lock
        child = os.fork()
        if child == 0:
            os._exit(child_verdict(llm, handle))
        llm._lock.release()
        gate.open()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(handle.result(WAIT_S).outputs[0].token_ids) == 3


def child_verdict(llm: LLM, handle: Any) -> int:
    """Exit status of the forked child: 0 if every use raised the right error and close did not hang."""
    try:
        for use in (lambda: llm.submit([4], params()), lambda: llm.generate([4]), handle.result, handle.cancel):
            try:
                use()
            except EngineClosedError as error:
                if "cannot be used in its fork" not in str(error):
                    return 2
            else:
                return 3
        llm.close()
    except BaseException:
        return 4
    return 0


# ---- options ---------------------------------------------------------------------------------------------------------
def test_unknown_and_bad_options_are_refused_before_the_model_is_opened() -> None:
    with pytest.raises(ConfigError, match="unknown option 'max_len'; known: model, dtype, "):
        LLM("/nowhere", max_len=3)
    with pytest.raises(ConfigError, match="dtype='float64' is not one of auto, float32, bfloat16, float16"):
        LLM("/nowhere", dtype="float64")
    for name in ("max_num_seqs", "max_batch_tokens", "block_size"):
        for value in (0, 10**9, 2.0, True):
            with pytest.raises(ConfigError, match=f"{name}={value} must be a positive integer of at most [0-9]+"):
                LLM("/nowhere", **{name: value})
    for name in ("num_threads", "max_model_len", "kv_cache_bytes"):
        with pytest.raises(ConfigError, match=f"{name}=True must be None or a positive integer"):
            LLM("/nowhere", **{name: True})


def test_sizes_of_cache_and_context() -> None:
    with pytest.raises(ConfigError, match="max_model_len=600 is above the model's limit of 512"):
        fake_engine(max_model_len=600)
    with pytest.raises(
        ConfigError, match="kv_cache_bytes=255 has room for 0 tokens, but 4 are needed; raise it to 256"
    ):
        fake_engine(kv_cache_bytes=255)
    with pytest.raises(ConfigError, match=r"has room for 8 tokens, but 100 are needed; .*, or lower max_model_len"):
        fake_engine(kv_cache_bytes=kv_bytes(2), max_model_len=100)
    assert fake_engine(max_num_seqs=3, max_model_len=100).scheduler.pool.num_blocks == 3 * 25
    assert fake_engine(kv_cache_bytes=kv_bytes(30)).scheduler.pool.num_blocks == 30
    for tensor in (*fake_engine().runner.kv.keys, *fake_engine().runner.kv.values):
        assert tensor.data_ptr() % 64 == 0
        assert not tensor.any()
