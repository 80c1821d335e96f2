"""pagelens: an inference engine for DeepSeek-OCR and Qwen3.

Importing this package does no work and loads no heavy module; the names below are resolved on first use.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

_LAZY = {
    "Reader": ".reader",
    "Page": ".documents.page",
    "LLM": ".llm",
    "RequestHandle": ".handle",
    "SamplingParams": ".types",
    "NgramGuard": ".types",
    "RequestOutput": ".types",
    "CompletionOutput": ".types",
    "RerankOutput": ".pooling",
    "RerankResult": ".pooling",
    "PagelensError": ".errors",
}

__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:
    from .documents.page import Page as Page
    from .errors import PagelensError as PagelensError
    from .handle import RequestHandle as RequestHandle
    from .llm import LLM as LLM
    from .pooling import RerankOutput as RerankOutput
    from .pooling import RerankResult as RerankResult
    from .reader import Reader as Reader
    from .types import CompletionOutput as CompletionOutput
    from .types import NgramGuard as NgramGuard
    from .types import RequestOutput as RequestOutput
    from .types import SamplingParams as SamplingParams


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
