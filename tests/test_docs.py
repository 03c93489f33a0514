"""Generated parts of the documentation are what their command generates."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_regimes() -> None:
    page = (DOCS / "regimes.md").read_text()
    assert runpy.run_path(str(DOCS / "regimes.py"))["rendered"](page) == page, "run python docs/regimes.py"
