"""resolve_model: folders, hub ids through a stand-in for snapshot_download, and its refusals. Nothing is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from pagelens.errors import ConfigError
from pagelens.loading.hub import resolve_model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Records calls of snapshot_download, which answers with a fixed folder."""
    seen: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        seen.append((repo_id, options))
        return "/cache/models--org--name/snapshots/0"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return seen


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def http_error(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    # Its constructor wants a response of the HTTP library; only the type matters here.
    return kind.__new__(kind)


def test_a_folder_is_itself(tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~") == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name"), "a local folder wins over a hub id"
    assert calls == []


def test_a_hub_id_fetches_data_files_only(calls: list[Any]) -> None:
    assert resolve_model("deepseek-ai/DeepSeek-OCR") == Path("/cache/models--org--name/snapshots/0")
    assert calls == [("deepseek-ai/DeepSeek-OCR", {"allow_patterns": ["*.safetensors", "*.json"]})]


@pytest.mark.parametrize(
    "model",
    [
        "absent",
        "./absent/folder",
        "/absent/folder",
        "a/b/c",
        "../x/y",
        "-x/y",
        "org/..",
        "org/a..b",
        "org/name@main",
        "org/na me",
        "org/name\n",
        "http://host/x",
        "",
        "org/" + "n" * 100,
        "nul\0",
        "x" * 5000,
    ],
)
def test_what_is_neither(model: str, calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"neither an existing folder nor a hub id|not a usable path"):
        resolve_model(model)
    assert calls == []


def test_a_path_is_never_a_hub_id(calls: list[Any]) -> None:
    with pytest.raises(ConfigError, match="neither an existing folder"):
        resolve_model(Path("org/name"))
    assert calls == []


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="is a file; pass the folder"):
        resolve_model(str(tmp_path / "model.safetensors"))


def test_the_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'pagelens\[hub\]'"):
        resolve_model("org/name")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OfflineModeIsEnabled("secret"), "offline, or HF_HUB_OFFLINE is set"),
        (LocalEntryNotFoundError("secret"), "is not in the local cache"),
        (http_error(GatedRepoError), "licence"),
        (http_error(RepositoryNotFoundError), "neither a local folder nor a model that the hub shows you"),
        (HFValidationError("secret"), "could not be downloaded .HFValidationError"),
        (ConnectionError("secret"), "could not be downloaded .ConnectionError"),
        (OSError("secret"), "could not be downloaded .OSError"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_failures_are_one_clear_sentence(error: BaseException, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(error, monkeypatch)
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_model("org/name")
    assert "'org/name'" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_the_real_library_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The true snapshot_download with an empty cache and no network allowed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="is not in the local cache, and the hub cannot be reached"):
        resolve_model("pagelens-tests/there-is-no-such-model")
