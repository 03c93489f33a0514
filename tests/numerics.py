"""What counts as correct: no more than twice the error of eager PyTorch in the same dtype, against float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from tiedfused import reference

# relative errors below these are rounding of the result itself, whoever computes it
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAMES = ("y", "grad_x", "grad_weight", "grad_bias_enc", "grad_bias_dec")


@dataclasses.dataclass
class Problem:
    """One layer's operands and the gradient of its output; biases may be None."""

    x: Tensor
    weight: Tensor
    bias_enc: Tensor | None
    bias_dec: Tensor | None
    grad_y: Tensor

    def to(self, *args: object) -> Problem:
        """The same, converted as `torch.Tensor.to` does, detached, and requiring gradients."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        moved = [None if t is None else t.detach().to(*args) for t in fields]  # type: ignore[arg-type]
        return Problem(*(None if t is None else t.clone().requires_grad_() for t in moved[:4]), moved[4])  # type: ignore[arg-type]

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.x, self.weight, self.bias_enc, self.bias_dec


def problem(
    n: int,
    d: int,
    h: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    biases: bool = True,
    seed: int = 0,
    activation: str = "relu",
    exact: bool = False,
) -> Problem:
    """Random operands, exactly representable in `dtype`, whose pre-activations keep off a kink at 0.

    A pre-activation that rounding moves across relu's kink flips its derivative between 0 and 1 in one of the two
    computations compared: an error of the problem, not of the code. Rows of W are shifted by their biases until every
    pre-activation is at least 2⁻⁵ away from 0, or, where there are no biases or too many rows, left alone.

    Of millions of pre-activations in fp32 rounding moves one or two, and one that only one side has is an error of
    hundreds of bounds. `exact`, for problems that large, puts x, W and biases on grids so coarse that every
    pre-activation is exact in every dtype, in any order of summation.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        scale = 2.0 ** round(math.log2(scale)) if exact else scale
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return ((values * 8).round() / 8 * scale if exact else values * scale).to(dtype)

    x, weight = normal(n, d), normal(h, d, scale=d**-0.5)
    bias_enc, bias_dec = (normal(h, scale=0.5), normal(d, scale=0.5)) if biases else (None, None)
    if bias_enc is not None and n and not exact and activation in ("relu", "leaky_relu", "elu", "selu"):
        a = x.double() @ weight.double().t()
        for _ in range(50):
            near = ((a + bias_enc.double()).abs() < 2**-5).any(0)
            if not near.any():
                break
            bias_enc[near] = normal(h, scale=2.0)[near]
    made = Problem(x, weight, bias_enc, bias_dec, normal(n, d))
    return made.to(device)


Layer = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]


def outputs(layer: Layer, p: Problem) -> dict[str, Tensor]:
    """y and every gradient of `layer` on `p`, by `NAMES`; a missing bias has none."""
    y = layer(*p.operands)
    leaves = [t for t in p.operands if t is not None]
    grads = iter(torch.autograd.grad(y, leaves, p.grad_y))
    found = {"y": y.detach()}
    for name, t in zip(NAMES[1:], p.operands, strict=True):
        if t is not None:
            found[name] = next(grads)
    return found


def assert_close(actual: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype, name: str = "result") -> None:
    """`actual` is finite and at most twice as far from `truth` as `eager` is, or as the dtype's floor.

    Both in the relative Frobenius norm and in the largest absolute error over the largest absolute value.
    """
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    truth = truth.detach().double()

    def errors(t: Tensor) -> tuple[float, float]:
        difference = t.detach().double() - truth
        frobenius = difference.norm() / truth.norm().clamp_min(1e-30)
        largest = difference.abs().amax() / truth.abs().amax().clamp_min(1e-30) if truth.numel() else frobenius * 0
        return float(frobenius), float(largest)

    for kind, ours, theirs in zip(("Frobenius", "max"), errors(actual), errors(eager), strict=True):
        bound = 2 * theirs + FLOOR[dtype]
        assert ours <= bound, f"{name}: {kind} error {ours:.3g}, eager's is {theirs:.3g}, bound {bound:.3g}"


def assert_layer_matches(
    layer: Layer, p: Problem, *, activation: str = "relu", output_activation: str = "identity"
) -> None:
    """y and each gradient of `layer` on `p` pass `assert_close`."""

    def eager(*operands: Tensor | None) -> Tensor:
        return reference.tied_encode_decode(
            *operands,
            activation=activation,
            output_activation=output_activation,  # type: ignore[arg-type]
        )

    dtype = p.x.dtype
    ours, theirs, truth = outputs(layer, p), outputs(eager, p), outputs(eager, p.to(torch.float64))
    assert ours.keys() == truth.keys()
    for name in truth:
        assert_close(ours[name], theirs[name], truth[name], dtype, name)
        assert ours[name].dtype == dtype, f"{name}: {ours[name].dtype}"
