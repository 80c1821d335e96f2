"""Muon for hidden matrices, AdamW for the rest, and the sum of gradients over processes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

HIDDEN = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp)|patch_embed|neck\.[02]|net_[23]|projector|layers\.\d+\."
DECAY = 0.02
BARRIER_TIMEOUT_S = 600


class Reducer:
    """Sum of a tensor over worker processes, through shared memory. `size` is the largest number of elements."""

    def __init__(self, world: int, size: int) -> None:
        self.world = world
        self.buffer = torch.zeros(world, size if world > 1 else 1).share_memory_()
        self.barrier = torch.multiprocessing.get_context("spawn").Barrier(world)

    def __call__(self, rank: int, x: Tensor) -> None:
        """Replace x, on every process, by its sum over all of them (all must call with equal shapes)."""
        if self.world == 1:
            return
        self.buffer[rank, : x.numel()] = x.flatten()
        self.barrier.wait(BARRIER_TIMEOUT_S)
        torch.sum(self.buffer[:, : x.numel()], 0, out=x.view(-1))
        self.barrier.wait(BARRIER_TIMEOUT_S)


def orthogonalised(g: Tensor) -> Tensor:
    """Nearly the orthogonal factor of each matrix of [n, a, b]: four Newton-Schulz steps in bfloat16.

    Method and coefficients: Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
    """
    x = g.bfloat16()
    flip = x.shape[-2] > x.shape[-1]
    x = x.transpose(-1, -2) if flip else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(4):
        a = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.transpose(-1, -2) if flip else x).float()


class Muon:
    """Momentum, then orthogonalised updates. Matrices of one shape are handled together and shared out over processes.

    `slow` is a factor on the rate of all that is not the decoder's.
    """

    def __init__(self, params: Iterable[Tensor], decoder: Iterable[Tensor], rank: int = 0, world: int = 1) -> None:
        in_decoder = {id(p) for p in decoder}
        self.rank, self.world, self.momentum = rank, world, 0.95
        self.groups: dict[tuple[tuple[int, int], bool], list[Tensor]] = {}
        for p in params:  # a stack of experts counts as separate matrices, a convolution as one
            a, b = p.shape[-2:] if p.ndim < 4 else (p.shape[0], p[0].numel())
            self.groups.setdefault(((a, b), id(p) in in_decoder), []).append(p)
        self.mean = {
            key: torch.zeros(sum(p.numel() for p in ps) // (key[0][0] * key[0][1]), *key[0])
            for key, ps in self.groups.items()
        }

    @torch.no_grad()
    def step(
        self, lr: float, slow: float, reduce: Callable[[Tensor], None], encoder: bool = True, decoder: bool = True
    ) -> None:
        """One update from the gradients; `encoder` and `decoder` say which of the two parts move."""
        for key, params in self.groups.items():
            shape, in_decoder = key
            if not (decoder if in_decoder else encoder):
                continue
            g = torch.cat([_gradient(p).reshape(-1, *shape) for p in params])
            g = g.lerp(self.mean[key].lerp_(g, 1 - self.momentum), self.momentum)
            update = torch.zeros_like(g)
            low, high = (len(g) * k // self.world for k in (self.rank, self.rank + 1))
            if high > low:
                update[low:high] = orthogonalised(g[low:high])
            reduce(update)
            rate, row = lr if in_decoder else lr * slow, 0
            for p in params:
                n = p.numel() // (shape[0] * shape[1])
                scale = rate * max(1.0, shape[0] / shape[1]) ** 0.5
                p.mul_(1 - rate * DECAY).add_(update[row : row + n].view_as(p), alpha=-scale)
                row += n

    def state(self) -> list[Tensor]:
        """The momenta, for saving."""
        return list(self.mean.values())

    def load_state(self, state: list[Tensor]) -> None:
        for mean, saved in zip(self.mean.values(), state):
            mean.copy_(saved)


def _gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


class Optimizer:
    """Both optimizers over a reader and its helpers, with summed and clipped gradients."""

    def __init__(
        self,
        model: nn.Module,
        helpers: nn.Module,
        reducer: Reducer,
        rank: int = 0,
        lr: float = 2e-3,
        muon_lr: float = 0.02,
        slow: float = 1.0,
    ) -> None:
        self.lr, self.muon_lr, self.slow, self.world = lr, muon_lr, slow, reducer.world
        self.reduce = functools.partial(reducer, rank)
        self.params = [p for p in [*model.parameters(), *helpers.parameters()] if p.requires_grad]
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
        hidden = [p for n, p in named if re.search(HIDDEN, n) and "mlp.gate.w" not in n]
        taken = {id(p) for p in hidden}
        rest = [p for p in self.params if id(p) not in taken]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
        decoder = [p for n, p in model.named_parameters() if n.startswith("model.layers.")]
        self.muon = Muon(hidden, decoder, rank, reducer.world)

    def zero(self) -> None:
        for p in self.params:
            p.grad = None

    def step(self, factor: float, extra: Tensor, encoder: bool = True, decoder: bool = True) -> tuple[Tensor, float]:
        """One update at `factor` times the base rates: (`extra` averaged over processes, the gradient norm)."""
        flat = torch.cat([*(_gradient(p).flatten() for p in self.params), extra.flatten()])
        self.reduce(flat)
        flat /= self.world
        gradient, extra = flat[: -extra.numel()], flat[-extra.numel() :].clone()
        norm = gradient.norm().item()
        gradient *= min(1.0, 1.0 / (norm + 1e-6))
        at = 0
        for p in self.params:
            p.grad = gradient[at : at + p.numel()].view_as(p)
            at += p.numel()
        for group in self.adam.param_groups:
            group["lr"] = self.lr * factor
        self.adam.step()
        self.muon.step(self.muon_lr * factor, self.slow, self.reduce, encoder, decoder)
        return extra, norm
