"""Qwen3, Qwen3-MoE and Llama folders written by transformers, against transformers itself.

float32: the largest difference of a logit is at most 1e-5 of the largest logit (sums in another order; about 1e-6 is
what is measured). bfloat16: weights rounded alike, then about ten roundings of 2^-9 a layer, so a row's differences are
at most 2^-5 of its logits (root mean squares). That of the median row: a router may take another of two nearly equal
experts, which changes that one row and those that see it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.text_models import YARN, all_logits, edit_json, greedy, make_oracle, save
from helpers.tiny_models import Session
from safetensors.torch import load_file, save_file

from pagelens.errors import WeightsError
from pagelens.loading.checkpoint import open_checkpoint, read_config
from pagelens.loading.presets import PRESETS
from pagelens.loading.qwen3_config import read_text_config
from pagelens.models.qwen3 import TextModel
from pagelens.models.registry import class_of
from pagelens.models.rope import yarn_frequencies
from pagelens.ops.registry import as_ops, resolve_ops

DENSE, MOE, LLAMA = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "LlamaForCausalLM"
IDS = random.Random(4).choices(range(96), k=100)
WIDE = {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "group of 1": (DENSE, {"num_key_value_heads": 4}),
    "group of 2, tied": (DENSE, {"tie_word_embeddings": True}),
    "group of 8": (DENSE, {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16}),
    "group of 16": (DENSE, WIDE),
    "head_dim is hidden over heads": (DENSE, {"head_dim": 16}),
    "yarn": (DENSE, {"rope_parameters": YARN}),
    "yarn, every key": (
        DENSE,
        {
            "rope_parameters": YARN
            | {"mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}
        },
    ),
    "yarn, attention_factor": (MOE, {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    "experts": (MOE, {}),
    "experts, tied, not renormalised": (MOE, {"tie_word_embeddings": True, "norm_topk_prob": False}),
    "experts of 128, group of 16": (
        MOE,
        {**WIDE, "num_hidden_layers": 1, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 16},
    ),
    "experts and dense layers": (MOE, {"mlp_only_layers": [1]}),
    "experts in every second layer": (MOE, {"decoder_sparse_step": 2}),
    "experts in no layer": (MOE, {"mlp_only_layers": [0, 1, 2]}),
    "llama": (LLAMA, {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "llama, tied, one head a group": (LLAMA, {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 16}),
}


@contextmanager
def loaded(folder: Path, backend: str, dtype: torch.dtype = torch.float32) -> Iterator[TextModel]:
    config = class_of(read_config(folder)).read_config(read_config(folder))
    table = resolve_ops(backend, TextModel.op_cases(config, dtype), num_threads=1)  # type: ignore[arg-type]
    with open_checkpoint(folder) as checkpoint:
        yield TextModel.load(checkpoint, config, dtype, as_ops(table))
    table.close()


def session(model: TextModel) -> Session:
    return Session(model)  # type: ignore[arg-type]


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    assert result.shape == expected.shape
    return float((result - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "_"))
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    """Both backends; the prompt in one piece, in chunks and token by token."""
    architecture, changes = CASES[case]
    oracle = make_oracle(architecture, **changes)
    expected = all_logits(oracle, IDS)
    save(oracle, tmp_path)
    for backend in ("native", "reference"):
        with loaded(tmp_path, backend) as model:
            one_piece = session(model).feed(IDS)
            pieces = session(model)
            chunked = torch.cat([pieces.feed(IDS[:7]), pieces.feed(IDS[7:50]), pieces.feed(IDS[50:])])
            steps = session(model)
            one_by_one = torch.cat([steps.feed([token]) for token in IDS])
        errors = [error(logits, expected) for logits in (one_piece, chunked, one_by_one)]
        print(f"{backend}: {', '.join(f'{value:.1e}' for value in errors)}")
        assert max(errors) <= 1e-5


@pytest.mark.parametrize("architecture", [DENSE, MOE, LLAMA])
def test_greedy_tokens_over_200_steps(architecture: str, tmp_path: Path) -> None:
    changes = {"head_dim": 16} if architecture == LLAMA else {}
    oracle = make_oracle(architecture, seed=1, **changes)
    expected = greedy(oracle, IDS[:9], 200)
    save(oracle, tmp_path)
    with loaded(tmp_path, "native") as model:
        assert session(model).greedy(IDS[:9], None, 200)[0] == expected


@pytest.mark.parametrize("architecture", [DENSE, MOE])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bfloat16(architecture: str, backend: str, tmp_path: Path) -> None:
    oracle = make_oracle(architecture).bfloat16()
    save(oracle, tmp_path)
    expected = all_logits(oracle.float(), IDS)  # the rounded weights, computed exactly
    with loaded(tmp_path, backend, torch.bfloat16) as model:
        difference = session(model).feed(IDS) - expected
    found = float((difference.square().mean(-1) / expected.square().mean(-1)).sqrt().median())
    print(f"differences of the median row: {found:.1e} of its logits")
    assert found <= 2.0**-5


def test_stacked_experts_give_the_same_bits(tmp_path: Path) -> None:
    oracle = make_oracle(MOE, mlp_only_layers=[1])
    folders = [save(oracle, tmp_path / str(stacked), stacked) for stacked in (False, True)]
    names = [set(load_file(folder / "model.safetensors")) for folder in folders]
    assert "model.layers.0.mlp.experts.7.up_proj.weight" in names[0]
    assert "model.layers.0.mlp.experts.gate_up_proj" in names[1]
    for backend in ("native", "reference"):
        logits = []
        for folder in folders:
            with loaded(folder, backend) as model:
                logits.append(session(model).feed(IDS))
        assert torch.equal(*logits)


def test_tensors_in_memory_give_the_same_model(tmp_path: Path) -> None:
    oracle = make_oracle(MOE)
    for stacked in (False, True):
        folder = save(oracle, tmp_path / str(stacked), stacked)
        with loaded(folder, "native") as model:
            tensors = load_file(folder / "model.safetensors")
            built = TextModel.from_tensors(model.config, tensors, torch.float32, model.ops)
            assert torch.equal(session(built).feed(IDS), session(model).feed(IDS))


def test_a_tied_head_wins_over_a_copy_in_the_file(tmp_path: Path) -> None:
    oracle = make_oracle(DENSE, tie_word_embeddings=True)
    save(oracle, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = torch.zeros(96, 64)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    save_file(tensors, tmp_path / "model.safetensors")
    with loaded(tmp_path, "native") as model:
        assert error(session(model).feed(IDS), all_logits(oracle, IDS)) <= 1e-5


def load(folder: Path) -> None:
    with loaded(folder, "reference"):
        pass


def test_wrong_files_are_refused_by_tensor(tmp_path: Path) -> None:
    oracle = make_oracle(MOE)
    save(oracle, tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    gate = "model.layers.1.mlp.experts.5.gate_proj.weight"
    faults = {
        r"missing: 'model\.layers\.1\.mlp\.experts\.5\.gate_proj": {k: v for k, v in good.items() if k != gate},
        r"left over: 'model\.layers\.0\.self_attn\.q_proj\.bias": {
            **good,
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(128),
        },
        r"gate_proj\.weight' is \[33, 64\], needs \[32, 64\]": {**good, gate: torch.zeros(33, 64)},
    }
    for message, tensors in faults.items():
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(WeightsError, match=message):
            load(tmp_path)
    save_file(good, tmp_path / "model.safetensors")
    edit_json(tmp_path / "config.json", vocab_size=95)
    with pytest.raises(WeightsError, match=r"embed_tokens\.weight' is \[96, 64\], needs \[95, 64\]"):
        load(tmp_path)


def test_yarn_frequencies_of_the_published_setting() -> None:
    """qwen3.md sections 4.1 and 10: theta 1e6, 32,768 positions, factor 4."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read_text_config({**PRESETS["qwen3-8b"], "rope_scaling": scaling}).decoder
    assert config.max_position_embeddings == 131072
    assert config.yarn is not None
    assert config.yarn.attention_factor == pytest.approx(1.138629436111989, rel=1e-15)
    found = yarn_frequencies(config.yarn, 128, 1e6)
    values = {
        0: 1.0,
        1: 0.80584,
        22: 8.6596e-3,
        23: 6.9783e-3,
        24: 5.3753e-3,
        30: 1.0644e-3,
        39: 6.4904e-5,
        40: 4.4457e-5,
        41: 3.5825e-5,
        63: 3.1023e-7,
    }
    for place, value in values.items():
        assert float(found[place]) == pytest.approx(value, rel=5e-5), place
