"""One problem of each kind, forward and training step: tiedfused, each peer and each regime a benchmark of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiedfused.benchmark.measure import applies
from tiedfused.benchmark.peers import LAYERS, Operands
from tiedfused.benchmark.shapes import Shape
from tiedfused.settings import REGIME_NAMES

CPU = {"narrow": Shape(2048, 128, 4096), "bottleneck": Shape(4096, 784, 64), "few rows": Shape(4, 2304, 16384)}
GPU = {
    "narrow": Shape(16384, 128, 32768),
    "wide": Shape(4096, 768, 24576),
    "bottleneck": Shape(4096, 784, 64),
    "few rows": Shape(4, 768, 24576),
}
CASES = [pytest.param("cpu", torch.float32, kind, shape, id=f"cpu-{kind}") for kind, shape in CPU.items()]
CASES += [
    pytest.param("cuda", torch.bfloat16, kind, shape, id=f"gpu-{kind}", marks=pytest.mark.gpu)
    for kind, shape in GPU.items()
]


@pytest.mark.parametrize("which", ["fwd", "step"])
@pytest.mark.parametrize("layer", [*LAYERS, *REGIME_NAMES])
@pytest.mark.parametrize(("device", "dtype", "kind", "shape"), CASES)
def test_regime(
    benchmark: Any, device: str, dtype: torch.dtype, kind: str, shape: Shape, layer: str, which: str
) -> None:
    if which == "step" and shape.few_rows:
        pytest.skip("few rows are inference")
    if not applies(layer, shape, dtype, which, torch.device(device)):
        pytest.skip("no other than eager or tiedfused here, or a regime that does not serve the problem")
    benchmark.group = f"{device} {kind} ({shape}) {which}"
    torch.compiler.reset()
    call = Operands.random(shape, dtype, device).named(layer, which)

    def run() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=2)
