"""Modes as data: the published six, and what a scaled model has of them."""

from __future__ import annotations

import pytest

from pagelens.config import ProcessorConfig
from pagelens.errors import ConfigError, PromptError
from pagelens.vision.modes import MAX_TILES, available_modes, default_mode, resolve_mode

REAL = ProcessorConfig()
SCALED = ProcessorConfig(base_size=192, image_size=128, crop_mode=True, min_crops=2, max_crops=4, scaled=True)


def test_the_real_model_has_the_six_published_modes() -> None:
    found = {m.name: (m.base_size, m.tile_size, m.squash, m.experimental) for m in available_modes(REAL).values()}
    assert found == {
        "tiny": (512, None, True, False),
        "small": (640, None, True, False),
        "base": (1024, None, False, False),
        "large": (1280, None, False, False),
        "gundam": (1024, 640, False, False),
        "gundam-master": (1280, 1024, False, True),
    }


def test_tile_limits_and_threshold_of_the_real_model() -> None:
    for name in ("gundam", "gundam-master"):
        mode = resolve_mode(name, REAL)
        assert (mode.min_crops, mode.max_crops, mode.tile_threshold) == (
            2,
            9,
            640,
        )  # the literal 640, also for 1024 tiles
    assert resolve_mode("gundam", ProcessorConfig(max_crops=6)).max_crops == 6


def test_a_scaled_model_has_base_and_gundam_at_its_own_sizes() -> None:
    modes = available_modes(SCALED)
    assert list(modes) == ["base", "gundam"]
    assert (modes["base"].base_size, modes["base"].tile_size, modes["base"].squash) == (192, None, False)
    gundam = modes["gundam"]
    assert (gundam.base_size, gundam.tile_size, gundam.tile_threshold) == (192, 128, 128)
    assert (gundam.min_crops, gundam.max_crops) == (2, 4)


def test_a_scaled_model_has_other_modes_only_if_it_lists_them() -> None:
    listed = ProcessorConfig(base_size=192, image_size=128, scaled=True, modes=("Tiny", "gundam"))
    assert list(available_modes(listed)) == ["tiny", "base", "gundam"]
    assert resolve_mode("tiny", listed).base_size == 512
    with pytest.raises(ConfigError, match=r"'huge'.*known modes: tiny, small"):
        available_modes(ProcessorConfig(scaled=True, modes=("huge",)))


@pytest.mark.parametrize("name", ["huge", "", "gundam ", "large", None, 3])
def test_a_missing_mode_is_one_line_naming_the_others(name: object) -> None:
    with pytest.raises(PromptError) as caught:
        resolve_mode(name, SCALED)  # type: ignore[arg-type]
    assert str(caught.value) == f"unknown mode {name!r}; this model has: base, gundam"


def test_names_ignore_case() -> None:
    assert resolve_mode("Gundam-Master", REAL).name == "gundam-master"


def test_max_crops() -> None:
    assert resolve_mode("gundam", REAL, 6).max_crops == 6
    assert resolve_mode("gundam", REAL, MAX_TILES).max_crops == MAX_TILES
    assert resolve_mode("base", REAL, 6) == resolve_mode("base", REAL)
    for bad in (1, 0, -3, MAX_TILES + 1, 2.5, True, "6"):
        with pytest.raises(PromptError, match=f"must be an integer from 2 to {MAX_TILES}"):
            resolve_mode("gundam", REAL, bad)  # type: ignore[arg-type]
    for bad in (0, "6"):
        with pytest.raises(PromptError, match=f"must be an integer from 1 to {MAX_TILES}"):
            resolve_mode("base", REAL, bad)  # type: ignore[arg-type]


def test_default_mode() -> None:
    assert default_mode(REAL).name == "gundam"
    assert default_mode(ProcessorConfig(crop_mode=False)).name == "base"
    assert default_mode(SCALED).name == "gundam"
    assert default_mode(ProcessorConfig(scaled=True, crop_mode=False, base_size=192, image_size=192)).name == "base"
