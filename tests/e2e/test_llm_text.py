"""LLM over text models: folders that transformers wrote, strings and token ids, padding rows, random weights."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.text_models import BEGIN, END, YARN, edit_json, greedy, make_oracle, save, write_tokenizer
from safetensors.torch import load_file, save_file

from pagelens import LLM, SamplingParams
from pagelens.errors import CapacityError, ConfigError, PromptError, WeightsError

DENSE, MOE, LLAMA = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "LlamaForCausalLM"
NUM_BYTES = 256
ROWS = 272  # of the embedding: 258 tokens and 14 rows of padding

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense, tied": (DENSE, {"tie_word_embeddings": True}),
    "experts and a dense layer, yarn": (MOE, {"mlp_only_layers": [0], "rope_parameters": YARN}),
    "llama": (LLAMA, {"head_dim": 16, "num_key_value_heads": 1}),
}


def prompts(count: int, vocab: int = 96) -> list[list[int]]:
    rng = random.Random(7)
    return [rng.choices(range(vocab), k=rng.randint(1, 40)) for _ in range(count)]


@pytest.mark.parametrize("case", MODELS, ids=lambda name: name.replace(" ", "_"))
def test_batched_greedy_tokens_equal_transformers(case: str, tmp_path: Path) -> None:
    """More prompts than run together, in chunks of 16 tokens, under both backends; one answer of 200 tokens."""
    architecture, changes = MODELS[case]
    oracle = make_oracle(architecture, seed=3, **changes)
    lengths = [200, 12, 25, 40, 8]
    expected = [greedy(oracle, ids, count) for ids, count in zip(prompts(5), lengths)]
    save(oracle, tmp_path, stacked_experts=architecture == MOE)
    params = [SamplingParams(max_tokens=count, detect_repetition=False) for count in lengths]
    for backend in ("native", "reference"):
        with LLM(tmp_path, backend=backend, num_threads=2, max_num_seqs=3, max_batch_tokens=16) as llm:
            outputs = llm.generate(prompts(5), params)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bfloat16_runs(backend: str, tmp_path: Path) -> None:
    """A float32 folder run in bfloat16; in company as alone (native), 1 token as the first of many."""
    save(make_oracle(MOE), tmp_path)
    sampling = SamplingParams(max_tokens=20, detect_repetition=False)
    with LLM(tmp_path, dtype="bfloat16", backend=backend, num_threads=2) as llm:
        together = [output.outputs[0].token_ids for output in llm.generate(prompts(4), sampling)]
        assert [len(tokens) for tokens in together] == [20] * 4
        if backend == "native":
            assert [llm.generate([ids], sampling)[0].outputs[0].token_ids for ids in prompts(4)] == together


def test_every_end_token_of_generation_config_stops(tmp_path: Path) -> None:
    oracle = make_oracle(DENSE, seed=2)
    answers = [greedy(oracle, ids, 30) for ids in prompts(2)]
    ends = [answers[0][10], next(token for token in answers[1] if token not in answers[0])]
    save(oracle, tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=ends[0])
    edit_json(tmp_path / "generation_config.json", eos_token_id=ends)
    with LLM(tmp_path, num_threads=1) as llm:
        outputs = llm.generate(prompts(2), SamplingParams(max_tokens=30, detect_repetition=False))
    for output, answer in zip(outputs, answers):
        first = next(i for i, token in enumerate(answer) if token in ends)
        assert output.outputs[0].token_ids == answer[: first + 1]
        assert output.outputs[0].finish_reason == "stop"


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose padding rows would win every choice."""
    folder = tmp_path_factory.mktemp("padded")
    save(make_oracle(DENSE, vocab_size=ROWS, eos_token_id=END), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][END + 1 :] *= 20
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_padding_rows_are_never_chosen(padded: Path) -> None:
    greedily = SamplingParams(max_tokens=20, ignore_eos=True, detect_repetition=False, logprobs=5)
    hot = SamplingParams(max_tokens=20, ignore_eos=True, detect_repetition=False, temperature=5.0, seed=1)
    text = "Größe: 4"
    (padded / "tokenizer.json").unlink(missing_ok=True)
    with LLM(padded, num_threads=1) as llm:
        bare = llm.generate([[1, 2, 3]], greedily)[0].outputs[0]
        assert max(bare.token_ids) > END, "without a tokenizer nothing says which rows are padding"
        with pytest.raises(PromptError, match=r"no tokenizer\.json"):
            llm.generate([text])
    write_tokenizer(padded)
    with LLM(padded, num_threads=1) as llm:
        outputs = llm.generate([text, text], [greedily, hot])
        assert len(outputs[0].prompt_token_ids) == len(text.encode()), "Qwen3 puts nothing before a prompt"
        for output in outputs:
            answer = output.outputs[0]
            assert len(answer.token_ids) == 20
            assert max(answer.token_ids) <= END
            assert answer.text == llm.tokenizer.decode(answer.token_ids)  # type: ignore[union-attr]
        logprobs = outputs[0].outputs[0].logprobs
        assert logprobs is not None
        assert all(max(step) <= END for step in logprobs)
        assert all(step[token].rank == 1 for step, token in zip(logprobs, outputs[0].outputs[0].token_ids))


@pytest.mark.parametrize(("begins", "ends"), [(False, False), (True, False), (False, True), (True, True)])
def test_what_stands_before_a_prompt_is_for_tokenizer_json_to_say(begins: bool, ends: bool, tmp_path: Path) -> None:
    """bos_token_id of config.json is not asked; an end token that embedding models append is no part of a prompt."""
    save(make_oracle(LLAMA, vocab_size=ROWS, head_dim=16, bos_token_id=BEGIN), tmp_path)
    write_tokenizer(tmp_path, begins, ends)
    with LLM(tmp_path, num_threads=1) as llm:
        assert llm.tokenizer is not None
        output = llm.generate(["<|end|>ab"], SamplingParams(max_tokens=1))[0]
        plain = llm.tokenizer.encode("ab", parse_special=True)
        assert output.prompt_token_ids == [BEGIN] * begins + [END, *plain]


def test_random_weights_of_a_folder_with_config_alone(tmp_path: Path) -> None:
    config = make_oracle(MOE, eos_token_id=95).config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [MOE]}, default=str))
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, detect_repetition=False)

    def run(**options: Any) -> list[list[int]]:
        with LLM(tmp_path, num_threads=1, **options) as llm:
            return [output.outputs[0].token_ids for output in llm.generate(prompts(3), sampling)]

    first = run(random_weights=True)
    assert run(random_weights=1) == first
    assert run(random_weights=1, backend="reference") == first
    assert run(random_weights=0) != first
    run(random_weights=True, dtype="bfloat16")
    with pytest.raises(WeightsError, match="no safetensors file"):
        LLM(tmp_path)
    for value in (-1, "yes", 0.5, None):
        with pytest.raises(ConfigError, match=r"random_weights=.* must be True, False or a seed"):
            LLM(tmp_path, random_weights=value)  # type: ignore[arg-type]


def test_what_is_refused(tmp_path: Path) -> None:
    save(make_oracle(DENSE), tmp_path)
    with LLM(tmp_path, num_threads=1) as llm:
        with pytest.raises(PromptError, match="reads text only"):
            llm.generate([{"prompt": [1], "images": ["page.png"]}])
        with pytest.raises(PromptError, match="token id 96 is outside the vocabulary, 0 to 95"):
            llm.generate([[96]])
        with pytest.raises(CapacityError, match="prompt has 200000 tokens but max_model_len is 320"):
            llm.generate([[1] * 200_000])
        with pytest.raises(ConfigError, match="reads text only"):
            _ = llm.processor
    with pytest.raises(ConfigError, match=r"'qwen3-0\.6b' is a preset, which has no weights"):
        LLM("qwen3-0.6b")
    edits = {
        r"model 'GPT2LMHeadModel' is not implemented; known: .*Qwen3MoeForCausalLM": {
            "architectures": ["GPT2LMHeadModel"]
        },
        r"config\.json: architectures='Qwen3ForCausalLM'": {"architectures": "Qwen3ForCausalLM"},
        r"config\.json: model_type is missing": {"model_type": ...},
        r"quantization_config: quant_method='exl9' is not supported": {"quantization_config": {"quant_method": "exl9"}},
    }
    config = (tmp_path / "config.json").read_text(encoding="utf-8")
    for message, changes in edits.items():
        edit_json(tmp_path / "config.json", **changes)
        with pytest.raises(ConfigError, match=message):
            LLM(tmp_path)
        (tmp_path / "config.json").write_text(config, encoding="utf-8")


def test_a_decode_step_allocates_nothing_but_its_logits(padded: Path) -> None:
    """Also with padding rows to mask."""
    from torch.profiler import ProfilerActivity, profile

    from pagelens.config import EngineConfig
    from pagelens.core import build_engine

    write_tokenizer(padded)
    engine = build_engine(EngineConfig(str(padded), backend="native", num_threads=1))
    sampling = SamplingParams(max_tokens=20, ignore_eos=True, detect_repetition=False)
    for index, ids in enumerate(prompts(3)):
        engine.add_request(engine.inputs.build(ids, sampling, str(index)))
    for _ in range(5):
        engine.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        assert len(engine.step()) == 3
    sizes = [event.self_cpu_memory_usage for event in prof.events() if event.self_cpu_memory_usage > 0]
    assert sizes == [3 * ROWS * torch.float32.itemsize]
    engine.close()
