"""A checkpoint's own chat template, run by Jinja's sandbox with limits on steps and sizes.

Templates come from the checkpoint folder only, never from callers of the API. They see the same environment as in
transformers (trim_blocks, lstrip_blocks, tojson, raise_exception, strftime_now, break and continue, {% generation %}),
minus what chat templates have no use for: only the filters and text methods listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import ConfigError, PromptError
from ..loading.strict_json import read_json_object, shown
from .chat import Segment, opens_thinking
from .chat_messages import check_messages, check_tools
from .jinja_sandbox import MAX_TEMPLATE_CHARS, CompiledTemplate, TemplateFault, compile_template
from .marked_text import Marks

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
MAX_CONFIG_BYTES = 16 * 2**20
_TOKEN_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """A chat template ready to render. Thread-safe.

    source          the Jinja text
    control_tokens  the tokenizer's (Tokenizer.control_tokens): recognised where the template writes them, and nowhere
                    else
    label           what to call the template in errors
    token_texts     further variables for the template: "bos_token" and its like
    Raises ConfigError if it is too long or does not compile.
    """

    def __init__(
        self,
        source: str,
        control_tokens: Collection[str],
        label: str = "chat template",
        token_texts: Mapping[str, str] | None = None,
    ) -> None:
        self._label = label
        self._control_tokens = frozenset(control_tokens)
        self._token_texts = dict(token_texts or {})
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ConfigError(f"{label} has {len(source)} characters; the limit is {MAX_TEMPLATE_CHARS}")
        try:
            self._template: CompiledTemplate = compile_template(source)
        except TemplateFault as fault:
            raise ConfigError(f"{label} does not compile: {fault}; correct the file, or remove it") from fault
        self._chars = frozenset(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[Segment]:
        """The conversation as a prompt (ChatRenderer.render). `thinking` is the template's enable_thinking.

        Raises PromptError for bad messages or tools, if the template refuses the conversation, fails or exceeds a
        limit, and for thinking=False if the template opens a think block all the same.
        """
        chat, functions = check_messages(messages), check_tools(tools)
        used = set(self._chars)
        _collect_chars([chat, functions], used)
        marks = Marks(self._control_tokens, used)
        variables = {
            **self._token_texts,
            "messages": [_mark_message(message, marks) for message in chat],
            "tools": marks.mark_all(functions) or None,
            "documents": None,
            "add_generation_prompt": bool(add_generation_prompt),
            "enable_thinking": bool(thinking),
        }
        try:
            text = self._template.run(variables, marks)
        except TemplateFault as fault:
            raise PromptError(
                f"{self._label} failed on this conversation: {fault}; change the conversation, or correct the template"
            ) from fault
        segments = marks.segments(text)
        if add_generation_prompt and not thinking and opens_thinking(segments):
            raise PromptError(f"thinking=False is not possible: {self._label} always opens a think block")
        return segments


def find_template(folder: str | Path, control_tokens: Collection[str]) -> ChatTemplate | None:
    """The template of a checkpoint folder: chat_template.jinja, else "chat_template" of tokenizer_config.json, or None.

    Of a list of named templates the one called "default" is taken. Raises ConfigError if a file is damaged, too large,
    or holds no template that can be used.
    """
    folder = Path(folder)
    path = folder / TEMPLATE_FILE
    source: Any = None
    label = f"{folder.name}/{TEMPLATE_FILE}"
    token_texts: dict[str, str] = {}

    def fail(reason: str) -> NoReturn:
        raise ConfigError(f"{folder.name}/{CONFIG_FILE}: {reason}")

    if (folder / CONFIG_FILE).is_file():
        config = read_json_object(folder / CONFIG_FILE, MAX_CONFIG_BYTES, fail)
        source = config.get("chat_template")
        token_texts = {key: text for key in _TOKEN_KEYS if (text := _token_text(config.get(key))) is not None}
    if path.is_file():
        source = _read_template(path, label)
    elif source is not None:
        label = f"{folder.name}/{CONFIG_FILE}: chat_template"
        source = _default_template(source, fail)
    if source is None:
        return None
    return ChatTemplate(source, control_tokens, label, token_texts)


def _read_template(path: Path, label: str) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            # One character more than allowed is enough to be refused.
            return file.read(MAX_TEMPLATE_CHARS + 1)
    except OSError as error:
        raise ConfigError(f"{label}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{label}: not UTF-8 at byte {error.start}") from error


def _default_template(source: Any, fail: Callable[[str], NoReturn]) -> str:
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        if "default" not in named:
            fail("chat_template is a list without a template named default")
        source = named["default"]
    if not isinstance(source, str):
        fail(f"chat_template must be a string, got {shown(source)}")
    return source


def _token_text(value: Any) -> str | None:
    """A token as tokenizer_config.json writes it: its text, or an object with its text as content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _mark_message(message: dict[str, Any], marks: Marks) -> dict[str, Any]:
    """Everything but the role and the form of a message is content."""
    result: dict[str, Any] = {}
    for key, value in message.items():
        if key == "role":
            result[key] = value
        elif key == "tool_calls":
            result[key] = [{name: _mark_part(name, part, marks) for name, part in call.items()} for call in value]
        else:
            result[key] = marks.mark_all(value)
    return result


def _mark_part(name: str, part: Any, marks: Marks) -> Any:
    return part if name == "type" else marks.mark_all(part)


def _collect_chars(value: Any, used: set[str]) -> None:
    if isinstance(value, str):
        used.update(value)
    elif isinstance(value, list):
        for item in value:
            _collect_chars(item, used)
    elif isinstance(value, dict):
        for key, item in value.items():
            used.update(key)
            _collect_chars(item, used)
