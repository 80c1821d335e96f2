"""Prompts in every form become the right tokens, and every wrong one a sentence that says what to do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from helpers.fake_model import IMAGE, VOCAB
from PIL import Image

from pagelens.config import ProcessorConfig
from pagelens.errors import ConfigError, ImageError, PromptError, ShapeError
from pagelens.inputs import InputBuilder, Request
from pagelens.types import SamplingParams

PROCESSOR = ProcessorConfig(192, 64, False, 2, 4, scaled=True)
PAGE = np.full((30, 40, 3), 200, np.uint8)
ROWS = 13  # 3x3 features of a 192 px view, three newlines, one separator


class LetterTokenizer:
    """One token a letter, from 10 on, and "<x>" as the special token 5; a text model's prompts begin with 8, 9."""

    prefix_ids = (8, 9)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        assert parse_special
        ids = []
        while text:
            if text.startswith("<x>"):
                ids.append(5)
                text = text[3:]
            else:
                ids.append(10 + ord(text[0]) % 50)
                text = text[1:]
        return ids

    def token_id(self, text: str) -> int | None:
        return {"<x>": 5, "<image>": IMAGE}.get(text)


def letters(text: str) -> list[int]:
    return LetterTokenizer().encode(text, parse_special=True)


def builder(**changes: Any) -> InputBuilder:
    options = {"tokenizer": LetterTokenizer(), "bos_token_id": 0, "processor": PROCESSOR} | changes
    return InputBuilder(VOCAB, **options)


def build(prompt: Any, params: SamplingParams | None = None, **changes: Any) -> Request:
    return builder(**changes).build(prompt, params or SamplingParams(), "0")


def test_plain_template_bos_and_pieces_encoded_apart() -> None:
    request = build({"prompt": "  a<image>\nb<x> c \n", "images": [PAGE]})
    assert request.token_ids == [0, *letters("a"), *[IMAGE] * ROWS, *letters("\nb"), 5, *letters(" c")]
    assert (request.images[0].start, request.images[0].count) == (2, ROWS)
    assert request.num_image_tokens == ROWS
    assert request.prompt == "  a<image>\nb<x> c \n"
    assert build("hi").token_ids == [0, *letters("hi")]


def test_two_images_and_a_single_one_without_a_list() -> None:
    request = build({"prompt": "<image>a<image>", "images": [PAGE, Image.new("RGB", (9, 9))]})
    assert request.token_ids == [0, *[IMAGE] * ROWS, *letters("a"), *[IMAGE] * ROWS]
    assert [image.start for image in request.images] == [1, ROWS + 2]
    assert build({"prompt": "<image>", "images": Image.fromarray(PAGE)}).num_image_tokens == ROWS


def test_token_ids_are_taken_as_they_are_with_each_image_id_expanded() -> None:
    request = build({"prompt": [9, IMAGE, 8], "images": [PAGE]})
    assert request.token_ids == [9, *[IMAGE] * ROWS, 8]
    assert request.prompt is None
    assert build((4, np.int64(6))).token_ids == [4, 6]
    assert build([9, IMAGE], processor=None).token_ids == [9, IMAGE], "an ordinary token where there are no images"


def test_tiles_and_max_crops_change_the_count() -> None:
    page = np.zeros((100, 200, 3), np.uint8)  # 2:1, above the 64 px tile
    count = build({"prompt": "<image>", "images": [page], "mode": "gundam"}).num_image_tokens
    assert count == 1 * 1 * (2 + 1) + ROWS
    page = np.zeros((100, 400, 3), np.uint8)
    counts = [
        build({"prompt": "<image>", "images": [page], "mode": "gundam", "max_crops": crops}).num_image_tokens
        for crops in (2, 4)
    ]
    assert counts == [3 + ROWS, 5 + ROWS]


def test_a_text_model_has_no_template() -> None:
    assert build(" a<image> ", processor=None, bos_token_id=None).token_ids == [8, 9, *letters(" a<image> ")]


def test_views_can_be_made_ahead_in_another_thread(tmp_path: Any) -> None:
    path = tmp_path / "page.png"
    Image.fromarray(PAGE).save(path)
    prompt = {"prompt": "<image>", "images": [path]}

    def slot() -> Any:
        return builder().build(prompt, SamplingParams(), "0", keep_views=False).images[0]

    expected = slot().take_views().global_view
    with ThreadPoolExecutor(1) as executor:
        ahead, released = slot(), slot()
        for one in (ahead, released):
            one.prefetch(executor)
            one.prefetch(executor)
        released.release()
        assert ahead.take_views().global_view.equal(expected)
        for one in (ahead, released):
            with pytest.raises(PromptError, match="already taken"):
                one.take_views()
            one.prefetch(executor)  # nothing is left to do
        path.unlink()
        gone = builder().build({"prompt": "<image>", "images": [PAGE]}, SamplingParams(), "0", keep_views=True)
        gone.images[0].prefetch(executor)
        assert gone.images[0].take_views().global_view.equal(expected)


def test_views_are_made_now_or_later_and_handed_out_once(tmp_path: Any) -> None:
    path = tmp_path / "page.png"
    Image.fromarray(PAGE).save(path)
    prompt = {"prompt": "<image>", "images": [path]}
    early = builder().build(prompt, SamplingParams(), "0", keep_views=True).images[0]
    late = builder().build(prompt, SamplingParams(), "0", keep_views=False).images[0]
    views = [slot.take_views() for slot in (early, late)]
    assert views[0].global_view.equal(views[1].global_view)
    with pytest.raises(PromptError, match="already taken"):
        early.take_views()
    changed = builder().build(prompt, SamplingParams(), "0", keep_views=False).images[0]
    Image.new("RGB", (77, 5)).save(path)
    with pytest.raises(ShapeError, match="the plan was made for"):
        changed.take_views()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt": "hello", "images": [PAGE]}, "the prompt has 0 <image> marks but 1 images were given"),
        ({"prompt": "<image><image>", "images": [PAGE]}, "2 <image> marks but 1 images"),
        ("<image>", "1 <image> marks but 0 images"),
        ([IMAGE], "1 <image> marks but 0 images"),
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([1, 64], "token id 64 is outside the vocabulary, 0 to 63"),
        ([-1], "token id -1 is outside"),
        ([1, 2.5], r"a list of token ids or a mapping, not list \[1, 2.5\]"),
        ([True], "not list"),
        (["a"], "not list"),
        (b"abc", "not bytes"),
        (None, "not NoneType"),
        (7, "not int"),
        ({"text": "a"}, "unknown key 'text' in a prompt; known: prompt, images, mode, max_crops"),
        ({"images": [PAGE]}, "needs the key 'prompt'"),
        ({"prompt": "<image>", "images": [PAGE], "mode": "huge"}, "unknown mode 'huge'; this model has: base, gundam"),
        ({"prompt": "<image>", "images": [PAGE], "mode": ""}, "unknown mode ''"),
        ({"prompt": "<image>", "images": [PAGE], "mode": "gundam", "max_crops": 1}, "max_crops=1"),
        ({"prompt": "<image>", "images": [PAGE], "mode": "base", "max_crops": "4"}, "max_crops='4'"),
    ],
)
def test_wrong_prompts(prompt: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        build(prompt)


def test_wrong_images_and_models_that_take_none() -> None:
    with pytest.raises(ImageError):
        build({"prompt": "<image>", "images": [b"not a picture"]})
    with pytest.raises(PromptError, match="reads text only"):
        build({"prompt": "<image>", "images": [PAGE]}, processor=None)
    for option in ({"mode": "base"}, {"max_crops": 4}):
        with pytest.raises(PromptError, match="reads text only"):
            build({"prompt": "a", **option}, processor=None)


def test_one_image_array_needs_no_list() -> None:
    assert build({"prompt": "<image>", "images": PAGE}).num_image_tokens == ROWS


def test_a_tokenizer_of_another_model_is_refused_before_an_op_sees_its_ids() -> None:
    with pytest.raises(PromptError, match=r"tokenizer\.json gives the id 64, but the model's vocabulary ends at 63"):
        build("a", bos_token_id=64)


def test_sampling_params_of_another_type() -> None:
    with pytest.raises(ConfigError, match="must be SamplingParams, not dict"):
        build([4], {"max_tokens": 3})  # type: ignore[arg-type]


def test_without_a_tokenizer() -> None:
    assert build([4, 5], tokenizer=None).token_ids == [4, 5]
    with pytest.raises(PromptError, match=r"no tokenizer.json, so a prompt must be a list of token ids"):
        build("hello", tokenizer=None)
    with pytest.raises(ConfigError, match=r"stop strings need a tokenizer.json"):
        build([4], SamplingParams(stop="x"), tokenizer=None)


def test_stop_ids_must_be_in_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match="stop_token_ids holds 64, outside the vocabulary 0 to 63"):
        build([4], SamplingParams(stop_token_ids=[64]))
