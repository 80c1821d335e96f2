"""The encoder in int8 gives the features of the plain one: the bar is a cosine of 0.999 for every feature vector.

Random weights at the real widths are the harder case: their activations have no structure that rounding could keep.
Errors grow with depth, so the network of every layer is measured by the slow test.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pagelens.config import ClipConfig, SamConfig
from pagelens.loading.checkpoint import open_checkpoint
from pagelens.loading.model_config import read_model_config
from pagelens.loading.random_weights import RandomWeights
from pagelens.loading.weights import TensorSource
from pagelens.models.clip import ClipTower, clip_parts
from pagelens.models.deepseek_ocr import DeepEncoder
from pagelens.models.sam import SamTower, sam_parts
from pagelens.models.weight_map import linear_part, pack_parts
from pagelens.models.workspace import Workspace
from pagelens.ops.native import NativeOps
from pagelens.ops.packing import PackedLinear
from pagelens.reader import builtin_model

BAR = 0.999
BF16 = torch.bfloat16
WIDTH = 1280  # of the decoder


def encoder_parts(sam: SamConfig, clip: ClipConfig, width: int) -> list[Any]:
    inner = clip.width + sam.downsample_channels[1]
    projector = linear_part("projector", "model.projector.layers", width, inner, bias=True)
    return [*sam_parts(sam), *clip_parts(clip), projector]


def packed_encoder(
    sam: SamConfig, clip: ClipConfig, width: int, source: TensorSource | None, weights: Any, ops: NativeOps
) -> tuple[DeepEncoder, dict[str, Any]]:
    """source None: random weights."""
    parts = encoder_parts(sam, clip, width)
    source = source or RandomWeights([p.spec for p in parts], BF16, 1)
    tensors = {name: source.tensor(name) for p in parts for name in p.spec.sources}
    packed = pack_parts(parts, tensors, BF16, ops, weights)
    scratch = Workspace()
    towers = SamTower(sam, packed, ops, scratch), ClipTower(clip, sam.downsample_channels[1], packed, ops, scratch)
    return DeepEncoder(*towers, packed["projector"], ops), packed


def features(sam: SamConfig, clip: ClipConfig, width: int, source: TensorSource | None, side: int) -> dict[str, Tensor]:
    """By kind of weights: [q * q, width] of a noisy page of `side` pixels."""
    ops = NativeOps(2)
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(5)).to(BF16) * 2 - 1
    found = {}
    for weights in ("auto", "int8", "int4"):
        encoder, _ = packed_encoder(sam, clip, width, source, None if weights == "auto" else weights, ops)
        found[weights] = encoder.encode_views(pixels).reshape(-1, width).to(torch.float32, copy=True)
    ops.close()
    return found


def check(found: dict[str, Tensor]) -> None:
    similar = cosine_similarity(found["auto"], found["int8"], dim=-1)
    print(f"cosine of the features: least {similar.min():.5f}, mean {similar.mean():.5f}")
    assert float(similar.min()) >= BAR
    assert not torch.equal(found["auto"], found["int8"])
    assert torch.equal(found["int8"], found["int4"]), "with int4 the encoder keeps 8 bits"


def test_features_of_the_real_widths() -> None:
    sam = SamConfig(layers=3, global_attn_indexes=(1,), image_size=256)
    check(features(sam, ClipConfig(layers=3), WIDTH, None, 256))


def test_features_of_the_built_in_reader() -> None:
    with open_checkpoint(builtin_model()) as checkpoint:
        config = read_model_config(checkpoint.config)
        check(features(config.sam, config.clip, config.decoder.hidden_size, checkpoint, config.sam.image_size))


@pytest.mark.slow
@pytest.mark.parametrize("side", [640, 1024])
def test_features_of_the_whole_encoder(side: int) -> None:
    check(features(SamConfig(), ClipConfig(), WIDTH, None, side))


def test_all_linear_layers_of_the_encoder_are_quantised() -> None:
    """And nothing else is: patches and convolutions are no linear layers."""
    sam = SamConfig(width=64, layers=2, heads=2, global_attn_indexes=(1,), image_size=64, out_channels=32)
    sam = replace(sam, downsample_channels=(32, 64))
    clip = ClipConfig(width=64, layers=1, heads=2)
    ops = NativeOps(1)
    for weights, bits in (("int8", 2), ("int4", 2), (None, 0)):
        _, packed = packed_encoder(sam, clip, 64, None, weights, ops)
        linear = {name: part.layout.format for name, part in packed.items() if isinstance(part, PackedLinear)}
        assert len(linear) == 2 * 4 + 4 + 1
        assert set(linear.values()) == {bits}
        assert packed["sam.patch_embed"].linear.layout.format == 0
        assert packed["sam.neck"].conv2.layout.format == 0
    ops.close()
