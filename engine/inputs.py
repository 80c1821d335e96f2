"""From what a user passes (a string, token ids, or a dict with images) to a Request the engine can run.

Counts vision tokens with the same TilePlan that later builds their rows, so the two cannot disagree. Knows nothing of
queues or the network.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .config import ProcessorConfig
from .errors import ConfigError, ImageError, PromptError
from .runtime.thinking import ThinkingPlan, ThinkingTokens, find_thinking_tokens
from .types import SamplingParams
from .vision.images import load_image
from .vision.modes import Mode, default_mode, resolve_mode
from .vision.preprocess import preprocess
from .vision.tiling import TilePlan, plan_tiles

if TYPE_CHECKING:
    from .text.tokenizer import Tokenizer
    from .vision.images import ImageSource

IMAGE_MARK = "<image>"
PROMPT_KEYS = ("prompt", "images", "mode", "max_crops")

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]


class ImageSlot:
    """One image of a prompt; its placeholders are the tokens start .. start+count-1.

    Without `views` the source is opened a second time when its turn comes, so that a long list of pages does not hold
    the pixels of all of them.

    digest  of pixels and plan: equal digests mean equal vision rows; None if nobody needs it
    """

    def __init__(
        self, source: ImageSource, plan: TilePlan, start: int, views: Any | None, digest: bytes | None = None
    ) -> None:
        self.plan = plan
        self.start = start
        self.count = plan.num_image_tokens
        self.digest = digest
        self._source: ImageSource | None = source
        self._views = views
        self._ahead: Future[Any] | None = None

    def prefetch(self, executor: Executor) -> None:
        """Begin to preprocess in another thread, so that `take_views` need not; nothing if there is nothing to do."""
        if self._views is None and self._source is not None and self._ahead is None:
            self._ahead = executor.submit(self._make_views, self._source)

    def take_views(self) -> Any:
        """The preprocessed pixels. Can be called once: neither source nor views are kept afterwards."""
        source, views, ahead = self._source, self._views, self._ahead
        self._source = self._views = self._ahead = None
        if views is not None:
            return views
        if ahead is not None:
            return ahead.result()
        if source is None:
            raise PromptError("the views of this image were already taken")
        return self._make_views(source)

    def _make_views(self, source: ImageSource) -> Any:
        pixels = load_image(source)
        views = preprocess(pixels, self.plan)
        # The prefix cache would keep the rows of the new picture under the name of the old one.
        if self.digest is not None and digest_image(pixels, self.plan) != self.digest:
            raise ImageError("the image was changed while its request waited; keep the file as it is until the answer")
        return views

    def release(self) -> None:
        """Forget source and views, whether they were taken or not."""
        if self._ahead is not None:
            self._ahead.cancel()
        self._source = self._views = self._ahead = None


def digest_image(pixels: NDArray[np.uint8], plan: TilePlan) -> bytes:
    """SHA-256 of all that the vision rows of an image depend on. pixels [h, w, 3], contiguous."""
    digest = hashlib.sha256(repr((pixels.shape, plan)).encode())
    digest.update(pixels.data)
    return digest.digest()


@dataclass(slots=True, eq=False)
class Request:
    """A checked prompt: `token_ids` with every image mark already replaced by its placeholders.

    is_pooled  no token is to be generated: the result is the last token's final hidden state
    """

    request_id: str
    prompt: str | None
    token_ids: list[int]
    images: tuple[ImageSlot, ...]
    sampling: SamplingParams
    preprocess_s: float = 0.0
    thinking: ThinkingPlan | None = None
    is_pooled: bool = False

    @property
    def num_image_tokens(self) -> int:
        return sum(image.count for image in self.images)


class InputBuilder:
    """Builds requests for one model. tokenizer, processor and image_token_id are None where the model has none.

    digest_images  tell images by their content, for the prefix cache
    """

    def __init__(
        self,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
        bos_token_id: int | None = None,
        image_token_id: int | None = None,
        processor: ProcessorConfig | None = None,
        digest_images: bool = False,
    ) -> None:
        self.digest_images = digest_images
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.bos_token_id = bos_token_id
        self.processor = processor
        if image_token_id is None and tokenizer is not None and processor is not None:
            image_token_id = tokenizer.token_id(IMAGE_MARK)
        self.image_token_id = image_token_id

    def build(self, prompt: Prompt, sampling: SamplingParams, request_id: str, keep_views: bool = True) -> Request:
        """Check a prompt and count its tokens.

        prompt      str, token ids, or {"prompt": str or ids, "images": [...], "mode": name, "max_crops": int}
        keep_views  preprocess the images now and keep the pixels; otherwise when the request's turn comes
        Raises PromptError, ImageError or ConfigError.
        """
        self._check_sampling(sampling)
        content, sources, mode = self._parse(prompt)
        slots: list[ImageSlot] = []
        started = time.perf_counter()
        pieces = self._tokenize(content)
        if len(pieces) - 1 != len(sources):
            raise PromptError(
                f"the prompt has {len(pieces) - 1} {IMAGE_MARK} marks but {len(sources)} images were given; "
                "write one mark for each image"
            )
        token_ids = pieces[0]
        for source, piece in zip(sources, pieces[1:]):
            slot = self._slot(source, mode, len(token_ids), keep_views)
            slots.append(slot)
            token_ids += [self._image_id()] * slot.count + piece
        if not token_ids:
            raise PromptError("the prompt is empty; give at least one token")
        if max(token_ids) >= self.vocab_size:
            raise PromptError(
                f"tokenizer.json gives the id {max(token_ids)}, but the model's vocabulary ends at "
                f"{self.vocab_size - 1}; the file belongs to another model"
            )
        text = content if isinstance(content, str) else None
        spent = time.perf_counter() - started
        thinking = self._plan_thinking(sampling.thinking_budget, token_ids)
        return Request(request_id, text, token_ids, tuple(slots), sampling, spent if slots else 0.0, thinking)

    @functools.cached_property
    def thinking_tokens(self) -> ThinkingTokens | None:
        """None if the model has no tokens for <think> and </think>."""
        return None if self.tokenizer is None else find_thinking_tokens(self.tokenizer)

    def _plan_thinking(self, budget: int | None, token_ids: list[int]) -> ThinkingPlan | None:
        tokens = None if budget is None else self.thinking_tokens
        if budget is None or (budget == 0 and tokens is None):
            return None
        if tokens is None or max(tokens.stop_ids) >= self.vocab_size:
            raise ConfigError(
                f"thinking_budget={budget} needs a model with the tokens <think> and </think>, which this model has "
                "not; leave it out"
            )
        starts_inside = tokens.are_open_in(token_ids)
        if starts_inside and budget == 0:
            raise PromptError(
                "thinking_budget=0, but the prompt ends inside a think block; close the block in the prompt, or give "
                "a budget of at least 1"
            )
        return ThinkingPlan(tokens, budget, starts_inside)

    def _parse(self, prompt: Prompt) -> tuple[str | Sequence[int], list[ImageSource], Mode | None]:
        """Content, images and mode of a prompt in any of its forms."""
        if not isinstance(prompt, Mapping):
            return prompt, [], None
        unknown = sorted(str(key) for key in prompt if key not in PROMPT_KEYS)
        if unknown:
            raise PromptError(f"unknown key {unknown[0]!r} in a prompt; known: {', '.join(PROMPT_KEYS)}")
        if "prompt" not in prompt:
            raise PromptError(f"a prompt given as a mapping needs the key 'prompt'; it has {sorted(prompt)}")
        images, mode, max_crops = (prompt.get(key) for key in ("images", "mode", "max_crops"))
        sources = list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
        if self.processor is None:
            if sources or mode is not None or max_crops is not None:
                raise PromptError("this model reads text only; leave out images, mode and max_crops")
            return prompt["prompt"], [], None
        name = default_mode(self.processor).name if mode is None else mode
        return prompt["prompt"], sources, resolve_mode(name, self.processor, max_crops)

    def _tokenize(self, content: str | Sequence[int]) -> list[list[int]]:
        """Token ids of the pieces between image marks."""
        if not isinstance(content, str):
            return self._split_ids(content)
        if self.tokenizer is None:
            raise PromptError("this model's folder has no tokenizer.json, so a prompt must be a list of token ids")
        if not content:
            raise PromptError("the prompt is empty; give at least one token")
        if self.processor is None:
            return [[*self.tokenizer.prefix_ids, *self.tokenizer.encode(content, parse_special=True)]]
        start = [] if self.bos_token_id is None else [self.bos_token_id]
        # The published template "plain": white space at both ends goes, each piece between images is encoded alone.
        pieces = [
            self.tokenizer.encode(piece, parse_special=True) if piece else []
            for piece in content.strip().split(IMAGE_MARK)
        ]
        pieces[0] = start + pieces[0]
        return pieces

    def _split_ids(self, content: Sequence[int]) -> list[list[int]]:
        pieces: list[list[int]] = [[]]
        try:
            # index() takes numpy's integers too, and neither floats nor strings.
            ids = [operator.index(token) for token in content]
        except TypeError:
            ids = None
        if ids is None or isinstance(content, (bytes, bytearray)) or any(isinstance(token, bool) for token in content):
            raise PromptError(f"a prompt is a string, a list of token ids or a mapping, not {_describe(content)}")
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise PromptError(f"token id {token} is outside the vocabulary, 0 to {self.vocab_size - 1}")
            if token == self.image_token_id and self.processor is not None:
                pieces.append([])
            else:
                pieces[-1].append(token)
        return pieces

    def _slot(self, source: ImageSource, mode: Mode | None, start: int, keep_views: bool) -> ImageSlot:
        if mode is None:
            raise PromptError("this model reads text only; leave out images and mode")
        pixels = load_image(source)
        plan = plan_tiles(pixels.shape[1], pixels.shape[0], mode)
        digest = digest_image(pixels, plan) if self.digest_images else None
        return ImageSlot(source, plan, start, preprocess(pixels, plan) if keep_views else None, digest)

    def _image_id(self) -> int:
        if self.image_token_id is None:
            raise PromptError(
                f"the model has no token for {IMAGE_MARK}: neither image_token_id in config.json nor the text in "
                "tokenizer.json"
            )
        return self.image_token_id

    def _check_sampling(self, sampling: SamplingParams) -> None:
        if not isinstance(sampling, SamplingParams):
            raise ConfigError(f"sampling params must be SamplingParams, not {_describe(sampling)}")
        for token in sampling.stop_token_ids or ():
            if not 0 <= token < self.vocab_size:
                raise ConfigError(f"stop_token_ids holds {token!r}, outside the vocabulary 0 to {self.vocab_size - 1}")
        if sampling.stop and self.tokenizer is None:
            raise ConfigError("stop strings need a tokenizer.json in the model's folder; use stop_token_ids")


def _describe(value: object) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
