"""What importing the package needs, and what it leaves to the calls that need it."""

from __future__ import annotations

import subprocess
import sys


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # import triton now raises ImportError
import torch, tiedfused
x = torch.randn(5, 8, requires_grad=True)
layer = tiedfused.TiedLinear(8, 16, bias=True, activation="gelu")
layer(x).sum().backward()
assert x.grad.shape == (5, 8)
plan = tiedfused.plan(5, 8, 16, device="cuda")
print(plan.backend, dict(plan.alternatives)["stream"])
"""


def test_package_works_without_triton() -> None:
    """Where Triton is not installed (macOS, Windows) it says what is missing."""
    assert run(WITHOUT_TRITON) == "tiled Triton is not installed"


EAGER_STEP = """
import sys, torch
slow = {"torch._dynamo", "torch._inductor", "sympy"} - sys.modules.keys()
import tiedfused
layer = tiedfused.TiedLinear(8, 16, bias=True, activation="gelu")
layer(torch.randn(5, 8, requires_grad=True)).sum().backward()
print(sorted(slow & sys.modules.keys()))
"""


def test_compiler_is_not_imported_by_an_eager_step() -> None:
    """Importing torch._dynamo takes longer than importing the rest of the package."""
    assert run(EAGER_STEP) == "[]"


FIRST_CALL_IN_A_MODE = """
import torch, tiedfused
from torch._subclasses import FakeTensorMode
with FakeTensorMode(), torch.device("cpu"):
    layer = tiedfused.TiedLinear(8, 16)
    layer(torch.randn(5, 8, requires_grad=True)).sum().backward()
print(type(layer.weight.grad).__name__)
"""


def test_compiler_may_be_imported_while_a_mode_is_active() -> None:
    assert run(FIRST_CALL_IN_A_MODE) == "FakeTensor"
