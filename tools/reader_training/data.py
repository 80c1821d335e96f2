"""The tokenizer, the views of a page, and batches of pages as tensors with their training targets."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from .model import BOS, DECODER, EOS, PROMPTS
from .pages import CELL_HEIGHT, CELL_WIDTH, Layout, Page

CELL = 64  # pixels of a vision token's square
SPECIALS = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<image>",
    "<|User|>",
    "<|Assistant|>",
    "<|ref|>",
    "<|/ref|>",
    "<|det|>",
    "<|/det|>",
    "<|grounding|>",
    "<td>",
    "</td>",
    "<tr>",
    "</tr>",
]
# DeepSeek-V3's pre-tokenizer, as far as this small vocabulary needs it: digits in threes, then this pattern.
PATTERN = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LICENCES = ("GPL-3", "Apache-2.0", "GFDL-1.3", "Artistic", "CC0-1.0")
LICENCE_DIR = "/usr/share/common-licenses"
IGNORE = -100  # a target position that does not count


def tokenizer_text() -> list[str]:
    """Lines that the tokenizer's merges are learnt from: Python's help topics and Debian's licence texts."""
    text = "\n".join(pydoc_data.topics.topics.values())
    for name in LICENCES:
        path = os.path.join(LICENCE_DIR, name)
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"{path} is missing; the tokenizer's merges need it (it is part of Debian's base-files)"
            )
        with open(path, encoding="utf-8") as file:
            text += file.read()
    text = re.sub(r"[^\x20-\x7e\n]+", " ", text)
    return [line.strip() for line in text.split("\n") if re.search("[a-z]{2}", line)]


def make_tokenizer(lines: Sequence[str]) -> Tokenizer:
    """Byte-level BPE of DECODER's vocabulary, with DeepSeek-OCR's special tokens, learnt from `lines`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=DECODER["vocab_size"],
        special_tokens=SPECIALS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    often = list(PROMPTS.values()) * 2500 + ["a\n\nb", "• item"] * 1500
    tokenizer.train_from_iterator([*lines, *often], trainer)
    return tokenizer


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a file; a clear error if it is missing or its vocabulary is not the model's."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"no tokenizer at {path}; make one with: train_reader.py tokenizer --out FILE")
    tokenizer = Tokenizer.from_file(path)
    if tokenizer.get_vocab_size() > DECODER["vocab_size"]:
        raise ValueError(f"{path} has {tokenizer.get_vocab_size()} tokens, the model {DECODER['vocab_size']}")
    return tokenizer


def views(image: Image.Image, layout: Layout) -> tuple[np.ndarray, list[np.ndarray]]:
    """The processor's views: one padded on grey, and the tiles (if any) in row order."""
    view, grid, tile = layout
    tiles = []
    if grid:
        pixels = np.asarray(image.resize((tile * grid[0], tile * grid[1])))
        tiles = [
            pixels[i * tile : (i + 1) * tile, j * tile : (j + 1) * tile] for i in range(grid[1]) for j in range(grid[0])
        ]
    return np.asarray(ImageOps.pad(image, (view, view), color=(127, 127, 127))), tiles


def to_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """[N, 3, H, W] in [-1, 1] from N pictures [H, W, 3] uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def cut(labels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[R, C] to [rows * columns, R / rows, C / columns], tiles in row order."""
    height, width = labels.shape
    parts = labels.reshape(rows, height // rows, columns, width // columns).swapaxes(1, 2)
    return parts.reshape(rows * columns, height // rows, width // columns)


@dataclass
class Batch:
    """B pages of one layout and one prompt, T target tokens at most.

    whole [B, 3, V, V], tiles [B * tiles, 3, t, t] or None; head [B, 1] and prompt [B, P] token ids;
    target [B, T] the expected ids; guide [B, T] which vision row holds the next character; cell [B, T] where inside
    that row's square it lies; labels [views, rows, columns] character classes. Unused targets are IGNORE.
    """

    whole: Tensor
    tiles: Tensor | None
    grid: tuple[int, int] | None
    head: Tensor
    prompt: Tensor
    target: Tensor
    guide: Tensor
    cell: Tensor
    labels: Tensor
    texts: list[str]


def _targets(page: Page, tokenizer: Tokenizer, columns: int) -> tuple[list[int], list[int], list[int]]:
    """Token ids with EOS, and for each the vision row and the cell of its first visible character."""
    glyphs = page.glyphs
    encoded = tokenizer.encode(page.text, add_special_tokens=False)
    first = [next((i for i in range(a, b) if glyphs[i].char not in " \n"), a) for a, b in encoded.offsets]
    # Rows of vision tokens end with a newline token, hence columns + 1.
    guide = [int(glyphs[i].y) // CELL * (columns + 1) + int(glyphs[i].x) // CELL for i in first]
    width = CELL // CELL_WIDTH
    cell = [int(glyphs[i].y) % CELL // CELL_HEIGHT * width + int(glyphs[i].x) % CELL // CELL_WIDTH for i in first]
    return [*encoded.ids, EOS], guide + guide[-1:], cell + cell[-1:]


def collate(pages: Sequence[Page], tokenizer: Tokenizer, layout: Layout, markdown: bool) -> Batch:
    """A batch of pages that were drawn for `layout` and `markdown`."""
    grid, size = layout.grid, len(pages)
    columns = grid[0] * layout.tile // CELL if grid else layout.view // CELL
    targets = [_targets(page, tokenizer, columns) for page in pages]
    longest = max(len(ids) for ids, _, _ in targets)
    rows = torch.full((3, size, longest), IGNORE)
    for i, columns_of_page in enumerate(targets):
        for row, values in zip(rows, columns_of_page):
            row[i, : len(values)] = torch.tensor(values)
    seen = [views(page.image, layout) for page in pages]
    labels = [cut(page.labels, grid[1], grid[0]) if grid else page.labels[None] for page in pages]
    prompt = tokenizer.encode(PROMPTS["md" if markdown else "plain"], add_special_tokens=False).ids
    return Batch(
        whole=to_tensor([whole for whole, _ in seen]),
        tiles=to_tensor([tile for _, tiles in seen for tile in tiles]) if grid else None,
        grid=grid,
        head=torch.full((size, 1), BOS),
        prompt=torch.tensor([prompt] * size),
        target=rows[0],
        guide=rows[1],
        cell=rows[2],
        labels=torch.from_numpy(np.concatenate(labels)),
        texts=[page.text for page in pages],
    )


def write_json(path: str, value: object) -> None:
    """Write indented JSON as UTF-8."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
