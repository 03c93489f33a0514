"""The one door into the op: argument checks, autocast, and which path serves a call."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.autograd.forward_ad as forward_ad
from torch import (
    Tensor,
    are_deterministic_algorithms_enabled,
    get_num_threads,
    is_autocast_enabled,
    is_grad_enabled,
    strided,
)
from torch.amp import is_autocast_available
from torch.compiler import is_compiling

from tiedfused import reference, settings
from tiedfused._backends import BACKENDS
from tiedfused.activations import Activation, get_activation
from tiedfused.devices import fp32_precision
from tiedfused.op import (
    apply_encode_decode,
    apply_encode_decode_stats,
    forward_with_stats,
    kernel_layout,
    plan_for,
)
from tiedfused.planning import DTYPES, Plan, fused_output
from tiedfused.reference import LatentStats

_functorch_active = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_any_autocast = torch._C._is_any_autocast_enabled
_tracing = torch._C._is_tracing

SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)

_PLAIN = (Tensor, torch.nn.Parameter)
_PLAIN_OR_NONE = (*_PLAIN, type(None))
_PLANS_KEPT = 4096
_plans: dict[Any, Plan] = {}


@overload
def tied_encode_decode(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None = ...,
    bias_dec: Tensor | None = ...,
    *,
    activation: str = ...,
    output_activation: str = ...,
    recompute: bool | None = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def tied_encode_decode(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None = ...,
    bias_dec: Tensor | None = ...,
    *,
    activation: str = ...,
    output_activation: str = ...,
    recompute: bool | None = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, LatentStats]: ...


def tied_encode_decode(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None = None,
    bias_dec: Tensor | None = None,
    *,
    activation: str = "relu",
    output_activation: str = "identity",
    recompute: bool | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LatentStats]:
    """y = g(f(x Wᵀ + b_enc) W + b_dec), without storing the latent.

    Args:
        x: ``[..., d]``, any strides, or sparse ``[N, d]``; bfloat16, float16, float32 or float64.
        weight: ``[H, d]``, same dtype and device as x (any under autocast).
        bias_enc: ``[H]`` or None.
        bias_dec: ``[d]`` or None.
        activation: f, a name of `tiedfused.activation_names`.
        output_activation: g, likewise.
        recompute: True never stores anything of size N·H (low-memory mode: backward recomputes the latent), False keeps
            the latent for backward, None lets the plan choose the faster within ``TIEDFUSED_WORKSPACE_MIB``.
        return_stats: True also returns the latent's statistics, for a sparsity penalty (`tiedfused.losses`) and its
            metrics (`tiedfused.metrics`), computed tile by tile while h is at hand. y is the same to the
            last bit where the same regime serves both.

    Returns:
        y ``[..., d]``, in x's dtype (under autocast, autocast's); with `return_stats`, y and a `LatentStats` of
        l1 ``[...]``, l0 ``[...]``, mean ``[H]`` and fired ``[H]``, of which l1 and mean are differentiable.

    Saved for backward are x, weight, bias_enc, what g's own gradient reads, and the latent if it is kept. Gradients are
    computed for those inputs that need one. The Triton kernels add both terms of W̄ in one fp32 accumulator; tiles of
    PyTorch round each product to x's dtype, as PyTorch's own do, and add them up in fp32 at least. See
    `tiedfused.reference` for the formulas and `tiedfused.plan` for what serves a given problem.

    Raises:
        TypeError: an argument is not a floating-point tensor, another than x is sparse, dtypes differ, an activation is
            not a name.
        ValueError: shapes or devices do not go together, d or H is 0, an activation is unknown.

    Example:
        >>> import torch
        >>> from tiedfused.functional import tied_encode_decode
        >>> x, weight = torch.randn(32, 64), torch.randn(256, 64) / 8
        >>> tied_encode_decode(x, weight, activation="relu").shape
        torch.Size([32, 64])

        With a penalty on the latent's L1 norm, which is not stored for it:

        >>> y, stats = tied_encode_decode(x, weight.requires_grad_(), return_stats=True)
        >>> loss = (y - x).square().mean() + 1e-3 * stats.l1.mean()
        >>> loss.backward()
        >>> stats.l1.shape, stats.fired.shape
        (torch.Size([32]), torch.Size([256]))
    """
    if (
        type(x) not in _PLAIN
        or type(weight) not in _PLAIN
        or type(bias_enc) not in _PLAIN_OR_NONE
        or type(bias_dec) not in _PLAIN_OR_NONE
        or _functorch_active()
        or forward_ad._current_level >= 0
        or is_compiling()
        or _modes()
        or x.is_meta
        or x.is_neg()
        or weight.is_neg()
        or weight.layout is not strided
        or (bias_enc is not None and (bias_enc.is_neg() or bias_enc.layout is not strided))
        or (bias_dec is not None and (bias_dec.is_neg() or bias_dec.layout is not strided))
        or _any_autocast()
        or _tracing()
        or x.layout is not strided
    ):
        return _dispatched(x, weight, bias_enc, bias_dec, activation, output_activation, recompute, return_stats)

    grad_x = x.requires_grad
    grad = is_grad_enabled() and (
        grad_x
        or weight.requires_grad
        or (bias_enc is not None and bias_enc.requires_grad)
        or (bias_dec is not None and bias_dec.requires_grad)
    )
    # One look-up stands for every check and choice below: they depend on nothing else, and cost as much as a small
    # problem's arithmetic.
    key = (
        x.shape,
        x.dtype,
        x.device,
        weight.shape,
        weight.dtype,
        weight.device,
        None if bias_enc is None else (bias_enc.shape, bias_enc.dtype, bias_enc.device),
        None if bias_dec is None else (bias_dec.shape, bias_dec.dtype, bias_dec.device),
        activation,
        output_activation,
        recompute,
        return_stats,
        grad,
        grad_x,
        fp32_precision("cuda") if x.is_cuda else None,
        get_num_threads(),
        are_deterministic_algorithms_enabled(),
        settings.number,
    )
    try:
        plan = _plans.get(key)
    except TypeError:  # an unhashable activation: the checks say so
        plan = None
    if plan is None:
        f, g = check_arguments(x, weight, bias_enc, bias_dec, activation, output_activation, recompute, return_stats)
        plan = plan_for(x, weight, f, fused_output(g, grad), grad, grad_x, recompute, return_stats)
        if settings.number_of(plan.request.in_force) == key[-1]:  # else another thread has changed them since
            if len(_plans) >= _PLANS_KEPT:
                _plans.clear()
            _plans[key] = plan

    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if not (
        rows.is_contiguous()
        and weight.is_contiguous()
        and (bias_enc is None or bias_enc.is_contiguous())
        and (bias_dec is None or bias_dec.is_contiguous())
    ):
        rows, weight, bias_enc, bias_dec = kernel_layout(rows, weight, bias_enc, bias_dec)
    stats = None
    if return_stats:
        if grad:
            y, *latent_stats = apply_encode_decode_stats(rows, weight, bias_enc, bias_dec, plan)
            stats = LatentStats(*latent_stats)
        else:
            y, _, stats = forward_with_stats(rows, weight, bias_enc, bias_dec, plan)
    elif grad:
        y = apply_encode_decode(rows, weight, bias_enc, bias_dec, plan)
    else:
        y = BACKENDS[plan.forward.backend].forward(rows, weight, bias_enc, bias_dec, plan)[0]
    if plan.output_activation.name != output_activation:
        y = get_activation(output_activation).forward(y)
    if x.dim() != 2:
        y = y.view(x.shape)
    return y if stats is None else (y, _shaped(stats, x))


def _shaped(stats: LatentStats, x: Tensor) -> LatentStats:
    """The statistics of x's rows, in the leading shape of x."""
    return stats._replace(l1=stats.l1.view(x.shape[:-1]), l0=stats.l0.view(x.shape[:-1]))


def _dispatched(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    bias_dec: Tensor | None,
    activation: str,
    output_activation: str,
    recompute: bool | None,
    return_stats: bool,
) -> Tensor | tuple[Tensor, LatentStats]:
    """The same where something else has a hand in it: autocast, torch.func, tracing, modes, subclasses, sparse x.

    A DTensor goes to the plain definition, whose every product is sharded as its operands are.
    """
    if isinstance(x, Tensor) and is_autocast_available(x.device.type) and is_autocast_enabled(x.device.type):
        cast: list[Any] = [_autocast(t) for t in (x, weight, bias_enc, bias_dec)]
        with torch.autocast(x.device.type, enabled=False):
            return tied_encode_decode(  # type: ignore[call-overload]
                *cast,
                activation=activation,
                output_activation=output_activation,
                recompute=recompute,
                return_stats=return_stats,
            )
    f, g = check_arguments(x, weight, bias_enc, bias_dec, activation, output_activation, recompute, return_stats)
    operands = (x, weight, bias_enc, bias_dec)
    if (
        _functorch_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or x.layout is not strided
        or any(type(t).__name__ == "DTensor" for t in operands)  # by name: the module takes a second to import
    ):
        options: dict[str, Any] = {"activation": activation, "output_activation": output_activation}
        return reference.tied_encode_decode(x, weight, bias_enc, bias_dec, **options, return_stats=return_stats)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    grad = is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    save_latent = False
    if grad:
        from tiedfused.tracing import keeps_latent_for  # here: it imports torch._dynamo

        save_latent = keeps_latent_for(rows, weight, f, recompute, return_stats)
    op = torch.ops.tiedfused.forward_stats if return_stats else torch.ops.tiedfused.forward
    z, _, *latent_stats = op.default(rows, weight, bias_enc, bias_dec, f.name, save_latent)
    y = g.forward(z) if rows is x else g.forward(z).view(x.shape)
    return (y, _shaped(LatentStats(*latent_stats), x)) if return_stats else y


def _autocast(t: Tensor | None) -> Tensor | None:
    """Cast as autocast casts an argument of `torch.nn.functional.linear`: floating-point, but not float64."""
    if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64:
        return t.to(torch.get_autocast_dtype(t.device.type))
    return t


def check_arguments(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    bias_dec: Tensor | None,
    activation: str,
    output_activation: str,
    recompute: bool | None,
    return_stats: bool,
) -> tuple[Activation, Activation]:
    """f and g, or one clear error for arguments that do not make sense together."""
    for name, t in (("x", x), ("weight", weight), ("bias_enc", bias_enc), ("bias_dec", bias_dec)):
        if t is None and name.startswith("bias"):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if t.dtype not in DTYPES:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{name}: expected a floating-point tensor ({expected}), got {_name(t.dtype)}")
        if name != "x" and t.layout is not strided:
            raise TypeError(f"{name}: expected a dense tensor, got {_name(t.layout)}; {name}.to_dense() is one")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected shape [H, d], both at least 1, got {_shape(weight)}")
    h, d = weight.shape
    if x.dim() == 0 or x.shape[-1] != d:
        raise ValueError(f"x: expected shape [..., {d}], as weight is [{h}, {d}], got {_shape(x)}")
    if x.layout in SPARSE and (x.dim() > 2 or x.dense_dim()):
        raise ValueError(
            f"x: expected shape [N, {d}] with 2 sparse dimensions where it is sparse, got {_shape(x)} with "
            f"{x.sparse_dim()}; x.to_dense() may have any shape"
        )
    for name, bias, size in (("bias_enc", bias_enc, h), ("bias_dec", bias_dec, d)):
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{name}: expected shape [{size}], as weight is [{h}, {d}], got {_shape(bias)}")
    for name, t in (("weight", weight), ("bias_enc", bias_enc), ("bias_dec", bias_dec)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name}: expected {_name(x.dtype)}, as x, got {_name(t.dtype)}")
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: expected on {x.device}, as x, got {t.device}")
    if recompute is not None and not isinstance(recompute, bool):
        raise TypeError(f"recompute: expected None, True or False, got {recompute!r}")
    if not isinstance(return_stats, bool):
        raise TypeError(f"return_stats: expected True or False, got {return_stats!r}")
    return get_activation(activation), get_activation(output_activation, "output_activation")


def _name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(t: Tensor) -> str:
    return str(list(t.shape))
