"""Whole models on two backends: what is recorded of their answers, and how two answers are compared."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pagelens import LLM, SamplingParams
from pagelens.ops import SamplingCut
from pagelens.ops.reference_sampling import ReferenceSampling
from pagelens.runtime.sampler import Sampled, Sampler, SequenceSampler

QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
ROUNDING = 1e-5  # of logits of about 1 in float32; seen on the interpreted kernels: 4e-6


class Step(NamedTuple):
    """One choice: the logits [V] that it was made from, how, and the token."""

    logits: Tensor
    cut: SamplingCut
    token: int


Answer = list[Step]


@contextmanager
def recorded_answers() -> Iterator[dict[SequenceSampler, Answer]]:
    """Fills with the steps of every sequence, in the order of their first tokens; logits as zeros if they have no data.

    For answers without rules that change the logits: those here are the model's.
    """
    answers: dict[SequenceSampler, Answer] = {}
    draws: dict[SequenceSampler, random.Random] = {}
    sample = Sampler.sample

    def recorded(self: Sampler, logits: Tensor, samplers: list[SequenceSampler]) -> list[Sampled]:
        rows = torch.zeros(logits.shape) if logits.device.type == "meta" else logits.detach().cpu().clone()
        chosen = sample(self, logits, samplers)
        for row, sampler, found in zip(rows, samplers, chosen, strict=True):
            params = sampler.params
            draw = draws.setdefault(sampler, random.Random(params.seed)).random()
            cut = SamplingCut(params.temperature, params.top_k, params.top_p, params.min_p, draw)
            answers.setdefault(sampler, []).append(Step(row, cut, found.token))
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "sample", recorded)
        yield answers


def generate(folder: Path, prompts: Sequence[list[int]], sampling: SamplingParams, **options: Any) -> list[Answer]:
    """The answers of a model with random weights, all prompts together."""
    with recorded_answers() as answers, LLM(folder, random_weights=3, **options) as llm:
        outputs = llm.generate(list(prompts), sampling)
    found = list(answers.values())
    assert tokens_of(found) == [output.outputs[0].token_ids for output in outputs]
    return found


def tokens_of(answers: list[Answer]) -> list[list[int]]:
    return [[step.token for step in answer] for answer in answers]


def chose_by_its_logits(step: Step) -> bool:
    return ReferenceSampling().sample(step.logits[None].clone(), [step.cut]) == [step.token]


def differences(found: list[Answer], expected: list[Answer]) -> list[float]:
    """The largest difference of the logits at each step, answer by answer, up to the first that chose another token.

    From there an answer goes its own way. That step was a near-tie if its logits differ little and each side chose what
    its own logits say; the latter is asserted here of all steps, and that answers are as many and as long.
    """
    assert [len(answer) for answer in found] == [len(answer) for answer in expected]
    result = []
    for ours, theirs in zip(found, expected):
        for a, b in zip(ours, theirs):
            assert chose_by_its_logits(a)
            assert chose_by_its_logits(b)
            result.append(float((a.logits - b.logits).abs().max()))
            if a.token != b.token:
                break
    return result
