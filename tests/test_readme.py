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


def test_benchmarks_are_the_committed_results() -> None:
    command = [sys.executable, "bench/document.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_every_file_that_is_linked_to_exists() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
        assert links
        assert [link for link in links if not (page.parent / link).exists()] == []
