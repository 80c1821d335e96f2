"""Figures, overlay and the output folder of a page."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pagelens.documents.draw import crop_figures, draw_boxes, label_color, save_page
from pagelens.documents.page import Page, build_page
from pagelens.errors import ImageError

WIDTH, HEIGHT = 200, 100


def tagged(label: str, boxes: str) -> str:
    return f"<|ref|>{label}<|/ref|><|det|>{boxes}<|/det|>"


def sample() -> tuple[Page, np.ndarray]:
    text = (
        f"{tagged('title', '[[100, 300, 900, 450]]')}\n# Hi\n\n{tagged('image', '[[0, 600, 500, 999]]')}\n"
        f"{tagged('text', '[[500, 600, 999, 999]]')}\nwords"
    )
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    image = np.stack([x, y, x + y], axis=2).astype(np.uint8)
    return build_page(text, WIDTH, HEIGHT), image


def test_figures_are_cut_out() -> None:
    page, image = sample()
    (crop,) = crop_figures(image, page)
    assert np.array_equal(np.asarray(crop), image[60:100, 0:100])


def test_overlay() -> None:
    page, image = sample()
    before = image.copy()
    overlay = np.asarray(draw_boxes(image, page))
    assert overlay.shape == image.shape
    assert np.array_equal(image, before)
    title, text = label_color("title"), label_color("text")
    left, top, right, bottom = page.blocks[0].boxes[0]
    for inset, inside in ((0, True), (3, True), (4, False)):  # the outline of a title is 4 pixels wide
        assert (tuple(overlay[(top + bottom) // 2, left + inset]) == title) == inside
        assert (tuple(overlay[bottom - 1 - inset, (left + right) // 2]) == title) == inside
    left, top, right, bottom = page.blocks[2].boxes[0]
    for inset, inside in ((0, True), (1, True), (2, False)):
        assert (tuple(overlay[(top + bottom) // 2, right - 1 - inset]) == text) == inside
    fill = (image[80, 150].astype(float) * (255 - 20) + np.array(text) * 20) / 255
    assert np.abs(overlay[80, 150] - fill).max() <= 1.5  # two roundings in the blend
    assert np.array_equal(overlay[5:14, 150], image[5:14, 150])  # outside all boxes and labels
    strip = overlay[page.blocks[0].boxes[0][1] - 15]
    assert strip[page.blocks[0].boxes[0][0]].tolist() == [255, 255, 255]


def test_colours_depend_on_the_label_alone() -> None:
    labels = ["title", "text", "image", "table", "list", "equation"]
    assert len({label_color(label) for label in labels}) == len(labels)
    assert label_color("title") == label_color("title")


@pytest.mark.parametrize("label", ["", "页眉 标题", "x" * 500, "a\nb\tc", "\ud800"])
def test_any_label_can_be_drawn(label: str) -> None:
    page = build_page(tagged(label, "[[0, 0, 999, 999], [990, 0, 999, 5]]"), WIDTH, HEIGHT)
    assert len(page.blocks) == 1
    draw_boxes(np.zeros((HEIGHT, WIDTH, 3), np.uint8), page)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 2)])
def test_tiny_pages_can_be_drawn(size: tuple[int, int]) -> None:
    page = build_page(tagged("title", "[[0, 0, 1, 1], [998, 998, 999, 999]]") + tagged("image", "[[0,0,1,1]]"), *size)
    image = np.zeros((size[1], size[0], 3), np.uint8)
    assert draw_boxes(image, page).size == size
    assert [crop.size for crop in crop_figures(image, page)] == [(1, 1)]


def test_another_image_is_refused() -> None:
    page, image = sample()
    for function in (crop_figures, draw_boxes):
        with pytest.raises(ImageError, match="the page was read from 200 x 100"):
            function(image[:-1], page)


def test_saving_a_page(tmp_path: Path) -> None:
    page, image = sample()
    folder = tmp_path / "deep" / "out"
    save_page(page, image, folder)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["images/0.jpg", "overlay.png", "page.json", "result.md"]
    assert (folder / "result.md").read_text(encoding="utf-8") == page.markdown + "\n"
    assert json.loads((folder / "page.json").read_text(encoding="utf-8")) == page.to_dict()
    assert Image.open(folder / "images/0.jpg").size == (100, 40)
    assert np.array_equal(np.asarray(Image.open(folder / "overlay.png")), np.asarray(draw_boxes(image, page)))
    assert oct((folder / "result.md").stat().st_mode & 0o777) == "0o644"
    (folder / "notes.txt").write_text("mine")
    save_page(build_page("new", WIDTH, HEIGHT), image, str(folder))
    assert (folder / "result.md").read_text() == "new\n"
    assert (folder / "notes.txt").read_text() == "mine"


def test_text_that_utf8_cannot_hold_is_saved_all_the_same(tmp_path: Path) -> None:
    page = build_page("a\ud800b", WIDTH, HEIGHT)
    save_page(page, np.zeros((HEIGHT, WIDTH, 3), np.uint8), tmp_path)
    assert (tmp_path / "result.md").read_text(encoding="utf-8") == "a?b\n"


def test_a_failed_write_leaves_the_old_file_and_no_scrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, image = sample()
    save_page(page, image, tmp_path)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        save_page(build_page("new", WIDTH, HEIGHT), image, tmp_path)
    assert (tmp_path / "result.md").read_text(encoding="utf-8") == page.markdown + "\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "overlay.png", "page.json", "result.md"]
