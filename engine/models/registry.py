"""From what config.json says of a model to the class that runs it."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError
from .deepseek_ocr import DeepseekOcr

MODELS: dict[str, type[DeepseekOcr]] = {
    "deepseek_vl_v2": DeepseekOcr,
    "DeepseekOCRForCausalLM": DeepseekOcr,
}


def model_class(model_type: str, architectures: Sequence[str] = ()) -> type[DeepseekOcr]:
    """The class for a model_type or one of the architectures. Raises ConfigError listing the known ones.

    An architecture is looked up first: other models share DeepSeek-OCR's model_type.
    """
    names = list(architectures) or [model_type]
    for name in names:
        if name in MODELS:
            return MODELS[name]
    raise ConfigError(f"model {', '.join(map(repr, names))} is not implemented; known: {', '.join(MODELS)}")
