"""Reader: a page image in, a Page with Markdown out, on any DeepSeek-OCR checkpoint or the small built-in model.

A thin layer over LLM: it picks the prompt, turns on the repetition guard, and parses what comes back. It knows nothing
of tensors, scheduling or files other than the page image.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .config import ProcessorConfig
from .doctor import reads_pages
from .documents.page import MarkdownStream, Page, Usage, build_page
from .errors import ConfigError, PromptError
from .handle import RequestHandle
from .inputs import IMAGE_MARK
from .llm import LLM
from .types import NgramGuard, RequestOutput, SamplingParams, require_one_answer
from .vision.images import load_image
from .vision.modes import Mode, default_mode, resolve_mode
from .vision.tiling import TilePlan, plan_tiles

if TYPE_CHECKING:
    from .vision.images import ImageSource

DEFAULT_PROMPT = "<image>\n<|grounding|>Convert the document to markdown."
BUILTIN_NOTE = (
    "reading with the small built-in reader (short printed text only); name a DeepSeek-OCR checkpoint folder or hub id "
    "with --model for real pages"
)


def builtin_model() -> Path:
    """Folder of the small model that ships with the package."""
    with as_file(files(__package__).joinpath("assets/reader")) as folder:
        return Path(folder)


def default_prompt(processor: ProcessorConfig) -> str:
    """The checkpoint's own Markdown prompt ("md" of `processor.prompts`, else its first), or the grounded one."""
    prompts = processor.prompts
    if not prompts:
        return DEFAULT_PROMPT
    return with_image_mark(prompts.get("md", next(iter(prompts.values()))))


def with_image_mark(prompt: str) -> str:
    """Put one image mark in front of a prompt that has none; more than one is a PromptError."""
    marks = prompt.count(IMAGE_MARK)
    if marks > 1:
        raise PromptError(f"the prompt has {marks} {IMAGE_MARK} marks, but Reader reads one page at a time; keep one")
    return prompt if marks else IMAGE_MARK + prompt


class PageStream:
    """A page being read: iterate to get Markdown as it comes (grounding tags already removed), then call `result()`.

    The pieces joined are the Markdown of the page, but for white space at its ends. `raw` iteration is not offered: the
    raw text is `result().raw_text`.
    """

    def __init__(self, handle: RequestHandle, plan: TilePlan, mode: Mode, load_s: float) -> None:
        self._handle, self._plan, self._mode, self._load_s = handle, plan, mode, load_s
        self._page: Page | None = None

    def __iter__(self) -> Iterator[str]:
        cleaner = MarkdownStream()
        for piece in self._handle.stream_text():
            cleaned = cleaner.push(piece)
            if cleaned:
                yield cleaned
        rest = cleaner.finish()
        if rest:
            yield rest

    def cancel(self) -> None:
        """Stop reading; `result()` then holds what was read so far, with finish_reason "abort"."""
        self._handle.cancel()

    def result(self, timeout: float | None = None) -> Page:
        """Wait for the end and return the page. Raises what made the request fail, or TimeoutError."""
        if self._page is None:
            self._page = self._build(self._handle.result(timeout))
        return self._page

    def _build(self, output: RequestOutput) -> Page:
        answer, metrics = output.outputs[0], output.metrics
        seconds = {
            "load": self._load_s,
            "preprocess": metrics.preprocess_s,
            "queue": metrics.queue_s,
            "encode": metrics.encode_s,
            "prefill": metrics.prefill_s,
            "decode": metrics.decode_s,
        }
        usage = Usage(
            mode=self._mode.name,
            columns=self._plan.columns,
            rows=self._plan.rows,
            image_tokens=metrics.num_image_tokens,
            valid_image_tokens=self._plan.valid_tokens,
            prompt_tokens=len(output.prompt_token_ids),
            text_tokens=len(answer.token_ids),
            seconds=seconds,
        )
        return build_page(answer.text, self._plan.width, self._plan.height, usage, answer.finish_reason or "abort")


class Reader:
    """Reads page images. Use as a context manager, or call `close()`.

    model    folder or hub id of a DeepSeek-OCR checkpoint; None = the small built-in reader
    options  those of LLM (dtype, backend, num_threads, max_num_seqs, ...); an unknown one is a ConfigError
    Raises ConfigError for a text model, before its weights are read.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        self.is_builtin = model is None
        named = str(model.expanduser().absolute()) if isinstance(model, Path) else model
        if named is not None and not reads_pages(named, options.get("random_weights", False) is not False):
            raise ConfigError(f"{model}: a text model reads no pages; use LLM, or name a DeepSeek-OCR checkpoint")
        self.llm = LLM(builtin_model() if model is None else model, **options)

    @property
    def processor(self) -> ProcessorConfig:
        return self.llm.processor

    def stream(
        self,
        image: ImageSource,
        mode: str | None = None,
        prompt: str | None = None,
        sampling: SamplingParams | None = None,
        max_crops: int | None = None,
        composite_alpha: bool = True,
    ) -> PageStream:
        """Start reading one page and return at once; several streams are read together, batched.

        image            path, bytes, PIL image or uint8 array
        mode             one of the checkpoint's modes; None = its default
        prompt           text, or the name of one of the checkpoint's prompts; None = its Markdown prompt
        sampling         None = greedy; the n-gram guard is on unless sampling.ngram_guard says otherwise
        max_crops        most tiles of a tiled mode
        composite_alpha  False keeps the colours under transparent areas, as the reference implementation does
        Raises ImageError, PromptError, ConfigError, CapacityError before anything runs.
        """
        chosen = default_mode(self.processor) if mode is None else resolve_mode(mode, self.processor)
        if max_crops is not None:
            chosen = resolve_mode(chosen.name, self.processor, max_crops)
        text = default_prompt(self.processor)
        if isinstance(prompt, str):
            text = with_image_mark(self.processor.prompts.get(prompt, prompt))
        elif prompt is not None:
            raise PromptError(f"the prompt must be a string, not {type(prompt).__name__}")
        started = time.perf_counter()
        pixels = load_image(image, composite_alpha=composite_alpha)
        load_s = time.perf_counter() - started
        plan = plan_tiles(pixels.shape[1], pixels.shape[0], chosen)
        request: dict[str, Any] = {"prompt": text, "images": [pixels], "mode": chosen.name}
        if max_crops is not None:
            request["max_crops"] = max_crops
        return PageStream(self.llm.submit(request, with_guard(sampling)), plan, chosen, load_s)

    def read(self, image: ImageSource, **options: Any) -> Page:
        """Read one page; arguments as in `stream`."""
        return self.stream(image, **options).result()

    def read_many(self, images: Iterable[ImageSource], **options: Any) -> list[Page]:
        """Read several pages together, in order; the first bad one raises, after which the others are cancelled."""
        streams: list[PageStream] = []
        try:
            for image in images:
                streams.append(self.stream(image, **options))
            return [stream.result() for stream in streams]
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise

    @staticmethod
    def save(page: Page, image: ImageSource, folder: str | Path, composite_alpha: bool = True) -> None:
        """Write a page's folder: result.md, images/ (the figures), overlay.png (its boxes drawn) and page.json."""
        from .documents.draw import save_page

        save_page(page, load_image(image, composite_alpha=composite_alpha), Path(folder))

    def close(self) -> None:
        """Free the model, its cache and its threads. Idempotent."""
        self.llm.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def with_guard(sampling: SamplingParams | None) -> SamplingParams:
    """The sampling to use for a page: greedy by default, and the n-gram guard on unless it was set."""
    sampling = SamplingParams() if sampling is None else sampling
    if not isinstance(sampling, SamplingParams):
        raise ConfigError(f"sampling must be SamplingParams, not {type(sampling).__name__}")
    require_one_answer(sampling, "Reader")
    return replace(sampling, ngram_guard=NgramGuard()) if sampling.ngram_guard is None else sampling
