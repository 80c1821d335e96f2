"""On a real card, for whoever has one: `make test-gpu` (PAGELENS_TEST_GPU=card). DRY=1 (PAGELENS_TEST_GPU=dry) runs the
same code with launches counted instead of started and nothing compared. Elsewhere none is collected.
"""

from __future__ import annotations

import os

MODE = os.environ.get("PAGELENS_TEST_GPU", "")
if MODE not in ("card", "dry"):
    collect_ignore_glob = ["test_*.py"]
