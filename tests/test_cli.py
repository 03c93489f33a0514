"""The command line, as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import tiedfused
from tiedfused.cli import app

RUN = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_info() -> None:
    result = RUN.invoke(app, ["info"])
    assert result.exit_code == 0
    for text in (tiedfused.__version__, torch.__version__, "backend triton", "backend tiled", "setting recompute"):
        assert text in result.output


def test_what_only_benchmarks_need_is_not_imported() -> None:
    program = "import sys, tiedfused.cli; print([m for m in sys.modules if m in ('tiedfused.benchmark', 'matplotlib')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "1", "64", "4096", "--inference"]], ids=" ".join)
def test_output_in_a_narrow_encoding(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tiedfused.cli", *arguments],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_explain() -> None:
    result = RUN.invoke(app, ["explain", "8192", "128", "8192", "--dtype", "bfloat16", "--device", "cuda"])
    assert result.exit_code == 0, result.output
    for text in ("stream", "triton", "weight_grad", "input_grad", "roofline", "never stored"):
        assert text in result.output


def test_explain_for_inference_and_another_capability() -> None:
    result = RUN.invoke(app, ["explain", "64", "128", "8192", "--inference", "--capability", "80"])
    assert result.exit_code == 0, result.output
    assert "weight_grad" not in result.output
    assert "on cuda" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0", "0", "8"], "d: got 0; expected an integer of 1 or more"),
        (["8", "8", "8", "--activation", "no"], "activation: unknown activation 'no'"),
        (["8", "8", "8", "--device", "abacus"], "abacus"),
        (["8", "8", "8", "--dtype", "int8"], "int8"),
        (["8", "8", "8", "--capability", "9.0"], "capability: got 9; expected an integer such as 90, for 9.0"),
        (["8", "8"], "Missing argument 'H'"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], message: str) -> None:
    result = RUN.invoke(app, ["explain", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
