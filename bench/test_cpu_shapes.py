"""Forward and training step on the CPU shapes, each peer a benchmark of its own."""

from __future__ import annotations

import pytest
import torch
from peers import CPU_SHAPES, DTYPES, Operands, peers

NAMES = tuple(peers())


@pytest.mark.parametrize("which", ["forward", "step"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_shape(benchmark, name: str, shape: tuple[int, int, int], dtype: str, which: str) -> None:
    benchmark.group = f"{which} {shape} {dtype}"
    operands = Operands.random(*shape, DTYPES[dtype])
    call = getattr(operands, which)(peers()[name])
    call()
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
    torch.compiler.reset()
