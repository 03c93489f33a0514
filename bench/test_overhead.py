"""Host time of a call on a problem too small to need any arithmetic."""

from __future__ import annotations

import pytest
import torch

from tiedfused import TiedLinear
from tiedfused.benchmark.peers import Operands, eager
from tiedfused.benchmark.shapes import Shape
from tiedfused.functional import tied_encode_decode

LAYERS = {"eager": eager, "tiedfused": tied_encode_decode}


@pytest.fixture
def operands() -> Operands:
    return Operands.random(Shape(4, 8, 16), torch.float32)


@pytest.mark.benchmark(group="overhead: inference")
@pytest.mark.parametrize("name", LAYERS)
def test_inference(benchmark, operands: Operands, name: str) -> None:
    with torch.no_grad():
        benchmark(LAYERS[name], operands.x, operands.weight, operands.bias_enc, operands.bias_dec)


@pytest.mark.benchmark(group="overhead: forward of a training step")
@pytest.mark.parametrize("name", LAYERS)
def test_forward(benchmark, operands: Operands, name: str) -> None:
    benchmark(LAYERS[name], operands.x, operands.weight, operands.bias_enc, operands.bias_dec)


@pytest.mark.benchmark(group="overhead: forward and backward")
@pytest.mark.parametrize("name", LAYERS)
def test_step(benchmark, operands: Operands, name: str) -> None:
    benchmark(operands.call(LAYERS[name], "step"))


@pytest.mark.benchmark(group="overhead: module")
@pytest.mark.parametrize("name", ["eager", "tiedfused"])
def test_module(benchmark, operands: Operands, name: str) -> None:
    class Eager(TiedLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decode(self.encode(x))

    module = (Eager if name == "eager" else TiedLinear)(8, 16, True, activation="relu")
    benchmark(module, operands.x)
