"""The rotary table of a decoder: plain frequencies, or YaRN's. Source: qwen3.md section 4.1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import DecoderConfig, YarnConfig
from ..ops import RopeTable


def rope_table(config: DecoderConfig, device: torch.device) -> RopeTable:
    """cos and sin for every position that the decoder may have, on the device."""
    positions, yarn = config.max_position_embeddings, config.yarn
    if yarn is None:
        table = RopeTable.build(positions, config.head_dim, config.rope_theta)
    else:
        frequencies = yarn_frequencies(yarn, config.head_dim, config.rope_theta)
        table = RopeTable.from_frequencies(positions, frequencies, yarn.attention_factor)
    return RopeTable(table.cos.to(device), table.sin.to(device))


def yarn_frequencies(yarn: YarnConfig, head_dim: int, theta: float) -> Tensor:
    """[D/2] float64: fast rotations as they are, slow ones divided by the factor, a ramp between the two."""

    def pair_that_turns(times: float) -> float:
        """Index of the pair (not whole) that makes so many turns within the original length."""
        return (
            head_dim * math.log(yarn.original_max_position_embeddings / (2 * math.pi * times)) / (2 * math.log(theta))
        )

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper limit is the head size and not the number of pairs in every published implementation.
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float64)
    slow = ((pairs - low) / (high - low)).clamp(0, 1)
    plain = theta ** -(2 * pairs / head_dim)
    return plain * (1 - slow) + plain / yarn.factor * slow
