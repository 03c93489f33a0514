"""Generated parts of the documentation are what their command generates; its examples run, its links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
GENERATE = runpy.run_path(str(DOCS / "generate.py"))
EXAMPLES = [
    pytest.param(page, code, id=f"{page.stem}-{index}")
    for page in sorted(DOCS.glob("*.md"))
    for index, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("page", GENERATE["pages"](), ids=lambda page: page.name)
def test_generated_blocks(page: Path) -> None:
    text = page.read_text()
    assert GENERATE["rendered"](text) == text, "run python docs/generate.py"


def test_every_block_is_on_a_page() -> None:
    text = "".join(page.read_text() for page in GENERATE["pages"]())
    assert {name for _, name, _ in GENERATE["BLOCK"].findall(text)} == set(GENERATE["BLOCKS"])


@pytest.mark.parametrize("page, code", EXAMPLES)
def test_example_runs(page: Path, code: str) -> None:
    exec(compile(code, str(page), "exec"), {})


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_file_it_links_to_exists(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
