"""SamplingParams.n: several answers to one prompt, each as if it were alone, from a prompt computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from e2e.test_thinking_budget import CLOSE, START, STOP_IDS, FakeTokenizer, Thinker
from helpers.fake_model import IMAGE, FakeModel, fake_config, fake_engine, kv_bytes
from helpers.script_model import scripted_llm

from pagelens import LLM, Reader, SamplingParams
from pagelens.errors import ConfigError, EngineError
from pagelens.runtime.sampler import answer_seed

PROMPT = list(range(10, 31))  # five blocks of four, and one token


@contextmanager
def fake_llm(model: FakeModel | None = None, tokenizer: Any = None, **options: Any) -> Iterator[LLM]:
    with LLM.from_engine(fake_engine(model, tokenizer, **options)) as llm:
        yield llm


def params(max_tokens: int = 8, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **{"detect_repetition": False, "ignore_eos": True, **options})


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no_cache"])
def test_each_answer_is_the_one_its_seed_gives_alone(cached: bool) -> None:
    model = FakeModel()
    with fake_llm(model, prefix_cache=cached) as llm:
        output = llm.generate([PROMPT], params(n=5, temperature=1.0, seed=3, logprobs=2))[0]
        num_computed = sum(tokens for tokens, _ in model.passes)
        alone = [
            llm.generate([PROMPT], params(temperature=1.0, seed=answer_seed(3, i), logprobs=2))[0].outputs[0]
            for i in range(5)
        ]
    assert [answer.index for answer in output.outputs] == [0, 1, 2, 3, 4]
    assert [(a.token_ids, a.logprobs) for a in output.outputs] == [(a.token_ids, a.logprobs) for a in alone]
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 5
    assert answer_seed(3, 0) == 3
    assert answer_seed(None, 4) is None
    # The prompt once, its last token again by each of the others, and seven of the eight tokens of each answer.
    assert num_computed == 21 + 4 * 1 + 5 * 7


def test_a_pass_counts_once_however_many_answers_are_in_it() -> None:
    """A prompt shorter than a block: nothing is shared, and all answers begin in one pass."""
    with fake_llm() as llm:
        metrics = llm.generate([[5, 6, 7]], params(n=8))[0].metrics
    assert 0 < metrics.prefill_s <= metrics.time_to_first_token_s


def test_greedy_answers_are_equal_and_unseeded_ones_differ() -> None:
    with fake_llm() as llm:
        greedy = llm.generate([PROMPT], params(n=3))[0]
        assert len({tuple(answer.token_ids) for answer in greedy.outputs}) == 1
        free = llm.generate([PROMPT], params(n=3, temperature=2.0))[0]
        assert len({tuple(answer.token_ids) for answer in free.outputs}) == 3


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no_cache"])
def test_more_answers_than_run_together_and_preemptions(cached: bool) -> None:
    sampling = params(30, n=7, temperature=1.0, seed=1)
    with fake_llm() as llm:
        expected = [answer.token_ids for answer in llm.generate([PROMPT], sampling)[0].outputs]
    engine = fake_engine(max_num_seqs=3, kv_cache_bytes=kv_bytes(16), max_batch_tokens=8, prefix_cache=cached)
    state = engine.add_request(engine.inputs.build(PROMPT, sampling, "0"))
    while engine.has_work:
        engine.step()
    output = state.output()
    assert [answer.token_ids for answer in output.outputs] == expected
    assert output.metrics.num_preemptions == engine.scheduler.num_preemptions > 0
    assert engine.scheduler.pool.num_free == 16


def test_an_image_is_encoded_once_for_all_answers() -> None:
    from e2e.test_prefix_cache import page, shown

    for prompt in ([IMAGE], [5, IMAGE, 6, 7, 8, 9, 10]):
        for cached in (True, False):
            model = FakeModel(fake_config(images=True))
            with fake_llm(model, prefix_cache=cached, max_num_seqs=2) as llm:
                sampling = params(n=4, temperature=1.0, seed=1)
                output = llm.generate([shown(prompt, page(1))], sampling)[0]
                assert model.encoded == 1
                last = llm.generate([shown(prompt, page(1))], params(temperature=1.0, seed=answer_seed(1, 3)))[0]
            assert output.outputs[3].token_ids == last.outputs[0].token_ids


def test_rows_that_one_answer_has_encoded_serve_the_others() -> None:
    from e2e.test_prefix_cache import page, shown

    engine = fake_engine(FakeModel(fake_config(images=True)))
    state = engine.add_request(engine.inputs.build(shown([5, IMAGE, 6], page(1)), params(n=2), "0"))
    first, second = (answer.sequence for answer in state.answers)
    images = state.request.images
    assert engine.runner.find_missing(first, images, 1) == list(images)
    engine.runner.encode(second, images)
    assert engine.runner.find_missing(first, images, 1) == []
    ((position, rows),) = engine.runner.image_rows(first, 0, 400)
    assert (position, len(rows)) == (1, images[0].count)
    engine.runner.release(first)
    assert not engine.runner.has_images(second)


def test_each_answer_ends_in_its_own_way() -> None:
    sampling = params(20, n=4, temperature=1.0, seed=1)
    with fake_llm() as llm:
        full = [answer.token_ids for answer in llm.generate([PROMPT], sampling)[0].outputs]
        stop = full[1][5]
        stopped = llm.generate([PROMPT], params(20, n=4, temperature=1.0, seed=1, stop_token_ids=[stop]))[0]
    for answer, tokens in zip(stopped.outputs, full):
        end = tokens.index(stop) + 1 if stop in tokens else 20
        assert answer.token_ids == tokens[:end]
        assert answer.finish_reason == ("stop" if stop in tokens else "length")
    assert len({len(answer.token_ids) for answer in stopped.outputs}) > 1
    assert stopped.finished


def test_stop_strings_streams_and_budgets_hold_for_each_answer() -> None:
    tokenizer = FakeTokenizer()
    sampling = params(90, n=3, temperature=1.0, seed=2, thinking_budget=5)
    with fake_llm(Thinker(), tokenizer) as llm:
        handle = llm.submit([20, 21, START], sampling)
        pieces = ["".join(handle.stream_text(index)) for index in range(3)]
        output = handle.result()
        assert [answer.text for answer in output.outputs] == pieces
        assert len(set(pieces)) == 3
        for answer in output.outputs:
            assert answer.token_ids.count(CLOSE) == 1
            assert answer.token_ids[6 : 6 + len(STOP_IDS)] == STOP_IDS
        with pytest.raises(IndexError, match="there is no answer 3; the request has n=3"):
            handle.stream_text(3)
        stop = output.outputs[1].text[-3:]
        again = llm.generate([[20, 21, START]], params(90, n=3, temperature=1.0, seed=2, thinking_budget=5, stop=stop))
        assert again[0].outputs[1].finish_reason == "stop"
        assert again[0].outputs[1].text == pieces[1][: pieces[1].index(stop)]
        snapshots = list(llm.submit([20, 21, START], sampling))
        assert {len(snapshot.outputs) for snapshot in snapshots} == {3}


def test_cancelling_ends_all_answers_and_frees_everything() -> None:
    engine = fake_engine(max_num_seqs=2)
    state = engine.add_request(engine.inputs.build(PROMPT, params(50, n=4), "0"))
    for _ in range(5):
        engine.step()
    engine.cancel(state)
    engine.scheduler.check_integrity()
    answers = state.output().outputs
    assert [answer.finish_reason for answer in answers] == ["abort"] * 4
    assert [len(answer.token_ids) for answer in answers] == [5, 4, 0, 0]
    assert not engine.has_work
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    assert engine._answers == {}


def test_the_error_of_one_answer_ends_all_of_them_and_no_other_request() -> None:
    with fake_llm() as llm:
        full = [a.token_ids for a in llm.generate([PROMPT], params(12, n=3, temperature=1.0, seed=1))[0].outputs]
    # A token that the second answer meets, and no other before it.
    place, poison = next(
        (i, token) for i, token in enumerate(full[1]) if all(token not in tokens[: i + 3] for tokens in full[::2])
    )
    with fake_llm(FakeModel(poison=poison), max_num_seqs=4) as llm:
        sampling = params(12, n=3, temperature=1.0, seed=1)
        outputs = llm.generate([PROMPT, [4, 5]], [sampling, params(12)])
        assert [answer.finish_reason for answer in outputs[0].outputs] == ["abort"] * 3
        assert all("NaN" in str(answer.stop_reason) for answer in outputs[0].outputs)
        # The third started with the second, and gets no token in the pass in which that fails.
        assert [len(answer.token_ids) for answer in outputs[0].outputs[1:]] == [place + 1] * 2
        assert outputs[1].outputs[0].finish_reason == "length"
        with pytest.raises(EngineError, match="NaN"):
            llm.submit(PROMPT, sampling).result(20)


def test_limits_and_what_gives_one_answer_only(tmp_path: Path) -> None:
    for n in (0, 65, -1):
        with pytest.raises(ConfigError, match=f"SamplingParams.n must be between 1 and 64, got {n}"):
            SamplingParams(n=n)
    with pytest.raises(ConfigError, match=r"SamplingParams\.n must be an integer"):
        SamplingParams(n=2.0)  # type: ignore[arg-type]
    with Reader() as reader, pytest.raises(ConfigError, match="Reader gives one answer, but n=2"):
        reader.read(Path("engine/assets/samples/notice.png"), sampling=SamplingParams(n=2))
    message = [{"role": "user", "content": "Hi"}]
    with scripted_llm(tmp_path, []) as llm, pytest.raises(ConfigError, match="stream_chat gives one answer, but n=2"):
        llm.stream_chat(message, {"n": 2})


def test_chat_tells_reasoning_and_answer_apart_in_each(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "Hi"}]
    with scripted_llm(tmp_path, ["<think>\nA\n</think>\n\nOne", "<think>\nB\n</think>\n\nTwo"], max_num_seqs=1) as llm:
        answers = llm.chat(message, {"n": 2, "temperature": 0.0})[0].outputs
    assert [(answer.index, answer.reasoning, answer.text) for answer in answers] == [(0, "A", "One"), (1, "B", "Two")]
