"""What tiedfused is compared with: the same layer, relu with both biases, as people write it in PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tiedfused import settings
from tiedfused.benchmark.shapes import Shape
from tiedfused.functional import tied_encode_decode
from tiedfused.settings import REGIME_NAMES

Layer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(x: Tensor, weight: Tensor, bias_enc: Tensor, bias_dec: Tensor) -> Tensor:
    """The layer as one writes it in PyTorch."""
    return F.linear(F.relu(F.linear(x, weight, bias_enc)), weight.t(), bias_dec)


def _checkpointed(*operands: Tensor) -> Tensor:
    return checkpoint(eager, *operands, use_reentrant=False)  # type: ignore[no-any-return]


class _EpilogueLinear(torch.autograd.Function):
    """relu(x Wᵀ + b) as one cuBLASLt product with an epilogue (oneDNN or BLAS on a CPU); PyTorch has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        h = torch._addmm_activation(bias, x, weight.t())
        ctx.save_for_backward(x, weight, h)
        return h

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, weight, h = ctx.saved_tensors
        grad_a = torch.ops.aten.threshold_backward(grad_h, h, 0)
        return grad_a @ weight, grad_a.t() @ x, grad_a.sum(0)


def _epilogue(x: Tensor, weight: Tensor, bias_enc: Tensor, bias_dec: Tensor) -> Tensor:
    return F.linear(_EpilogueLinear.apply(x, weight, bias_enc), weight.t(), bias_dec)


def _low_memory(x: Tensor, weight: Tensor, bias_enc: Tensor, bias_dec: Tensor) -> Tensor:
    return tied_encode_decode(x, weight, bias_enc, bias_dec, recompute=True)


# A factory each: torch.compile is asked anew for every problem, so that no shape is generalised over.
PEERS: dict[str, Callable[[], Layer]] = {
    "eager": lambda: eager,
    "compile": lambda: torch.compile(eager, dynamic=False),
    "max-autotune": lambda: torch.compile(eager, dynamic=False, mode="max-autotune-no-cudagraphs"),
    "checkpoint": lambda: _checkpointed,
    "epilogue": lambda: _epilogue,
}
OURS: dict[str, Callable[[], Layer]] = {"tiedfused": lambda: tied_encode_decode, "low memory": lambda: _low_memory}
LAYERS = PEERS | OURS

MEANING = {
    "eager": "PyTorch as one writes it",
    "compile": "`torch.compile` of it",
    "max-autotune": '`torch.compile(mode="max-autotune-no-cudagraphs")`',
    "checkpoint": "eager under `torch.utils.checkpoint`, which recomputes the latent too",
    "epilogue": "bias and relu in the product's epilogue (`torch._addmm_activation`; cuBLASLt on NVIDIA GPUs)",
    "low memory": "tiedfused with `recompute=True`, where that is another plan than the default's",
}


def chosen(names: list[str], problems: list[str]) -> list[str]:
    """The peers and regimes among `names`, all peers if there are none; what is unknown is a line in `problems`."""
    known = (*PEERS, *REGIME_NAMES)
    problems += [f"peers: got {name!r}; expected {', '.join(known)}" for name in names if name not in known]
    return [name for name in known if name in names] if names else list(PEERS)


@dataclasses.dataclass(frozen=True)
class Call:
    """One thing to time: `run` is timed; `prepare` before it is not, nor entering what `within` gives for both."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def __call__(self) -> Any:
        with self.within():
            if self.prepare is not None:
                self.prepare()
            return self.run()


@dataclasses.dataclass(frozen=True)
class Operands:
    """One problem's tensors; x, weight and both biases require gradients."""

    x: Tensor
    weight: Tensor
    bias_enc: Tensor
    bias_dec: Tensor
    grad_y: Tensor

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Operands:
        """Normal operands, the weight scaled so that the pre-activation is normal too."""
        generator = torch.Generator(device).manual_seed(seed)
        n, d, h = shape

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(size, generator=generator, device=device).mul_(scale).to(dtype)

        x, weight, bias_enc, bias_dec = normal(n, d), normal(h, d, scale=d**-0.5), normal(h), normal(d)
        for leaf in (x, weight, bias_enc, bias_dec):
            leaf.requires_grad_()
        return cls(x, weight, bias_enc, bias_dec, normal(n, d))

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What has a gradient."""
        return self.x, self.weight, self.bias_enc, self.bias_dec

    def call(self, layer: Layer, which: str) -> Call:
        """A pass of `layer`: ``fwd`` without gradients → (y,); ``bwd`` and ``step`` → (y, x̄, W̄, b̄_enc, b̄_dec)."""

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (layer(*self.leaves),)

        def backward(y: Tensor) -> tuple[Tensor, ...]:
            return (y.detach(), *torch.autograd.grad(y, self.leaves, self.grad_y))

        made: list[Tensor] = []
        if which == "fwd":
            return Call(forward)
        if which == "step":
            return Call(lambda: backward(layer(*self.leaves)))
        return Call(lambda: backward(made.pop()), prepare=lambda: made.append(layer(*self.leaves)))

    def named(self, name: str, which: str) -> Call:
        """A pass of the layer called `name`: one of `LAYERS`, or tiedfused in the regime of that name."""
        if name not in REGIME_NAMES:
            return self.call(LAYERS[name](), which)
        call = self.call(tied_encode_decode, which)
        return dataclasses.replace(call, within=lambda: settings.override(regime=name))
