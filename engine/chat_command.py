"""The work behind `pagelens generate` and `pagelens chat`: text as it comes on stdout, or JSON.

Thinking is shown dimmed on a terminal; into a file or a pipe only answers go (--json has both).
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator
from typing import Any

from .chat import ChatStream
from .cli import EXIT_OK, complain
from .errors import ConfigError, PagelensError
from .llm import LLM
from .loading.presets import find_description
from .types import RequestOutput, SamplingParams

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
SWITCHES = {"/think": True, "/no_think": False}


def generate(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Continue one prompt; returns the exit status."""
    _check_tokenizer(args)
    _prepare_streams()
    with LLM(args.model, **options) as llm:
        handle = llm.submit(args.prompt, SamplingParams.from_mapping(sampling_values(args)))
        if args.json:
            output = handle.result()
            answer = output.outputs[0]
            _print_json({"prompt": args.prompt, "text": answer.text, **_counts(output)})
        else:
            for piece in handle.stream_text():
                _write(_shown(piece))
            _write("\n")
            output = handle.result()
    _note_end(output)
    return EXIT_OK


def chat(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Talk until the input ends; returns the exit status, that of a refused input if any message was refused."""
    _check_tokenizer(args)
    _prepare_streams()
    status = EXIT_OK
    messages: list[dict[str, Any]] = [] if args.system is None else [{"role": "system", "content": args.system}]
    thinking = not args.no_think
    with LLM(args.model, **options) as llm:
        llm.chat_sampling(thinking)  # a model that cannot chat is refused before the first message
        for line in _lines():
            if line in SWITCHES:
                thinking = SWITCHES[line]
                print(f"pagelens: thinking is {'on' if thinking else 'off'}", file=sys.stderr)
                continue
            messages.append({"role": "user", "content": line})
            try:
                budget = args.thinking_budget if thinking else None
                stream = llm.stream_chat(messages, sampling_values(args), None, thinking, budget)
                output = _show(stream, args.json)
            except PagelensError as error:
                messages.pop()
                status = complain(str(error))
                continue
            _note_end(output)
            # The reasoning is left out: templates drop it from all turns but the current one.
            messages.append({"role": "assistant", "content": output.outputs[0].text})
    return status


def _check_tokenizer(args: argparse.Namespace) -> None:
    """Raises ConfigError for a preset, before gigabytes of random weights are made for it."""
    if args.random_weights and find_description(args.model, random_weights=True).folder is None:
        raise ConfigError(
            f"the preset {args.model!r} has no tokenizer.json, so it takes no text; "
            f"time it with `pagelens bench --model {args.model} --random-weights`, or give a checkpoint's folder"
        )


def sampling_values(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given."""
    values = {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}
    return {name: value for name, value in values.items() if value is not None}


def _lines() -> Iterator[str]:
    """Messages from stdin, without empty ones; a terminal gets a prompt, and Ctrl-D ends."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            if sys.stdin.isatty():
                print(file=sys.stderr)  # Ctrl-D leaves the cursor behind the prompt
            return
        if line.strip():
            yield line.strip()


def _show(stream: ChatStream, as_json: bool) -> RequestOutput:
    """Print one answer while it comes. Ctrl-C ends the answer; what there is of it stays in the conversation."""
    try:
        if not as_json:
            _print_pieces(stream)
        output = stream.result()
    except KeyboardInterrupt:
        stream.cancel()
        output = stream.result()
        if not as_json:
            _write(PLAIN + "\n" if sys.stdout.isatty() else "\n")
    if as_json:
        answer = output.outputs[0]
        calls = [{"name": call.name, "arguments": call.arguments} for call in answer.tool_calls]
        told = {"reasoning": answer.reasoning, "text": answer.text, "tool_calls": calls}
        _print_json({"role": "assistant", **told, **_counts(output)})
    return output


def _print_pieces(stream: ChatStream) -> None:
    is_terminal = sys.stdout.isatty()
    is_dim = False
    for delta in stream:
        if is_terminal and delta.reasoning:
            _write(_shown(delta.reasoning) if is_dim else DIM + _shown(delta.reasoning))
            is_dim = True
        if delta.text:
            _write(f"{PLAIN}\n\n{_shown(delta.text)}" if is_dim else _shown(delta.text))
            is_dim = False
    _write(PLAIN + "\n" if is_dim else "\n")


def _prepare_streams() -> None:
    # Neither a character that stdout's encoding lacks nor a byte that is no text may end the run.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _shown(text: str) -> str:
    """A model's text as it may be printed here: what a model writes must not steer a terminal."""
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, ensure_ascii=False), flush=True)


def _counts(output: RequestOutput) -> dict[str, Any]:
    answer = output.outputs[0]
    return {
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "tokens": len(answer.token_ids),
        "prefill_s": round(output.metrics.prefill_s, 6),
        "decode_s": round(output.metrics.decode_s, 6),
    }


def _note_end(output: RequestOutput) -> None:
    reason = output.outputs[0].finish_reason
    if reason != "stop":
        print(f"pagelens: ended by {reason!r}, the text may be incomplete", file=sys.stderr)
