"""The stream-H Triton kernels as a backend: a plan's passes, each handed to its launcher."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from tiedfused._backends.triton.forward import forward as _forward
from tiedfused._backends.triton.input_grad import input_grad
from tiedfused._backends.triton.weight_grad import weight_grad
from tiedfused.planning import Pass, Plan


def _device_of(t: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, whichever the tensors are on."""
    if not t.is_cuda or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


def _options(one: Pass, plan: Plan) -> dict[str, Any]:
    return {"activation": plan.activation, "tile": one.tile, "split": one.split, "precision": plan.precision}


def forward(
    x: Tensor, weight: Tensor, bias_enc: Tensor | None, bias_dec: Tensor | None, plan: Plan
) -> tuple[Tensor, None]:
    """y ``[N, d]``; the latent is never kept."""
    with _device_of(x):
        y = _forward(
            x,
            weight,
            bias_enc,
            bias_dec,
            output_activation=plan.output_activation,
            **_options(plan.passes[0], plan),
        )
    return y, None


def backward(
    grad_z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    latent: Tensor | None,
    plan: Plan,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """x̄ ``[N, d]``, W̄ ``[H, d]``, b̄_enc ``[H]`` in x's dtype, None where `needs` does not ask; `latent` is None."""
    need_x, need_weight, need_bias = needs
    operands = (grad_z, x, weight, bias_enc)
    grad_x = grad_weight = grad_bias = None
    with _device_of(x):
        for one in plan.passes[1:]:
            options = _options(one, plan)
            if one.kernel == "input_grad":
                if need_x:
                    grad_x = input_grad(*operands, **options)
            elif one.kernel == "weight_grad_atomic":
                sum_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
                grad_weight, grad_bias = weight_grad(*operands, grad_x=sum_x, **options)
                grad_x = sum_x.to(x.dtype)
            elif need_weight or need_bias:
                grad_weight, grad_bias = weight_grad(*operands, **options)
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad_bias.to(x.dtype) if need_bias and grad_bias is not None else None,
    )
