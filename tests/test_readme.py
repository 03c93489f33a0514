"""What the README shows is what the code does and what the results say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert names["y"].shape == names["x"].shape  # type: ignore[attr-defined]


def test_table_is_the_committed_result() -> None:
    ((command, shown),) = re.findall(r"<!-- python (.*?) -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert [line.rstrip() for line in done.stdout.splitlines() if line.strip()] == shown.splitlines()


def test_every_file_it_links_to_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
