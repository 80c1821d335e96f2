"""The training tool of the built-in reader: what it draws, what it trains, what it exports, how it measures.

Drawn with the font that Pillow carries, so that no font needs to be installed; one test uses the real families and is
skipped, with the missing packages as its reason, where they are not.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import train_reader  # noqa: E402
from reader_training import evaluate, fonts, losses, recipe, words  # noqa: E402
from reader_training.data import collate, cut, load_tokenizer, make_tokenizer  # noqa: E402
from reader_training.loop import STATE, Settings, train  # noqa: E402
from reader_training.model import EOS, IMAGE, PAD, Reader, config, load_reader, save_reader  # noqa: E402
from reader_training.optim import Optimizer, Reducer, orthogonalised  # noqa: E402
from reader_training.pages import CLASSES, LAYOUTS, Page, draw_page  # noqa: E402

ASSETS = ROOT / "engine" / "assets" / "reader"
TOKENIZER = str(ASSETS / "tokenizer.json")
FONTS = fonts.built_in_fonts()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These tensors are tiny: more threads only wait for each other, for minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(seed: int, layout: str = "192", level: float = 0.4, markdown: bool = False) -> Page:
    r = np.random.default_rng(seed)
    return draw_page(r, words.Words(), FONTS, LAYOUTS[layout], level, markdown)


# ---- what is drawn


@pytest.mark.parametrize("layout", ["192", "256", "2x1", "2x2"])
def test_a_page_depends_on_its_seed_alone(layout: str) -> None:
    first, again, other = (draw(seed, layout) for seed in (11, 11, 12))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.glyphs == again.glyphs
    assert first.image.tobytes() != other.image.tobytes()


def test_held_out_words_are_in_no_training_text() -> None:
    source = words.Words()
    held_out = {w for part in words.word_lists() for w in part if words.is_held_out(w)} - set(words.COMMON)
    assert len(held_out) > 1000
    assert held_out.isdisjoint(source.words)
    assert held_out.isdisjoint(source.extra)
    r = np.random.default_rng(3)
    drawn = {source._training_word(r) for _ in range(20_000)}
    assert len(drawn) > 5000
    assert held_out.isdisjoint(drawn)


def test_reported_pages_have_no_training_word() -> None:
    source, r = words.Words(strict=True), np.random.default_rng(4)
    trained = {w for part in words.word_lists() for w in part if not words.is_held_out(w)} | set(words.COMMON)
    assert trained.isdisjoint(source.words)
    items = [source.one(r) for _ in range(5000)]
    plain = [item.lower() for item in items if item.isalpha()]
    assert len(plain) > 2000
    assert trained.isdisjoint(plain)
    assert any(any(c.isdigit() for c in item) for item in items)
    assert any(any(c in "!?;:$%" for c in item) for item in items)


@pytest.mark.parametrize("markdown", [False, True])
@pytest.mark.parametrize("layout", ["192", "256", "2x1", "2x2"])
def test_targets_point_at_the_characters(layout: str, markdown: bool) -> None:
    tokenizer, view = load_tokenizer(TOKENIZER), LAYOUTS[layout]
    pages = [draw(seed, layout, 1.0, markdown) for seed in range(20, 24)]
    batch = collate(pages, tokenizer, view, markdown)
    columns = (view.grid[0] * view.tile if view.grid else view.view) // 64
    checked = 0
    for page, ids, guide, cell in zip(pages, batch.target, batch.guide, batch.cell):
        n = int((ids >= 0).sum())
        assert ids[n - 1] == EOS
        assert tokenizer.decode(ids[: n - 1].tolist(), skip_special_tokens=False) == page.text
        spans = tokenizer.encode(page.text, add_special_tokens=False).offsets
        for (a, b), where, inside in zip(spans, guide.tolist(), cell.tolist()):
            row, column = divmod(where, columns + 1)
            label = page.labels[row * 4 + inside // 8, column * 8 + inside % 8]
            char = next((c for c in page.text[a:b] if c not in " \n"), None)
            if char is None or char == "#":
                continue
            # Two narrow characters may share a cell; then the label is the later one's, still of this page's text.
            assert label > 0
            checked += int(label == CLASSES[char])
    assert checked > 50


def test_labels_of_tiles_are_the_labels_of_the_page() -> None:
    page = draw(5, "2x2", 1.0)
    tiles = cut(page.labels, 2, 2)
    assert tiles.shape == (4, 12, 24)
    joined = np.block([[tiles[0], tiles[1]], [tiles[2], tiles[3]]])
    assert np.array_equal(joined, page.labels)


def test_fresh_pages_have_the_lines_that_were_asked_for() -> None:
    base, *_, tiled = evaluate.tasks(256)
    for page in evaluate.fresh_pages(FONTS, base, False, 12, seed=6):
        assert 2 <= len([line for line in page.text.split("\n") if line]) <= 4
    for page in evaluate.fresh_pages(FONTS, tiled, False, 3, seed=6):
        assert len(page.text) >= 150
        assert page.image.size == (384, 384)


# ---- fonts


def test_missing_fonts_are_named_with_their_packages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(fonts.MissingFontsError, match=r"18 of 18 .*apt-get install .*fonts-dejavu .*fonts-urw-base35"):
        fonts.load_fonts(fonts.TRAINED, str(tmp_path))
    empty = ["--font-dir", str(tmp_path)]
    assert train_reader.main([*empty, "train", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "fonts-jetbrains-mono" in error
    assert not (tmp_path / "out").exists()
    assert train_reader.main([*empty, "fonts"]) == 1
    assert "apt-get install fonts-cantarell" in capsys.readouterr().out


def test_fonts_are_found_by_name_in_other_places(tmp_path: Path) -> None:
    family = fonts.TRAINED[0]
    other = tmp_path / "TTF"
    other.mkdir()
    for file in (family.regular, family.bold):
        (other / os.path.basename(file)).write_bytes(b"")
    assert fonts.missing([family], str(tmp_path)) == []
    assert fonts.locate(family.regular, str(tmp_path)) == str(other / os.path.basename(family.regular))


def test_no_family_is_both_trained_and_kept() -> None:
    trained = {file for f in fonts.TRAINED for file in (f.regular, f.bold)}
    assert trained.isdisjoint({file for f in fonts.NEVER_TRAINED for file in (f.regular, f.bold)})
    assert all(f.since for f in fonts.TRAINED)
    assert not any(f.since for f in fonts.NEVER_TRAINED)


def test_installed_families_have_every_character() -> None:
    families = (*fonts.TRAINED, *fonts.NEVER_TRAINED)
    lost = fonts.missing(families)
    if lost:
        pytest.skip("training fonts are not installed: apt-get install " + " ".join(sorted({f.package for f in lost})))
    for family, pair in zip(families, fonts.load_fonts(families).pairs):
        for face in pair:
            missing_glyph = bytes(face.at(24).getmask("\uffff"))
            for char in CLASSES:
                assert face.advance(24, char) > 0
                assert bytes(face.at(24).getmask(char)) != missing_glyph, (family.name, char)


# ---- the tokenizer and the network


def test_tokenizer_has_the_special_tokens_and_loses_nothing() -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    assert tokenizer.token_to_id("<｜end▁of▁sentence｜>") == EOS
    assert tokenizer.token_to_id("<｜▁pad▁｜>") == PAD
    assert tokenizer.token_to_id("<image>") == IMAGE
    text = "# Zürich, 12345.6%\n\n- a • b\t{x_y}~ <td>é漢</td>\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_a_new_tokenizer_has_the_same_special_ids() -> None:
    made, shipped = make_tokenizer(["some lines to learn merges from, again and again"] * 3), load_tokenizer(TOKENIZER)
    specials = {i: shipped.id_to_token(i) for i in range(15)}
    assert {i: made.id_to_token(i) for i in range(15)} == specials


@pytest.fixture(scope="module")
def batches() -> dict[str, tuple[object, str]]:
    tokenizer = load_tokenizer(TOKENIZER)
    made = {}
    for layout in ("192", "2x1"):
        made[layout] = collate([draw(seed, layout, 0.1) for seed in (31, 32)], tokenizer, LAYOUTS[layout], False)
    return made


@pytest.mark.parametrize("layout", ["192", "2x1"])
def test_training_steps_lower_the_loss(batches: dict, layout: str) -> None:
    torch.manual_seed(0)
    model, helpers = Reader(), losses.Helpers()
    optimizer = Optimizer(model, helpers, Reducer(1, 1))
    model.train()
    history = []
    for _ in range(3):
        parts = losses.compute(model, helpers, batches[layout], read=True)
        optimizer.zero()
        parts.total(1.0).backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in optimizer.params)
        extra, norm = optimizer.step(0.5, parts.values())
        assert torch.equal(extra, parts.values())
        assert 0 < norm < 1e4
        history.append(parts.total(1.0).item())
    assert history[-1] < 0.9 * history[0], history


def test_stages_move_only_their_own_part(batches: dict) -> None:
    torch.manual_seed(0)
    model, helpers = Reader(), losses.Helpers()

    def changed(read: bool, frozen: bool) -> set[str]:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = Optimizer(model, helpers, Reducer(1, 1))
        parts = losses.compute(model, helpers, batches["192"], read, frozen)
        parts.total(1.0).backward()
        optimizer.step(0.1, torch.zeros(1), encoder=not frozen, decoder=read)
        optimizer.zero()
        # Hidden matrices only: AdamW's weight decay moves the small rest a little in every stage.
        names = {n for n, p in model.named_parameters() if p.ndim > 1 and not torch.equal(p, before[n])}
        return {n for n in names if ".blocks." in n or "model.layers." in n}

    model.train()
    dense = changed(read=False, frozen=False)
    assert dense
    assert not [n for n in dense if n.startswith("model.layers.") and "mlp.gate.w" not in n]
    assert not [n for n in changed(read=True, frozen=True) if ".blocks." in n and "rel_pos" not in n]


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(1)
    for shape in ((2, 32, 96), (2, 96, 32)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(*shape)))
        # The coefficients aim at 0.7 to 1.2, not at exactly 1, and four steps leave the smallest a little below.
        assert values.min() > 0.4
        assert values.max() < 1.3


def test_the_sum_over_processes_is_the_sum() -> None:
    reducer = Reducer(2, 10)
    parts = [torch.arange(6.0).view(2, 3), torch.full((2, 3), 10.0)]
    runs = [threading.Thread(target=reducer, args=(rank, parts[rank])) for rank in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(20)
    assert torch.equal(parts[0], torch.arange(6.0).view(2, 3) + 10)
    assert torch.equal(parts[0], parts[1])


# ---- schedules and whole runs


def test_recipes_begin_and_end_as_described() -> None:
    assert recipe.scratch(0.1).read is False
    assert recipe.scratch(0.1).families == fonts.BASE
    assert set(recipe.scratch(0.3).layouts) == {"192", "256"}
    assert "2x2" in recipe.tiles(0.6).layouts
    assert recipe.scratch(0.6).families == 0
    for make in recipe.RECIPES.values():
        points = [make(t) for t in np.linspace(0, 1, 201)]
        assert all(0 <= p.rate <= 1 and sum(p.layouts.values()) == pytest.approx(1) for p in points)
        assert points[-1].rate == 0
    assert recipe.helper_weight(0.5) == 1
    assert recipe.helper_weight(0.99) == 0


def tiny_settings(out: Path, **changes: object) -> Settings:
    base = Settings(str(out), TOKENIZER, "continue", world=1, check_pages=0, batch_scale=0.05, built_in_font=True)
    return replace(base, log_every=1, **changes)


def test_a_run_by_steps_is_repeatable_and_resumable(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(tiny_settings(tmp_path / name, steps=2))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    train(tiny_settings(tmp_path / "a", steps=3, resume=True))
    resumed = load_file(tmp_path / "a" / "model.safetensors")
    assert any(not torch.equal(first[name], resumed[name]) for name in first)
    steps = [json.loads(line).get("step") for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [s for s in steps if s] == [1, 2, 3]
    assert (tmp_path / "a" / STATE).exists()


def test_resuming_nothing_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(tiny_settings(tmp_path / "none", steps=1, resume=True))


# ---- what is exported, and how it is measured


def test_exported_tensors_are_the_built_in_readers(tmp_path: Path) -> None:
    shipped = load_file(ASSETS / "model.safetensors")
    torch.manual_seed(2)
    save_reader(Reader(), str(tmp_path))
    made = load_file(tmp_path / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in made.items()} == {n: (t.shape, t.dtype) for n, t in shipped.items()}
    again = load_reader(str(tmp_path)).export()
    assert all(torch.equal(again[name], made[name]) for name in made)
    assert json.loads((ASSETS / "config.json").read_text()) == config()
    assert os.path.getsize(ASSETS / "model.safetensors") <= 12_000_000


def test_the_engine_reads_what_the_training_model_reads() -> None:
    tasks = evaluate.tasks(config()["processor"]["base_size"])
    through_training = evaluate.training_reader(str(ASSETS))
    through_engine = evaluate.engine_reader(str(ASSETS), dtype="float32", threads=1)
    for task in (tasks[0], tasks[-1]):
        pages = evaluate.fresh_pages(FONTS, task, False, 2, seed=8)
        expected = through_training(pages, task.mode, task.layout, False)
        assert through_engine(pages, task.mode, task.layout, False) == expected
        assert all(expected)


def test_another_whole_page_view_is_a_copy_with_one_change(tmp_path: Path) -> None:
    source = tmp_path / "reader"
    shutil.copytree(ASSETS, source)
    (tmp_path / "copy").mkdir()
    copy = evaluate.with_base_size(str(source), 192, str(tmp_path / "copy"))
    assert evaluate.stored_base_size(copy) == 192
    assert evaluate.stored_base_size(str(source)) == config()["processor"]["base_size"]


@settings(max_examples=60, deadline=None)
@given(st.text("abc\n", max_size=12), st.text("abc\n", max_size=12))
def test_edit_distance_equals_the_plain_recurrence(a: str, b: str) -> None:
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            replaced = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(replaced, table[i - 1][j] + 1, table[i][j - 1] + 1)
    assert evaluate.edit_distance(a, b) == table[-1][-1]


def test_scores_count_characters_and_pages() -> None:
    pages = [draw(seed) for seed in (41, 42)]
    perfect = evaluate.score(pages, [page.text for page in pages])
    assert (perfect.cer, perfect.exact, perfect.error) == (0, 1, 0)
    silent = evaluate.score(pages, [pages[0].text, ""])
    assert silent.exact == 0.5
    assert silent.cer == pytest.approx(len(pages[1].text) / silent.characters)
    assert silent.error > 0
