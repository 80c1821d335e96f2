"""README says what is: its Python example runs, and its table of modes is what `pagelens modes` prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pagelens.cli import main
from pagelens.reader import builtin_model

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SAMPLE = "engine/assets/samples/notice.png"


def test_the_python_example_runs() -> None:
    """With the built-in model in place of the real checkpoint, and a sample in place of the user's page."""
    found = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    code = found.group(1)
    for stand_in, real in (("path/to/DeepSeek-OCR", str(builtin_model())), ('"page.png"', repr(SAMPLE))):
        assert stand_in in code
        code = code.replace(stand_in, real)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Train 508" in done.stdout
    assert done.stdout.rstrip().endswith(("stop", "length"))


def test_the_table_of_modes_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["modes", "--size", "1240x1754"]) == 0
    printed = {row[0]: row[1:3] for row in map(str.split, capsys.readouterr().out.splitlines()[1:])}
    table = README.split("| mode | views |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    written = {row[0].split()[0]: row[2:4] for row in cells}
    assert written == printed
