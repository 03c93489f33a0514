"""The stream regime (`tiedfused.regimes.stream`): a plan's passes, each handed to its launcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiedfused._backends.triton.forward import forward as _forward
from tiedfused._backends.triton.input_grad import input_grad
from tiedfused._backends.triton.weight_grad import weight_grad
from tiedfused.planning import Plan
from tiedfused.reference import LatentStats, zero_stats
from tiedfused.regimes.common import Pass


def _options(one: Pass, plan: Plan) -> dict[str, Any]:
    return {"activation": plan.activation, "tile": one.tile, "split": one.split, "precision": plan.precision}


def forward(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    bias_dec: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, None, LatentStats | None]:
    """y ``[N, d]``, and the latent's statistics; the latent is never kept."""
    stats = zero_stats(x, weight) if plan.stats else None
    y = _forward(
        x,
        weight,
        bias_enc,
        bias_dec,
        output_activation=plan.output_activation,
        stats=stats,
        rows_at_once=x.shape[0] if plan.forward.chunk is None else plan.forward.chunk[0],
        **_options(plan.forward.passes[0], plan),
    )
    return y, None, stats


def backward(
    grad_z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    latent: Tensor | None,
    plan: Plan,
    needs: tuple[bool, bool, bool],
    grad_l1: Tensor | None,
    grad_total: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """x̄ ``[N, d]``, W̄ ``[H, d]`` in x's dtype, b̄_enc ``[H]`` in fp32; `latent` is None."""
    need_x, need_weight, need_bias = needs
    operands = (grad_z, x, weight, bias_enc, grad_l1, grad_total)
    grad_x = grad_weight = grad_bias = None
    assert plan.backward is not None
    for one in plan.backward.passes:
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
    return grad_x, grad_weight, grad_bias
