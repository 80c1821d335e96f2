"""The training processes: one single-threaded process a core, gradients summed in shared memory."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from . import losses
from .data import Batch, collate, load_tokenizer, write_json
from .evaluate import read_with_training_model, score, training_pages
from .fonts import DEFAULT_FONT_DIR, TRAINED, FontSet, built_in_fonts, load_fonts
from .losses import Helpers
from .model import Reader, config, save_reader
from .optim import Optimizer, Reducer
from .pages import LAYOUTS, draw_page
from .recipe import BATCH, RECIPES, Point, helper_weight
from .words import Words

STATE = "state.pt"
WARM_UP_S, WARM_UP_STEPS = 40, 60  # gentle start, also after --init, where the optimizers' averages begin empty
EXTRA = len(losses.NAMES) + 2  # what travels with the gradients: the losses, pages of the batch, elapsed seconds


@dataclass(frozen=True)
class Settings:
    """One training. `steps` instead of minutes makes progress, and so the result, independent of the clock."""

    out: str
    tokenizer: str
    recipe: str = "scratch"
    minutes: float = 200.0
    steps: int = 0
    seed: int = 1234
    world: int = 2
    init: str = ""
    aux: str = ""
    resume: bool = False
    lr: float = 2e-3
    muon_lr: float = 0.02
    slow: float = 1.0
    freeze: float = 0.0
    bf16: bool = True
    log_every: int = 50
    save_minutes: float = 10.0
    check_pages: int = 32
    batch_scale: float = 1.0
    font_dir: str = DEFAULT_FONT_DIR
    built_in_font: bool = False


class Drawer:
    """An endless supply of batches. All processes agree on layout and prompt of a step, so that they keep in step."""

    def __init__(self, s: Settings, rank: int, step: int, tokenizer: Tokenizer, fonts: FontSet) -> None:
        seed = s.seed + rank if step == 0 else (s.seed + rank, step)  # a resumed run draws other pages than before
        self.r = np.random.default_rng(seed)
        self.scale, self.tokenizer, self.fonts, self.words = s.batch_scale, tokenizer, fonts, Words()
        self.pool: list[tuple[list[Any], str, bool]] = []

    def next(self, step: int, point: Point) -> Batch:
        """The batch of a step. Four batches are drawn together and sorted by length, to limit padding."""
        if not self.pool:
            shared = np.random.default_rng(99 + step)
            layout = str(shared.choice(list(point.layouts), p=list(point.layouts.values())))
            markdown, n = bool(shared.random() < 0.5), max(1, round(BATCH[layout] * self.scale))
            view, fonts = LAYOUTS[layout], self.fonts.first(point.families)
            pages = [
                draw_page(self.r, self.words, fonts, view, self._level(point, layout), markdown) for _ in range(4 * n)
            ]
            pages.sort(key=lambda page: len(page.glyphs))
            self.pool = [(pages[i * n : (i + 1) * n], layout, markdown) for i in shared.permutation(4)]
        pages, layout, markdown = self.pool.pop()
        return collate(pages, self.tokenizer, LAYOUTS[layout], markdown)

    def _level(self, point: Point, layout: str) -> float:
        return point.level if point.level > 1 else point.page_level(LAYOUTS[layout], self.r.random())


class Trainer:
    """One process of a training; rank 0 also logs, checks and saves."""

    def __init__(self, s: Settings, rank: int, reducer: Reducer) -> None:
        torch.manual_seed(0)
        self.s, self.rank = s, rank
        self.tokenizer = load_tokenizer(s.tokenizer)
        self.fonts = built_in_fonts() if s.built_in_font else load_fonts(TRAINED, s.font_dir)
        self.model, self.helpers = Reader(), Helpers()
        if s.init:
            self.model.load_export(load_file(os.path.join(s.init, "model.safetensors")))
        if s.aux:
            self.helpers.load_state_dict(torch.load(s.aux, weights_only=True))
        self.optimizer = Optimizer(self.model, self.helpers, reducer, rank, s.lr, s.muon_lr, s.slow)
        self.step, self.seen, self.elapsed = 0, 0, 0.0
        if s.resume:
            self._restore()
        self.begun = time.time() - self.elapsed
        self.drawer = Drawer(s, rank, self.step, self.tokenizer, self.fonts)
        self.recent: list[list[float]] = []

    @property
    def progress(self) -> float:
        """0 to 1, by steps if the settings count steps, else by the clock."""
        return self.step / self.s.steps if self.s.steps else self.elapsed / (self.s.minutes * 60)

    def run(self) -> None:
        """Train to the end of the schedule."""
        saved_at = self.elapsed
        while self.progress < 1:
            point = RECIPES[self.s.recipe](self.progress)
            norm = self.one_step(point)
            if self.rank == 0 and self.step % self.s.log_every == 0:
                self.log(point, norm)
            if self.elapsed - saved_at > self.s.save_minutes * 60 or self.progress >= 1:
                saved_at = self.elapsed
                if self.rank == 0:
                    self.save()
                    self.check(point)

    def one_step(self, point: Point) -> float:
        """Draw, learn, update. Returns the gradient norm."""
        s, t = self.s, self.progress
        batch = self.drawer.next(self.step, point)
        frozen = self.elapsed < s.freeze * 60
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=s.bf16):
            parts = losses.compute(self.model, self.helpers, batch, point.read, frozen)
            loss = parts.total(helper_weight(t))
        self.optimizer.zero()
        loss.backward()
        # Only rank 0's clock counts, so that all processes stop at the same step.
        clock = (time.time() - self.begun) * s.world if self.rank == 0 else 0.0
        extra = torch.cat([parts.values(), torch.tensor([float(len(batch.texts)), clock])])
        warm = self.step / WARM_UP_STEPS if s.steps else self.elapsed / WARM_UP_S
        rate = point.rate * min(1.0, warm)
        extra, norm = self.optimizer.step(rate, extra, not frozen, point.read)
        values = extra.tolist()
        self.elapsed = values[-1]
        self.step, self.seen = self.step + 1, self.seen + int(values[-2] * s.world)
        self.recent.append(values[:-2])
        return norm

    def log(self, point: Point, norm: float) -> None:
        means = dict(zip(losses.NAMES, np.mean(self.recent, 0)))
        self.recent = []
        rate = self.seen / max(self.elapsed, 1e-9)
        line = {
            "step": self.step,
            "minutes": self.elapsed / 60,
            "pages": self.seen,
            "pages_s": rate,
            "stage": point.stage,
            "norm": norm,
        }
        self._write({**line, **means})

    def check(self, point: Point) -> None:
        """Greedy character error rate on a few held-out pages: a guide while training, not a reported figure."""
        if not (point.read and self.s.check_pages):
            return
        words = Words(held_out=True)
        for name in [n for n in ("192", "256", "2x2") if n in point.layouts]:
            layout = LAYOUTS[name]
            level = replace(point, level=min(point.level, 1.0)).page_level
            pages = training_pages(words, self.fonts, layout, True, self.s.check_pages, level)
            answers = read_with_training_model(self.model, self.tokenizer, pages, layout, True)
            self._write({"minutes": self.elapsed / 60, "layout": name, "cer": score(pages, answers).cer})

    def save(self) -> None:
        """The exported reader, the helpers (to continue) and the whole state (to resume)."""
        out = self.s.out
        save_reader(self.model, out)
        write_json(os.path.join(out, "config.json"), config())
        tokenizer = os.path.join(out, "tokenizer.json")
        if not os.path.exists(tokenizer):
            shutil.copyfile(self.s.tokenizer, tokenizer)
        torch.save(self.helpers.state_dict(), os.path.join(out, "aux.pt"))
        state = {
            "model": self.model.state_dict(),
            "helpers": self.helpers.state_dict(),
            "adam": self.optimizer.adam.state_dict(),
            "muon": self.optimizer.muon.state(),
            "progress": torch.tensor([self.step, self.seen, self.elapsed], dtype=torch.float64),
        }
        path = os.path.join(out, STATE)
        torch.save(state, path + ".tmp")
        os.replace(path + ".tmp", path)

    def _restore(self) -> None:
        path = os.path.join(self.s.out, STATE)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} is missing: nothing to resume; train without --resume first")
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.helpers.load_state_dict(state["helpers"])
        self.optimizer.adam.load_state_dict(state["adam"])
        self.optimizer.muon.load_state(state["muon"])
        step, seen, self.elapsed = state["progress"].tolist()
        self.step, self.seen = int(step), int(seen)

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(
            {k: round(float(v), 4) if isinstance(v, (float, np.floating)) else v for k, v in line.items()}
        )
        print(text, flush=True)
        with open(os.path.join(self.s.out, "log.jsonl"), "a", encoding="utf-8") as file:
            file.write(text + "\n")


def _worker(rank: int, settings: Settings, reducer: Reducer) -> None:
    torch.set_num_threads(1)
    Trainer(settings, rank, reducer).run()


def train(settings: Settings) -> None:
    """Run a training to its end; returns when the exported reader is in settings.out."""
    if settings.recipe not in RECIPES:
        raise ValueError(f"unknown recipe {settings.recipe!r}; known: {', '.join(RECIPES)}")
    if not settings.built_in_font:
        load_fonts(TRAINED, settings.font_dir)  # a clear error before any process starts
    load_tokenizer(settings.tokenizer)
    os.makedirs(settings.out, exist_ok=True)
    if settings.world == 1:
        Trainer(settings, 0, Reducer(1, 1)).run()
    else:
        elements: list[Tensor] = [*Reader().parameters(), *Helpers().parameters()]
        reducer = Reducer(settings.world, sum(p.numel() for p in elements) + EXTRA)
        torch.multiprocessing.spawn(_worker, (settings, reducer), nprocs=settings.world)
