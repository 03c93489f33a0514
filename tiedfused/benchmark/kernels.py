"""Each Triton kernel alone: which plan holds it, and the call that launches it as that plan would."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tiedfused import planning, settings, tiles
from tiedfused.activations import IDENTITY, get_activation
from tiedfused.benchmark.peers import Operands
from tiedfused.benchmark.shapes import Shape
from tiedfused.regimes.common import Part, Pass

# kernel → the function that is launched, where it has another name
_FUNCTIONS = {
    **dict.fromkeys(tiles.FEW_ROWS_KERNELS, "forward"),
    "weight_grad_atomic": "weight_grad",
    "chunk_encode": "chunk_latent",
    "bottleneck_latent_grad": "bottleneck_latent",
    "bottleneck_weight_grad": "chunk_weight_grad",
    "bottleneck_decode": "chunk_decode",
}
REGIMES = {
    **dict.fromkeys(tiles.STREAM_KERNELS, "stream"),
    **dict.fromkeys(tiles.FEW_ROWS_KERNELS, "few_rows"),
    **dict.fromkeys(tiles.CHUNK_KERNELS, "chunked"),
    **dict.fromkeys(tiles.BOTTLENECK_KERNELS, "bottleneck"),
}
"""Kernel → the regime whose plan holds it."""


def function_name(kernel: str) -> str:
    """Of the Triton function, as a profiler shows it.

    Example:
        >>> function_name("few_rows_16")
        'forward_kernel'
    """
    return f"{_FUNCTIONS.get(kernel, kernel)}_kernel"


@dataclasses.dataclass(frozen=True)
class Planned:
    """A kernel as a plan holds it.

    Args:
        one: the kernel's pass.
        part: the direction it belongs to.
        precision: of fp32 products.
    """

    one: Pass
    part: Part
    precision: str

    def block(self, shape: Shape) -> Shape:
        """What one launch works on: a chunk, where the regime works in chunks."""
        rows, latents = self.part.chunk or (shape.n, shape.h)
        return Shape(rows, shape.d, latents)

    def launches(self, shape: Shape) -> int:
        """How many there are in the pass."""
        block = self.block(shape)
        return math.ceil(shape.n / block.n) * math.ceil(shape.h / block.h)


def planned(kernel: str, shape: Shape, dtype: torch.dtype, device: torch.device, capability: int) -> Planned | None:
    """`kernel` in the plan of a training step that is left to its regime; None where that plan does not hold it."""
    with settings.override(regime=REGIMES[kernel], atomics=kernel == "weight_grad_atomic"):
        made = planning.plan(*shape, dtype=dtype, device=device, capability=capability, recompute=True)
    found = [(one, part) for part in made.parts if part.backend == "triton" for one in part.passes]
    return next((Planned(one, part, made.precision) for one, part in found if one.kernel == kernel), None)


def kernels_of(shape: Shape, dtype: torch.dtype, device: torch.device, capability: int) -> list[str]:
    """Every kernel that a training step on `shape` may run, whichever regime the plan chooses."""
    return [kernel for kernel in tiles.KERNELS if planned(kernel, shape, dtype, device, capability) is not None]


def launches(p: Planned, sets: Sequence[Operands]) -> list[Callable[[], tuple[Tensor, ...]]]:
    """For each set of operands a call that launches the kernel once, with relu and both biases, and gives its results.

    What the chunked regime writes and reads at once, h and ā of a chunk, is in the same place for all of them, as
    there; so is what is written. Sums of a split product come as [split, rows, columns] where their combination is not
    the launcher's.
    """
    from tiedfused._backends.triton.bottleneck_forward import bottleneck_forward
    from tiedfused._backends.triton.bottleneck_latent import bottleneck_latent
    from tiedfused._backends.triton.chunk_decode import chunk_decode
    from tiedfused._backends.triton.chunk_latent import chunk_latent
    from tiedfused._backends.triton.chunk_weight_grad import chunk_weight_grad
    from tiedfused._backends.triton.forward import forward
    from tiedfused._backends.triton.input_grad import input_grad
    from tiedfused._backends.triton.weight_grad import weight_grad

    kernel, split = p.one.kernel, p.one.split
    function = _FUNCTIONS.get(kernel, kernel)
    (rows, d), latents = sets[0].x.shape, sets[0].weight.shape[0]
    n, _, h = p.block(Shape(rows, d, latents))
    like = sets[0].x.detach()
    gemm: dict[str, Any] = {"tile": p.one.tile, "precision": p.precision}
    latent = {"activation": get_activation("relu"), **gemm}
    summed = {**latent, "split": split}

    def empty(*size: int, dtype: torch.dtype = like.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=like.device)

    buffers: list[Tensor] = []
    if function.startswith("chunk_"):
        generator = torch.Generator(like.device).manual_seed(0)
        buffers = [empty(n, h).normal_(generator=generator).relu_() for _ in range(2)]
    made = {"chunk_decode": n, "chunk_weight_grad": h}.get(function, 0)
    out = empty(split, made, d, dtype=torch.float32) if split > 1 else empty(made, d)
    sum_x = empty(n, d, dtype=torch.float32) if kernel == "weight_grad_atomic" else None
    sum_bias = None
    if kernel == "chunk_latent":
        sum_bias = empty(-(-n // p.one.tile.block_m), h, dtype=torch.float32)  # type: ignore[union-attr]

    def one(operands: Operands) -> Callable[[], tuple[Tensor, ...]]:
        x, weight, bias_enc, bias_dec = (t.detach() for t in operands.leaves)
        x, grad_y, weight, bias_enc = x[:n], operands.grad_y[:n], weight[:h], bias_enc[:h]
        grad = None if kernel in ("chunk_encode", "bottleneck_latent") else grad_y

        def run() -> tuple[Tensor, ...]:
            if function == "forward":
                return (forward(x, weight, bias_enc, bias_dec, output_activation=IDENTITY, **summed),)
            if function == "input_grad":
                return (input_grad(grad_y, x, weight, bias_enc, **summed),)
            if function == "weight_grad":
                zeroed = None if sum_x is None else sum_x.zero_()
                grads = weight_grad(grad_y, x, weight, bias_enc, grad_x=zeroed, **summed)
                return grads if sum_x is None else (*grads, sum_x)
            if function == "bottleneck_forward":
                return (bottleneck_forward(x, weight, bias_enc, bias_dec, output_activation=IDENTITY, **latent),)
            if function == "bottleneck_latent":
                made_h, grad_a = bottleneck_latent(x, grad, weight, bias_enc, **summed)
                return (made_h,) if grad_a is None else (made_h, grad_a)
            made_h, grad_a = buffers
            if function == "chunk_latent":
                written = None if grad is None else grad_a
                chunk_latent(x, grad, weight, bias_enc, h=made_h, grad_a=written, grad_bias_enc=sum_bias, **latent)
                return (made_h,) if written is None else (made_h, written)
            if function == "chunk_decode":
                chunk_decode(made_h, weight, None, earlier=None, out=out, split=split, **gemm)
            else:
                assert function == "chunk_weight_grad", kernel
                chunk_weight_grad(grad_a, made_h, x, grad_y, earlier=None, out=out, split=split, **gemm)
            return (out,)

        return run

    return [one(operands) for operands in sets]
