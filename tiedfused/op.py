"""The operator: its schema, its backward, and the ways into it.

Two doors lead to the same backends. `torch.ops.tiedfused.forward` carries autograd for torch.compile, torch.export,
tensor subclasses and dispatch modes. `EncodeDecode`, a plain autograd Function, is the eager fast path: a dispatcher
hop and `register_autograd` would cost more than a small problem's arithmetic. `functional` picks the door.

g is part of the op in inference only. In training it follows as an operation of its own: autograd then saves y or the
pre-output, whichever g's gradient reads, and frees it, and ȳ, before this op's backward starts; inside the op both
would stay alive through it.

Saved for backward: x, weight, bias_enc, and the latent only if the plan keeps it. Backward recomputes the latent tile
by tile otherwise. With ``create_graph=True`` it is written out in differentiable PyTorch instead, so that second
derivatives are right; that form stores the latent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

from tiedfused import planning, reference, settings
from tiedfused._backends import BACKENDS
from tiedfused.activations import IDENTITY, Activation, get_activation
from tiedfused.planning import Plan
from tiedfused.regimes import tiled


def keeps_latent_for(x: Tensor, weight: Tensor, f: Activation, recompute: bool | None) -> bool:
    """Whether a training step on x ``[N, d]`` keeps the latent.

    While a graph is traced, sizes may be symbolic, and a rule of thumb that holds for all devices stands for the plan:
    what is not known of the sizes for certain counts as too large, since to ask would bind the graph to the answer.
    """
    (n, d), h = x.shape, weight.shape[0]
    if not is_compiling() and all(isinstance(size, int) for size in (n, d, h)):
        return plan_for(x, weight, f, IDENTITY, True, True, recompute).save_latent
    asked = settings.current().recompute if recompute is None else recompute
    if asked is not None:
        return not asked
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # half a second, needed only here

    return tiled.keeps_latent(n, h, d, x.dtype, statically_known_true)


def plan_for(
    x: Tensor,
    weight: Tensor,
    f: Activation,
    g: Activation,
    grad: bool,
    grad_x: bool,
    recompute: bool | None,
) -> Plan:
    """The plan of x ``[..., d]`` with weight ``[H, d]``."""
    h, d = weight.shape
    return planning.make_plan(planning.request(x.numel() // d, d, h, x.dtype, x.device, f, g, grad, grad_x, recompute))


def last_stride_one(t: Tensor) -> Tensor:
    """t ``[N, d]`` with elements of a row next to each other; a copy only if they are not."""
    return t if t.stride(1) == 1 else t.contiguous()


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


def _differentiable_backward(
    grad_z: Tensor, x: Tensor, weight: Tensor, bias_enc: Tensor | None, f: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.latent_gradients(grad_z, x, weight, reference.pre_activation(x, weight, bias_enc), f)


class EncodeDecode(torch.autograd.Function):
    """The eager path. ctx-style on purpose: a `setup_context` Function costs 26 µs a call in `inspect.signature`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias_enc: Tensor | None, bias_dec: Tensor | None, plan: Plan
    ) -> Tensor:
        """The pre-output z ``[N, d]``."""
        z, latent = BACKENDS[plan.forward.backend].forward(x, weight, bias_enc, bias_dec, plan)
        ctx.plan = plan
        ctx.save_for_backward(x, weight, bias_enc, latent)
        return z

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x, weight, bias_enc and bias_dec."""
        plan, needs = ctx.plan, ctx.needs_input_grad
        if torch.is_autocast_enabled(plan.device):  # the backward runs in the precision of the forward
            with torch.autocast(plan.device, enabled=False):
                return EncodeDecode.backward(ctx, grad_z)
        x, weight, bias_enc, latent = ctx.saved_tensors
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad_z):  # is_grads_batched=True
            grads = _differentiable_backward(grad_z, x, weight, bias_enc, plan.activation)
        else:
            grad_z = last_stride_one(grad_z)
            grads = BACKENDS[plan.backward.backend].backward(grad_z, x, weight, bias_enc, latent, plan, needs[:3])
        grad_bias_dec = grad_z.sum(0) if needs[3] else None
        return *(grad if need else None for grad, need in zip(grads, needs, strict=False)), grad_bias_dec, None


# `Function.apply` without its Python wrapper, whose work (functorch, default arguments) is done before we get here:
# 1.6 of 8 µs on a tiny problem
apply_encode_decode = super(torch.autograd.Function, EncodeDecode).apply


# ---- the registered operator -------------------------------------------------------------------------------------

_library = torch.library.Library("tiedfused", "DEF")
_library.define(
    "forward(Tensor x, Tensor weight, Tensor? bias_enc, Tensor? bias_dec, str activation, bool save_latent) "
    "-> (Tensor z, Tensor latent)"
)
_library.define(
    "backward(Tensor grad_z, Tensor x, Tensor weight, Tensor? bias_enc, Tensor latent, str activation, "
    "bool save_latent, bool[] needs) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias_enc)"
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
    z, latent = BACKENDS[plan.forward.backend].forward(x, weight, bias_enc, bias_dec, plan)
    return z, x.new_empty(0) if latent is None else latent.view(-1)


def _op_backward(
    grad_z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    latent: Tensor,
    activation: str,
    save_latent: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grad_z = last_stride_one(grad_z)
    x, weight, bias_enc, _ = kernel_layout(x, weight, bias_enc, None)
    plan = plan_for(x, weight, get_activation(activation), IDENTITY, True, needs[0], not save_latent)
    assert plan.backward is not None
    grads = BACKENDS[plan.backward.backend].backward(
        grad_z, x, weight, bias_enc, latent if save_latent else None, plan, (needs[0], needs[1], needs[2])
    )
    grad_x, grad_weight, grad_bias = (x.new_empty(0) if grad is None else grad for grad in grads)
    return grad_x, grad_weight, grad_bias


_library.impl("forward", _op_forward, "CompositeExplicitAutograd")
_library.impl("backward", _op_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("tiedfused::forward", lib=_library)
def _fake_forward(x, weight, bias_enc, bias_dec, activation, save_latent):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape[0] * weight.shape[0] if save_latent else 0)


@torch.library.register_fake("tiedfused::backward", lib=_library)
def _fake_backward(grad_z, x, weight, bias_enc, latent, activation, save_latent, needs):  # type: ignore[no-untyped-def]
    shapes = (x.shape, weight.shape, (weight.shape[0],))
    return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


def _op_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias_enc, _, ctx.activation, ctx.save_latent = inputs
    latent = output[1]
    ctx.mark_non_differentiable(latent)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias_enc, latent)


def _op_autograd(ctx: Any, grad_z: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_z is None:
        return (None,) * 6
    x, weight, bias_enc, latent = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads: tuple[Tensor, ...]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        grads = _differentiable_backward(grad_z, x, weight, bias_enc, get_activation(ctx.activation))
    else:
        grads = torch.ops.tiedfused.backward.default(
            grad_z, x, weight, bias_enc, latent, ctx.activation, ctx.save_latent, list(needs[:3])
        )
    grad_bias_dec = grad_z.sum(0) if needs[3] else None
    return *(grad if need else None for grad, need in zip(grads, needs, strict=False)), grad_bias_dec, None, None


torch.library.register_autograd("tiedfused::forward", _op_autograd, setup_context=_op_setup_context, lib=_library)


def _op_no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "tiedfused::backward is not differentiable; differentiate tied_encode_decode with create_graph=True"
    )


torch.library.register_autograd(
    "tiedfused::backward", _op_no_double_backward, setup_context=lambda ctx, inputs, output: None, lib=_library
)


@register_flop_formula(torch.ops.tiedfused.forward)
def _forward_flops(x, weight, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """4NdH: two products."""
    return 4 * x[0] * x[1] * weight[0]


@register_flop_formula(torch.ops.tiedfused.backward)
def _backward_flops(grad_z, x, weight, bias_enc, latent, activation, save_latent, needs, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """h̄, the two terms of W̄, and x̄, 2NdH each where asked for: theoretical, without what is recomputed."""
    need_x, need_weight, _ = needs
    return (2 + 4 * need_weight + 2 * need_x) * x[0] * x[1] * weight[0]
