"""A GPU that one test breaks: the others' results stay what they are. With a GPU that is made up."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MADE_UP = """
import torch

broken = []

def synchronize(device=None):
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.is_available, torch.cuda.synchronize = lambda: True, synchronize
"""
TESTS = """
import made_up
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(6))
def test_kernel(i):
    if i == 1:
        made_up.broken.append(i)
    else:
        made_up.synchronize()

@pytest.mark.gpu
def test_wrong_result():
    assert 1 == 2

def test_without_gpu():
    pass
"""


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_illegal_access_fails_its_own_test_alone(workers: int, tmp_path: Path) -> None:
    if workers and importlib.util.find_spec("xdist") is None:
        pytest.skip("needs pytest-xdist")
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "made_up.py").write_text(MADE_UP)
    (tmp_path / "test_made_up.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "made_up", "-p", "no:cacheprovider"]
    command += ["-c", str(HERE.parent / "pyproject.toml"), "--rootdir", str(tmp_path), str(tmp_path)]
    command += ["-p", "xdist", "-n", str(workers)] if workers else []
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**outer, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(HERE.parent)])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "illegal memory access" in done.stdout + done.stderr
    blamed = {
        line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")) and "test_kernel" in line
    }
    assert len(blamed) == 1 and "test_kernel[1]" in blamed.pop(), done.stdout
    if workers:
        assert "2 failed, " in done.stdout
    else:
        assert "the GPU has failed in" in done.stdout
        assert "skipped" in done.stdout
