"""The mixture-of-experts decoder of DeepSeek-OCR at any size, as it is trained.

The experts of a layer are stacked in two tensors; model.py splits them when it exports.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .towers import attend, cast

Cache = list[Tensor]  # [] or [keys, values] of one layer
Guide = tuple[int, int, Tensor]  # first row of text, number of vision rows, wanted vision row of each text row


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return cast(F.rms_norm(x, x.shape[-1:], self.weight, self.eps))


def rope_table(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, [positions, head_dim], both halves equal (rotate-half)."""
    angles = torch.outer(torch.arange(positions).float(), theta ** (-torch.arange(0, head_dim, 2).float() / head_dim))
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (a, b), cos, sin = x.chunk(2, -1), cos.to(x.dtype), sin.to(x.dtype)
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    """Causal attention; with a guide, also the loss of head 0 for looking at the right vision row."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width = c["hidden_size"]
        self.heads = c["num_attention_heads"]
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, guide: Guide | None
    ) -> tuple[Tensor, Tensor | None]:
        n, t, c = x.shape
        q, k, v = (p(x).view(n, t, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = [k, v]
        y = attend(q, k, v, t > 1)
        loss = None
        if guide is not None:
            start, num_rows, wanted = guide
            scores = torch.matmul(q[:, 0, start:], k[:, 0, 1 : 1 + num_rows].transpose(-1, -2)) * q.shape[-1] ** -0.5
            loss = F.cross_entropy(scores.flatten(0, 1), wanted.flatten(), ignore_index=-100)
        return self.o_proj(y.transpose(1, 2).reshape(n, t, c)), loss


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Moe(nn.Module):
    """Routed experts (softmax, top-k, not renormalised) plus a shared one; `balance` is set in training."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, hidden, experts = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"]
        self.top_k = c["num_experts_per_tok"]
        self.gate = nn.Linear(width, experts, bias=False)
        self.gate_up = nn.Parameter((torch.rand(experts, 2 * hidden, width) * 2 - 1) * width**-0.5)
        self.down = nn.Parameter((torch.rand(experts, width, hidden) * 2 - 1) * hidden**-0.5)
        self.shared_experts = Mlp(width, hidden * c["n_shared_experts"])
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scores = self.gate(flat).float().softmax(-1)
        weights, chosen = scores.topk(self.top_k, -1)
        counts = torch.bincount(chosen.flatten(), minlength=scores.shape[1])
        if self.training:
            self.balance = scores.shape[1] * (counts / chosen.numel() * scores.mean(0)).sum()
        order = chosen.flatten().argsort()
        token = order // self.top_k
        parts = []
        for expert, rows in enumerate(flat.index_select(0, token).split(counts.tolist())):
            gate, up = F.linear(rows, self.gate_up[expert]).chunk(2, -1)
            parts.append(F.linear(F.silu(gate) * up, self.down[expert]))
        routed = torch.cat(parts) * weights.flatten()[order, None].to(flat.dtype)
        out = torch.zeros_like(flat).index_add(0, token, routed.to(flat.dtype)).view_as(x)
        return self.shared_experts(x) + out


class DecoderLayer(nn.Module):
    def __init__(self, c: dict[str, Any], index: int) -> None:
        super().__init__()
        width, eps = c["hidden_size"], c["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(width, eps), RmsNorm(width, eps)
        self.self_attn = Attention(c)
        dense = index < c["first_k_dense_replace"]
        self.mlp: nn.Module = Mlp(width, c["intermediate_size"]) if dense else Moe(c)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None, guide: Guide | None = None
    ) -> tuple[Tensor, Tensor | None]:
        y, loss = self.self_attn(self.input_layernorm(x), cos, sin, cache, guide)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), loss
