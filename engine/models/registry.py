"""From what config.json says of a model to the class that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ..errors import ConfigError
from ..loading.config_reader import ConfigReader
from ..loading.weights import TensorSource, WeightSpec
from ..ops import OpCase, Ops
from .deepseek_ocr import DeepseekOcr
from .qwen3 import TextModel
from .weight_map import OpenedParts, QuantizeTo


class ModelClass(Protocol):
    """What the engine asks of the class of a model before there is one. A config is what its read_config returned."""

    def read_config(self, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> Any:
        """Check the objects in config.json and generation_config.json; raises ConfigError naming the key."""

    def weight_specs(self, config: Any) -> list[WeightSpec]: ...
    def op_cases(self, config: Any, dtype: torch.dtype) -> list[OpCase]: ...
    def open_parts(self, checkpoint: TensorSource, config: Any) -> OpenedParts: ...
    def load(
        self,
        checkpoint: TensorSource,
        config: Any,
        dtype: torch.dtype,
        ops: Ops,
        quantize_to: QuantizeTo | None = None,
        low_memory: bool = False,
    ) -> Any: ...


MODELS: dict[str, ModelClass] = {
    "deepseek_vl_v2": DeepseekOcr,
    "DeepseekOCRForCausalLM": DeepseekOcr,
    "qwen3": TextModel,
    "Qwen3ForCausalLM": TextModel,
    "qwen3_moe": TextModel,
    "Qwen3MoeForCausalLM": TextModel,
    "llama": TextModel,
    "LlamaForCausalLM": TextModel,
    # The decoder alone, as embedding models are saved.
    "Qwen3Model": TextModel,
    "Qwen3MoeModel": TextModel,
    "LlamaModel": TextModel,
}


def model_class(model_type: str, architectures: Sequence[str] = ()) -> ModelClass:
    """The class for a model_type or one of the architectures. Raises ConfigError listing the known ones.

    An architecture is looked up first: other models share DeepSeek-OCR's model_type.
    """
    names = list(architectures) or [model_type]
    for name in names:
        if name in MODELS:
            return MODELS[name]
    raise ConfigError(
        f"model {', '.join(map(repr, names))} is not implemented; known: {', '.join(MODELS)}; "
        "use a checkpoint of one of these"
    )


def class_of(raw: Mapping[str, Any]) -> ModelClass:
    """The class for the object in a config.json. Raises ConfigError if it names none that is known."""
    top = ConfigReader(raw, "config.json")
    return model_class(top.require("model_type", str), top.get("architectures", (str,), ()))
