"""Runs the model: encodes each request's images once, and executes the passes the scheduler chose.

Knows nothing of queues, text or sampling.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import EngineError
from ..types import ForwardBatch, KVCacheView
from .sequence import Sequence


class Model(Protocol):
    """What the runner needs of a network. `config.decoder` is its DecoderConfig."""

    config: Any

    def forward(self, batch: ForwardBatch, kv: KVCacheView) -> Tensor:
        """Store the batch's keys and values in the cache and return the logits [L, V] float32 of its logit rows."""
        ...

    def forward_pooled(self, batch: ForwardBatch, kv: KVCacheView) -> tuple[Tensor, Tensor]:
        """The same logits, and the final hidden states [P, C] float32 of batch.pooled_rows. Text models only."""
        ...

    def encode_image(self, views: Any, plan: Any) -> Tensor:
        """Vision rows [plan.num_image_tokens, C] of one image, activation dtype, in the order of its placeholders."""
        ...


class ImageInput(Protocol):
    """One image of a prompt: its placeholders are the tokens start .. start+count-1."""

    @property
    def start(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def plan(self) -> Any: ...
    @property
    def digest(self) -> bytes | None: ...

    def take_views(self) -> Any:
        """The preprocessed pixels; they may be forgotten once taken."""
        ...


@dataclass(slots=True)
class EncodedImage:
    start: int
    rows: Tensor


class Runner:
    """A model and its KV-cache.

    Vision rows are kept until `release`, so that a recompute needs no second encoding. They belong to all the answers
    to a prompt: any of their sequences may be named.
    """

    def __init__(self, model: Model, kv: KVCacheView) -> None:
        self.model = model
        self.kv = kv
        self._images: dict[Sequence, list[EncodedImage]] = {}  # by Sequence.root

    def has_images(self, sequence: Sequence) -> bool:
        """Whether vision rows are held for a sequence."""
        return sequence.root in self._images

    def find_missing(self, sequence: Sequence, images: SequenceOf[ImageInput], first_position: int) -> list[ImageInput]:
        """The images with rows at first_position or later that `encode` has not had yet."""
        encoded = {image.start for image in self._images.get(sequence.root, ())}
        return [image for image in images if image.start + image.count > first_position and image.start not in encoded]

    def encode(self, sequence: Sequence, images: SequenceOf[ImageInput]) -> tuple[float, float]:
        """Preprocess and encode images of a sequence and keep their rows. Returns the seconds of both stages."""
        preprocess_s = encode_s = 0.0
        encoded = []
        for image in images:
            started = time.perf_counter()
            views = image.take_views()
            preprocessed = time.perf_counter()
            with torch.inference_mode():
                rows = self.model.encode_image(views, image.plan)
            if len(rows) != image.count:
                raise EngineError(f"the encoder made {len(rows)} rows for an image with {image.count} placeholders")
            encoded.append(EncodedImage(image.start, rows))
            preprocess_s += preprocessed - started
            encode_s += time.perf_counter() - preprocessed
        self._images.setdefault(sequence.root, []).extend(encoded)
        return preprocess_s, encode_s

    def free_encoder(self) -> None:
        """Free the encoder's weights until the next image, where the model can load them again."""
        free = getattr(self.model, "free_encoder", None)
        if free is not None:
            free()

    def image_rows(self, sequence: Sequence, start: int, end: int) -> list[tuple[int, Tensor]]:
        """Vision rows at positions start..end-1, as (position, rows); a chunk may cut through an image."""
        pieces = []
        for image in self._images.get(sequence.root, ()):
            first, last = max(start, image.start), min(end, image.start + len(image.rows))
            if first < last:
                pieces.append((first, image.rows[first - image.start : last - image.start]))
        return pieces

    def run(self, batch: ForwardBatch) -> tuple[Tensor, Tensor | None]:
        """Logits [L, V] of the batch's logit rows, and the hidden states [P, C] of its pooled rows if it has any."""
        with torch.inference_mode():
            if batch.pooled_rows is None:
                return self.model.forward(batch, self.kv), None
            return self.model.forward_pooled(batch, self.kv)

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence's vision rows."""
        self._images.pop(sequence.root, None)
