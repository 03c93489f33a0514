"""`tiedfused bench`: what goes wrong costs a line and its own cell, and what was measured is in the file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tiedfused.benchmark import bench, device, measure, report
from tiedfused.cli import app

RUN = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1"})
SMALL = ["--shapes", "96,16,128", "--dtype", "float32", "--device", "cpu", "--peers", "eager", "--budget", "20"]


@pytest.fixture(autouse=True)
def _quick(small_machine: None) -> None:
    pass


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.json")
    return path


def test_measures_and_goes_on_after_what_it_does_not_know(tmp_path: Path) -> None:
    unknown = ["--shapes", "nope", "--peers", "also", "--device", "abacus"]
    result = RUN.invoke(app, ["bench", *SMALL, *unknown, "--out", str(tmp_path)])
    assert result.exit_code == 1, result.output
    for line in ("shapes: got 'nope'", "peers: got 'also'", "device: got 'abacus'"):
        assert sum(line in text for text in result.stderr.splitlines()) == 1, result.stderr
    assert "96, 16, 128" in result.stdout
    found = report.load(only_file(tmp_path))
    assert [cell["pass"] for cell in found["cells"]] == ["fwd", "step"]
    assert {"eager", "tiedfused"} <= found["cells"][1]["ms"].keys()
    assert len(found["problems"]) == 2
    assert {path.name.rsplit("-", 1)[1] for path in tmp_path.glob("*.png")} == {"ratios.png", "roofline.png"}


def test_nothing_to_measure(tmp_path: Path) -> None:
    assert RUN.invoke(app, ["bench", "--shapes", "nope", "--out", str(tmp_path)]).exit_code == 2
    empty = RUN.invoke(app, ["bench", *SMALL, "--part", "2/2", "--out", str(tmp_path)])
    assert (empty.exit_code, empty.stderr) == (2, "part: got '2/2'; there are no more than 1 problems\n")
    assert RUN.invoke(app, ["bench", *SMALL, "--part", "3/2", "--out", str(tmp_path)]).exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["bench", *SMALL, "--peers", "eager"], ["profile", "4", "4", "4"]], ids=" ".join)
def test_folder_that_cannot_be_written(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = RUN.invoke(app, [*command, "--out", str(tmp_path / "file" / "folder")], env={"COLUMNS": "500"})
    assert done.exit_code == 2
    assert "out: [Errno 20] Not a directory" in done.stderr


def failing(error: BaseException) -> Callable[..., dict[str, Any]]:
    """A `measure_cell` that raises in its second call."""
    calls: list[int] = []

    def measured(*arguments: Any, **options: Any) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return measure.measure_cell(*arguments, **options)

    return measured


def run(out: Path, **options: Any) -> tuple[Path | None, list[str]]:
    problems: list[str] = []
    arguments = {"shapes": ["96,16,128"], "dtypes": ["float32"], "passes": ["fwd", "step", "bwd"], "peers": ["eager"]}
    path = bench.bench(**{**arguments, **options}, device="cpu", out=out, problems=problems, pictures=False)
    return path, problems


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("too much\nof it"), "(96, 16, 128) float32 step: not enough memory: too much"),
        (RuntimeError("no\nidea"), "(96, 16, 128) float32 step: no"),
    ],
)
def test_a_failing_cell(error: Exception, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_cell", failing(error))
    path, problems = run(tmp_path)
    assert path is not None
    assert [cell["pass"] for cell in report.load(path)["cells"]] == ["fwd", "bwd"]
    assert problems == [line] == report.load(path)["problems"]


def test_a_failing_gpu_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_cell", failing(RuntimeError("Triton Error [CUDA]: an illegal memory access")))
    monkeypatch.setattr(device, "has_failed", lambda _: True)
    path, problems = run(tmp_path)
    assert path is not None
    assert len(report.load(path)["cells"]) == 1
    assert problems[-1] == "the GPU has failed: 1 more problems are not measured"


def test_an_interrupt_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_cell", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert [cell["pass"] for cell in report.load(only_file(tmp_path))["cells"]] == ["fwd"]


def test_a_budget_that_is_used_up(tmp_path: Path) -> None:
    path, problems = run(tmp_path, budget=0.0)
    assert path is None
    assert list(tmp_path.iterdir()) == []
    assert problems[0].startswith("not measured, since the budget of 0 s is used up: (96, 16, 128) float32 fwd; ")


def test_every_cell_is_written_before_the_next_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def measured(*arguments: Any, **options: Any) -> dict[str, Any]:
        written.append(len(report.load(only_file(tmp_path))["cells"]) if written else 0)
        return measure.measure_cell(*arguments, **options)

    monkeypatch.setattr(bench, "measure_cell", measured)
    run(tmp_path)
    assert written == [0, 1, 2]


def test_a_disturbed_cell_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is calm then is taken; one that stays disturbed keeps the better of both, and a line says so."""
    made = {"fwd": [(1.0, 4e11), (2.0, 4e11)], "step": [(1.0, 1e11), (1.1, 4e11)], "bwd": [(9.0, 4e11), (4.0, 4e11)]}

    def measured(shape: Any, dtype: Any, which: str, *_: Any) -> dict[str, Any]:
        spread, gemm = made[which].pop(0)
        times = {"ms": {"tiedfused": [1.0, 1.0, spread]}, "rates": {"gemm": gemm, "memory": 1e10}}
        return {"shape": [96, 16, 128], "dtype": "float32", "pass": which, "skipped": {}, **times}

    monkeypatch.setattr(bench, "measure_cell", measured)
    monkeypatch.setattr(bench, "SPREAD", 1.5)
    monkeypatch.setattr(bench, "STEADY", 0.8)
    path, problems = run(tmp_path)
    assert path is not None
    cells = {cell["pass"]: cell for cell in report.load(path)["cells"]}
    assert [cells[which]["ms"]["tiedfused"][2] for which in ("fwd", "step", "bwd")] == [1.0, 1.1, 4.0]
    assert made["fwd"], "what was calm is not measured again"
    assert [line.split(":")[0] for line in problems] == ["(96, 16, 128) float32 bwd"]
    assert problems == report.load(path)["problems"]


def test_parts_have_files_of_their_own(tmp_path: Path) -> None:
    for part in ("1/2", "2/2"):
        run(tmp_path, shapes=["96,16,128", "96,16,64"], passes=["fwd"], part=part)
    found = sorted(tmp_path.glob("*.json"))
    assert [path.stem.split("-part-")[1] for path in found] == ["1-of-2", "2-of-2"]
    assert [report.load(path)["cells"][0]["shape"] for path in found] == [[96, 16, 128], [96, 16, 64]]


def test_against_an_earlier_file(results: dict[str, Any], tmp_path: Path) -> None:
    report.save(results, tmp_path / "now.json")
    before = copy.deepcopy(results)
    before["cells"][0]["ms"]["eager"] = [99.0, 98.0, 100.0]
    report.save(before, tmp_path / "before.json")
    show = ["bench", "--show", str(tmp_path / "now.json"), "--against"]
    slower = RUN.invoke(app, [*show, str(tmp_path / "before.json")])
    assert slower.exit_code == 1
    assert "1 slower" in slower.stdout
    assert RUN.invoke(app, [*show, str(tmp_path / "now.json")]).exit_code == 0
    (tmp_path / "other.json").write_text(json.dumps({"schema": 7}))
    other = RUN.invoke(app, [*show, str(tmp_path / "other.json")])
    assert other.exit_code == 1
    assert "4096, 64, 8192" in other.stdout, "the table is shown all the same"
    assert "other.json: got schema 7; expected 'tiedfused-bench/1'" in other.stderr
