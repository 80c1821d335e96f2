"""Bytes and operations of what the benchmarks time, counted from sizes: what must be done, not what a kernel does.

A multiplication and an addition are two operations. Norms, softmax, rotations and the like are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import ClipConfig, DecoderConfig, MoeConfig, SamConfig

if TYPE_CHECKING:
    from ..vision.tiling import TilePlan


def moe_layers(config: DecoderConfig) -> tuple[int, MoeConfig | None]:
    """How many layers have experts, and their sizes."""
    moe = config.moe
    return (0, None) if moe is None else (config.num_layers - len(moe.dense_layers), moe)


def layer_weights(config: DecoderConfig) -> int:
    """Weights of all layers that one token meets; the output head is not among them."""
    width, heads = config.hidden_size, config.num_heads * config.head_dim
    attention = width * (heads + 2 * config.num_kv_heads * config.head_dim) + heads * width
    sparse, moe = moe_layers(config)
    total = config.num_layers * attention + (config.num_layers - sparse) * 3 * width * config.intermediate_size
    if moe is not None:
        inner = moe.top_k * moe.intermediate_size + moe.shared_intermediate_size
        total += sparse * width * (moe.num_experts + 3 * inner)
    return total


def head_weights(config: DecoderConfig) -> int:
    return config.vocab_size * config.hidden_size


def decoder_operations(config: DecoderConfig, tokens: int, logit_rows: int, first: int = 0) -> int:
    """Of `tokens` tokens at positions first, first + 1, ...; each sees itself and what is before it."""
    seen = tokens * first + tokens * (tokens + 1) // 2
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * seen
    return 2 * tokens * layer_weights(config) + 2 * logit_rows * head_weights(config) + attention


def kv_bytes(config: DecoderConfig, positions: int, bytes_per_value: int) -> int:
    """Keys and values of so many positions in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * positions * bytes_per_value


def sam_operations(config: SamConfig, side: int) -> int:
    """The first tower on one view of side x side pixels; windows count with their padding."""
    width, grid = config.width, side // config.patch_size
    rows = grid * grid
    linear = 2 * rows * width * width * (4 + 2 * config.mlp_ratio)
    window = config.window_size
    windows = (-(-grid // window)) ** 2
    total = 2.0 * rows * width * 3 * config.patch_size**2
    for layer in range(config.layers):
        is_global = layer in config.global_attn_indexes
        pairs = rows * rows if is_global else windows * window**4
        relative = rows * 2 * grid if is_global else windows * window**2 * 2 * window
        total += linear + 4 * pairs * width + 2 * relative * width
    neck, (middle, last) = config.out_channels, config.downsample_channels
    total += 2 * rows * neck * (width + 9 * neck)
    return int(total + 2 * rows // 4 * middle * 9 * neck + 2 * rows // 16 * last * 9 * middle)


def clip_operations(config: ClipConfig, features: int) -> int:
    """The second tower on one view of so many features and its class token."""
    rows, width = features + 1, config.width
    linear = 2 * rows * width * width * (4 + 2 * config.mlp_ratio)
    return int(config.layers * (linear + 4 * rows * rows * width))


def encoder_operations(sam: SamConfig, clip: ClipConfig, hidden_size: int, plan: TilePlan) -> int:
    """Both towers and the projector on all views of one page."""
    total = 0
    inner = clip.width + sam.downsample_channels[-1]
    for side, count, tokens in (
        (plan.base_size, 1, plan.global_grid**2),
        (plan.tile_size, plan.num_tiles, plan.local_grid**2),
    ):
        if count:
            projector = 2 * tokens * inner * hidden_size
            total += count * (sam_operations(sam, side) + clip_operations(clip, tokens) + projector)
    return total
