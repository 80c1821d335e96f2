"""What the reader is trained on: the next token, and four helpers that exist in training only.

The helpers (none of them exported): the character in every 8x16 cell, predicted from the neck and from every vision
token; head 0 of two decoder layers must look at the vision token that holds the next character; and the states of those
layers must tell in which cell of that token it lies. docs/reader.md says what each of them brought.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .data import CELL, IGNORE, Batch
from .model import DECODER, GUIDED_LAYERS, SAM, Reader
from .pages import CELL_HEIGHT, CELL_WIDTH, NUM_CLASSES

CELLS_DOWN, CELLS_ACROSS = CELL // CELL_HEIGHT, CELL // CELL_WIDTH
CELLS = CELLS_DOWN * CELLS_ACROSS
PATCH_CELLS = 16 * 16 // (CELL_WIDTH * CELL_HEIGHT)
EMPTY_WEIGHT = 0.05


class Helpers(nn.Module):
    """The training-only heads."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.neck = nn.Linear(SAM["out_channels"], PATCH_CELLS * NUM_CLASSES)
        self.token = nn.Linear(DECODER["hidden_size"], CELLS * NUM_CLASSES)
        self.cell = nn.ModuleList(nn.Linear(DECODER["hidden_size"], CELLS) for _ in GUIDED_LAYERS)
        self.register_buffer("weight", torch.ones(NUM_CLASSES))
        self.weight[0] = EMPTY_WEIGHT

    def forward(self, neck: Tensor, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss at the neck, loss at the vision tokens, and the two shares of characters that are right)."""
        n, rows, columns = labels.shape
        a = self.neck(neck.permute(0, 2, 3, 1)).reshape(-1, NUM_CLASSES)
        wanted = labels.flatten()
        neck_loss = F.cross_entropy(a.float(), wanted, self.weight)
        b = self.token(tokens).reshape(-1, NUM_CLASSES)
        squares = labels.view(n, rows // CELLS_DOWN, CELLS_DOWN, columns // CELLS_ACROSS, CELLS_ACROSS)
        by_token = squares.transpose(2, 3).reshape(-1)
        token_loss = F.cross_entropy(b.float(), by_token, self.weight)
        with torch.no_grad():
            neck_right = (a.argmax(-1) == wanted)[wanted > 0].float().mean()
            token_right = (b.argmax(-1) == by_token)[by_token > 0].float().mean()
        return neck_loss, token_loss, neck_right, token_right


@dataclass
class Losses:
    """The parts of a batch's loss, and the shares (0 to 1) that are right: tokens, cells at the neck, at the tokens."""

    ce: Tensor
    neck: Tensor
    token: Tensor
    guide: Tensor
    cell: Tensor
    balance: Tensor
    right: Tensor
    neck_right: Tensor
    token_right: Tensor

    def total(self, helpers: float) -> Tensor:
        """What is minimised; `helpers` fades the helpers out."""
        extras = self.neck + self.token + 0.4 * self.guide + 0.4 * self.cell
        return self.ce + helpers * extras + 0.01 * self.balance

    def values(self) -> Tensor:
        """All parts as one float vector, in the order of NAMES."""
        return torch.stack([getattr(self, name).detach().float() for name in NAMES])


NAMES = tuple(f.name for f in fields(Losses))


def compute(model: Reader, helpers: Helpers, batch: Batch, read: bool, frozen: bool = False) -> Losses:
    """The losses of a batch. read=False trains the encoder alone; frozen=True keeps the encoder as it is."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        rows, tokens, neck = model.vision(batch)
    neck_loss, token_loss, neck_right, token_right = helpers(neck, tokens, batch.labels)
    zero = torch.zeros(())
    if not read:
        return Losses(zero, neck_loss, token_loss, zero, zero, zero, zero, neck_right, token_right)
    embed = model.model.embed_tokens
    x = torch.cat([embed(batch.head), rows, embed(batch.prompt), embed(batch.target[:, :-1].clamp(min=0))], 1)
    start = rows.shape[1] + batch.prompt.shape[1]  # the row of the prompt's last token: it predicts the first character
    states, guide, middle = model.decode(x, guide=(start, rows.shape[1], batch.guide))
    cell_losses = [
        F.cross_entropy(
            head(F.rms_norm(m, m.shape[-1:])).flatten(0, 1).float(), batch.cell.flatten(), ignore_index=IGNORE
        )
        for head, m in zip(helpers.cell, middle)
    ]
    logits = model.lm_head(states[:, start:])
    ce = F.cross_entropy(logits.flatten(0, 1).float(), batch.target.flatten(), ignore_index=IGNORE)
    right = (logits.argmax(-1) == batch.target)[batch.target >= 0].float().mean()
    balance = torch.stack([moe.balance for moe in model.experts()]).sum()
    return Losses(
        ce,
        neck_loss,
        token_loss,
        torch.stack(guide).mean(),
        torch.stack(cell_losses).mean(),
        balance,
        right,
        neck_right,
        token_right,
    )
