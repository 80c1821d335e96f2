"""LLM.embed and LLM.rerank over folders that transformers wrote, against transformers itself.

float32: the largest difference is at most 1e-5 of the largest value, as for logits (tests/models/test_qwen3.py).
"""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fake_model import FakeModel, fake_config, fake_engine
from helpers.pooling_models import (
    END_OF_TEXT,
    NO,
    ROWS,
    YES,
    ids_of,
    pooling_oracle,
    save_model,
    unit,
    write_tokenizer,
)
from helpers.text_models import all_logits, edit_json, greedy
from safetensors.torch import load_file, save_file

from pagelens import LLM, RerankOutput, SamplingParams
from pagelens.config import EngineConfig
from pagelens.core import Engine, build_engine
from pagelens.errors import CapacityError, ConfigError, EngineClosedError, EngineError, PromptError
from pagelens.models.qwen3 import TextModel
from pagelens.pooling import encode_pairs
from pagelens.quantize import quantize_checkpoint
from pagelens.runtime.state import RequestState
from pagelens.text.tokenizer import Tokenizer

DENSE, MOE, LLAMA = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "LlamaForCausalLM"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": (DENSE, {}),
    "dense, tied": (DENSE, {"tie_word_embeddings": True}),
    "experts": (MOE, {}),
    "llama": (LLAMA, {"head_dim": 16}),
}
TEXTS = ["The capital of China is Beijing.", "x", "Größe: 4 " * 20, "Gravity pulls <|im_end|> bodies."]
QUERY = "What is the capital of China?"
SHORT = SamplingParams(max_tokens=12, detect_repetition=False)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", MODELS, ids=lambda name: name.replace(" ", "_"))
def test_vectors_equal_transformers(case: str, backend: str, tmp_path: Path) -> None:
    """More texts than run together, in chunks; every dimension kept, and the first few."""
    architecture, changes = MODELS[case]
    oracle = pooling_oracle(architecture, **changes)
    save_model(oracle, tmp_path)
    with LLM(tmp_path, backend=backend, num_threads=2, max_num_seqs=3, max_batch_tokens=32) as llm:
        for dim in (None, 1, 7, 64):
            found = llm.embed(TEXTS, dim)
            assert found.dtype == np.float32
            expected = unit(oracle, [ids_of(text) for text in TEXTS], dim)
            print(f"{backend}, dim {dim}: {error(found, expected):.1e}")
            assert error(found, expected) <= 1e-5
            assert np.abs(np.linalg.norm(found, axis=1) - 1).max() <= 1e-6
        queries = llm.embed(QUERY, instruction="Find the city")
        assert error(queries, unit(oracle, [ids_of(f"Instruct: Find the city\nQuery:{QUERY}")])) <= 1e-5
        assert llm.embed([], 5).shape == (0, 5)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", MODELS, ids=lambda name: name.replace(" ", "_"))
def test_scores_equal_a_softmax_over_two_of_all_logits(case: str, backend: str, tmp_path: Path) -> None:
    architecture, changes = MODELS[case]
    oracle = pooling_oracle(architecture, seed=2, **changes)
    save_model(oracle, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    with LLM(tmp_path, backend=backend, num_threads=2, max_batch_tokens=100) as llm:
        for instruction in (None, "Judge harshly"):
            output = llm.rerank(QUERY, TEXTS, instruction)
            prompts = encode_pairs(tokenizer, QUERY, TEXTS, instruction)
            logits = torch.stack([all_logits(oracle, ids)[-1] for ids in prompts])
            expected = logits[:, [NO, YES]].double().softmax(-1)[:, 1].numpy()
            print(f"{backend}: {output.scores}, off by {np.abs(np.array(output.scores) - expected).max():.1e}")
            assert np.ptp(expected) > 0.02, "the documents do not differ enough to tell anything"
            assert np.abs(np.array(output.scores) - expected).max() <= 1e-5
            assert output.num_tokens == sum(map(len, prompts))
            assert [result.index for result in output] == [0, 1, 2, 3]
            best_first = np.argsort(-expected).tolist()
            assert [result.index for result in output.ranked()] == best_first
            assert [result.index for result in output.ranked(2)] == best_first[:2]
        assert llm.rerank(QUERY, []) == RerankOutput([], 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", [DENSE, MOE])
def test_company_and_chunks_change_no_bit(architecture: str, dtype: str, tmp_path: Path) -> None:
    save_model(pooling_oracle(architecture), tmp_path)
    rng = random.Random(3)
    texts = ["".join(rng.choices("abcdefgh ", k=rng.randint(1, 200))) for _ in range(9)]
    options: dict[str, Any] = {"dtype": dtype, "backend": "native"}
    with LLM(tmp_path, num_threads=1, **options) as llm:
        alone = np.concatenate([llm.embed(text) for text in texts])
        assert np.array_equal(llm.embed(texts), alone)
        scores = [llm.rerank(QUERY, [text]).scores[0] for text in texts]
        assert llm.rerank(QUERY, texts).scores == scores
    for chunk in (1, 16, 61):
        with LLM(tmp_path, num_threads=2, max_num_seqs=4, max_batch_tokens=chunk, **options) as llm:
            assert np.array_equal(llm.embed(texts), alone)
            if chunk > 1:
                assert llm.rerank(QUERY, texts).scores == scores


# ---- in the engine ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(pooling_oracle(seed=1), tmp_path_factory.mktemp("pooling"))


def add(engine: Engine, name: str, ids: list[int], is_pooled: bool) -> RequestState:
    request = engine.inputs.build(ids, SHORT, name)
    request.is_pooled = is_pooled
    return engine.add_request(request)


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def test_generation_and_pooling_share_passes_and_change_nothing(folder: Path) -> None:
    """Also with a cache so small that requests are preempted and computed again."""
    rng = random.Random(5)
    prompts = [rng.choices(range(ROWS), k=rng.randint(2, 50)) for _ in range(12)]
    engine = build_engine(EngineConfig(str(folder), backend="native", num_threads=1))
    expected = []
    for index, ids in enumerate(prompts):
        state = add(engine, "alone", ids, index % 2 == 0)
        run(engine)
        expected.append(state.output())
    layer = engine.runner.kv.keys[0]
    engine.close()
    token_bytes = 2 * 3 * layer.shape[2] * layer.shape[3] * 4
    for options in ({}, {"kv_cache_bytes": token_bytes * 4 * 18, "block_size": 4, "max_batch_tokens": 23}):
        engine = build_engine(
            EngineConfig(str(folder), backend="native", num_threads=1, check_blocks=True, **options)  # type: ignore[arg-type]
        )
        passes = []
        run_model = engine.runner.run

        def spy(batch: Any, run_model: Any = run_model, passes: Any = passes) -> Any:
            logits, hidden = run_model(batch)
            passes.append((len(logits), 0 if hidden is None else len(hidden)))
            return logits, hidden

        engine.runner.run = spy  # type: ignore[method-assign]
        states = [add(engine, str(index), ids, index % 2 == 0) for index, ids in enumerate(prompts)]
        run(engine)
        for state, alone in zip(states, expected):
            output = state.output()
            assert output.outputs[0].token_ids == alone.outputs[0].token_ids
            assert output.outputs[0].finish_reason == alone.outputs[0].finish_reason
            assert (output.pooled is None) == (alone.pooled is None)
            if output.pooled is not None:
                assert np.array_equal(output.pooled, alone.pooled)
                assert output.outputs[0].token_ids == []
        assert any(logits and pooled for logits, pooled in passes), "no pass held both kinds"
        assert sum(logits for logits, _ in passes) == 6 * 12, "logits are computed for tokens that are chosen, and only"
        assert sum(pooled for _, pooled in passes) == 6
        assert (engine.scheduler.num_preemptions > 0) == bool(options)
        engine.close()


def test_a_cancelled_text_frees_its_blocks(folder: Path) -> None:
    engine = build_engine(EngineConfig(str(folder), num_threads=1, max_batch_tokens=8, check_blocks=True))
    state = add(engine, "long", [5] * 60, True)
    engine.step()
    engine.cancel(state)
    assert not engine.has_work
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    assert state.output().pooled is None
    engine.close()


def test_values_that_are_not_finite_fail_their_text_alone(tmp_path: Path) -> None:
    save_model(pooling_oracle(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][ids_of("z")[0]] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with LLM(tmp_path, num_threads=1) as llm:
        for call in (lambda: llm.embed(["a", "z", "b"]), lambda: llm.rerank("q", ["a", "z", "b"])):
            with pytest.raises(EngineError, match=r"1: 64 of 64 values of the hidden state are not finite"):
                call()
        assert np.isfinite(llm.embed(["a", "b"])).all()


def test_closing_fails_texts_in_flight(folder: Path) -> None:
    engine = build_engine(EngineConfig(str(folder), num_threads=1))
    run_model, started, go = engine.runner.run, threading.Event(), threading.Event()

    def wait_and_run(batch: Any) -> Any:
        started.set()
        assert go.wait(60)
        return run_model(batch)

    engine.runner.run = wait_and_run  # type: ignore[method-assign]
    llm = LLM.from_engine(engine)
    errors: list[BaseException] = []

    def embed() -> None:
        try:
            llm.embed(TEXTS * 10)
        except BaseException as raised:
            errors.append(raised)

    caller = threading.Thread(target=embed)
    caller.start()
    assert started.wait(60)
    closer = threading.Thread(target=llm.close)
    closer.start()
    while llm._closed_because is None:
        closer.join(0.01)
    go.set()
    for thread in (caller, closer):
        thread.join(60)
        assert not thread.is_alive()
    assert [type(raised) for raised in errors] == [EngineClosedError]
    for call in (lambda: llm.embed("a"), lambda: llm.rerank("q", ["a"])):
        with pytest.raises(EngineClosedError):
            call()


def test_threads_may_embed_rerank_and_generate_at_once(folder: Path) -> None:
    with LLM(folder, num_threads=1, max_num_seqs=5, max_batch_tokens=64) as llm:
        calls = (
            lambda: llm.embed(TEXTS).tolist(),
            lambda: llm.rerank(QUERY, TEXTS).scores,
            lambda: [output.outputs[0].token_ids for output in llm.generate([[1, 2, 3], [4, 5]], SHORT)],
        )
        expected = [call() for call in calls]
        found: list[Any] = [None] * 9

        def work(index: int) -> None:
            found[index] = calls[index % 3]()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert found == expected * 3


# ---- checkpoints -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", [DENSE, MOE, LLAMA])
def test_a_decoder_without_prefix_and_head_only_embeds(architecture: str, tmp_path: Path) -> None:
    """As transformers saves the decoder itself."""
    oracle = pooling_oracle(architecture, **({"head_dim": 16} if architecture == LLAMA else {}))
    save_model(oracle, tmp_path)
    oracle.model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"embed_tokens.weight", "norm.weight", "layers.0.input_layernorm.weight"} <= names
    for backend in ("native", "reference"):
        with LLM(tmp_path, backend=backend, num_threads=1, max_batch_tokens=40) as llm:
            assert error(llm.embed(TEXTS), unit(oracle, [ids_of(text) for text in TEXTS])) <= 1e-5
            with pytest.raises(ConfigError, match=r"no output head.* cannot generate; use embed\(\)"):
                llm.generate("a")
            with pytest.raises(ConfigError, match=r"no output head.* cannot generate; use embed\(\)"):
                llm.submit([1, 2])
            with pytest.raises(ConfigError, match=r"no output head.* cannot rerank"):
                llm.rerank("a", ["b"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_missing_prefix_changes_nothing(tied: bool, tmp_path: Path) -> None:
    """With a tied head, or a head of its own, everything works."""
    oracle = pooling_oracle(seed=4, tie_word_embeddings=tied)
    expected = greedy(oracle, [1, 2, 3], 12)
    results = []
    for prefix in (True, False):
        folder = save_model(oracle, tmp_path / str(prefix), prefix)
        assert ("model.norm.weight" in load_file(folder / "model.safetensors")) == prefix
        with LLM(folder, num_threads=1) as llm:
            assert llm.generate([[1, 2, 3]], SHORT)[0].outputs[0].token_ids == expected
            results.append((llm.embed(TEXTS).tolist(), llm.rerank(QUERY, TEXTS)))
    assert results[0] == results[1]


def test_tensors_in_memory_may_lack_the_prefix_too(folder: Path) -> None:
    engine = build_engine(EngineConfig(str(folder), num_threads=1))
    model = engine.runner.model
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    assert not TextModel.from_tensors(model.config, bare, torch.float32, model.ops).has_head  # type: ignore[attr-defined]
    engine.close()


# ---- what is refused -------------------------------------------------------------------------------------------------
def test_bad_input_is_named(folder: Path) -> None:
    with LLM(folder, num_threads=1, max_model_len=400) as llm:
        embed: Any = llm.embed
        rerank: Any = llm.rerank
        for dim in (0, 65, -1, 8.0, True, "8"):
            with pytest.raises(ConfigError, match=r"dim=.* must be an integer from 1 to 64, the model's hidden size"):
                embed("a", dim)
        assert embed("a", np.int64(8)).shape == (1, 8)
        faults: list[tuple[type[Exception], str, Any]] = [
            (PromptError, "text 1 is empty", lambda: embed(["a", ""])),
            (PromptError, "text 0 is empty", lambda: embed("")),
            (PromptError, "text 1 must be a string, not int", lambda: embed(["a", 3])),
            (PromptError, "texts must be a list of strings, not bytes", lambda: embed(b"a")),
            (PromptError, "texts must be a list of strings, not NoneType", lambda: embed(None)),
            (PromptError, "text 0: text has a lone surrogate", lambda: embed("\ud800")),
            (PromptError, "instruction must be None or a non-empty string, got ''", lambda: embed("a", None, "")),
            (PromptError, "instruction must be None or a non-empty string, got 3", lambda: rerank("a", ["b"], 3)),
            (PromptError, "query is empty", lambda: rerank("", ["a"])),
            (PromptError, "query must be a string, not list", lambda: rerank(["q"], ["a"])),
            (PromptError, "documents must be a list of strings, not str", lambda: rerank("q", "a")),
            (PromptError, "document 1 is empty", lambda: rerank("q", ["a", ""])),
            (PromptError, "document 0 must be a string, not NoneType", lambda: rerank("q", [None])),
            (
                CapacityError,
                "text 1: the text has 401 tokens but max_model_len is 400; shorten it or raise max_model_len",
                lambda: embed(["a", "b" * 400]),
            ),
            (CapacityError, "document 0: the text has .* tokens but max_model_len", lambda: rerank("q", ["b" * 400])),
        ]
        for kind, message, call in faults:
            with pytest.raises(kind, match=message):
                call()
        assert embed("b" * 399).shape == (1, 64), "a text may fill the context: no place is needed for an answer"


def test_a_text_may_fill_the_cache_and_no_more(folder: Path) -> None:
    token_bytes = 2 * 3 * 2 * 32 * 4  # keys and values, layers, heads, head_dim, float32
    with LLM(folder, num_threads=1, kv_cache_bytes=token_bytes * 64) as llm:
        assert llm.embed("b" * 63).shape == (1, 64)
        with pytest.raises(CapacityError, match=r"65 tokens but the KV-cache has room for 64; .*kv_cache_bytes"):
            llm.embed("b" * 64)


def test_models_that_cannot_pool(tmp_path: Path) -> None:
    save_model(pooling_oracle(), tmp_path)
    write_tokenizer(tmp_path, merges=())
    with LLM(tmp_path, num_threads=1) as llm:
        with pytest.raises(ConfigError, match=r"no such single tokens; use a reranking model"):
            llm.rerank("q", ["a"])
        assert llm.embed("a").shape == (1, 64)
    (tmp_path / "tokenizer.json").unlink()
    with LLM(tmp_path, num_threads=1) as llm, pytest.raises(ConfigError, match=r"need a tokenizer\.json"):
        llm.embed("a")
    reader = LLM.from_engine(fake_engine(FakeModel(fake_config(images=True))))
    with reader, pytest.raises(ConfigError, match="this one reads pages"):
        reader.embed("a")


def test_another_way_of_pooling_is_refused(tmp_path: Path) -> None:
    """Files of sentence-transformers, in both spellings."""
    save_model(pooling_oracle(), tmp_path)
    config = tmp_path / "1_Pooling" / "config.json"
    config.parent.mkdir()
    with LLM(tmp_path, num_threads=1) as llm:
        vectors = llm.embed(TEXTS)
        for good in ({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False}, {"pooling_mode": "lasttoken"}):
            config.write_text(json.dumps({"word_embedding_dimension": 64, **good}))
            assert np.array_equal(llm.embed(TEXTS), vectors)
        bad: Any
        config.write_text(json.dumps({"word_embedding_dimension": 64}))
        with pytest.raises(ConfigError, match=r"1_Pooling/config\.json: pooling without a mode .* only lasttoken is"):
            llm.embed(TEXTS)
        for bad in (
            {"pooling_mode_mean_tokens": True},
            {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True},
            {"pooling_mode": "mean"},
        ):
            config.write_text(json.dumps(bad))
            with pytest.raises(ConfigError, match=r"1_Pooling/config\.json: pooling .*mean.* only lasttoken is"):
                llm.embed(TEXTS)
        config.write_text("[1]")
        with pytest.raises(ConfigError, match=r"1_Pooling/config\.json: is not a JSON object"):
            llm.embed(TEXTS)
        config.unlink()
        for name in ("2_Dense", "2_Dense_1024"):
            (tmp_path / name).mkdir()
            with pytest.raises(ConfigError, match=f"{name}: a linear layer behind the pooling is not implemented"):
                llm.embed(TEXTS)
            (tmp_path / name).rmdir()


def test_a_packed_folder_is_pooled_as_its_source_says(tmp_path: Path) -> None:
    source = save_model(pooling_oracle(), tmp_path / "source")
    for name in ("1_Pooling", "2_Dense"):
        (source / name).mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    quantize_checkpoint(source, tmp_path / "packed", "int8", num_threads=1)
    with LLM(tmp_path / "packed", num_threads=1) as llm:
        with pytest.raises(ConfigError, match="2_Dense: a linear layer behind the pooling is not implemented"):
            llm.embed(TEXTS)
        (tmp_path / "packed" / "2_Dense").rmdir()
        assert llm.embed(TEXTS).shape == (4, 64)


def test_a_table_with_fewer_rows_than_the_tokenizer_has_tokens(tmp_path: Path) -> None:
    """The 4B and 8B embedding models have 151,665 rows, their tokenizer more tokens: those cannot be computed."""
    oracle = pooling_oracle(vocab_size=END_OF_TEXT + 1)
    save_model(oracle, tmp_path)
    with LLM(tmp_path, num_threads=1) as llm:
        assert error(llm.embed(TEXTS), unit(oracle, [ids_of(text) for text in TEXTS])) <= 1e-5
        with pytest.raises(PromptError, match=r"document 0: token id 260 is outside the vocabulary, 0 to 259"):
            llm.rerank("q", ["a"])


def test_random_weights_embed_and_rerank(tmp_path: Path) -> None:
    save_model(pooling_oracle(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    edit_json(tmp_path / "config.json", dtype="bfloat16")
    with LLM(tmp_path, num_threads=1, random_weights=True) as llm:
        assert llm.embed(TEXTS).shape == (4, 64)
        assert all(0 < score < 1 for score in llm.rerank(QUERY, TEXTS).scores)
