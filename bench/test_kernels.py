"""Each kernel alone, as the plan of its regime launches it: PyTorch's tiles on the CPU, Triton on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tiedfused._backends import tiled
from tiedfused.benchmark.kernels import launches, planned
from tiedfused.benchmark.peers import Operands
from tiedfused.benchmark.shapes import Shape
from tiedfused.devices import cuda_capability, known_capability
from tiedfused.planning import plan
from tiedfused.tiles import BOTTLENECK_KERNELS, FEW_ROWS_KERNELS, KERNELS

CPU = Shape(2048, 128, 4096)


def gpu_shape(kernel: str) -> Shape:
    """A problem whose plan holds the kernel."""
    if kernel in FEW_ROWS_KERNELS:
        return Shape(int(kernel.rpartition("_")[2]), 768, 24576)
    if kernel in BOTTLENECK_KERNELS:
        # h by itself, and y from it, are for row tiles that are too few for the GPU
        return Shape(128, 17768, 512) if kernel in ("bottleneck_latent", "bottleneck_decode") else Shape(4096, 784, 64)
    return Shape(16384, 128, 32768)


def measure(benchmark: Any, group: str, run: Callable[[], Any]) -> None:
    benchmark.group = group
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_tiled(benchmark: Any, kernel: str) -> None:
    made = plan(*CPU, dtype=torch.float32)
    operands = Operands.random(CPU, torch.float32)
    x, weight, bias_enc, bias_dec = (t.detach() for t in operands.leaves)

    def run() -> None:
        if kernel == "forward":
            tiled.forward(x, weight, bias_enc, bias_dec, made)
        else:
            tiled.backward(operands.grad_y, x, weight, bias_enc, None, made, (True, True, True))

    measure(benchmark, f"tiled on the CPU ({CPU})", run)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_triton(benchmark: Any, kernel: str) -> None:
    shape, device = gpu_shape(kernel), torch.device("cuda")
    found = planned(kernel, shape, torch.bfloat16, device, known_capability(cuda_capability(None)))
    if found is None:
        pytest.skip(f"not in the plan of ({shape})")
    (call,) = launches(found, [Operands.random(shape, torch.bfloat16, device)])

    def run() -> None:
        call()
        torch.cuda.synchronize()

    measure(benchmark, f"{kernel} on one of ({found.block(shape)})", run)
