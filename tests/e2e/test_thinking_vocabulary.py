"""The thinking budget with Qwen's real vocabulary: a random Qwen3 of 151,936 rows, asked through chat."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
from helpers.package_data import package_file
from helpers.qwen_vocabulary import qwen_folder, qwen_tokenizer

from pagelens import LLM
from pagelens.runtime.thinking import STOP_TEXT
from pagelens.types import CompletionOutput

# qwen3.md section 6.
STOP_IDS = [
    271, 82796, 279, 7199, 882, 553, 279, 1196, 11, 358, 614, 311, 2968, 279, 6291, 3118, 389, 279, 7274, 5961, 1431,
    624, 151668, 271,
]  # fmt: skip
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "float32",
}
MAX_TOKENS = 110


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Its template is Qwen3's with an open think block at the end, as Thinking-2507 has it: noise opens none itself."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shutil.copy(qwen_folder() / "tokenizer.json", folder)
    template = package_file("trl", "trl/chat_templates/qwen3.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template + r"{{- '<think>\n' }}", encoding="utf-8")
    with LLM(folder, random_weights=4, num_threads=2) as made:
        yield made


def ask(llm: LLM, budget: int | None) -> CompletionOutput:
    messages = [{"role": "user", "content": "What is 2+2? </think> /no_think"}]
    sampling = {"max_tokens": MAX_TOKENS, "temperature": 1.0, "seed": 5, "detect_repetition": False}
    return llm.chat(messages, sampling, thinking_budget=budget)[0].outputs[0]


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_the_published_stop_text_ends_the_block(llm: LLM, budget: int) -> None:
    free = ask(llm, None)
    assert not {151645, 151667, 151668} & set(free.token_ids), "this model thinks for ever"
    answer = ask(llm, budget)
    end = answer.token_ids.index(151668) - STOP_IDS.index(151668)
    assert answer.token_ids[end : end + len(STOP_IDS)] == STOP_IDS
    assert answer.token_ids[:end] == free.token_ids[:end]
    # More than the budget only to finish a character, and no more than that needs.
    assert budget <= end <= budget + 3
    tokenizer = qwen_tokenizer()
    thoughts = [b"".join(map(tokenizer.id_to_bytes, free.token_ids[:count])) for count in range(budget, end + 1)]
    assert [is_cut(thought) for thought in thoughts[:-1]] == [True] * (end - budget)
    assert end == budget + 3 or not is_cut(thoughts[-1])
    assert answer.reasoning is not None
    assert answer.reasoning.endswith(STOP_TEXT.partition("\n</think>")[0].strip())
    assert answer.text.strip("\n") == tokenizer.decode(answer.token_ids[end + len(STOP_IDS) :]).strip("\n")
    assert len(answer.token_ids) == MAX_TOKENS


def is_cut(text: bytes) -> bool:
    """Whether it ends within a character: after a byte that begins one of more bytes than follow."""
    for num_bytes in range(1, min(3, len(text)) + 1):
        byte = text[-num_bytes]
        if byte >= 0xC2:
            return num_bytes < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4 if byte < 0xF5 else 1)
        if byte < 0x80:
            return False
    return False
