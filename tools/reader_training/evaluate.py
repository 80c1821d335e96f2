"""Character error rate of a reader on fresh pages, read through the engine (or, for comparison, the training model).

A reported page has held-out words only, digits, punctuation and strings of symbols included; texts are compared
character by character, line breaks included.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .data import collate, load_tokenizer, write_json
from .fonts import DEFAULT_FONT_DIR, NEVER_TRAINED, TRAINED, FontSet, load_fonts
from .model import PROMPTS, Reader, load_reader
from .pages import TILE, Layout, Page, draw_page
from .words import Words

MAX_TOKENS = 260
READ_LEVEL = 0.4  # how wide lines are; the number of lines is given
CHECK_SEED = 7
BOOTSTRAP = 1000
ENGINE_GROUP = 16  # pages handed to the engine at once

Read = Callable[[Sequence[Page], str, Layout, bool], list[str]]  # pages, mode, the same as a layout, markdown


@dataclass(frozen=True)
class Score:
    """cer = edits / characters over all pages; error is one standard error of it (bootstrap over pages)."""

    pages: int
    characters: int
    cer: float
    error: float
    exact: float


@dataclass(frozen=True)
class Task:
    """One line of the report."""

    name: str
    families: str  # "trained" or the name of a family kept for evaluation
    mode: str  # the engine's
    layout: Layout
    lines: tuple[int, int] | None = (2, 4)
    min_characters: int = 0


def edit_distance(a: str, b: str) -> int:
    """Least number of insertions, deletions and replacements of characters that turn a into b (Levenshtein)."""
    other = np.frombuffer(b.encode("utf-32-le"), np.uint32)
    index = np.arange(len(b) + 1)
    previous = index
    for i, char in enumerate(a, 1):
        replaced = np.minimum(previous[:-1] + (other != ord(char)), previous[1:] + 1)
        # An insertion chain is a running minimum of (value - column).
        current = np.concatenate([[i], replaced])
        previous = np.minimum.accumulate(current - index) + index
    return int(previous[-1])


def score(pages: Sequence[Page], answers: Sequence[str]) -> Score:
    """Compare answers with the pages' texts, exactly as they are."""
    rows = np.array([(edit_distance(page.text, answer), len(page.text)) for page, answer in zip(pages, answers)])
    pick, n = np.random.default_rng(0), len(rows)
    totals = [rows[pick.integers(0, n, n)].sum(0) for _ in range(BOOTSTRAP)]
    edits, characters = rows.sum(0)
    error = float(np.std([e / c for e, c in totals]))
    return Score(n, int(characters), float(edits / characters), error, float((rows[:, 0] == 0).mean()))


def training_pages(
    words: Words,
    fonts: FontSet,
    layout: Layout,
    markdown: bool,
    n: int,
    level: Callable[[Layout, float], float],
    seed: int = CHECK_SEED,
) -> list[Page]:
    """Pages of the training mix of lengths."""
    r = np.random.default_rng(seed)
    return [draw_page(r, words, fonts, layout, level(layout, r.random()), markdown) for _ in range(n)]


def fresh_pages(fonts: FontSet, task: Task, markdown: bool, n: int, seed: int) -> list[Page]:
    """n pages of a task, strictly held-out words; pages with another number of lines, or too short, are redrawn."""
    r, words = np.random.default_rng(seed), Words(strict=True)
    pages: list[Page] = []
    while len(pages) < n:
        lines = int(r.integers(task.lines[0], task.lines[1] + 1)) if task.lines else None
        level = 1.0 if task.layout.grid else READ_LEVEL
        for _ in range(1000):
            page = draw_page(r, words, fonts, task.layout, level, markdown, lines)
            drawn = sum(1 for line in page.text.split("\n") if line)
            if lines in (None, drawn) and len(page.text) >= task.min_characters:
                break
        else:
            raise ValueError(f"1000 pages in a row did not fit the task {task.name!r}; its view is too small for it")
        pages.append(page)
    return pages


def read_with_training_model(
    model: Reader, tokenizer: Tokenizer, pages: Sequence[Page], layout: Layout, markdown: bool
) -> list[str]:
    """Texts read by the network of this folder, greedily, in float32."""
    answers: list[str] = []
    for i in range(0, len(pages), ENGINE_GROUP):
        batch = collate(pages[i : i + ENGINE_GROUP], tokenizer, layout, markdown)
        answers += [tokenizer.decode(ids, skip_special_tokens=False) for ids in model.generate(batch, MAX_TOKENS)]
    return answers


def training_reader(folder: str) -> Read:
    """A Read through the training model."""
    model, tokenizer = load_reader(folder), load_tokenizer(os.path.join(folder, "tokenizer.json"))

    def read(pages: Sequence[Page], mode: str, layout: Layout, markdown: bool) -> list[str]:
        return read_with_training_model(model, tokenizer, pages, layout, markdown)

    return read


def engine_reader(
    folder: str, dtype: str = "auto", backend: str = "auto", threads: int = 0, weights: str = "auto"
) -> Read:
    """A Read through the public API of the installed package, with its defaults for everything else."""
    try:
        from pagelens import LLM, SamplingParams
    except ImportError as error:
        raise RuntimeError(
            f"the engine cannot be imported ({error}); install it with `pip install -e .`, or use --through training"
        ) from error
    llm = LLM(folder, dtype=dtype, backend=backend, num_threads=threads or None, weights=weights)
    params = SamplingParams(max_tokens=MAX_TOKENS)

    def read(pages: Sequence[Page], mode: str, layout: Layout, markdown: bool) -> list[str]:
        prompt = "<image>" + PROMPTS["md" if markdown else "plain"]
        answers: list[str] = []
        for i in range(0, len(pages), ENGINE_GROUP):
            group = pages[i : i + ENGINE_GROUP]
            requests = [{"prompt": prompt, "images": [page.image], "mode": mode} for page in group]
            answers += [output.outputs[0].text for output in llm.generate(requests, params)]
        return answers

    return read


def _config(folder: str) -> dict[str, Any]:
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        values: dict[str, Any] = json.load(file)
    return values


def stored_base_size(folder: str) -> int:
    """Side of the whole-page view that a reader's config.json names."""
    return int(_config(folder)["processor"]["base_size"])


def with_base_size(folder: str, base_size: int, scratch: str) -> str:
    """A copy of a reader's folder whose config.json names another whole-page view (the engine follows no links)."""
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copyfile(os.path.join(folder, name), os.path.join(scratch, name))
    values = _config(folder)
    values["processor"]["base_size"] = base_size
    write_json(os.path.join(scratch, "config.json"), values)
    return scratch


def tasks(base_size: int) -> list[Task]:
    """The figures that are reported for a reader with this whole-page view."""
    view, tiles = Layout(base_size), Layout(base_size, (2, 2), TILE)
    name = f"base {base_size}, 2-4 lines"
    return [
        Task(f"{name}, trained families", "trained", "base", view),
        *(Task(f"{name}, {f.name} (never trained)", f.name, "base", view) for f in NEVER_TRAINED),
        Task(f"tiles 2x2 + {base_size}, >= 150 characters, trained", "trained", "gundam", tiles, None, 150),
    ]


@dataclass(frozen=True)
class Source:
    """Which reader is measured, and how it is run. base_size 0: the one of its config.json; threads 0: all."""

    folder: str
    through: str = "engine"
    base_size: int = 0
    font_dir: str = DEFAULT_FONT_DIR
    dtype: str = "auto"
    backend: str = "auto"
    threads: int = 0
    weights: str = "auto"


def read_tasks(source: Source, n: int, seed: int, markdown: bool) -> Iterator[tuple[Task, list[Page], list[str]]]:
    """Every reported task with n fresh pages and what is read from them. Raises MissingFontsError."""
    fonts = {"trained": load_fonts(TRAINED, source.font_dir)}
    fonts |= {family.name: load_fonts([family], source.font_dir) for family in NEVER_TRAINED}
    base_size = source.base_size or stored_base_size(source.folder)
    with tempfile.TemporaryDirectory() as scratch:
        copy = with_base_size(source.folder, base_size, scratch)
        if source.through == "engine":
            read = engine_reader(copy, source.dtype, source.backend, source.threads, source.weights)
        else:
            read = training_reader(copy)
        for task in tasks(base_size):
            pages = fresh_pages(fonts[task.families], task, markdown, n, seed)
            yield task, pages, read(pages, task.mode, task.layout, markdown)


def report(source: Source, n: int, seed: int, markdown: bool) -> dict[str, Any]:
    """Print and return the figures of a reader."""
    result: dict[str, Any] = {"seed": seed, "prompt": "md" if markdown else "plain", "through": source.through}
    print(f"{'':60s} pages  chars  CER %   +-  exact %")
    for task, pages, answers in read_tasks(source, n, seed, markdown):
        s = score(pages, answers)
        result[task.name] = asdict(s)
        figures = f"{s.pages:5d} {s.characters:6d} {100 * s.cer:6.2f} {100 * s.error:5.2f} {100 * s.exact:7.1f}"
        print(f"{task.name:60s} {figures}", flush=True)
    return result


def samples(source: Source, out: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Write n pages of each reported task as PNG into `out`; returns the index of their texts and what was read."""
    index: list[dict[str, Any]] = []
    for markdown in (False, True):
        for number, (task, pages, answers) in enumerate(read_tasks(source, n, seed, markdown)):
            for i, (page, answer) in enumerate(zip(pages, answers)):
                prompt = "md" if markdown else "plain"
                name = f"{number}-{prompt}-{i}.png"
                page.image.save(os.path.join(out, name))
                errors = edit_distance(page.text, answer)
                entry = {"file": name, "task": task.name, "mode": task.mode, "prompt": "<image>" + PROMPTS[prompt]}
                index.append({**entry, "text": page.text, "read": answer, "errors": errors})
    return index
