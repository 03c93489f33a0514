"""The driver of ``make gpu-report``, tried out on a CPU, so that it does not break on the day there is a GPU."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiedfused.benchmark import bench, gpu_report, report, tune

ROOT = Path(__file__).parents[2]
NOT_THERE = ("typer", "rich", "matplotlib", "hypothesis", "pytest_benchmark", "expecttest", "xdist")


@pytest.mark.slow
def test_with_torch_and_pytest_alone(tmp_path: Path) -> None:
    blocked, out = tmp_path / "blocked", tmp_path / "out"
    blocked.mkdir()
    for name in NOT_THERE:
        (blocked / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(blocked), str(ROOT)]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # what is not installed is no plugin
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tiedfused.benchmark.gpu_report", "--out", str(out), "--device", "cpu"]
    command += ["--shapes", "64,16,128", "--peers", "eager", "--seconds", "90"]
    command += ["--tests", "tests/test_memory.py", "--tests", "tests/test_properties.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    text = (out / "report.md").read_text()
    assert text in done.stdout
    for part in ("## bench", "| 64, 16, 128 |", "## profile", "| aten::", "nothing to tune on a CPU", "- bench: "):
        assert part in text
    assert "needs a CUDA GPU" in (out / "tests.txt").read_text()
    found = {path.name: path.stat().st_size for path in out.iterdir()}
    assert len(found) <= 8
    assert max(found.values()) < 16 << 20
    (results,) = (report.load(path) for path in out.glob("*.json"))
    assert {cell["dtype"] for cell in results["cells"]} == {"float32", "bfloat16"}


def test_a_stage_that_hangs_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setattr(gpu_report.sys, "executable", "/bin/sh")
    monkeypatch.setattr(gpu_report, "__spec__", type("Spec", (), {"name": "no-module"}))
    assert gpu_report._run_stage("bench", [], 5.0, log).startswith("bench: ended with status ")
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\ntrap 'echo summary; exit 1' INT\necho begun\nsleep 30 & wait\n")
    slow.chmod(0o755)
    monkeypatch.setattr(gpu_report.sys, "executable", str(slow))
    assert gpu_report._run_stage("bench", [], 0.5, log).startswith("bench: cut off")
    assert log.read_text() == "begun\nsummary\n"
    slow.write_text("#!/bin/sh\ntrap '' INT\nsleep 30\n")
    monkeypatch.setattr(gpu_report, "GRACE_SECONDS", 0.2)
    assert gpu_report._run_stage("bench", [], 0.3, log).startswith("bench: cut off")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "device: got 'abacus'"),
        (["--part", "5/3", "--device", "cpu"], "part: got '5/3'; expected K/N"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_report.main(["--out", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_each_part_takes_its_problems() -> None:
    shapes = [gpu_report._in_part(["headline"], f"{k}/3") for k in (1, 2, 3)]
    assert [len(part) for part in shapes] == [1, 1, 1]
    assert [shape for part in shapes for shape in part] == gpu_report._in_part(["headline"], "1/1")


def test_no_stage_writes_over_another_s_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bench's results and tune's config are both called as the GPU is."""
    folders: list[Path] = []
    for module, name in ((bench, "bench"), (tune, "tune")):
        monkeypatch.setattr(module, name, lambda **options: folders.append(options["out"]))
    options = argparse.Namespace(out=tmp_path, part="1/1", shapes=None, peers=None, device="", seconds=60.0)
    gpu_report._bench(options)
    gpu_report._tune(options)
    assert len(set(folders)) == 2
    assert all(len(folder.relative_to(tmp_path).parts) <= 1 for folder in folders)


@pytest.mark.parametrize("installed", [[], ["xdist"], ["pytest_timeout"], ["xdist", "pytest_timeout"]])
def test_tests_run_in_parallel_where_they_can(installed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And are cut off one by one only where others then go on."""
    commands: list[list[str]] = []

    def import_module(name: str) -> None:
        if name not in installed:
            raise ImportError(name)

    monkeypatch.setattr(gpu_report.importlib, "import_module", import_module)
    monkeypatch.setattr(gpu_report.os, "execv", lambda program, command: commands.append(command))
    gpu_report._tests(argparse.Namespace(tests=["tests"]))
    assert ("-n" in commands[0]) == ("xdist" in installed)
    assert ("--timeout" in commands[0]) == (len(installed) == 2)
    assert commands[0][:5] == [sys.executable, "-m", "pytest", "-m", "gpu and not slow"]
