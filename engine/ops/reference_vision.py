"""The vision half of the reference backend (see reference.py): patches, the two attentions, the downsampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ShapeError

SCORE_BYTES = 8 << 20  # scores held at a time, so that they stay near the caches; a whole 64x64 grid would be 805 MB


@dataclass(frozen=True, slots=True)
class PackedPatchEmbed:
    """weight [C, 3, p, p], bias [C] as they came."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class PackedConvDownsample:
    """The weights of pack_conv_downsample as they came."""

    conv1: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    conv2: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    down1: Tensor
    down2: Tensor


def written(result: Tensor, out: Tensor | None) -> Tensor:
    """The result, in `out` if that is given."""
    if out is None:
        return result
    if out.shape != result.shape or out.dtype != result.dtype:
        raise ShapeError(f"out must be {list(result.shape)} {result.dtype}, got {list(out.shape)} {out.dtype}")
    return out.copy_(result)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, 3*C] laid out q | k | v -> three [B*heads, T, D] float32."""
    batch, tokens, width = qkv.shape
    parts = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    q, k, v = parts.float().flatten(1, 2).unbind(0)
    return q, k, v


def join_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B*heads, T, D] -> [B, T, C]."""
    return x.view(x.shape[0] // num_heads, num_heads, *x.shape[1:]).transpose(1, 2).flatten(2)


def softmax_in_place(scores: Tensor) -> Tensor:
    scores -= scores.amax(-1, keepdim=True)
    scores.exp_()
    return scores.div_(scores.sum(-1, keepdim=True))


def relative_rows(table: Tensor, size: int) -> Tensor:
    """[2*size-1, D] -> [size, size, D] whose entry (i, j) is the table's row i - j + size - 1."""
    steps = torch.arange(size, device=table.device)
    return table[steps[:, None] - steps + size - 1]


class ReferenceVisionOps:
    """The ops patch_embed, window_attention, attention and conv_downsample of the contract."""

    def pack_patch_embed(self, weight: Tensor, bias: Tensor) -> PackedPatchEmbed:
        if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or bias.shape != weight.shape[:1]:
            raise ShapeError(
                f"pack_patch_embed: needs [C, 3, p, p] and [C], got {list(weight.shape)}, {list(bias.shape)}"
            )
        return PackedPatchEmbed(weight, bias)

    def pack_conv_downsample(self, weights: dict[str, Tensor]) -> PackedConvDownsample:
        return PackedConvDownsample(**weights)

    def patch_embed(self, pixels: Tensor, weight: PackedPatchEmbed, patch_size: int) -> Tensor:
        kernel = weight.weight
        good = pixels.ndim == 4 and pixels.shape[2] == pixels.shape[3] and pixels.shape[2] % patch_size == 0
        if not good or tuple(kernel.shape[1:]) != (pixels.shape[1], patch_size, patch_size):
            raise ShapeError(
                f"patch_embed: pixels must be [B, {kernel.shape[1]}, S, S], S a multiple of {kernel.shape[2]}, "
                f"got {list(pixels.shape)} and patch_size {patch_size}"
            )
        y = functional.conv2d(pixels.float(), kernel.float(), weight.bias.float(), stride=patch_size)
        return y.permute(0, 2, 3, 1).contiguous().to(pixels.dtype)

    def window_attention(
        self,
        qkv: Tensor,
        pad_qkv: Tensor,
        rel_h: Tensor,
        rel_w: Tensor,
        num_heads: int,
        window: int,
        out: Tensor | None = None,
    ) -> Tensor:
        batch, grid, _, width = qkv.shape
        size = window or grid
        if rel_h.shape != (2 * size - 1, width // (3 * num_heads)) or rel_w.shape != rel_h.shape:
            raise ShapeError(
                f"window_attention: for windows of {size} the tables must be [{2 * size - 1}, "
                f"{width // (3 * num_heads)}], got {list(rel_h.shape)} and {list(rel_w.shape)}"
            )
        across = -(-grid // size)
        padded = pad_qkv.to(qkv.dtype).expand(batch, across * size, across * size, width).contiguous()
        padded[:, :grid, :grid] = qkv
        windows = padded.view(batch, across, size, across, size, width).transpose(2, 3).reshape(-1, size * size, width)
        rows_h, rows_w = relative_rows(rel_h.float(), size), relative_rows(rel_w.float(), size)
        seen = self._grid_attention(windows, rows_h, rows_w, num_heads)
        seen = seen.view(batch, across, across, size, size, -1).transpose(2, 3)
        return written(seen.reshape(batch, across * size, across * size, -1)[:, :grid, :grid].contiguous(), out)

    @staticmethod
    def _grid_attention(qkv: Tensor, rows_h: Tensor, rows_w: Tensor, num_heads: int) -> Tensor:
        """qkv [windows, size*size, 3*C] -> [windows, size*size, C], a few windows, heads or grid rows at a time."""
        tokens = qkv.shape[1]
        size = rows_h.shape[0]
        q, k, v = split_heads(qkv, num_heads)
        seen = torch.empty_like(q)
        step = max(1, SCORE_BYTES // (4 * tokens * tokens))
        row_step = min(size, max(1, SCORE_BYTES // (4 * tokens * size)))
        for first in range(0, q.shape[0], step):
            items = slice(first, first + step)
            keys = k[items].transpose(1, 2)
            for row in range(0, size, row_step):
                part = slice(row * size, min(row + row_step, size) * size)
                at = q[items, part].view(-1, (part.stop - part.start) // size, size, q.shape[-1])
                bias_h = torch.einsum("nabe,ace->nabc", at, rows_h[row : row + row_step])  # query (a, b) on key row c
                bias_w = torch.einsum("nabe,bde->nabd", at, rows_w)  # and on key column d
                scores = torch.bmm(q[items, part] * q.shape[-1] ** -0.5, keys)
                grid = scores.view(*at.shape[:3], size, size)
                grid += bias_h[..., :, None]
                grid += bias_w[..., None, :]
                seen[items, part] = torch.bmm(softmax_in_place(scores), v[items])
        return join_heads(seen, num_heads).to(qkv.dtype)

    def attention(self, qkv: Tensor, num_heads: int, out: Tensor | None = None) -> Tensor:
        if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads):
            raise ShapeError(f"attention: qkv must be [B, T, 3*C], C a multiple of {num_heads}, got {list(qkv.shape)}")
        q, k, v = split_heads(qkv, num_heads)
        scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
        return written(join_heads(torch.bmm(softmax_in_place(scores), v), num_heads).to(qkv.dtype), out)

    def conv_downsample(self, x: Tensor, neck: PackedConvDownsample, eps: float) -> Tensor:
        def norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            last = functional.layer_norm(y.permute(0, 2, 3, 1), weight.shape, weight.float(), bias.float(), eps)
            return last.permute(0, 3, 1, 2)

        if x.ndim != 4 or x.shape[3] != neck.conv1.shape[1]:
            raise ShapeError(f"conv_downsample: x must be [B, G, G, {neck.conv1.shape[1]}], got {list(x.shape)}")
        y = functional.conv2d(x.permute(0, 3, 1, 2).float(), neck.conv1.float())
        y = norm(y, neck.norm1_weight, neck.norm1_bias)
        y = norm(functional.conv2d(y, neck.conv2.float(), padding=1), neck.norm2_weight, neck.norm2_bias)
        y = functional.conv2d(y, neck.down1.float(), stride=2, padding=1)
        y = functional.conv2d(y, neck.down2.float(), stride=2, padding=1)
        return y.permute(0, 2, 3, 1).contiguous().to(x.dtype)
