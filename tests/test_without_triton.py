"""Where Triton is not installed (macOS, Windows) the package imports, works, and says what is missing."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
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


def test_package_works() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "tiled Triton is not installed"
