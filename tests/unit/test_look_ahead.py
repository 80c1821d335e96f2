"""On a device the pages of waiting requests are preprocessed while a pass runs; on the CPU they are not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from helpers.fake_model import IMAGE, FakeModel, fake_config, fake_engine

from pagelens import inputs
from pagelens.core import LOOK_AHEAD, Engine
from pagelens.inputs import Request
from pagelens.runtime.state import RequestState
from pagelens.types import SamplingParams

WAIT_S = 20  # reached only if nothing overlaps
THREAD = "pages"


def page(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def request(engine: Engine, index: int) -> Request:
    prompt: Any = {"prompt": [5 + index, IMAGE, 9], "images": [page(index)]}
    return engine.inputs.build(prompt, SamplingParams(max_tokens=3), str(index), keep_views=False)


def tokens(state: RequestState) -> list[int]:
    assert state.error is None
    return list(state.answers[0].output().token_ids)


def run(engine: Engine, count: int = 4) -> list[RequestState]:
    states = [engine.add_request(request(engine, index)) for index in range(count)]
    while engine.has_work:
        engine.step()
    return states


@pytest.fixture
def engine() -> Iterator[Engine]:
    """One sequence at a time, so that requests wait; the thread that an engine on a device has."""
    engine = fake_engine(FakeModel(fake_config(images=True)), max_num_seqs=1)
    assert engine._preprocessing is None, "on the CPU the kernels want all cores"
    engine._preprocessing = ThreadPoolExecutor(1, THREAD)
    yield engine
    engine.close()


class Recorder:
    """Replaces `preprocess`: notes which thread has made each page."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.original = inputs.preprocess
        self.made: list[str] = []
        self.changed = threading.Condition()
        monkeypatch.setattr(inputs, "preprocess", self)

    def __call__(self, pixels: Any, plan: Any) -> Any:
        views = self.original(pixels, plan)
        with self.changed:
            self.made.append(threading.current_thread().name)
            self.changed.notify_all()
        return views

    @property
    def ahead(self) -> int:
        return sum(name.startswith(THREAD) for name in self.made)

    def wait_until_ahead(self, count: int) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.ahead >= count, WAIT_S)


def test_pages_of_waiting_requests_are_made_during_a_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass does not end before the next two pages are there: only another thread can have made them."""
    expected = [tokens(state) for state in run(fake_engine(FakeModel(fake_config(images=True))))]
    recorder = Recorder(monkeypatch)
    during: list[int] = []

    def pause() -> None:
        if not during:
            assert recorder.wait_until_ahead(LOOK_AHEAD)
            assert engine._preprocessing is not None
            engine._preprocessing.submit(int).result(WAIT_S)  # behind whatever else was asked for
            during.append(recorder.ahead)

    model: Any = engine.runner.model
    model.pause = pause
    states = run(engine)
    assert during == [LOOK_AHEAD], "pixels of no more than these are held"
    assert [name.startswith(THREAD) for name in recorder.made].count(False) == 1, "the first page had nobody before it"
    assert recorder.ahead == 3
    assert [tokens(state) for state in states] == expected


def test_an_error_ahead_is_that_of_its_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    original, failed = recorder.original, list[str]()

    def fail_second(pixels: Any, plan: Any) -> Any:
        if np.array_equal(np.asarray(pixels), page(1)):
            failed.append(threading.current_thread().name)
            raise ValueError("this page is broken")
        return original(pixels, plan)

    recorder.original = fail_second
    states = run(engine, 3)
    assert [state.error is None for state in states] == [True, False, True]
    assert "this page is broken" in str(states[1].error)
    assert [name.startswith(THREAD) for name in failed] == [True]


def test_a_cancelled_request_leaves_no_page_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    states = [engine.add_request(request(engine, index)) for index in range(3)]
    engine.step()
    assert recorder.wait_until_ahead(1)
    engine.cancel(states[1])
    while engine.has_work:
        engine.step()
    assert [len(tokens(states[index])) for index in (0, 2)] == [3, 3]
    images = [image for state in states for image in state.request.images]
    assert all(image._ahead is None and image._views is None and image._source is None for image in images)


def test_only_a_device_has_the_thread() -> None:
    pytest.importorskip("triton", reason="the null device counts launches of Triton kernels")
    from helpers.null_device import QWEN3_06B, null_engine

    with null_engine(QWEN3_06B, use_graphs=False, sequences=1) as (engine, _):
        thread = engine._preprocessing
        assert thread is not None
        engine.close()
        with pytest.raises(RuntimeError, match="after shutdown"):
            thread.submit(print)
