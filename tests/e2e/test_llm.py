"""LLM with the built-in checkpoint: real pages in flight, text, options, and decode steps that allocate no more."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from pagelens import LLM, SamplingParams
from pagelens.config import EngineConfig
from pagelens.core import DTYPES, Engine, build_engine
from pagelens.errors import CapacityError, ConfigError, PromptError, UnsupportedError
from pagelens.reader import builtin_model, default_prompt
from pagelens.runtime.kv_cache import block_bytes

SAMPLES = Path(str(files("pagelens").joinpath("assets/samples")))
NUM_TOKENS = 32


def pages() -> list[Image.Image]:
    """The sample pages, and parts of them, so that lengths and contents differ."""
    whole = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.png"))]
    assert len(whole) >= 3
    parts = [page.crop((0, 0, page.width, page.height // 2)) for page in whole]
    return [*whole, *parts]


@pytest.fixture(scope="module")
def llm() -> Any:
    with LLM(builtin_model()) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompt(llm: LLM) -> str:
    return default_prompt(llm.processor)


def run_engine(engine: Engine, prompts: list[Any], order: list[int], steps_between: int) -> dict[int, list[int]]:
    """Token ids of each prompt; answers have a fixed length, so that every run holds the cache for as long."""
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, detect_repetition=False)
    states = {}
    for index in order:
        states[index] = engine.add_request(engine.inputs.build(prompts[index], sampling, str(index)))
        for _ in range(steps_between):
            engine.step()
    while engine.has_work:
        engine.step()
    return {index: state.output().outputs[0].token_ids for index, state in states.items()}


@pytest.mark.parametrize(("dtype", "threads"), [("float32", 1), ("bfloat16", 2)])
def test_pages_in_flight_give_exactly_the_tokens_each_gives_alone(dtype: str, threads: int, prompt: str) -> None:
    prompts = [{"prompt": prompt, "images": [page]} for page in pages()]
    config = EngineConfig(str(builtin_model()), dtype=dtype, num_threads=threads)  # type: ignore[arg-type]
    engine = build_engine(config)
    alone = [run_engine(engine, prompts, [index], 0)[index] for index in range(len(prompts))]
    num_prompt = len(engine.inputs.build(prompts[0], SamplingParams(), "").token_ids)
    decoder, num_needed = engine.model_config.decoder, engine.scheduler.pool.num_needed
    engine.close()
    assert len({tuple(tokens) for tokens in alone}) == len(alone), "different pages give different answers"
    # Room for one whole request and the prompt of a second, which must therefore give way as they grow.
    num_blocks = num_needed(num_prompt + NUM_TOKENS) + num_needed(num_prompt)
    rng = random.Random(3)
    preemptions = 0
    for max_batch_tokens in (11, 64, 2048):
        engine = build_engine(
            config.with_options(
                kv_cache_bytes=num_blocks * block_bytes(decoder, DTYPES[dtype], config.block_size),
                max_num_seqs=4,
                max_batch_tokens=max_batch_tokens,
                check_blocks=True,
            )
        )
        order = rng.sample(range(len(prompts)), len(prompts))
        found = run_engine(engine, prompts, order, rng.randint(0, 3))
        preemptions += engine.scheduler.num_preemptions
        engine.close()
        assert [found[index] for index in range(len(prompts))] == alone
    assert preemptions >= 3


def test_a_native_decode_step_allocates_nothing_but_its_logits(prompt: str) -> None:
    try:
        engine = build_engine(EngineConfig(str(builtin_model()), backend="native", num_threads=2))
    except UnsupportedError as error:
        pytest.fail(f"the native backend should run the built-in model everywhere: {error}")
    sampling = SamplingParams(max_tokens=30, ignore_eos=True, detect_repetition=False)
    for index, page in enumerate(pages()[:3]):
        request = engine.inputs.build({"prompt": prompt, "images": [page]}, sampling, str(index))
        engine.add_request(request)
    for _ in range(5):
        engine.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        changed = engine.step()
    assert len(changed) == 3
    sizes = [event.self_cpu_memory_usage for event in prof.events() if event.self_cpu_memory_usage > 0]
    assert sizes == [3 * engine.model_config.decoder.vocab_size * 4], "one tensor: three rows of float32 logits"
    engine.close()


def test_every_kind_of_image_gives_the_same_answer(llm: LLM, prompt: str) -> None:
    path = min(SAMPLES.glob("*.png"))
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    sources = [path, str(path), path.read_bytes(), picture, np.asarray(picture)]
    llm.clear_prefix_cache()  # the first of them is to be encoded
    outputs = llm.generate(
        [{"prompt": prompt, "images": [source]} for source in sources], SamplingParams(max_tokens=60)
    )
    assert len({output.outputs[0].text for output in outputs}) == 1
    first = outputs[0]
    assert first.outputs[0].text
    assert first.finished
    assert first.prompt == prompt
    metrics = first.metrics
    assert metrics.num_image_tokens == first.prompt_token_ids.count(llm.model_config.image_token_id)
    assert min(metrics.encode_s, metrics.prefill_s, metrics.decode_s, metrics.preprocess_s) > 0


def test_streamed_text_and_result_agree(llm: LLM, prompt: str) -> None:
    handles = [llm.submit({"prompt": prompt, "images": [page]}, SamplingParams(max_tokens=60)) for page in pages()]
    for handle in handles:
        pieces = list(handle.stream_text())
        answer = handle.result().outputs[0]
        assert "".join(pieces) == answer.text
        assert all(pieces)
        assert answer.finish_reason in ("stop", "length")


def test_text_is_the_decoded_tokens_without_the_end(llm: LLM, prompt: str) -> None:
    answer = llm.generate({"prompt": prompt, "images": [pages()[0]]})[0].outputs[0]
    assert llm.tokenizer is not None
    eos = llm.model_config.decoder.eos_token_ids
    assert (answer.finish_reason, answer.token_ids[-1] in eos) == ("stop", True)
    assert answer.text == llm.tokenizer.decode(answer.token_ids[:-1])


def test_stop_string_cuts_text_and_ends(llm: LLM, prompt: str) -> None:
    page = {"prompt": prompt, "images": [pages()[0]]}
    text = llm.generate(page)[0].outputs[0].text
    stop = text[4:6]
    answer = llm.generate(page, SamplingParams(stop=stop))[0].outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (text[: text.index(stop)], "stop", stop)


def test_seeded_sampling_is_repeatable_in_company(llm: LLM, prompt: str) -> None:
    page = {"prompt": prompt, "images": [pages()[0]]}
    sampling = SamplingParams(temperature=2.0, top_k=50, seed=5, max_tokens=20)
    alone = llm.generate(page, sampling)[0].outputs[0].token_ids
    others = [{"prompt": prompt, "images": [other]} for other in pages()[1:]]
    company = llm.generate([*others, page], [SamplingParams(max_tokens=15)] * len(others) + [sampling])
    assert company[-1].outputs[0].token_ids == alone
    other_seed = SamplingParams(temperature=2.0, top_k=50, seed=6, max_tokens=20)
    assert llm.generate(page, other_seed)[0].outputs[0].token_ids != alone


def test_prompt_longer_than_the_context(llm: LLM) -> None:
    limit = llm.max_model_len
    with pytest.raises(
        CapacityError, match=rf"prompt has {limit + 9} tokens but max_model_len is {limit}, which leaves"
    ):
        llm.submit([5] * (limit + 9))
    params = [SamplingParams(max_tokens=5), SamplingParams(max_tokens=limit)]
    with pytest.raises(CapacityError, match=rf"prompt 1: .*needs 10 \+ {limit} tokens but max_model_len is {limit}"):
        llm.generate([[5], [5] * 10], params)


def test_a_folder_without_tokenizer_takes_token_ids(tmp_path: Path, llm: LLM, prompt: str) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(builtin_model() / name, tmp_path / name)
    page = pages()[0]
    expected = llm.generate({"prompt": prompt, "images": [page]})[0]
    image_id = llm.model_config.image_token_id
    ids = [token for token in expected.prompt_token_ids if token != image_id]
    first = expected.prompt_token_ids.index(image_id)
    with LLM(tmp_path) as bare:
        assert bare.tokenizer is None
        output = bare.generate({"prompt": [*ids[:first], image_id, *ids[first:]], "images": [page]})[0]
        assert output.prompt_token_ids == expected.prompt_token_ids
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert output.outputs[0].text == ""
        with pytest.raises(PromptError, match=r"no tokenizer\.json"):
            bare.submit("hello")


def test_ids_that_the_config_leaves_out_are_found_by_their_texts(tmp_path: Path, llm: LLM, prompt: str) -> None:
    shutil.copytree(builtin_model(), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for name in ("bos_token_id", "eos_token_id"):
        del config["language_config"][name]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    page = {"prompt": prompt, "images": [pages()[0]]}
    with LLM(tmp_path) as other:
        expected, found = (each.generate(page)[0] for each in (llm, other))
    assert found.outputs[0].finish_reason == "stop"
    assert found.prompt_token_ids == expected.prompt_token_ids
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids


def test_a_path_is_never_taken_for_a_hub_id() -> None:
    with pytest.raises(ConfigError, match="no/such' is neither an existing folder"):
        LLM(Path("no/such"))


def test_options_reach_the_engine() -> None:
    with LLM(builtin_model(), max_model_len=64, num_threads=1, max_num_seqs=2) as small:
        assert small.max_model_len == 64
        with pytest.raises(CapacityError, match="max_model_len is 64"):
            small.submit([5] * 64)
    with pytest.raises(ConfigError, match="unknown option 'quantization'"):
        LLM(builtin_model(), quantization="int4")


def test_the_process_may_end_with_requests_in_flight() -> None:
    """The engine's thread is stopped before the interpreter is torn down: no crash, no wait for the answers."""
    program = (
        "from pagelens import LLM, SamplingParams\n"
        "from pagelens.reader import builtin_model\n"
        "llm = LLM(builtin_model(), num_threads=1)\n"
        "sampling = SamplingParams(ignore_eos=True, detect_repetition=False)\n"
        "handles = [llm.submit([5, 6, i], sampling) for i in range(7, 12)]\n"
        "next(iter(handles[0]))\n"
        "print('leaving', handles[0].done)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving False\n", "")
