"""Bad input to a text model: one clear error from LLM, one line and status 2 from the command line.

Each sentence names the value that is wrong, what is accepted, and what to do.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chat_cases import small_tokenizer
from helpers.quantized_checkpoints import FORMATS, make_quantized_checkpoint
from helpers.text_models import edit_json, make_oracle, save
from safetensors.torch import load_file, save_file

from pagelens import LLM
from pagelens.cli import main
from pagelens.errors import CapacityError, ConfigError, PagelensError, PromptError, WeightsError

HI = [{"role": "user", "content": "Hi"}]
EXPERT = "model.layers.1.mlp.experts.5.up_proj"
MOST_SECONDS = 20  # the slowest is the template that loops, some seconds on a loaded machine
Damage = Callable[[Path], object]


def config(**changes: Any) -> Damage:
    return lambda folder: edit_json(folder / "config.json", **changes)


def quantization(**changes: Any) -> Damage:
    return config(quantization_config={**FORMATS["gptq_int4"][1], **changes})


def template(source: str) -> Damage:
    return lambda folder: (folder / "chat_template.jinja").write_text(source, encoding="utf-8")


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / "model.safetensors")

    return damage


@dataclass(frozen=True)
class Bad:
    """error: the class; parts: of the sentence, in their order (the value, what is accepted, the remedy).

    model    "plain" (experts) or "gptq"
    damage   done to a copy of its folder
    options  of LLM; `arguments` are the same for the command line
    prompt   given to generate(); None: chat() is called instead
    """

    error: type[PagelensError]
    parts: tuple[str, ...]
    damage: Damage = lambda folder: None
    model: str = "plain"
    options: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    prompt: str | None = "!"


LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
KNOWN = ("Qwen3MoeForCausalLM", "use a checkpoint of one of these")
CASES: dict[str, Bad] = {
    "architecture": Bad(ConfigError, ("'GPT2LMHeadModel'", *KNOWN), config(architectures=["GPT2LMHeadModel"])),
    "model_type": Bad(ConfigError, ("'gpt2'", *KNOWN), config(architectures=..., model_type="gpt2")),
    "no top_k": Bad(
        ConfigError, ("config.json", "num_experts_per_tok is missing", "add it"), config(num_experts_per_tok=...)
    ),
    "top_k above all": Bad(
        ConfigError, ("num_experts_per_tok=9", "accepted: at most num_experts (8)"), config(num_experts_per_tok=9)
    ),
    "method": Bad(
        ConfigError,
        ("quant_method='exl9'", "accepted: fp8, gptq, awq, compressed-tensors", "use the original checkpoint"),
        config(quantization_config={"quant_method": "exl9"}),
    ),
    "no method": Bad(
        ConfigError,
        ("quantization_config", "quant_method is missing", "add it"),
        config(quantization_config={"bits": 4}),
    ),
    "bits": Bad(ConfigError, ("bits=3", "accepted: 4 or 8"), quantization(bits=3), "gptq"),
    "scales of another shape": Bad(
        WeightsError,
        (f"'{EXPERT}.scales' is [1, 32]", "[2, 32]", "download both again"),
        tensor(f"{EXPERT}.scales", lambda t: t[:1]),
        "gptq",
    ),
    "values of another shape": Bad(
        WeightsError,
        (EXPERT, "56 inputs", "group_size=32", "do not belong together"),
        tensor(f"{EXPERT}.qweight", lambda t: t[:-1]),
        "gptq",
    ),
    "values of another type": Bad(
        WeightsError,
        (f"'{EXPERT}.qweight' is", "I64", "I32"),
        tensor(f"{EXPERT}.qweight", lambda t: t.long()),
        "gptq",
    ),
    "weights": Bad(ConfigError, ("int5", "int8", "int4"), options={"weights": "int5"}, arguments=("--weights", "int5")),
    "weights twice": Bad(
        ConfigError,
        ("weights", "int4", "quantised already", "auto"),
        model="gptq",
        options={"weights": "int4"},
        arguments=("--weights", "int4"),
    ),
    "template that does not compile": Bad(
        ConfigError,
        ("chat_template.jinja does not compile", "line 2", "correct the file, or remove it"),
        template("{{ messages }}\n{% for message in %}"),
        prompt=None,
    ),
    "template that loops": Bad(
        PromptError,
        ("chat_template.jinja failed", "the limit of 500000 steps", "correct the template"),
        template(LOOPS),
        prompt=None,
    ),
    "template that calls itself": Bad(
        PromptError,
        ("chat_template.jinja failed", "without end", "correct the template"),
        template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        prompt=None,
    ),
    "a long prompt": Bad(
        CapacityError, ("200000 tokens", "max_model_len is 320", "shorten the prompt"), prompt="!" * 200_000
    ),
    "max_model_len": Bad(
        ConfigError, ("max_model_len=4000", "limit of 320", "lower it"), options={"max_model_len": 4000}
    ),
    "an empty prompt": Bad(PromptError, ("prompt is empty",), prompt=""),
}
COMMAND_CASES = [name for name, bad in CASES.items() if bad.arguments or not bad.options]  # the options that it has


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    save(make_oracle("Qwen3MoeForCausalLM", vocab_size=272), base / "plain")
    make_quantized_checkpoint(base / "gptq", "gptq_int4", "qwen3_moe")
    for folder in (base / "plain", base / "gptq"):
        small_tokenizer(folder)
    return {"plain": base / "plain", "gptq": base / "gptq"}


def damaged(bad: Bad, models: dict[str, Path], tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(models[bad.model], folder)
    bad.damage(folder)
    return folder


def assert_tells(text: str, parts: tuple[str, ...]) -> None:
    """One line with all parts in their order."""
    assert "\n" not in text
    at = 0
    for part in parts:
        found = text.find(part, at)
        assert found >= 0, f"{part!r} is not in {text[at:]!r}"
        at = found + len(part)


def answer(folder: Path, bad: Bad) -> None:
    with LLM(folder, num_threads=1, **bad.options) as llm:
        if bad.prompt is None:
            llm.chat(HI)
        else:
            llm.generate([bad.prompt])


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "_"))
def test_llm_tells(case: str, models: dict[str, Path], tmp_path: Path) -> None:
    bad = CASES[case]
    folder = damaged(bad, models, tmp_path)
    started = time.monotonic()
    with pytest.raises(PagelensError) as caught:
        answer(folder, bad)
    assert type(caught.value) is bad.error
    assert_tells(str(caught.value), bad.parts)
    assert time.monotonic() - started < MOST_SECONDS


@pytest.mark.parametrize("case", COMMAND_CASES, ids=lambda name: name.replace(" ", "_"))
def test_the_command_tells(
    case: str,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = CASES[case]
    folder = damaged(bad, models, tmp_path)
    arguments = ["--model", str(folder), "--threads", "1", *bad.arguments]
    if bad.prompt is None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
        command = ["chat", *arguments]
    else:
        command = ["generate", *arguments, "--prompt", bad.prompt]
    try:
        status = main(command)
    except SystemExit as end:  # argparse
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.startswith("pagelens")
    assert err.count("\n") == 1
    assert_tells(err.rstrip("\n"), bad.parts)


def test_the_models_themselves_are_good(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for folder in models.values():
        command = ["generate", "--model", str(folder), "--prompt", "!", "--max-tokens", "3", "--threads", "1", "--json"]
        assert main(command) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == 3
