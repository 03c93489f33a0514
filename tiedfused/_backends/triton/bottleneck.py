"""The bottleneck regime (`tiedfused.regimes.bottleneck`): a plan's passes, each handed to its launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from tiedfused._backends.triton.bottleneck_forward import bottleneck_forward
from tiedfused._backends.triton.bottleneck_latent import bottleneck_latent
from tiedfused._backends.triton.chunk_decode import chunk_decode
from tiedfused._backends.triton.chunk_weight_grad import chunk_weight_grad
from tiedfused._backends.triton.chunked import options
from tiedfused._backends.triton.combine import combine
from tiedfused._backends.triton.stats import stats_of
from tiedfused.activations import IDENTITY
from tiedfused.planning import Plan
from tiedfused.reference import LatentStats, zero_stats


def forward(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    bias_dec: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, None, LatentStats | None]:
    """y ``[N, d]``, and the latent's statistics; the latent is not kept."""
    first, *rest = plan.forward.passes
    if not rest:
        stats = zero_stats(x, weight) if plan.stats else None
        y = bottleneck_forward(
            x,
            weight,
            bias_enc,
            bias_dec,
            activation=plan.activation,
            output_activation=plan.output_activation,
            stats=stats,
            **options(first, plan),
        )
        return y, None, stats
    h, _ = bottleneck_latent(
        x, None, weight, bias_enc, activation=plan.activation, split=first.split, **options(first, plan)
    )
    stats = stats_of(h) if plan.stats else None
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (decode,) = rest
    chunk_decode(
        h,
        weight,
        bias_dec,
        earlier=None,
        out=y,
        output_activation=plan.output_activation,
        split=decode.split,
        **options(decode, plan),
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
    assert plan.backward is not None
    passes = {one.kernel.removeprefix("bottleneck_"): one for one in plan.backward.passes}
    one = passes["latent_grad"]
    h, grad_a = bottleneck_latent(
        x,
        grad_z,
        weight,
        bias_enc,
        grad_l1,
        grad_total,
        activation=plan.activation,
        split=one.split,
        **options(one, plan),
    )
    assert grad_a is not None
    grad_x = grad_weight = grad_bias = None
    if need_weight:
        one = passes["weight_grad"]
        grad_weight = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
        out = grad_weight
        if one.split > 1:
            out = torch.empty((one.split, *weight.shape), dtype=torch.float32, device=x.device)
        chunk_weight_grad(grad_a, h, x, grad_z, earlier=None, out=out, split=one.split, **options(one, plan))
        if one.split > 1:
            combine(out, grad_weight, None, activation=IDENTITY)
    if need_x:
        one = passes["decode"]
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        chunk_decode(grad_a, weight, None, earlier=None, out=grad_x, split=one.split, **options(one, plan))
    if need_bias:
        grad_bias = grad_a.sum(0, dtype=torch.float32)
    return grad_x, grad_weight, grad_bias
