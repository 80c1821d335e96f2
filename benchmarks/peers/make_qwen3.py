"""Write a Qwen3-0.6B folder of random bfloat16 weights: python -m benchmarks.peers.make_qwen3 OUT"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from pagelens.loading.presets import PRESETS
from pagelens.loading.random_weights import RandomWeights
from pagelens.models.qwen3 import TextModel

NAME = "qwen3-0.6b"
# The tied head then has logits of a spread of 3, so that the distributions that are compared are not flat.
EMBEDDING_GAIN = 5.0


def main() -> None:
    out = Path(sys.argv[1])
    config = PRESETS[NAME]
    source = RandomWeights(TextModel.weight_specs(TextModel.read_config(config)), torch.bfloat16, seed=1)
    tensors = {name: source.tensor(name) for name in source.names()}
    tensors["model.embed_tokens.weight"] *= EMBEDDING_GAIN
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    main()
