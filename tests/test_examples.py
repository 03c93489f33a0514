"""The examples run, and what the documentation keeps of them is what they make of the numbers that it keeps."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")
ROOT = Path(__file__).parents[1]
EXAMPLES = ["transpose_or_inverse", "tied_vs_untied", "sparse_autoencoder", "deep_stack", "denoising"]
# Enough to go through all of the code, and no more.
SHORT: dict[str, dict[str, Any]] = {
    "transpose_or_inverse": {"iterations": 2},
    "sparse_autoencoder": {"steps": 2, "device": "cpu"},
    "deep_stack": {"steps": 4},
    "denoising": {"steps": 2},
}


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    import torch

    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield importlib.import_module(request.param)
    torch.set_num_threads(threads)
    for name in ("common", request.param):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("example", EXAMPLES, indirect=True)
def test_documented_tables_are_of_the_documented_numbers(example: ModuleType) -> None:
    data = json.loads((ROOT / "docs" / "data" / f"{example.NAME}.json").read_text(encoding="utf-8"))
    assert example.shown(data["results"]) == data["shown"], f"run {data['command']}"


@pytest.mark.parametrize("example", SHORT, indirect=True)
def test_runs(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in {"ROWS": 64, "LATENTS": 192, "MEMORY_LATENTS": (8, 16), "ROUNDS": 2}.items():
        if hasattr(example, name) and example.NAME == "sparse_autoencoder":
            monkeypatch.setattr(example, name, small)
    monkeypatch.setattr(sys.modules["common"], "DOCS", tmp_path)
    example.main(docs=True, **SHORT[example.NAME])
    assert (tmp_path / f"{example.NAME}.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "data" / f"{example.NAME}.json").read_text(encoding="utf-8"))
    shown = json.loads((ROOT / "docs" / "data" / f"{example.NAME}.json").read_text(encoding="utf-8"))["shown"]
    assert written["shown"].keys() == shown.keys()


@pytest.mark.parametrize("example", ["tied_vs_untied"], indirect=True)
def test_a_job_of_tied_vs_untied(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "SEEDS", (0, 1))
    results = {"runs": [example.compete((who, task, 1)) for task in example.TASKS for who in example.contestants(4)]}
    assert len(example.shown(results)["table"]["rows"]) == 3 * len(example.TASKS)


def test_every_example_has_a_target_and_data() -> None:
    (line,) = [text for text in (ROOT / "Makefile").read_text().splitlines() if text.startswith("EXAMPLES :=")]
    assert line.split()[2:] == EXAMPLES
    assert {path.stem for path in (ROOT / "docs" / "data").glob("*.json")} == set(EXAMPLES)
