"""Memory of weights and of pages: mapped or copied, towers that come and go, nothing that grows page after page."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.text_models import make_oracle, save
from numpy.typing import NDArray

from pagelens import LLM, Reader, SamplingParams
from pagelens.bench.memory import read_resident
from pagelens.errors import ConfigError, WeightsError
from pagelens.models.deepseek_ocr import DeepseekOcr, is_tower
from pagelens.quantize import quantize_checkpoint
from pagelens.reader import builtin_model

LIMIT = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "int8"
    quantize_checkpoint(builtin_model(), folder, "int8", num_threads=1)
    return folder


def page(seed: int, width: int = 190, height: int = 120) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def network_of(reader: Reader) -> DeepseekOcr:
    engine = reader.llm._engine
    assert engine is not None
    model = engine.runner.model
    assert isinstance(model, DeepseekOcr)
    return model


def texts(reader: Reader, count: int = 3, **options: Any) -> list[str]:
    size = (700, 500) if options.get("mode") == "gundam" else (190, 120)
    pages = [page(seed, *size) for seed in range(count)]
    return [answer.raw_text for answer in reader.read_many(pages, sampling=LIMIT, **options)]


# ---- mapped or copied ------------------------------------------------------------------------------------------------
def test_copied_weights_read_the_same_and_leave_the_file_alone(packed: Path) -> None:
    with Reader(packed, num_threads=1) as reader:
        expected = texts(reader)
    with Reader(packed, num_threads=2, use_mmap=False) as reader:
        assert texts(reader) == expected
        assert mapped_places(packed) == []


def test_a_mapped_table_is_not_copied(packed: Path) -> None:
    with Reader(packed, num_threads=1) as reader:
        table = network_of(reader).decoder._embed.data_ptr()
        assert any(start <= table < end for start, end in mapped_places(packed))


def mapped_places(folder: Path) -> list[tuple[int, int]]:
    """Address ranges of this process where a file of the folder is mapped."""
    gc.collect()
    places = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if str(folder.resolve()) in line:
            start, end = line.split()[0].split("-")
            places.append((int(start, 16), int(end, 16)))
    return places


# ---- towers that come and go -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"use_mmap": False}, {"plain": True}, {"plain": True, "weights": "int4"}])
def test_low_memory_reads_the_same(packed: Path, options: dict[str, Any]) -> None:
    options = dict(options)
    model = builtin_model() if options.pop("plain", False) else packed
    for mode in ("base", "gundam"):
        with Reader(model, num_threads=1, **options) as reader:
            expected = texts(reader, mode=mode)
            assert network_of(reader).has_encoder
        with Reader(model, num_threads=1, low_memory=True, **options) as reader:
            assert not network_of(reader).has_encoder, "the towers are loaded with the first page"
            assert texts(reader, mode=mode) == expected
            assert not network_of(reader).has_encoder
            assert texts(reader, mode=mode) == expected, "and again for the next pages"


def test_towers_are_in_memory_only_while_pages_are_encoded(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reader(packed, num_threads=1, low_memory=True) as reader:
        network = network_of(reader)
        seen: list[tuple[str, bool]] = []
        forward, encode = network.forward, network._encode

        def watched_forward(*args: Any) -> Any:
            seen.append(("decoder", network.has_encoder))
            return forward(*args)

        def watched_encode(*args: Any) -> Any:
            result = encode(*args)
            seen.append(("encoder", network.has_encoder))
            return result

        monkeypatch.setattr(network, "forward", watched_forward)
        monkeypatch.setattr(network, "_encode", watched_encode)
        texts(reader, 5)
        assert set(seen) == {("decoder", False), ("encoder", True)}


def test_low_memory_and_an_image_that_fails(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reader(packed, num_threads=1, low_memory=True) as reader:
        network = network_of(reader)
        encode = network._encode

        def failing(views: Any, *args: Any) -> Any:
            if float(views.global_view.mean()) > 0.5:
                assert network.encoder
                raise ValueError("no such page")
            return encode(views, *args)

        monkeypatch.setattr(network, "_encode", failing)
        streams = [reader.stream(image, sampling=LIMIT) for image in (page(1), np.full_like(page(1), 255), page(2))]
        results = [stream.result().finish_reason for stream in (streams[0], streams[2])]
        assert set(results) <= {"stop", "length"}
        with pytest.raises(ValueError, match="no such page"):
            streams[1].result()
        assert not network.has_encoder
        assert network._scratch.num_bytes == 0


def test_towers_that_cannot_be_loaded_fail_their_page_only(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reader(packed, num_threads=1, low_memory=True) as reader:
        network = network_of(reader)
        towers = network._towers
        assert towers is not None

        def fail() -> Any:
            raise WeightsError("the disk has gone")

        with monkeypatch.context() as patch:
            patch.setattr(towers, "load", fail)
            with pytest.raises(WeightsError, match="the disk has gone"):
                reader.read(page(1), sampling=LIMIT)
        assert reader.read(page(1), sampling=LIMIT).finish_reason in ("stop", "length")


def test_closing_ends_the_mapping(packed: Path) -> None:
    reader = Reader(packed, num_threads=1, low_memory=True)
    texts(reader)
    assert mapped_places(packed)
    reader.close()
    assert mapped_places(packed) == []


def test_a_text_model_has_no_towers(tmp_path: Path) -> None:
    folder = save(make_oracle("Qwen3ForCausalLM"), tmp_path)
    with pytest.raises(ConfigError, match="low_memory=True frees vision towers"):
        LLM(folder, low_memory=True)
    for name in ("use_mmap", "low_memory"):
        with pytest.raises(ConfigError, match=f"{name}=1 must be True or False"):
            LLM(folder, **{name: 1})


def test_released_pages_of_the_towers_are_gone(packed: Path) -> None:
    """The towers' bytes of the mapped file are in memory after an encode without low_memory, and not with it."""
    resident = []
    for low_memory in (False, True):
        with Reader(packed, num_threads=1, low_memory=low_memory) as reader:
            texts(reader)
            resident.append(resident_of(packed))
    names = [name for name in network_parts() if is_tower(name)]
    assert names
    assert resident[1] < 0.7 * resident[0], resident


def network_parts() -> list[str]:
    from pagelens.loading.checkpoint import read_config

    config = DeepseekOcr.read_config(read_config(builtin_model()))
    return [part.spec.target for part in DeepseekOcr.parts(config)]


def resident_of(folder: Path) -> int:
    """Bytes of the folder's files that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split()[0]:
            inside = str(folder.resolve()) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


# ---- page after page -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("low_memory", [False, True])
def test_nothing_grows_page_after_page(low_memory: bool) -> None:
    with Reader(num_threads=2, prefix_cache=False, low_memory=low_memory, max_num_seqs=4) as reader:
        network = network_of(reader)
        engine = reader.llm._engine
        assert engine is not None
        kernels = engine._closeables[0]._owned[0]

        def read(first: int, count: int) -> tuple[int, int, int]:
            for seed in range(first, first + count):
                reader.read(page(seed, 700, 700), mode="gundam", sampling=SamplingParams(max_tokens=3))
            resident = read_resident()
            return network._scratch.num_bytes, kernels.scratch_bytes, resident.total if resident else 0

        _, scratch, before = read(0, 12)
        buffers, scratch_after, after = read(12, 40)
        assert buffers == 0
        assert scratch_after == scratch
        # Rows, pixels and buffers of one such page are above 1 MB: kept, they would be far above this.
        assert after - before < 12e6, f"{(after - before) / 1e6:.1f} MB more after 40 pages"


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before
