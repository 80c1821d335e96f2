"""A checkpoint whose tensors go by the names that the weight maps use.

Embedding models are saved without the language model around the decoder: `layers.0...` instead of `model.layers.0...`,
and no head. Source: qwen3.md section 1.3.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import WeightsError
from ..quantization import Weight
from .strict_json import shown
from .weights import TensorSource

PREFIX = "model."
HEAD = "lm_head."
_TABLE = "embed_tokens.weight"


def prefixed_names(names: Collection[str]) -> dict[str, str]:
    """Name with `model.` -> name in the file. The two are the same unless the file has the decoder without a prefix."""
    if _TABLE not in names or PREFIX + _TABLE in names:
        return {name: name for name in names}
    # The head stands outside the decoder in every file.
    return {name if name.startswith((PREFIX, HEAD)) else PREFIX + name: name for name in names}


def with_prefix(source: TensorSource) -> TensorSource:
    """`source` itself if its names begin with `model.`, else the same tensors under names that do."""
    names = prefixed_names(source.names())
    return source if all(new == old for new, old in names.items()) else RenamedTensors(source, names)


class RenamedTensors:
    """A TensorSource over another. names: new name -> name in the source."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._name(name))

    def dtype(self, name: str) -> str:
        return self._source.dtype(self._name(name))

    def tensor(self, name: str) -> Weight:
        return self._source.tensor(self._name(name))

    def release(self, name: str) -> None:
        self._source.release(self._name(name))

    def _name(self, name: str) -> str:
        try:
            return self._names[name]
        except KeyError:
            raise WeightsError(f"the checkpoint has no tensor {shown(name)}") from None
