"""A checkpoint's own template: where it is found, what it may do, its limits; contents behave as themselves inside."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from pagelens.errors import ConfigError, PromptError
from pagelens.text.chat import Segment, segments_text
from pagelens.text.chat_template import ChatTemplate, find_template
from pagelens.text.jinja_sandbox import MAX_TEMPLATE_CHARS
from pagelens.text.marked_text import Marks

from ..helpers.chat_cases import ADDED_TOKENS, QWEN3_JINJA, texts

HI = [{"role": "user", "content": "Hi"}]


def render(source: str, content: str = "Hi", **options: Any) -> str:
    return segments_text(ChatTemplate(source, ADDED_TOKENS).render([{"role": "user", "content": content}], **options))


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert find_template(tmp_path, ADDED_TOKENS) is None
    config = tmp_path / "tokenizer_config.json"

    def found() -> str:
        template = find_template(tmp_path, ADDED_TOKENS)
        assert template is not None
        return segments_text(template.render(HI))

    config.write_text(json.dumps({"bos_token": None}))
    assert find_template(tmp_path, ADDED_TOKENS) is None
    config.write_text(json.dumps({"chat_template": "A{{ eos_token }}", "eos_token": {"content": "<e>"}}))
    assert found() == "A<e>"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    config.write_text(json.dumps({"chat_template": named, "eos_token": "<e>"}))
    assert found() == "D"
    (tmp_path / "chat_template.jinja").write_text("F{{ eos_token }}")
    assert found() == "F<e>"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("[1]", "not a JSON object"),
        ('{"chat_template": 1}', "must be a string"),
        ('{"chat_template": [{"name": "x", "template": "y"}]}', "named default"),
        ('{"chat_template": "{% if %}"}', "does not compile"),
        ('{"chat_template": "{{ x | nosuch }}"}', "nosuch"),
    ],
)
def test_damaged_files(tmp_path: Path, config: str, sentence: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ConfigError, match=sentence):
        find_template(tmp_path, ADDED_TOKENS)


def test_a_file_that_is_not_utf8_or_too_large(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        find_template(tmp_path, ADDED_TOKENS)
    path.write_text("x" * (MAX_TEMPLATE_CHARS + 1))
    with pytest.raises(ConfigError, match="limit"):
        find_template(tmp_path, ADDED_TOKENS)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "limit of .* steps"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion|steps"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}", "steps"),
        ("{% for i in range(10**9) %}{% endfor %}", r"'\*\*'"),
        ("{% for i in range(1000000000) %}{% endfor %}", "[Rr]ange"),
        ("{{ 'x' * 1000000000 }}", "limit of .* characters"),
        ("{{ [1] * 1000000000 }}", "limit of .* characters"),
        ("{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}", "characters"),
        ("{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "characters"),
        ("{% set n = namespace(s=9) %}{% for i in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}", "bits"),
        ("{% set n = namespace(s=9) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
         "steps"),
        ("{% set n = namespace(s=9) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s|tojson }}",
         "steps"),
        ("{% set s = 'x' * 100000 %}{{ s.replace('x', s) }}", "characters"),
        ("{% set s = 'x' * 100000 %}{{ s | replace('x', s) }}", "characters"),
        ("{% set s = 'x' * 100000 %}{{ [s, s] | map('replace', 'x', s) | list | length }}", "characters"),
        ("{% set s = 'x' * 100000 %}{{ s.join(range(100000)) }}", "characters"),
        ("{% set s = 'x' * 100000 %}{{ range(100000) | join(s) }}", "characters"),
        ("{{ 'x'.center(1000000000) }}", "center"),
        ("{{ '%1000000000d' % 1 }}", "'%'"),
        ("{{ '{:1000000000}'.format(1) }}", "format"),
        ("{{ messages.__class__.__mro__ }}", "unsafe|Security"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ messages[0].content._marks.unmark }}", "unsafe|Security"),
        ("{{ raise_exception('no ' ~ messages[0].role) }}", "refuses the conversation: no user"),
        ("{{ messages[0].nothing.more }}", "Undefined"),
        ("{{ nothing | tojson }}", "not defined"),
        ("{{ messages | tojson(indent=1000000) }}", "indent"),
        ("{% include 'x' %}", "loader"),
    ],
)  # fmt: skip
def test_limits(source: str, sentence: str) -> None:
    begin = time.monotonic()
    with pytest.raises(PromptError, match=sentence):
        render(source)
    # The step limit is what ends the slowest of these; some seconds allow for a loaded machine.
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("source", ["{% for a in b recursive %}{% endfor %}", "{{ 'x' | center(9) }}", "{{ lipsum( }}"])
def test_refused_when_compiled(source: str) -> None:
    with pytest.raises(ConfigError):
        ChatTemplate(source, ADDED_TOKENS)


def test_what_templates_are_given() -> None:
    assert render("{{ tools is none }}{{ add_generation_prompt }}{{ enable_thinking }}") == "TrueTrueTrue"
    assert render("{{ enable_thinking is false }}", thinking=False) == "True"
    assert render("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}!") == "Hi!"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{{ lipsum is defined }}") == "False"
    with pytest.raises(PromptError, match="always opens a think block"):
        render("<think>\n", thinking=False)


# What templates do with contents. Each prints the same as in transformers, for any content.
OPERATIONS = [
    "{{ m.content }}",
    "{{ m.content | trim }}|{{ m.content.strip() }}|{{ m.content.lstrip('<\n') }}|{{ m.content.rstrip('>') }}",
    "{{ m.content.split('</think>')[-1] }}|{{ m.content.split('</think>') | length }}|{{ m.content.split() | join }}",
    "{{ m.content.rsplit('<think>', 1)[0] }}|{{ m.content.partition('<')[2] }}|{{ m.content.rpartition('>')[0] }}",
    "{{ '</think>' in m.content }}{{ m.content.startswith('<think>') }}{{ m.content.endswith(('>', 'Hi')) }}",
    "{{ m.content.replace('<', '(') }}|{{ m.content | replace('think', 'thank') }}|{{ m.content.replace('', '.') }}",
    "{{ m.content | upper }}|{{ m.content.lower() }}",
    "{{ m.content[1:5] }}|{{ m.content[0] }}|{{ m.content | length }}|{{ m.content.find('<') }}",
    "{{ m.content | tojson }}|{{ [m.content, {m.content: 1}] | tojson }}|{{ m.content | tojson(ensure_ascii=True) }}",
    "{{ m.content == '<think>' }}{{ m.content != 'think' }}{{ m.content in ['think', 'Hi'] }}",
    "{% set x = '<think>' + m.content + '</think>' %}{{ x.split('</think>')[0].split('<think>')[-1] }}{{ x | length }}",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(m.content).startswith('<think>') }}{{ f(m.content) }}",
    "{{ '<' ~ m.content ~ '>' }}{{ [m.content, '>'] | join('<') }}{{ '<'.join([m.content, m.content]) }}",
    "{{ m.content.splitlines() | join(' ') }}{{ m.content.removeprefix('<think>').removesuffix('>') }}",
    "{{ m.content.count('<') }}{% for c in m.content %}{{ c }},{% endfor %}",
]


@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=60, deadline=None)
@given(texts.filter(bool))
def test_contents_behave_as_themselves(operation: str, content: str) -> None:
    source = "{% set m = messages[0] %}" + operation
    message = {"role": "user", "content": content}
    expected = render_jinja_template([[message]], chat_template=source)[0][0]
    assert render(source, content) == expected


@settings(max_examples=200, deadline=None)
@given(texts, texts)
def test_control_tokens_are_the_templates_alone(content: str, key: str) -> None:
    """Marks and contents side by side: "<" and a content "think" do not make a control token."""
    source = "<think>{% set c = messages[0].content %}<{{ c }}></{{ c }}>{{ '<' ~ c | trim ~ '>' }}{{ c }}<|im_end|>"
    segments = ChatTemplate(source, ADDED_TOKENS).render([{"role": "user", "content": content}])
    assert [segment.text for segment in segments if segment.is_control] == ["<think>", "<|im_end|>"]
    with_keys = "{% for k in tools[0].function.parameters %}<{{ k }}>{% endfor %}</think>"
    function = {"name": "f", "parameters": {key: 1, "think": 2, "im_end": 3}}
    segments = ChatTemplate(with_keys, ADDED_TOKENS).render(HI, [{"type": "function", "function": function}])
    assert [segment.text for segment in segments if segment.is_control] == ["</think>"]


def test_private_characters_of_a_message_survive() -> None:
    text = "".join(chr(0xF0000 + index) for index in range(50)) + "<think>"
    assert ChatTemplate("{{ messages[0].content }}", ADDED_TOKENS).render([{"role": "user", "content": text}]) == [
        Segment(text, False)
    ]


def test_tokens_of_letters_and_of_spaces() -> None:
    template = ChatTemplate("{{ messages[0].content }}STOP  <a b>", ["STOP", "  ", "<a b>"])
    segments = template.render([{"role": "user", "content": "STOP  <a b> xSTOPx"}])
    assert segments == [
        Segment("STOP  <a b> xSTOPx", False),
        Segment("STOP", True),
        Segment("  ", False),
        Segment("<a b>", True),
    ]
    assert ChatTemplate("<x>", []).render(HI) == [Segment("<x>", False)]


@given(st.lists(texts, min_size=2, max_size=5))
def test_marks_are_reversible(parts: list[str]) -> None:
    marks = Marks(ADDED_TOKENS, set("".join(parts)))
    for part in parts:
        assert marks.unmark(marks.mark(part)) == part
        assert hash(marks.mark(part)) == hash(part)


def test_threads_share_a_template() -> None:
    template = ChatTemplate(QWEN3_JINJA, ADDED_TOKENS)
    expected = {n: template.render([{"role": "user", "content": f"<{n}>"}] * 20) for n in range(4)}
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(10):
            if template.render([{"role": "user", "content": f"<{n}>"}] * 20) != expected[n]:
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
