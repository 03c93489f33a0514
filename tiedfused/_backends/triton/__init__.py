"""The Triton kernels as a backend: each regime's launches are in the module of its name."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from tiedfused._backends.triton import bottleneck, chunked, stream
from tiedfused.planning import Plan
from tiedfused.reference import LatentStats

_REGIMES = {"stream": stream, "few_rows": stream, "bottleneck": bottleneck, "chunked": chunked}


def _device_of(t: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, whichever the tensors are on."""
    if not t.is_cuda or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


def forward(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    bias_dec: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor | None, LatentStats | None]:
    """y ``[N, d]``, h ``[N, H]`` if the plan keeps it, and its statistics if the plan has them."""
    with _device_of(x):
        return _REGIMES[plan.forward.regime].forward(x, weight, bias_enc, bias_dec, plan)


def backward(
    grad_z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    latent: Tensor | None,
    plan: Plan,
    needs: tuple[bool, bool, bool],
    grad_l1: Tensor | None = None,
    grad_total: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """x̄ ``[N, d]``, W̄ ``[H, d]``, b̄_enc ``[H]`` in x's dtype, None where `needs` does not ask."""
    assert plan.backward is not None
    with _device_of(x):
        regime = _REGIMES[plan.backward.regime]
        grads = regime.backward(grad_z, x, weight, bias_enc, latent, plan, needs, grad_l1, grad_total)
        grad_x, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
        return grad_x, grad_weight, None if grad_bias is None else grad_bias.to(x.dtype)
