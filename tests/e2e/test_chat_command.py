"""`pagelens generate` and `pagelens chat`: streams, JSON, a terminal, switches, refusals."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_cases import small_tokenizer
from helpers.script_model import END, VOCAB, scripted_llm
from helpers.text_models import make_oracle, save

from pagelens import chat_command
from pagelens.cli import main
from pagelens.types import RequestOutput

THOUGHT = "<think>\nGreet \x1b[31mback.\n</think>\n\n"


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """say(answers, lines): run chat over a scripted model with these lines as stdin; returns the exit status."""

    def run(answers: list[str], lines: list[str], *options: str) -> int:
        monkeypatch.setattr(chat_command, "LLM", lambda model, **_: scripted_llm(Path(model), answers))
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return main(["chat", "--model", str(tmp_path), "--temperature", "0", *options])

    return run


def test_answers_alone_go_into_a_pipe(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert say([THOUGHT + "Hello!", "42."], ["Hi", "", "6*7?"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello!\n42.\n"
    assert err == ""


def test_json_has_everything_and_the_conversation_goes_on(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["Hi", "/no_think", "6*7? /think", "/think", "Bye"]
    assert say([THOUGHT + "Hello!", "42.", "Bye!"], lines, "--json", "--system", "Be brief.") == 0
    out, err = capsys.readouterr()
    first, second, third = (json.loads(line) for line in out.splitlines())
    assert (first["reasoning"], first["text"], first["tool_calls"]) == ("Greet \x1b[31mback.", "Hello!", [])
    assert (second["reasoning"], second["text"], second["finish_reason"]) == (None, "42.", "stop")
    assert third["text"] == "Bye!"
    # Of small_tokenizer's tokens all are bytes but the control tokens and double line breaks.
    turns = ["system\nBe brief.", "user\nHi", "assistant\nHello!", "user\n6*7? /think"]
    size = sum(len(turn) + 3 for turn in turns) + len("assistant\n") + 1
    assert second["prompt_tokens"] == size + 4, "earlier reasoning is gone, and the empty think block has four tokens"
    assert err == "pagelens: thinking is off\npagelens: thinking is on\n"


def test_thinking_is_dim_on_a_terminal(
    say: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert say([THOUGHT + "Hel\x07lo!", "<think>\nHm"], ["Hi", "Hi"]) == 0
    out = capsys.readouterr().out
    # What the model writes cannot steer the terminal.
    assert out == "\x1b[2mGreet \ufffd[31mback.\x1b[0m\n\nHel\ufffdlo!\n\x1b[2mHm\x1b[0m\n"


def test_budget_and_no_think(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert say(["<think>I could go on"], ["Hi"], "--json", "--thinking-budget", "5") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["reasoning"].startswith("I cou\n\nConsidering")
    assert answer["text"] == "ld go on"
    assert say(["Hello!"], ["Hi"], "--json", "--no-think", "--thinking-budget", "5") == 0
    assert json.loads(capsys.readouterr().out)["reasoning"] is None


def test_a_refused_message_is_one_line_and_the_next_goes_on(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert say(["Hello!"], ["long " * 1000, "Hi"]) == 2
    out, err = capsys.readouterr()
    assert out == "Hello!\n"
    assert err.count("\n") == 1
    assert "max_model_len is 4096" in err


def test_an_interrupted_answer_stays_in_the_conversation(
    say: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[str] = []

    def interrupt(text: str) -> None:
        printed.append(text)
        if len(printed) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat_command, "_write", interrupt)
    long_answer = " ".join(str(number) for number in range(800))
    assert say([long_answer, "Bye"], ["Hi", "Hi"]) == 0
    assert long_answer.startswith(printed[0])
    assert printed[1] == "\n", "nothing more of that answer"
    assert "".join(printed).endswith("Bye\n")
    assert "ended by 'abort'" in capsys.readouterr().err


def test_an_interrupted_answer_is_one_line_of_json(
    say: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = chat_command.ChatStream.result
    calls: list[chat_command.ChatStream] = []

    def interrupt(stream: chat_command.ChatStream) -> RequestOutput:
        calls.append(stream)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return result(stream)

    monkeypatch.setattr(chat_command.ChatStream, "result", interrupt)
    assert say([" ".join(str(number) for number in range(800))], ["Hi"], "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["finish_reason"] == "abort"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save(make_oracle("Qwen3ForCausalLM", vocab_size=VOCAB, eos_token_id=END), folder)
    small_tokenizer(folder)
    return folder


def test_generate_streams_a_text_and_prints_json(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", str(tiny), "--prompt", "Größe", "--max-tokens", "12", "--threads", "1"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert out == record["text"] + "\n"
    assert record["prompt"] == "Größe"
    assert record["prompt_tokens"] == len("Größe".encode())
    assert 1 <= record["tokens"] <= 12
    assert ("ended by 'length'" in err) == (record["finish_reason"] == "length")
    hot = [*command, "--json", "--temperature", "2", "--seed", "5"]
    texts = []
    for _ in range(2):
        assert main(hot) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != record["text"]


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        (["--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["--temperature", "-1"], "temperature must be between 0 and 100, got -1.0"),
        (["--max-tokens", "100000"], "max_model_len is 320"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "\udcff"], "lone surrogate"),
    ],
)
def test_refusals_are_one_line(options: list[str], needle: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(tiny), "--prompt", "Hi", "--threads", "1", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert needle in err


def test_models_that_cannot_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pagelens.reader import builtin_model

    assert main(["chat", "--model", str(builtin_model())]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert main(["chat", "--model", str(tmp_path / "missing")]) == 2
    assert "missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["chat"])
    assert "--model" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["generate", "--prompt", "Hi"], ["chat"]], ids=["generate", "chat"])
def test_a_preset_is_refused_before_its_weights_are_made(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_command, "LLM", lambda *_, **__: pytest.fail("a model was made"))
    assert main([*command, "--model", "qwen3-0.6b", "--random-weights"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "the preset 'qwen3-0.6b' has no tokenizer.json, so it takes no text" in err
    assert "pagelens bench --model qwen3-0.6b --random-weights" in err
