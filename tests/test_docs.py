"""Generated parts of the documentation are what their command generates."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
GENERATE = runpy.run_path(str(DOCS / "generate.py"))


@pytest.mark.parametrize("page", GENERATE["pages"](), ids=lambda page: page.name)
def test_generated_blocks(page: Path) -> None:
    text = page.read_text()
    assert GENERATE["rendered"](text) == text, "run python docs/generate.py"


def test_every_block_is_on_a_page() -> None:
    text = "".join(page.read_text() for page in GENERATE["pages"]())
    assert {name for _, name, _ in GENERATE["BLOCK"].findall(text)} == set(GENERATE["BLOCKS"])
