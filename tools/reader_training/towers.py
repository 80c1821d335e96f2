"""The two vision towers of DeepSeek-OCR at any size, as they are trained: SAM's (windows) and CLIP's.

Module names are those of the official checkpoint. Attention is written as plain products: on small sequences on a CPU
its backward pass is several times faster than that of the fused kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def cast(x: Tensor) -> Tensor:
    """To bfloat16 once under autocast, rather than once for each matrix that reads x."""
    return x.bfloat16() if torch.is_autocast_enabled("cpu") else x


def resized_positions(table: Tensor, n: int) -> Tensor:
    """[1, S, S, C] to [1, n, n, C], bicubic with antialiasing."""
    if table.shape[1] == n:
        return table
    resized = F.interpolate(table.permute(0, 3, 1, 2), size=(n, n), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1)


def relative_table(table: Tensor, n: int) -> Tensor:
    """[n, n, D]: [q, k] is the table's row for the distance q - k; a table of another size is resized linearly."""
    if table.shape[0] != 2 * n - 1:
        table = F.interpolate(table.t()[None], size=2 * n - 1, mode="linear")[0].t()
    i = torch.arange(n)
    return table[i[:, None] - i[None, :] + n - 1]


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k' / sqrt(D)) v over the last two axes."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if causal:
        scores = scores + torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype).triu(1)
    return torch.matmul(scores.softmax(-1).to(v.dtype), v)


class SamAttention(nn.Module):
    """Attention over an H x W grid with decomposed relative positions."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        # Start with heads that prefer near patches: a constant query u (the bias) against u * -distance.
        u = F.normalize(torch.randn(width // heads), dim=0)
        slope = torch.tensor([1.0, 0.6, 0.3, 0.1])[torch.arange(heads) % 4]
        near = -torch.arange(-size + 1, size).abs().clamp(max=7).float()
        self.qkv.bias.data[:width] = (slope[:, None] * u).flatten()
        self.rel_pos_h, self.rel_pos_w = (nn.Parameter(near[:, None] * u) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        d, heads = c // self.heads, self.heads
        q, k, v = self.qkv(x).view(n, h * w, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
        grid = q.reshape(n * heads, h, w, d)
        rows = torch.einsum("bhwc,hkc->bhwk", grid, relative_table(self.rel_pos_h, h)).reshape(n, heads, h * w, h)
        columns = torch.einsum("bhwc,wkc->bhwk", grid, relative_table(self.rel_pos_w, w)).reshape(n, heads, h * w, w)
        # bias[q, (i, j)] = rows[q, i] + columns[q, j], folded into the score product with one-hot columns.
        hot = torch.cat([torch.eye(h).repeat_interleave(w, 0), torch.eye(w).repeat(h, 1)], 1).to(k.dtype)
        q = torch.cat([q * d**-0.5, rows.to(q.dtype), columns.to(q.dtype)], -1)
        k = torch.cat([k, hot.expand(n, heads, h * w, h + w)], -1)
        y = torch.matmul(torch.matmul(q, k.transpose(-1, -2)).softmax(-1), v)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(n, h, w, c))
        return out


class SamMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin2(F.gelu(self.lin1(x)))
        return out


class SamBlock(nn.Module):
    """A block of the SAM tower; window 0 attends over the whole grid."""

    def __init__(self, width: int, heads: int, window: int, grid: int, mlp_ratio: float) -> None:
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = SamAttention(width, heads, window or grid)
        self.mlp = SamMlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        y, size = cast(self.norm1(x)), self.window
        if size:  # windows padded with zeros; the padding takes part in the attention, as in the official model
            n, h, w, c = y.shape
            down, across = -(-h // size), -(-w // size)
            y = F.pad(y, (0, 0, 0, across * size - w, 0, down * size - h))
            y = y.view(n, down, size, across, size, c).transpose(2, 3).reshape(-1, size, size, c)
            y = self.attn(y).view(n, down, across, size, size, c).transpose(2, 3)
            y = y.reshape(n, down * size, across * size, c)[:, :h, :w]
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(cast(self.norm2(x)))


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of [N, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """The convolution of stride = patch size, as one matrix product."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        p = self.patch
        x = x.view(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(n, h // p, w // p, c * p * p)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class SamEncoder(nn.Module):
    """[N, 3, S, S] to (neck [N, c, S/16, S/16], features [N, f, S/64, S/64])."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, grid, out = c["width"], c["image_size"] // c["patch_size"], c["out_channels"]
        self.patch_embed = PatchEmbed(c["patch_size"], width)
        self.pos_embed = nn.Parameter(torch.randn(1, grid, grid, width) * 0.1)
        windows = [0 if i in c["global_attn_indexes"] else c["window_size"] for i in range(c["layers"])]
        self.blocks = nn.ModuleList(SamBlock(width, c["heads"], w, grid, c["mlp_ratio"]) for w in windows)
        self.neck = nn.Sequential(
            nn.Conv2d(width, out, 1, bias=False),
            LayerNorm2d(out),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            LayerNorm2d(out),
        )
        first, second = c["downsample_channels"]
        self.net_2 = nn.Conv2d(out, first, 3, 2, 1, bias=False)
        self.net_3 = nn.Conv2d(first, second, 3, 2, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(x)
        x = x + resized_positions(self.pos_embed, x.shape[1])
        for block in self.blocks:
            x = block(x)
        neck = self.neck(x.permute(0, 3, 1, 2))
        return neck, self.net_3(self.net_2(neck))


class ClipAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv_proj, self.out_proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv_proj(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.out_proj(attend(q, k, v).transpose(1, 2).reshape(n, t, c))
        return out


class ClipMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        out: Tensor = self.fc2(x * torch.sigmoid(1.702 * x))
        return out


class ClipLayer(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn, self.mlp = ClipAttention(width, heads), ClipMlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(cast(self.layer_norm1(x)))
        return x + self.mlp(cast(self.layer_norm2(x)))


class ClipEncoder(nn.Module):
    """The CLIP tower over SAM's features [N, C, n, n]: [N, 1 + n * n, C], the class token first."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, self.grid = c["width"], c["image_size"] // c["patch_size"]
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.randn(width) * 0.1)
        # Part of the official checkpoint, never used: this tower is given features, not pixels.
        self.embeddings.patch_embedding = nn.Conv2d(3, width, c["patch_size"], c["patch_size"], bias=False)
        self.embeddings.position_embedding = nn.Embedding(self.grid**2 + 1, width)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.1)
        self.embeddings.patch_embedding.weight.requires_grad_(False).zero_()
        self.pre_layrnorm = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(
            ClipLayer(width, c["heads"], c["mlp_ratio"]) for _ in range(c["layers"])
        )

    def forward(self, features: Tensor) -> Tensor:
        n, c, size, _ = features.shape
        positions = self.embeddings.position_embedding.weight
        grid = resized_positions(positions[1:].view(1, self.grid, self.grid, c), size).reshape(size * size, c)
        class_token = self.embeddings.class_embedding.expand(n, 1, c)
        x = torch.cat([class_token, features.flatten(2).transpose(1, 2)], 1)
        x = self.pre_layrnorm(x + torch.cat([positions[:1], grid]))
        for layer in self.transformer.layers:
            x = layer(x)
        return x
