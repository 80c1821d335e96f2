"""Where a model is: a local folder, or a Hugging Face hub id that is downloaded or found in the local cache."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import ConfigError

# Code, pickles and documents of a repository are not fetched at all.
ALLOWED_FILES = ("*.safetensors", "*.json")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
MAX_HUB_ID = 96


def resolve_model(model: str | Path) -> Path:
    """The folder of a model: `model` itself if it is an existing folder, else the hub id "org/name" in the local cache.

    A hub model is downloaded by huggingface_hub (extra "hub"), data files only; with HF_HUB_OFFLINE=1 only the cache
    is used. Raises ConfigError if it is neither a folder nor an id, if the extra is missing, or if the download fails.
    """
    text = str(model)
    folder = Path(text).expanduser()
    try:
        # "" would be the current folder.
        if text and folder.is_dir():
            return folder
        if text and folder.exists():
            raise ConfigError(f"model {text!r} is a file; pass the folder that holds config.json and *.safetensors")
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"model {text[:80]!r} is not a usable path") from error
    if isinstance(model, Path) or not HUB_ID.fullmatch(text) or len(text) > MAX_HUB_ID or ".." in text:
        raise ConfigError(f"model {text!r} is neither an existing folder nor a hub id of the form org/name")
    return _download(text)


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise ConfigError(
            f"model {hub_id!r} is not a local folder, and loading from the hub needs: pip install 'pagelens[hub]'"
        ) from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(ALLOWED_FILES)))
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"model {hub_id!r} is not a local folder, is not in the local cache, and the hub cannot be reached "
            "(offline, or HF_HUB_OFFLINE is set); download it first or pass a folder"
        ) from error
    except GatedRepoError as error:
        raise ConfigError(f"model {hub_id!r} needs its licence accepted on the hub and a login") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"model {hub_id!r} is neither a local folder nor a model that the hub shows you") from error
    except (OSError, ValueError, RuntimeError) as error:
        # The library's own text may hold addresses and headers; its type says enough, the chain has the rest.
        raise ConfigError(f"model {hub_id!r} could not be downloaded ({type(error).__name__})") from error
