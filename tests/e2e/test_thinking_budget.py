"""The thinking budget in the engine, with models made to think for ever: exact counts, batches, preemption, edges."""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from helpers.fake_model import EOS, FakeModel, fake_engine, kv_bytes

from pagelens import LLM, SamplingParams
from pagelens.errors import ConfigError, PromptError
from pagelens.runtime.thinking import STOP_TEXT
from pagelens.types import CompletionOutput, KVCacheView, NgramGuard

OPEN, CLOSE, TURN, START = 4, 5, 6, 9  # the model answers START with <think>
EURO = (60, 61, 62)  # its three bytes


class FakeTokenizer:
    """Ids 10 to 59 are single characters, and each word of an encoded text is one of them."""

    special_ids = frozenset({TURN})
    control_tokens = frozenset({"<think>", "</think>", "<turn>"})
    vocab_size = 64
    _ids: dict[str, int] = {"<think>": OPEN, "</think>": CLOSE, "<turn>": TURN}  # noqa: RUF012
    _bytes: dict[int, bytes] = {  # noqa: RUF012
        OPEN: b"<think>", CLOSE: b"</think>", TURN: b"<turn>", 60: b"\xe2", 61: b"\x82", 62: b"\xac",
    }  # fmt: skip

    def bos_id(self) -> None:
        return None

    def token_id(self, text: str) -> int | None:
        return self._ids.get(text)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        words = re.findall(r"</think>|\n+|[^\s<]+", text)
        return [self._ids.get(word, 10 + zlib.crc32(word.encode()) % 50) for word in words]

    def id_to_bytes(self, id_: int) -> bytes:
        return self._bytes.get(id_, chr(48 + id_).encode() if 10 <= id_ < 60 else b"")


STOP_IDS = FakeTokenizer().encode(STOP_TEXT, parse_special=True)


@dataclass
class Thinker(FakeModel):
    """Its logits depend on all it has seen; tokens in `never` are not chosen, `follows` says what must come after."""

    never: tuple[int, ...] = (EOS, OPEN, CLOSE, TURN, *EURO)
    follows: dict[int, int] = field(default_factory=lambda: {START: OPEN})

    def _logits(self, batch: Any, kv: KVCacheView, sequence: int, row: int) -> np.ndarray:
        logits = super()._logits(batch, kv, sequence, row)
        logits[list(self.never)] -= 100
        following = self.follows.get(int(batch.token_ids[row]))
        if following is not None:
            logits[following] += 1000
        return logits


def run(prompt: list[int], model: Thinker | None = None, max_tokens: int = 120, **options: Any) -> CompletionOutput:
    engine = fake_engine(model or Thinker(), FakeTokenizer())
    with LLM.from_engine(engine) as llm:
        return llm.generate([prompt], SamplingParams(max_tokens=max_tokens, **options))[0].outputs[0]


def test_the_stop_text_ends_the_block() -> None:
    assert STOP_IDS[-2] == CLOSE
    assert STOP_TEXT.endswith("now.\n</think>\n\n")
    assert len(STOP_IDS) > 10


@pytest.mark.parametrize("prompt", [[20, 21, START], [20, OPEN, 30]], ids=["model opens", "prompt opens"])
@pytest.mark.parametrize("budget", [1, 7, 64])
def test_the_block_is_closed_after_exactly_so_many_tokens(budget: int, prompt: list[int]) -> None:
    free = run(prompt)
    assert CLOSE not in free.token_ids, "without a budget this model thinks for ever"
    answer = run(prompt, thinking_budget=budget)
    end = (prompt[-1] == START) + budget
    assert answer.token_ids[:end] == free.token_ids[:end]
    assert answer.token_ids[end : end + len(STOP_IDS)] == STOP_IDS
    rest = answer.token_ids[end + len(STOP_IDS) :]
    assert len(rest) == 120 - end - len(STOP_IDS) > 0
    assert CLOSE not in rest
    assert rest == run(prompt + answer.token_ids[: end + len(STOP_IDS)], max_tokens=len(rest)).token_ids, (
        "the fed tokens are in the cache like any others"
    )
    assert answer.finish_reason == "length"


def traffic(seed: int, with_budgets: bool) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(seed)
    requests = []
    for index in range(9):
        prompt = [rng.randrange(10, 60) for _ in range(rng.randint(1, 9))] + [[START], [OPEN], [20]][index % 3]
        options: dict[str, Any] = [
            {},
            {"temperature": 1.0, "seed": index},
            {"ngram_guard": NgramGuard(3, 9)},
            {"presence_penalty": 1.0, "repetition_penalty": 1.2},
        ][index % 4]
        budget = rng.randint(1, 12) if index % 2 else None
        max_tokens = rng.randint(20, 45)
        if with_budgets:
            options = {**options, "thinking_budget": budget}
        requests.append((prompt, SamplingParams(max_tokens=max_tokens, **options)))
    return requests


@pytest.mark.parametrize("seed", range(2))
def test_in_a_crowd_with_preemptions_each_gets_what_it_gets_alone(seed: int) -> None:
    requests = traffic(seed, with_budgets=True)
    alone = [run(p, max_tokens=s.max_tokens or 0, **changes(s)).token_ids for p, s in requests]
    plain = [run(p, max_tokens=s.max_tokens or 0, **changes(s)).token_ids for p, s in traffic(seed, False)]
    budgeted = [s.thinking_budget is not None and p[-1] != 20 for p, s in requests]
    assert [a != b for a, b in zip(alone, plain)] == budgeted, "only those with a budget change"
    recomputed = cut = 0
    for max_batch_tokens in (5, 64):
        engine = fake_engine(
            Thinker(), FakeTokenizer(), kv_cache_bytes=kv_bytes(14), max_num_seqs=5, max_batch_tokens=max_batch_tokens
        )
        states = [engine.add_request(engine.inputs.build(p, s, str(i))) for i, (p, s) in enumerate(requests)]
        for _ in range(5000):
            if not engine.has_work:
                break
            engine.step()
            for sequence in (state.sequence for state in states if CLOSE in state.sequence.token_ids):
                recomputed += sequence.status == "waiting"
                cut += sequence.status == "running" and 1 < sequence.num_pending < len(STOP_IDS)
        assert [state.output().outputs[0].token_ids for state in states] == alone
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    assert recomputed > 0, "some request gave way with the stop text in its answer"
    assert cut > 0, "the stop text was computed in several chunks"


def changes(sampling: SamplingParams) -> dict[str, Any]:
    names = ("temperature", "seed", "ngram_guard", "presence_penalty", "repetition_penalty", "thinking_budget")
    return {name: getattr(sampling, name) for name in names}


@pytest.mark.parametrize("extra", [0, 1, 5])
def test_max_tokens_holds_while_the_stop_text_is_fed(extra: int) -> None:
    answer = run([20, OPEN], max_tokens=7 + extra, thinking_budget=7)
    assert answer.token_ids[7:] == STOP_IDS[:extra]
    assert (len(answer.token_ids), answer.finish_reason) == (7 + extra, "length")


@pytest.mark.parametrize(
    ("follows", "num_extra"),
    [
        ({OPEN: 60, 60: 61, 61: 62}, 2),  # complete after two more
        ({OPEN: 20, 20: 60, 60: 61, 61: 62}, 0),  # not begun yet
        ({OPEN: 60, 60: 60}, 3),  # never complete: at most three more
        ({OPEN: 60, 60: 20}, 1),  # broken off: nothing to wait for
        ({OPEN: 60, 60: CLOSE}, None),  # closed by the model meanwhile
    ],
)
def test_a_character_may_be_finished(follows: dict[int, int], num_extra: int | None) -> None:
    model = Thinker(follows=follows)
    answer = run([20, OPEN], model, max_tokens=60, thinking_budget=1)
    if num_extra is None:
        assert answer.token_ids[:2] == [60, CLOSE]
        assert STOP_IDS[1] not in answer.token_ids[2:4]
        return
    assert answer.token_ids[1 + num_extra : 1 + num_extra + len(STOP_IDS)] == STOP_IDS
    reasoning = answer.text.partition("</think>")[0]
    assert ("€" in reasoning) == (num_extra == 2)


def test_a_block_closed_by_the_model_is_left_alone() -> None:
    follows = {START: OPEN, OPEN: 20, 20: CLOSE, CLOSE: 30}
    prompt = [50, START]
    free = run(prompt, Thinker(follows=follows))
    assert free.token_ids[:4] == [OPEN, 20, CLOSE, 30]
    assert run(prompt, Thinker(follows=follows), thinking_budget=2) == free
    # A second block is part of the answer.
    again = {**follows, 30: OPEN, OPEN: 21, 21: CLOSE}
    free = run(prompt, Thinker(follows=again), detect_repetition=False)
    assert free.token_ids.count(OPEN) > 5
    assert run(prompt, Thinker(follows=again), thinking_budget=2, detect_repetition=False) == free


def test_an_answer_without_a_block_and_an_end_within_one() -> None:
    assert run([20], thinking_budget=2) == run([20])
    ended = run([20, OPEN], Thinker(follows={OPEN: 30, 30: EOS}), thinking_budget=2)
    assert (ended.token_ids, ended.finish_reason) == ([30, EOS], "stop")


def test_zero_is_thinking_off() -> None:
    free = run([20, START], max_tokens=30)
    answer = run([20, START], max_tokens=30, thinking_budget=0)
    assert free.token_ids[0] == OPEN
    assert OPEN not in answer.token_ids
    assert CLOSE not in answer.token_ids
    with pytest.raises(PromptError, match="thinking_budget=0, but the prompt ends inside a think block"):
        run([20, OPEN, 30], thinking_budget=0)
    # The block of an earlier turn that was never closed is not open here.
    assert run([20, OPEN, 30, TURN, 20], thinking_budget=0).finish_reason == "length"


def test_what_is_refused() -> None:
    for value in (-1, 1.5, True, "many"):
        with pytest.raises(ConfigError, match=r"SamplingParams\.thinking_budget must be"):
            SamplingParams(thinking_budget=value)  # type: ignore[arg-type]
    engine = fake_engine(Thinker())
    with LLM.from_engine(engine) as llm:
        with pytest.raises(ConfigError, match="thinking_budget=3 needs a model with the tokens <think> and </think>"):
            llm.generate([[20]], SamplingParams(thinking_budget=3))
        assert len(llm.generate([[20]], SamplingParams(thinking_budget=0, max_tokens=2))[0].outputs[0].token_ids) == 2


def test_a_loop_in_the_block_is_ended_by_the_budget() -> None:
    model = Thinker(follows={OPEN: 30, 30: 30})
    assert run([20, OPEN], model).finish_reason == "repetition"
    answer = run([20, OPEN], model, thinking_budget=40)
    assert answer.token_ids[:40] == [30] * 40
    assert answer.token_ids[40 : 40 + len(STOP_IDS)] == STOP_IDS
    assert len(answer.token_ids) >= 40 + len(STOP_IDS) + 8, "the answer is given its own time to repeat itself"
    # A loop after the block ends the answer as ever.
    model = Thinker(follows={STOP_IDS[-1]: 31, 31: 31})
    assert run([20, OPEN], model, thinking_budget=5).finish_reason == "repetition"


def test_fed_tokens_cannot_end_the_answer() -> None:
    whole = run([20, OPEN], thinking_budget=5)
    fed = FakeTokenizer().id_to_bytes(STOP_IDS[2]).decode()
    reasoning, after = whole.text[:5], whole.text.partition("</think>")[2][1:]
    assert fed not in reasoning, "or this test shows nothing"
    stopped = run([20, OPEN], thinking_budget=5, stop=[fed], stop_token_ids=[STOP_IDS[3]])
    assert stopped.token_ids[: 5 + len(STOP_IDS)] == whole.token_ids[: 5 + len(STOP_IDS)]
    # In the answer a stop string counts again.
    assert run([20, OPEN], thinking_budget=5, stop=[after[3:6]]).stop_reason == after[3:6]


def test_fed_tokens_have_no_log_probabilities_but_count_in_penalties() -> None:
    answer = run([20, OPEN], max_tokens=60, thinking_budget=5, logprobs=2, presence_penalty=2.0)
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(answer.token_ids) == 60
    empty = [index for index, step in enumerate(answer.logprobs) if not step]
    assert empty == list(range(5, 5 + len(STOP_IDS)))
    chosen = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids) if step]
    assert answer.cumulative_logprob == pytest.approx(sum(chosen))
    late = answer.token_ids[5 + len(STOP_IDS) :]
    plain = run([20, OPEN], max_tokens=60, thinking_budget=5).token_ids[5 + len(STOP_IDS) :]
    assert len(set(late) & set(STOP_IDS)) < len(set(plain) & set(STOP_IDS))
