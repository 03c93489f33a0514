"""The operator: its schema, its backward, and the ways into it.

Two doors lead to the same backends. `torch.ops.tiedfused.forward` carries autograd for torch.compile, torch.export,
tensor subclasses and dispatch modes. `EncodeDecode`, a plain autograd Function, is the eager fast path: a dispatcher
hop and `register_autograd` would cost more than a small problem's arithmetic. `functional` picks the door.

g is part of the op in inference only. In training it follows as an operation of its own: autograd then saves y or the
pre-output, whichever g's gradient reads, and frees it, and ȳ, before this op's backward starts; inside the op both
would stay alive through it.

A call that asks for the latent's statistics has doors of its own, `EncodeDecodeStats` and
`torch.ops.tiedfused.forward_stats`, so that the others do not pay for outputs they do not have; the backward is shared.

Saved for backward: x, weight, bias_enc, and the latent only if the plan keeps it; else backward recomputes it tile by
tile. Settings may change between forward and backward, so a kept latent has one layout (`tiedfused._backends`). And
`torch.utils.checkpoint` calls forward again during backward, and tells what it saves then by order and shape: so
something empty is saved in the place of a latent that is not kept.

With ``create_graph=True`` backward is written out in differentiable PyTorch instead, so that second derivatives are
right; that form stores the latent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp import is_autocast_available
from torch.utils.flop_counter import register_flop_formula

from tiedfused import planning, reference
from tiedfused._backends import BACKENDS
from tiedfused.activations import IDENTITY, Activation, get_activation
from tiedfused.planning import Plan
from tiedfused.reference import LatentStats


def plan_for(
    x: Tensor,
    weight: Tensor,
    f: Activation,
    g: Activation,
    grad: bool,
    grad_x: bool,
    recompute: bool | None,
    stats: bool = False,
) -> Plan:
    """The plan of x ``[..., d]`` with weight ``[H, d]``, under the present settings."""
    h, d = weight.shape
    return planning.make_plan(
        planning.request(x.numel() // d, d, h, x.dtype, x.device, f, g, grad, grad_x, recompute, stats)
    )


def last_stride_one(t: Tensor) -> Tensor:
    """t ``[N, d]`` with elements of a row next to each other, as they are in memory; a copy only if they are not.

    Rows that overlap, as those of `torch.Tensor.unfold`, are copied too: oneDNN refuses them.
    """
    overlap = 0 < t.stride(0) < t.shape[1] and t.shape[0] > 1
    return t.resolve_neg() if t.stride(1) == 1 and not overlap else t.contiguous()


def kernel_layout(
    x: Tensor, weight: Tensor, bias_enc: Tensor | None, bias_dec: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The operands as backends read them: rows of any stride, everything else contiguous."""
    return (
        last_stride_one(x),
        last_stride_one(weight),
        None if bias_enc is None else bias_enc.contiguous(),
        None if bias_dec is None else bias_dec.contiguous(),
    )


def forward_with_stats(
    x: Tensor, weight: Tensor, bias_enc: Tensor | None, bias_dec: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor | None, LatentStats]:
    """The pre-output (in inference y), the latent if the plan keeps it, and its statistics."""
    z, latent, stats = BACKENDS[plan.forward.backend].forward(x, weight, bias_enc, bias_dec, plan)
    stats.mean.div_(x.shape[0])
    return z, latent, stats


# one for all calls: to make one takes a tenth of the forward of a small one
_NOT_KEPT = torch.empty(0, device="cpu")


def _penalties(grad_l1: Tensor | None, grad_mean: Tensor | None, n: int) -> tuple[Tensor | None, Tensor | None]:
    """What the backends add to h̄: a term of each row, times the latent's sign, and one of each latent."""
    return (
        None if grad_l1 is None else grad_l1.contiguous(),
        None if grad_mean is None else grad_mean / n,
    )


def _differentiable_backward(
    grad_z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    f: Activation,
    grad_l1: Tensor | None,
    grad_mean: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    a = reference.pre_activation(x, weight, bias_enc)
    return reference.latent_gradients(grad_z, x, weight, a, f, grad_l1, grad_mean)


class EncodeDecode(torch.autograd.Function):
    """The eager path. ctx-style on purpose: a `setup_context` Function costs 26 µs a call in `inspect.signature`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias_enc: Tensor | None, bias_dec: Tensor | None, plan: Plan
    ) -> Tensor:
        """The pre-output z ``[N, d]``."""
        z, latent, _ = BACKENDS[plan.forward.backend].forward(x, weight, bias_enc, bias_dec, plan)
        ctx.plan = plan
        ctx.save_for_backward(x, weight, bias_enc, _NOT_KEPT if latent is None else latent)
        return z

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_z: Tensor | None, grad_l1: Tensor | None = None, grad_mean: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias_enc and bias_dec."""
        plan, needs = ctx.plan, ctx.needs_input_grad
        if torch.is_autocast_enabled(plan.device):  # the backward runs in the precision of the forward
            with torch.autocast(plan.device, enabled=False):
                return EncodeDecode.backward(ctx, grad_z, grad_l1, grad_mean)
        x, weight, bias_enc, latent = ctx.saved_tensors
        if grad_z is None:
            grad_z = torch.zeros_like(x)
        if torch.is_grad_enabled() or _batched(grad_z) or _batched(grad_l1) or _batched(grad_mean):
            grads = _differentiable_backward(grad_z, x, weight, bias_enc, plan.activation, grad_l1, grad_mean)
        else:
            grad_z = last_stride_one(grad_z)
            penalties = _penalties(grad_l1, grad_mean, plan.n) if plan.stats else ()
            backend = BACKENDS[plan.backward.backend]
            kept = latent if plan.save_latent else None
            grads = backend.backward(grad_z, x, weight, bias_enc, kept, plan, needs[:3], *penalties)
        grad_bias_dec = grad_z.sum(0) if needs[3] else None
        return *(grad if need else None for grad, need in zip(grads, needs, strict=False)), grad_bias_dec, None


def _batched(grad: Tensor | None) -> bool:
    """Whether a gradient comes from ``is_grads_batched=True``."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


class EncodeDecodeStats(torch.autograd.Function):
    """`EncodeDecode` with the latent's statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias_enc: Tensor | None, bias_dec: Tensor | None, plan: Plan
    ) -> tuple[Tensor, ...]:
        """The pre-output z ``[N, d]``, l1 ``[N]``, l0 ``[N]``, mean ``[H]`` and fired ``[H]``."""
        z, latent, stats = forward_with_stats(x, weight, bias_enc, bias_dec, plan)
        ctx.plan = plan
        ctx.save_for_backward(x, weight, bias_enc, _NOT_KEPT if latent is None else latent)
        ctx.mark_non_differentiable(stats.l0, stats.fired)
        ctx.set_materialize_grads(False)
        return z, *stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """As of `EncodeDecode`; the gradient of each differentiable output may be missing."""
        grad_z, grad_l1, _, grad_mean, _ = grads
        return EncodeDecode.backward(ctx, grad_z, grad_l1, grad_mean)


# `Function.apply` without its Python wrapper, whose work (functorch, default arguments) is done before we get here:
# 1.6 of 8 µs on a tiny problem
apply_encode_decode = super(torch.autograd.Function, EncodeDecode).apply
apply_encode_decode_stats = super(torch.autograd.Function, EncodeDecodeStats).apply


# ---- the registered operator -------------------------------------------------------------------------------------

_library = torch.library.Library("tiedfused", "DEF")
_library.define(
    "forward(Tensor x, Tensor weight, Tensor? bias_enc, Tensor? bias_dec, str activation, bool save_latent)"
    " -> (Tensor z, Tensor latent)"
)
_library.define(
    "forward_stats(Tensor x, Tensor weight, Tensor? bias_enc, Tensor? bias_dec, str activation, bool save_latent)"
    " -> (Tensor z, Tensor latent, Tensor l1, Tensor l0, Tensor mean, Tensor fired)"
)
_library.define(
    "backward(Tensor grad_z, Tensor x, Tensor weight, Tensor? bias_enc, Tensor latent, str activation, "
    "bool save_latent, bool[] needs, bool stats=False, Tensor? grad_l1=None, Tensor? grad_mean=None)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias_enc)"
)


def _op_forward(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    bias_dec: Tensor | None,
    activation: str,
    save_latent: bool,
) -> tuple[Tensor, Tensor]:
    x, weight, bias_enc, bias_dec = kernel_layout(x, weight, bias_enc, bias_dec)
    plan = plan_for(x, weight, get_activation(activation), IDENTITY, save_latent, True, not save_latent)
    z, latent, _ = BACKENDS[plan.forward.backend].forward(x, weight, bias_enc, bias_dec, plan)
    return z, x.new_empty(0) if latent is None else latent


def _op_forward_stats(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    bias_dec: Tensor | None,
    activation: str,
    save_latent: bool,
) -> tuple[Tensor, ...]:
    x, weight, bias_enc, bias_dec = kernel_layout(x, weight, bias_enc, bias_dec)
    plan = plan_for(x, weight, get_activation(activation), IDENTITY, save_latent, True, not save_latent, True)
    z, latent, stats = forward_with_stats(x, weight, bias_enc, bias_dec, plan)
    return z, x.new_empty(0) if latent is None else latent, *stats


def _op_backward(
    grad_z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    latent: Tensor,
    activation: str,
    save_latent: bool,
    needs: list[bool],
    stats: bool = False,
    grad_l1: Tensor | None = None,
    grad_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_z = last_stride_one(grad_z)
    x, weight, bias_enc, _ = kernel_layout(x, weight, bias_enc, None)
    plan = plan_for(x, weight, get_activation(activation), IDENTITY, True, needs[0], not save_latent, stats)
    assert plan.backward is not None
    grads = BACKENDS[plan.backward.backend].backward(
        grad_z,
        x,
        weight,
        bias_enc,
        latent if save_latent else None,
        plan,
        (needs[0], needs[1], needs[2]),
        *_penalties(grad_l1, grad_mean, plan.n),
    )
    grad_x, grad_weight, grad_bias = (x.new_empty(0) if grad is None else grad for grad in grads)
    return grad_x, grad_weight, grad_bias


for _name, _implementation in (
    ("forward", _op_forward),
    ("forward_stats", _op_forward_stats),
    ("backward", _op_backward),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("tiedfused::forward", lib=_library)
def _fake_forward(x, weight, bias_enc, bias_dec, activation, save_latent):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty((x.shape[0], weight.shape[0]) if save_latent else 0)


@torch.library.register_fake("tiedfused::forward_stats", lib=_library)
def _fake_forward_stats(x, weight, *arguments):  # type: ignore[no-untyped-def]
    return *_fake_forward(x, weight, *arguments), *reference.zero_stats(x, weight)


@torch.library.register_fake("tiedfused::backward", lib=_library)
def _fake_backward(grad_z, x, weight, bias_enc, latent, activation, save_latent, needs, *_):  # type: ignore[no-untyped-def]
    shapes = (x.shape, weight.shape, (weight.shape[0],))
    return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


def _op_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias_enc, _, ctx.activation, ctx.save_latent = inputs
    ctx.device = x.device.type
    latent, *stats = output[1:]
    ctx.mark_non_differentiable(latent, *stats[1::2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias_enc, latent)


def _op_autograd(ctx: Any, grad_z: Tensor | None, _: Tensor | None, *grad_stats: Tensor | None) -> tuple[Any, ...]:
    grad_l1, grad_mean = grad_stats[::2] if grad_stats else (None, None)
    if grad_z is None and grad_l1 is None and grad_mean is None:
        return (None,) * 6
    if is_autocast_available(ctx.device) and torch.is_autocast_enabled(
        ctx.device
    ):  # the backward runs in the forward's precision
        with torch.autocast(ctx.device, enabled=False):
            return _op_autograd(ctx, grad_z, None, *grad_stats)
    x, weight, bias_enc, latent = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_z = torch.zeros_like(x) if grad_z is None else grad_z
    grads: tuple[Tensor, ...]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        f = get_activation(ctx.activation)
        grads = _differentiable_backward(grad_z, x, weight, bias_enc, f, grad_l1, grad_mean)
    else:
        operands = (grad_z, x, weight, bias_enc, latent, ctx.activation, ctx.save_latent, list(needs[:3]))
        penalties = (True, grad_l1, grad_mean) if grad_stats else ()
        grads = torch.ops.tiedfused.backward.default(*operands, *penalties)
    grad_bias_dec = grad_z.sum(0) if needs[3] else None
    return *(grad if need else None for grad, need in zip(grads, needs, strict=False)), grad_bias_dec, None, None


for _name in ("forward", "forward_stats"):
    torch.library.register_autograd(f"tiedfused::{_name}", _op_autograd, setup_context=_op_setup_context, lib=_library)


def _op_no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "tiedfused::backward is not differentiable; differentiate tied_encode_decode with create_graph=True"
    )


torch.library.register_autograd(
    "tiedfused::backward",
    _op_no_double_backward,
    setup_context=lambda ctx, inputs, output: None,
    lib=_library,
)


@register_flop_formula([torch.ops.tiedfused.forward, torch.ops.tiedfused.forward_stats])
def _forward_flops(x, weight, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """4NdH: two products."""
    return 4 * x[0] * x[1] * weight[0]


@register_flop_formula(torch.ops.tiedfused.backward)
def _backward_flops(grad_z, x, weight, bias_enc, latent, activation, save_latent, needs, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """h̄, the two terms of W̄, and x̄, 2NdH each where asked for: theoretical, without what is recomputed."""
    need_x, need_weight, _ = needs
    return (2 + 4 * need_weight + 2 * need_x) * x[0] * x[1] * weight[0]
