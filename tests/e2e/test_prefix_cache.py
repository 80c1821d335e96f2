"""The prefix cache in the engine: the same results with and without it, and no image is encoded twice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fake_model import IMAGE, FakeModel, fake_config, fake_engine, kv_bytes
from PIL import Image

from pagelens import LLM, SamplingParams
from pagelens.config import EngineConfig
from pagelens.core import build_engine
from pagelens.errors import ConfigError, EngineClosedError, EngineError, PromptError
from pagelens.inputs import Prompt
from pagelens.reader import builtin_model, default_prompt
from pagelens.runtime.kv_cache import block_bytes
from pagelens.types import RequestOutput
from pagelens.vision.modes import available_modes

SAMPLES = sorted(Path(str(files("pagelens").joinpath("assets/samples"))).glob("*.png"))
SYSTEM = [20, 21, 22, 23, 24, 25, 26, 27, 28]  # two blocks of four, and one token


@contextmanager
def fake_llm(model: FakeModel | None = None, **options: Any) -> Iterator[LLM]:
    with LLM.from_engine(fake_engine(model, **options)) as llm:
        yield llm


def params(max_tokens: int = 6, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, detect_repetition=False, **options)


def page(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def shown(prompt: list[int], *images: np.ndarray) -> Prompt:
    return {"prompt": prompt, "images": list(images)}


# ---- exactness -------------------------------------------------------------------------------------------------------
def traffic(seed: int) -> list[tuple[Prompt, SamplingParams]]:
    rng = random.Random(seed)
    requests: list[tuple[Prompt, SamplingParams]] = []
    for index in range(10):
        prompt = SYSTEM[: rng.choice([3, 8, 9])] + [rng.choice([30, 31]) for _ in range(rng.randint(1, 6))]
        options = [{}, {"temperature": 1.0, "seed": index % 3}][rng.randrange(2)]
        sampling = params(rng.randint(1, 12), n=rng.choice([1, 1, 3]), logprobs=1, **options)
        requests.append((shown([*prompt, IMAGE, 5], page(index % 2)) if index % 3 == 0 else prompt, sampling))
    return requests


def answers_of(output: RequestOutput) -> list[tuple[list[int], Any]]:
    return [(answer.token_ids, answer.logprobs) for answer in output.outputs]


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_shared_each_gets_what_it_gets_alone(seed: int, cached: bool) -> None:
    requests = traffic(seed)
    alone = []
    for prompt, sampling in requests:
        with fake_llm(FakeModel(fake_config(images=True)), prefix_cache=False, max_num_seqs=1) as llm:
            alone.append(answers_of(llm.generate([prompt], sampling)[0]))
    rng = random.Random(seed)
    preemptions = hits = evictions = 0
    for _ in range(4):
        engine = fake_engine(
            FakeModel(fake_config(images=True)),
            kv_cache_bytes=kv_bytes(17),
            max_num_seqs=5,
            max_batch_tokens=rng.choice([3, 7, 16, 64]),
            prefix_cache=cached,
        )
        states = {}
        for index in rng.sample(range(len(requests)), len(requests)):
            states[index] = engine.add_request(engine.inputs.build(*requests[index], str(index)))
            for _ in range(rng.randint(0, 6)):
                engine.step()
        while engine.has_work:
            engine.step()
        assert [answers_of(states[index].output()) for index in range(len(requests))] == alone
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
        stats = engine.prefix_cache_stats()
        assert stats.num_cached_tokens == sum(state.metrics.num_cached_tokens for state in states.values())
        assert stats.num_queried_tokens == (sum(len(s.request.token_ids) for s in states.values()) if cached else 0)
        preemptions += engine.scheduler.num_preemptions
        hits += stats.num_cached_tokens
        evictions += stats.num_evictions
    assert preemptions > 0
    assert (hits > 0, evictions > 0) == (cached, cached)


def builtin_llm(dtype: Any, cached: bool, block_size: int = 4, **options: Any) -> LLM:
    config = EngineConfig(
        str(builtin_model()),
        dtype=dtype,
        backend="native",
        num_threads=2,
        block_size=block_size,
        prefix_cache=cached,
        **options,
    )
    return LLM.from_engine(build_engine(config))


@pytest.mark.parametrize(("dtype", "kept"), [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8")])
@pytest.mark.parametrize("kind", ["text", "images"])
def test_native_results_are_the_same_with_and_without_the_cache(kind: str, dtype: str, kept: str) -> None:
    """Tokens and log probabilities, bit for bit: prompts that share all, some or nothing of what was there before."""
    prompts: list[Any]
    if kind == "text":
        common = [random.Random(1).randrange(10, 300) for _ in range(70)]
        prompts = [common + [40 + i] * i for i in range(3)] + [common[:33], common, [9, *common]]
    else:
        text = "<image>\nRead."
        pictures = [Image.open(path).convert("RGB") for path in SAMPLES]
        prompts = [{"prompt": text, "images": [picture]} for picture in (*pictures, pictures[0])]
        prompts += [{"prompt": "<image>\nWrite it down.", "images": [pictures[0]]}]
    sampling = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=3, detect_repetition=False)
    results, cached_tokens = [], []
    for cached in (False, True):
        with builtin_llm(dtype, cached, 16 if kind == "text" else 4, kv_cache_dtype=kept) as llm:
            outputs = [llm.generate([prompt], sampling)[0] for prompt in prompts] + llm.generate(prompts, sampling)
            results.append([answers_of(output) for output in outputs])
            cached_tokens.append([output.metrics.num_cached_tokens for output in outputs])
    assert results[0] == results[1]
    assert set(cached_tokens[0]) == {0}
    first, again = cached_tokens[1][: len(prompts)], cached_tokens[1][len(prompts) :]
    assert first[0] == first[2 if kind == "images" else -1] == 0, "nothing was there, or it was something else"
    assert sum(count > 0 for count in first) == (4 if kind == "text" else 2)
    assert min(again) > 0


def test_an_int8_cache_too_small_for_all_gives_the_same_answers() -> None:
    """Preempted sequences are computed again, into other blocks, in other pieces: not a bit changes."""
    rng = random.Random(3)
    prompts = [[rng.randrange(10, 300) for _ in range(rng.randint(20, 60))] for _ in range(6)]
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=3, detect_repetition=False)
    config = EngineConfig(
        str(builtin_model()), dtype="bfloat16", backend="native", num_threads=2, block_size=4, kv_cache_dtype="int8"
    )
    results, preemptions, one_block = [], [], 0
    for options in ({"max_num_seqs": 1}, {"max_batch_tokens": 37, "check_blocks": True}):
        small = {"kv_cache_bytes": 30 * one_block} if one_block else {}
        engine = build_engine(config.with_options(**small, **options))
        one_block = block_bytes(engine.model_config.decoder, torch.bfloat16, 4, "int8")
        assert not small or engine.scheduler.pool.num_blocks == 30
        states = [engine.add_request(engine.inputs.build(ids, sampling, str(i))) for i, ids in enumerate(prompts)]
        while engine.has_work:
            engine.step()
        results.append([answers_of(state.output()) for state in states])
        preemptions.append(engine.scheduler.num_preemptions)
        engine.close()
    assert preemptions[0] == 0 < preemptions[1]
    assert results[0] == results[1]


# ---- images ----------------------------------------------------------------------------------------------------------
def test_an_image_in_the_cache_is_not_encoded_again() -> None:
    model = FakeModel(fake_config(images=True))
    with fake_llm(model) as llm:
        first = llm.generate([shown([IMAGE, 5, 6, 7, 8], page(1))], params())[0]
        assert (model.encoded, first.metrics.num_cached_tokens) == (1, 0)
        same = llm.generate([shown([IMAGE, 5, 6, 7, 8], page(1))], params())[0]
        assert model.encoded == 1
        assert same.metrics.num_cached_tokens >= same.metrics.num_image_tokens
        assert same.metrics.encode_s == 0
        assert same.outputs == first.outputs
        handle = llm.submit(shown([IMAGE, 5, 6, 7, 8], page(1)), params())
        assert (handle.result().outputs, model.encoded) == (first.outputs, 1)
        with pytest.raises(PromptError, match="already taken"):
            handle.request.images[0].take_views()  # pixels that nobody needed are freed
        other = llm.generate([shown([IMAGE, 5, 6, 7, 8], page(2))], params())[0]
        assert (model.encoded, other.metrics.num_cached_tokens) == (2, 0)
        assert other.outputs != first.outputs
        two = llm.generate([shown([IMAGE, 5, 6, 7, 8, IMAGE, 5], page(1), page(2))], params())[0]
        assert model.encoded == 3, "the first is there, the second stands elsewhere"
        assert two.metrics.num_cached_tokens >= first.metrics.num_image_tokens
        together = llm.generate([shown([IMAGE, 5, 6, 7, 8, 9, i], page(3)) for i in range(10, 14)], params())
        assert model.encoded == 4, "who comes second waits for the first"
        assert len({tuple(output.outputs[0].token_ids) for output in together}) == 4


def test_an_image_whose_blocks_were_evicted_after_a_preemption_is_encoded_then() -> None:
    model = FakeModel(fake_config(images=True), eos_bias=-100.0)
    prompt = shown([IMAGE, 5, 6, 7, 8], page(1))
    engine = fake_engine(model, kv_cache_bytes=kv_bytes(13))
    expected = run_alone(engine, prompt, 30)
    assert model.encoded == 1
    old = engine.add_request(engine.inputs.build([50] * 10, params(42), "old"))
    state = engine.add_request(engine.inputs.build(prompt, params(30), "1"))
    while engine.has_work:
        engine.step()
    assert state.sequence.num_preemptions > 0
    assert state.output().outputs[0].token_ids == expected
    assert len(old.output().outputs[0].token_ids) == 42
    assert model.encoded == 2, "not for its first start, but for its second"


def run_alone(engine: Any, prompt: Prompt, max_tokens: int) -> list[int]:
    state = engine.add_request(engine.inputs.build(prompt, params(max_tokens), "alone"))
    while engine.has_work:
        engine.step()
    tokens: list[int] = state.output().outputs[0].token_ids
    return tokens


def test_another_mode_of_the_same_page_is_not_found() -> None:
    with builtin_llm("float32", True) as llm:
        modes = list(available_modes(llm.processor))
        assert len(modes) >= 2
        prompt = default_prompt(llm.processor)
        found: dict[str, list[int]] = {}
        for mode in (*modes, *modes):
            output = llm.generate([{"prompt": prompt, "images": [SAMPLES[0]], "mode": mode}], params(2))[0]
            found.setdefault(mode, []).append(output.metrics.num_cached_tokens)
        assert all(first == 0 < second for first, second in found.values()), found


def test_a_file_that_changes_while_its_request_waits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    Image.fromarray(page(1)).save(path)
    engine = fake_engine(FakeModel(fake_config(images=True)))
    state = engine.add_request(
        engine.inputs.build({"prompt": [IMAGE, 5], "images": [path]}, params(), "0", keep_views=False)
    )
    Image.fromarray(page(2)).save(path)
    while engine.has_work:
        engine.step()
    assert "was changed while its request waited" in str(state.output().outputs[0].stop_reason)
    assert engine.prefix_cache_stats().num_cached_blocks == 0


# ---- failures, counts, options ---------------------------------------------------------------------------------------
def test_nothing_of_a_failed_request_or_pass_is_found() -> None:
    model = FakeModel(poison=60)
    with fake_llm(model, block_size=2) as llm:
        assert llm.generate([[4, 5, 6, 60]], params())[0].outputs[0].finish_reason == "abort"
        assert llm.prefix_cache_stats().num_cached_blocks == 0
        llm.generate([[4, 5, 6, 7]], params())
        assert llm.prefix_cache_stats().num_cached_blocks > 0
        model.fail_at = len(model.passes) + 1
        with pytest.raises(EngineError, match="this model is broken"):
            llm.generate([[4, 5, 6, 8]], params(ignore_eos=True))
        assert llm.prefix_cache_stats().num_cached_blocks == 0
        assert llm.generate([[4, 5, 6, 7]], params())[0].metrics.num_cached_tokens == 0


def test_a_turn_finds_the_one_before() -> None:
    with fake_llm() as llm:
        first = llm.generate([[4, 5, 6, 7, 8]], params(9, ignore_eos=True))[0]
        turn = [*first.prompt_token_ids, *first.outputs[0].token_ids, 9, 10]
        assert llm.generate([turn], params())[0].metrics.num_cached_tokens == 12, "13 of its tokens were computed"


def test_counts_and_clearing() -> None:
    prompt = [*SYSTEM, 4]
    with fake_llm(kv_cache_bytes=kv_bytes(30)) as llm:
        assert llm.prefix_cache_stats().hit_rate == 0
        llm.generate([prompt, prompt], params(1))
        stats = llm.prefix_cache_stats()
        assert (stats.num_blocks, stats.num_cached_blocks, stats.num_evictions) == (30, 2, 0)
        assert (stats.num_queried_tokens, stats.num_cached_tokens, stats.hit_rate) == (20, 8, 0.4)
        llm.clear_prefix_cache()
        assert llm.generate([prompt], params(1))[0].metrics.num_cached_tokens == 0
        llm.clear_prefix_cache()
        llm.generate([[9] * 5], params(1))
        assert llm.prefix_cache_stats().num_cached_blocks == 1
        handle = llm.submit([*prompt, 5], params(100, ignore_eos=True))
        next(iter(handle))
        llm.clear_prefix_cache()
        assert llm.generate([prompt], params(1))[0].metrics.num_cached_tokens == 0, "also while another runs"
        assert len(handle.result().outputs[0].token_ids) == 100
    with pytest.raises(EngineClosedError, match="the engine was closed"):
        llm.clear_prefix_cache()
    with fake_llm(prefix_cache=False) as llm:
        llm.generate([prompt, prompt], params(1))
        stats = llm.prefix_cache_stats()
        assert (stats.num_cached_blocks, stats.num_queried_tokens) == (0, 0)
        llm.clear_prefix_cache()
    with pytest.raises(ConfigError, match="prefix_cache='yes' must be True or False"):
        fake_engine(prefix_cache="yes")
