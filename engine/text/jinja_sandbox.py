"""Jinja with limits: a template can neither reach outside, nor run for ever, nor fill the memory.

Every loop step, call and joined text counts against a budget for one rendering. Filters and text methods are the ones
that chat templates use; whatever could blow a small template up (format, center, "x" * 10**9) is missing or counted.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.runtime import Context, Undefined

from .marked_text import Marks

MAX_TEMPLATE_CHARS = 2**18
MAX_STEPS = 500_000
MAX_CHARS = 2**26
MAX_INT_BITS = 4096
_FILTERS = frozenset(
    {
        "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last", "length",
        "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round", "safe", "select",
        "selectattr", "sort", "trim", "unique", "upper",
    }
)  # fmt: skip
_TEXT_METHODS = frozenset(
    {
        "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdecimal", "isdigit", "islower",
        "isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
        "replace", "rfind", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "upper",
    }
)  # fmt: skip
_GLOBALS = ("range", "dict", "namespace", "cycler", "joiner")


class TemplateFault(Exception):
    """What went wrong in a template, in a sentence."""


class _Budget:
    """What one rendering may still do."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks
        self._steps = MAX_STEPS
        self._chars = MAX_CHARS

    def step(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise TemplateFault(f"it takes more than the limit of {MAX_STEPS} steps, as one that loops does")

    def build(self, num_chars: int) -> None:
        self.step()
        self._chars -= num_chars
        if self._chars < 0:
            raise TemplateFault(f"it builds more than the limit of {MAX_CHARS} characters")

    def text(self, text: str) -> str:
        self.build(len(text))
        return self.marks.wrap(text) if type(text) is str else text


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with the running rendering's budget. One environment serves one template, for many threads."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
            finalize=_finalize,
            cache_size=0,
        )
        self.running = threading.local()
        self.filters = {name: call for name, call in self.filters.items() if name in _FILTERS}
        self.filters.update(
            tojson=_tojson, join=_join, replace=_replace, string=_string, loop_steps=_loop_steps, concat=_concat
        )
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    @property
    def budget(self) -> _Budget:
        budget: _Budget = self.running.budget
        return budget

    def call(*args: Any, **kwargs: Any) -> Any:
        # `self` and `context` are positional so that a macro may have arguments of these names, as in the base class.
        self, _, function = args[0], args[1], args[2]
        budget = self.budget
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            if function.__name__ == "join" and len(args) == 4:
                args = (*args[:3], [_text_of(item, budget) for item in args[3]])
            _check_text_call(budget, owner, function.__name__, args[3:])
        result = jinja2.sandbox.SandboxedEnvironment.call(*args, **kwargs)
        if isinstance(result, str):
            return budget.text(result)
        budget.build(len(result) if isinstance(result, list) else 0)
        return result

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is not None:
            raise TemplateFault(f"it calls {value.__name__}() of a text, which is not supported")
        return None

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            self.budget.build(_size(left) + _size(right))
        elif operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                if left.bit_length() + right.bit_length() > MAX_INT_BITS:
                    raise TemplateFault(f"it multiplies beyond the limit of {MAX_INT_BITS} bits")
                self.budget.step()
            else:
                count = left if isinstance(left, int) else right
                self.budget.build((_size(left) + _size(right)) * max(0, count if isinstance(count, int) else 0))
        elif operator == "**" or isinstance(left, str):
            raise TemplateFault(f"it uses {operator!r} on {type(left).__name__}, which is not supported")
        result = super().call_binop(context, operator, left, right)
        return self.budget.marks.wrap(result) if type(result) is str else result


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks text for training; here it only passes it on."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        body: list[jinja2.nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class CompiledTemplate:
    """A template that can be run."""

    def __init__(self, environment: _Environment, template: jinja2.Template) -> None:
        self._environment = environment
        self._template = template

    def run(self, variables: dict[str, Any], marks: Marks) -> str:
        """What the template prints. Raises TemplateFault if it fails or exceeds a limit."""
        budget = self._environment.running.budget = _Budget(marks)
        pieces = []
        try:
            for piece in self._template.generate(variables):
                budget.build(len(piece))
                pieces.append(piece)
        except TemplateFault:
            raise
        except RecursionError as error:
            raise TemplateFault("its macros call each other without end, as deep as the limit of recursion") from error
        except Exception as error:
            # A template is a program: it can fail in as many ways as one.
            raise TemplateFault(_sentence(error)) from error
        finally:
            del self._environment.running.budget
        return "".join(pieces)


def compile_template(source: str) -> CompiledTemplate:
    """Compile a template. Raises TemplateFault if it is not one."""
    environment = _Environment()
    try:
        tree = environment.parse(source)
        for loop in list(tree.find_all(jinja2.nodes.For)):
            if loop.recursive:
                raise TemplateFault(f"line {loop.lineno} has a recursive loop, which is not supported")
            loop.iter = _filter(loop.iter, "loop_steps", environment)
        _replace_concat(tree, environment)
        return CompiledTemplate(environment, environment.from_string(tree))
    except TemplateFault:
        raise
    except Exception as error:
        raise TemplateFault(_sentence(error)) from error


def _filter(node: jinja2.nodes.Node, name: str, environment: _Environment) -> jinja2.nodes.Filter:
    result = jinja2.nodes.Filter(cast(jinja2.nodes.Expr, node), name, [], [], None, None, lineno=node.lineno)
    result.set_environment(environment)
    return result


def _replace_concat(tree: jinja2.nodes.Node, environment: _Environment) -> None:
    """a ~ b becomes a filter: Jinja joins texts without asking the sandbox."""
    for parent in [tree, *tree.find_all(jinja2.nodes.Node)]:
        for field, value in list(parent.iter_fields()):
            if isinstance(value, jinja2.nodes.Concat):
                setattr(parent, field, _concat_filter(value, environment))
            elif isinstance(value, list):
                value[:] = [
                    _concat_filter(item, environment) if isinstance(item, jinja2.nodes.Concat) else item
                    for item in value
                ]


def _concat_filter(node: jinja2.nodes.Concat, environment: _Environment) -> jinja2.nodes.Filter:
    items = jinja2.nodes.List(node.nodes, lineno=node.lineno)
    items.set_environment(environment)
    return _filter(items, "concat", environment)


def _check_text_call(budget: _Budget, owner: str, name: str, args: tuple[Any, ...]) -> None:
    if name not in _TEXT_METHODS:
        raise TemplateFault(f"it calls {name}() of a text, which is not supported")
    if name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        budget.build((owner.count(args[0]) + 1) * len(args[1]))
    elif name == "join" and args:
        budget.build(sum(map(len, args[0])) + len(owner) * len(args[0]))
    else:
        budget.build(len(owner))


@jinja2.pass_environment
def _loop_steps(environment: _Environment, items: Iterable[Any]) -> Iterator[Any]:
    budget = environment.budget
    for item in items:
        budget.step()
        yield item


@jinja2.pass_environment
def _concat(environment: _Environment, items: list[Any]) -> str:
    return _join(environment, items)


@jinja2.pass_environment
def _join(environment: _Environment, items: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    budget = environment.budget
    if attribute is not None:
        items = [environment.getitem(item, attribute) for item in items]
    texts = [_text_of(item, budget) for item in items]
    budget.build(sum(map(len, texts)) + len(d) * len(texts))
    return budget.marks.wrap(d.join(texts))


@jinja2.pass_environment
def _replace(environment: _Environment, text: Any, old: str, new: str, count: int | None = None) -> str:
    budget = environment.budget
    text = _text_of(text, budget)
    budget.build((text.count(old) + 1) * len(new))
    return budget.text(text.replace(old, new, -1 if count is None else count))


@jinja2.pass_environment
def _string(environment: _Environment, value: Any) -> str:
    return environment.budget.text(_text_of(value, environment.budget))


@jinja2.pass_environment
def _finalize(environment: _Environment, value: Any) -> str:
    return _text_of(value, environment.budget)


@jinja2.pass_environment
def _tojson(
    environment: _Environment,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: nothing is escaped for HTML."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise TemplateFault(f"tojson has indent={indent!r}; the limit is 16")
    if isinstance(value, Undefined):
        raise TemplateFault("tojson is given a value that is not defined")
    _count(value, environment.budget)
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    budget = environment.budget
    return budget.text(budget.marks.escape_non_ascii(text) if ensure_ascii else text)


def _raise_exception(message: Any) -> None:
    raise TemplateFault(f"it refuses the conversation: {str(message)[:300]}")


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(str(pattern)[:100])


def _text_of(value: Any, budget: _Budget) -> str:
    if isinstance(value, str):
        return value
    _count(value, budget)
    return str(value)


def _count(value: Any, budget: _Budget) -> None:
    """Count every item that writing a value down will visit: lists that share lists can be huge in few lines."""
    budget.step()
    if isinstance(value, dict):
        for item in value.values():
            _count(item, budget)
    elif isinstance(value, list | tuple):
        for item in value:
            _count(item, budget)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 1


def _sentence(error: Exception) -> str:
    line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return f"{type(error).__name__}: {str(error)[:300]}{line}"
