"""What tiedfused is measured against, how, and on which shapes."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tiedfused.functional import tied_encode_decode

# (N, d, H), chosen to run on two CPU cores
CPU_SHAPES = [(8192, 64, 4096), (8192, 128, 8192), (4096, 256, 8192), (4096, 768, 6144)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# relative Frobenius error against eager above which a result is wrong, and its speed not worth reporting
WRONG = {torch.float32: 1e-3, torch.bfloat16: 3e-2}

Layer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(x: Tensor, weight: Tensor, bias_enc: Tensor, bias_dec: Tensor) -> Tensor:
    """The layer as one writes it in PyTorch."""
    return F.linear(F.relu(F.linear(x, weight, bias_enc)), weight.t(), bias_dec)


def peers() -> dict[str, Layer]:
    """Name → layer, the ones compared with first. Compiled code is fresh: no shape is generalised over."""
    torch.compiler.reset()
    return {
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
        "tiedfused": tied_encode_decode,
        "low memory": lambda *operands: tied_encode_decode(*operands, recompute=True),
    }


@dataclasses.dataclass(frozen=True)
class Operands:
    """One problem's tensors; all of x, weight and biases require gradients."""

    x: Tensor
    weight: Tensor
    bias_enc: Tensor
    bias_dec: Tensor
    grad_y: Tensor

    @classmethod
    def random(cls, n: int, d: int, h: int, dtype: torch.dtype, device: str = "cpu") -> Operands:
        """Normal operands, the weight scaled so that the pre-activation is normal too."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

        leaves = (normal(n, d), normal(h, d, scale=d**-0.5), normal(h), normal(d))
        return cls(*(t.requires_grad_() for t in leaves), normal(n, d))

    def forward(self, layer: Layer) -> Callable[[], Tensor]:
        """A call of `layer` without gradients."""

        def run() -> Tensor:
            with torch.no_grad():
                return layer(self.x, self.weight, self.bias_enc, self.bias_dec)

        return run

    def step(self, layer: Layer) -> Callable[[], tuple[Tensor, ...]]:
        """A call of `layer` and of its backward, all four gradients."""

        def run() -> tuple[Tensor, ...]:
            operands = (self.x, self.weight, self.bias_enc, self.bias_dec)
            return torch.autograd.grad(layer(*operands), operands, self.grad_y)

        return run


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, Frobenius, in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time every call once a round, so that what the machine does besides hits all of them; CPU only."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # warm-up: compiles, caches, page faults
        call()
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    quintiles = {name: statistics.quantiles(t, n=5, method="inclusive") for name, t in times.items()}
    return {name: Timing(statistics.median(t), quintiles[name][0], quintiles[name][3]) for name, t in times.items()}
