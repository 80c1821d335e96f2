"""Reader on the built-in model: reading depends on the image, streaming equals reading, batching changes nothing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.text_models import make_oracle, save
from PIL import Image

from pagelens import LLM, PagelensError, Reader, SamplingParams
from pagelens.config import ProcessorConfig
from pagelens.errors import ConfigError, PromptError
from pagelens.reader import DEFAULT_PROMPT, default_prompt, with_image_mark

SAMPLES = Path(__file__).resolve().parents[2] / "engine" / "assets" / "samples"
FILES = sorted(SAMPLES.glob("*.png"))
LIMIT = SamplingParams(max_tokens=80)


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    with Reader() as one:
        yield one


def test_prompts() -> None:
    assert default_prompt(ProcessorConfig()) == DEFAULT_PROMPT
    assert default_prompt(ProcessorConfig(prompts={"plain": "\nA.", "md": "\nB."})) == "<image>\nB."
    assert default_prompt(ProcessorConfig(prompts={"plain": "\nA."})) == "<image>\nA."
    assert with_image_mark("<image>\nX") == "<image>\nX"
    with pytest.raises(PromptError, match="2 <image> marks"):
        with_image_mark("<image><image>")


def test_different_pages_give_different_text(reader: Reader) -> None:
    texts = {reader.read(file, sampling=LIMIT).markdown for file in FILES}
    assert len(texts) == len(FILES) > 1


def test_every_kind_of_source_reads_the_same(reader: Reader) -> None:
    data = FILES[0].read_bytes()
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    sources = (FILES[0], str(FILES[0]), data, picture, np.asarray(picture))
    pages = [reader.read(source, sampling=LIMIT) for source in sources]
    assert len({page.markdown for page in pages}) == 1


def test_stream_joins_to_the_page(reader: Reader) -> None:
    stream = reader.stream(FILES[0], sampling=LIMIT)
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces).strip() == stream.result().markdown.strip()


def test_pages_read_together_equal_pages_read_alone(reader: Reader) -> None:
    alone = [reader.read(file, sampling=LIMIT).raw_text for file in FILES]
    order = list(reversed(FILES)) + FILES
    together = [page.raw_text for page in reader.read_many(order, sampling=LIMIT)]
    assert together == list(reversed(alone)) + alone


def test_usage_adds_up(reader: Reader) -> None:
    page = reader.read(FILES[0], sampling=LIMIT)
    usage = page.usage
    side = reader.processor.base_size // 64
    assert usage.image_tokens == side * (side + 1) + 1
    assert usage.text_tokens > 0
    assert usage.compression_ratio == round(usage.text_tokens / usage.valid_image_tokens, 2)
    assert {"preprocess", "encode", "prefill", "decode"} <= set(usage.seconds)
    assert all(seconds >= 0 for seconds in usage.seconds.values())
    assert page.finish_reason in ("stop", "length")
    assert (page.width, page.height) == Image.open(FILES[0]).size


def test_a_bad_page_in_a_batch_cancels_the_rest_and_the_reader_lives_on(reader: Reader) -> None:
    with pytest.raises(PagelensError):
        reader.read_many([FILES[0], b"not an image", FILES[0]], sampling=LIMIT)
    assert reader.read(FILES[0], sampling=LIMIT).markdown


def test_cancel_keeps_what_was_read(reader: Reader) -> None:
    stream = reader.stream(FILES[0])
    next(iter(stream))
    stream.cancel()
    page = stream.result(timeout=30)
    assert page.finish_reason in ("abort", "stop")


def test_unknown_mode_and_option(reader: Reader) -> None:
    with pytest.raises(PromptError, match="tiny"):
        reader.read(FILES[0], mode="tiny")
    with pytest.raises(ConfigError, match="colour"):
        Reader(colour="red")


def test_a_text_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    folder = save(make_oracle("Qwen3ForCausalLM"), tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"a text model reads no pages; use LLM, or name a DeepSeek-OCR checkpoint"):
        Reader(folder)


def test_a_length_that_cannot_be_is_refused_before_the_weights_are_read(tmp_path: Path) -> None:
    folder = save(make_oracle("Qwen3ForCausalLM"), tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"max_model_len=10000000 is above the model's limit of \d+ positions"):
        LLM(folder, max_model_len=10_000_000)
