"""The activations f (latent) and g (output): one table, one home for each.

An entry is a PyTorch function, its gradient, and optionally the pair of Triton functions that computes the same
inside the kernels. To add one, add an entry here (or call `register_activation` from your own code): nothing else
in the package names an activation.

Every gradient is a product, ``grad ⊙ f′``, and reads one saved tensor: f's output where f′ can be had from it
without loss (relu, leaky_relu, sigmoid, tanh), else f's input. elu, selu and softplus could be inverted as well, but
``y + 1`` near −1 and ``1 − e^{−y}`` near 0 cancel in bf16, so they read the input, as eager PyTorch does.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    _jit: Any = triton.jit
except ImportError:  # macOS, Windows: the table keeps its PyTorch half
    HAS_TRITON = False

    def _jit(fn: Any) -> None:
        return None


aten = torch.ops.aten

ELU_ALPHA = 1.0
LEAKY_SLOPE = 0.01
SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946


@dataclasses.dataclass(frozen=True, eq=False)
class Activation:
    """One activation.

    Args:
        name: what users pass as ``activation=`` or ``output_activation=``.
        forward: f, elementwise, differentiable PyTorch; same shape and dtype out as in.
        backward: ``(grad, saved) -> grad ⊙ f′``, differentiable PyTorch, so that double backward works. ``saved`` is
            f's output if `from_output`, else f's input.
        from_output: which tensor `backward` reads.
        triton: ``(f, f′)`` as ``@triton.jit`` functions ``f(a) -> h`` and ``f′(a, h) -> derivative`` on fp32 tiles, or
            None: then the Triton kernels cannot serve this activation and the tiled PyTorch backend does. With
            `from_output`, f′ may be given h in the place of a, where only h was kept.
        onednn: the name and scalars of the same function as a oneDNN epilogue, or None.
        in_place: the same function, overwriting its argument, or None.
        non_negative: whether f(a) ≥ 0 for every a.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    from_output: bool
    triton: tuple[Any, Any] | None = None
    onednn: tuple[str, tuple[float, ...], str] | None = None
    in_place: Callable[[Tensor], Tensor] | None = None
    non_negative: bool = False


# ---- the Triton pairs: f(a) and f′(a, h), fp32 in and out; polynomials are minimax, to a relative error of 1.3e-7


@_jit
def _identity(a):
    return a


@_jit
def _identity_d(a, h):
    return tl.full(a.shape, 1.0, tl.float32)


@_jit
def _relu(a):
    # a NaN pre-activation stays a NaN, as in PyTorch; one instruction, and none where h is then rounded to 16 bits
    return tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)


@_jit
def _relu_d(a, h):
    # a NaN passes the gradient on, as `threshold_backward` does
    return tl.where(a <= 0.0, 0.0, 1.0)


@_jit
def _leaky_relu(a):
    return tl.where(a > 0.0, a, 0.01 * a)


@_jit
def _leaky_relu_d(a, h):
    return tl.where(a > 0.0, 1.0, 0.01)


@_jit
def _expm1(a):
    # of a ≤ 0; near 0 exp(a) − 1 cancels
    near = a * (1.0 + a * (0.49999463 + a * (0.1665636 + a * (0.04104247 + a * 0.0068076))))
    return tl.where(a > -0.5, near, tl.exp(a) - 1.0)


@_jit
def _log1p(u):
    # of 0 ≤ u ≤ 1, as 2 atanh(u / (2 + u)): 1 + u would round a small u away
    s = u / (2.0 + u)
    z = s * s
    return s * (2.0 + z * (0.66666416 + z * (0.40021528 + z * (0.28001796 + z * 0.28012036))))


@_jit
def _elu(a):
    return tl.where(a > 0.0, a, _expm1(a))


@_jit
def _elu_d(a, h):
    return tl.where(a > 0.0, 1.0, tl.exp(a))


@_jit
def _selu(a):
    return 1.0507009873554805 * tl.where(a > 0.0, a, 1.6732632423543772 * _expm1(a))


@_jit
def _selu_d(a, h):
    return 1.0507009873554805 * tl.where(a > 0.0, 1.0, 1.6732632423543772 * tl.exp(a))


@_jit
def _sigmoid(a):
    return 1.0 / (1.0 + tl.exp(-a))


@_jit
def _sigmoid_d(a, h):
    return h * (1.0 - h)


@_jit
def _tanh(a):
    z = a * a
    near = a * (1.0 + z * (-0.33332947 + z * (0.13320725 + z * (-0.0526718 + z * 0.01643755))))
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(a)))  # cancels near 0
    return tl.where(z < 0.3, near, tl.where(a < 0.0, -far, far))


@_jit
def _tanh_d(a, h):
    return 1.0 - h * h


@_jit
def _normal(a):
    # Φ(a), and the density times √(2π), from one exponential; the tail is exp(−a²/2) times a function of t
    density = tl.exp(-0.5 * a * a)
    t = 1.0 / (1.0 + 0.3 * tl.abs(a))
    high = 0.12946883 + t * (-0.05539317 + t * (0.20820589 + t * (-0.1582756 + t * 0.03593164)))
    tail = density * t * (0.11962639 + t * (0.12079834 + t * (0.09963761 + t * high)))
    return tl.where(a < 0.0, tail, 1.0 - tail), density


@_jit
def _gelu(a):
    return a * _normal(a)[0]


@_jit
def _gelu_d(a, h):
    cdf, density = _normal(a)
    return cdf + 0.3989422804014327 * a * density


@_jit
def _gelu_gate(a):
    # (1 + tanh u) / 2 is sigmoid(2u), without the sum that cancels
    return _sigmoid(a * (1.5957691216057308 + 0.07135481282553504 * a * a))


@_jit
def _gelu_tanh(a):
    return a * _gelu_gate(a)


@_jit
def _gelu_tanh_d(a, h):
    s = _gelu_gate(a)
    return s * (1.0 + a * (1.0 - s) * (1.5957691216057308 + 0.21406443847660513 * a * a))


@_jit
def _silu(a):
    return a * _sigmoid(a)


@_jit
def _silu_d(a, h):
    s = _sigmoid(a)
    return s * (1.0 + a * (1.0 - s))


@_jit
def _softplus(a):
    # above 20, where PyTorch returns its input, the second term is less than half a unit in the last place
    return tl.where(a < 0.0, 0.0, a) + _log1p(tl.exp(-tl.abs(a)))


@_jit
def _softplus_d(a, h):
    return _sigmoid(a)


def _silu_backward(grad: Tensor, a: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return aten.silu_backward(grad, a)
    s = torch.sigmoid(a)  # the one ATen gradient here that has no derivative of its own
    return grad * (s * (1 + a * (1 - s)))


# ---- the table ---------------------------------------------------------------------------------------------------

IDENTITY = Activation(
    "identity",
    forward=lambda a: a,
    backward=lambda grad, y: grad,
    from_output=True,
    triton=(_identity, _identity_d),
    onednn=("none", (), ""),
)

_TABLE: dict[str, Activation] = {
    a.name: a
    for a in (
        IDENTITY,
        Activation(
            "relu",
            forward=torch.relu,
            backward=lambda grad, y: aten.threshold_backward(grad, y, 0),
            from_output=True,
            triton=(_relu, _relu_d),
            in_place=torch.relu_,  # and no oneDNN epilogue: its relu turns a NaN into 0
            non_negative=True,
        ),
        Activation(
            "leaky_relu",
            forward=lambda a: F.leaky_relu(a, LEAKY_SLOPE),
            backward=lambda grad, y: aten.leaky_relu_backward(grad, y, LEAKY_SLOPE, True),
            from_output=True,
            triton=(_leaky_relu, _leaky_relu_d),
            onednn=("leaky_relu", (LEAKY_SLOPE,), ""),
        ),
        Activation(
            "elu",
            forward=lambda a: F.elu(a, ELU_ALPHA),
            backward=lambda grad, a: aten.elu_backward(grad, ELU_ALPHA, 1, 1, False, a),
            from_output=False,
            triton=(_elu, _elu_d),
        ),
        Activation(
            "selu",
            forward=F.selu,
            backward=lambda grad, a: aten.elu_backward(grad, SELU_ALPHA, SELU_SCALE, 1, False, a),
            from_output=False,
            triton=(_selu, _selu_d),
        ),
        Activation(
            "gelu",
            forward=F.gelu,
            backward=lambda grad, a: aten.gelu_backward(grad, a),
            from_output=False,
            triton=(_gelu, _gelu_d),
        ),
        Activation(
            "gelu_tanh",
            forward=lambda a: F.gelu(a, approximate="tanh"),
            backward=lambda grad, a: aten.gelu_backward(grad, a, approximate="tanh"),
            from_output=False,
            triton=(_gelu_tanh, _gelu_tanh_d),
        ),
        Activation(
            "silu",
            forward=F.silu,
            backward=_silu_backward,
            from_output=False,
            triton=(_silu, _silu_d),
        ),
        Activation(
            "softplus",
            forward=F.softplus,
            backward=lambda grad, a: aten.softplus_backward(grad, a, 1, 20),
            from_output=False,
            triton=(_softplus, _softplus_d),
            non_negative=True,
        ),
        Activation(
            "sigmoid",
            forward=torch.sigmoid,
            backward=lambda grad, y: aten.sigmoid_backward(grad, y),
            from_output=True,
            triton=(_sigmoid, _sigmoid_d),
            onednn=("sigmoid", (), ""),
            non_negative=True,
        ),
        Activation(
            "tanh",
            forward=torch.tanh,
            backward=lambda grad, y: aten.tanh_backward(grad, y),
            from_output=True,
            triton=(_tanh, _tanh_d),
            onednn=("tanh", (), ""),
        ),
    )
}


def activation_names() -> tuple[str, ...]:
    """The names that ``activation=`` and ``output_activation=`` accept, in table order.

    Example:
        >>> activation_names()[:3]
        ('identity', 'relu', 'leaky_relu')
    """
    return tuple(_TABLE)


def get_activation(activation: str, argument: str = "activation") -> Activation:
    """The table's entry of that name.

    Args:
        activation: a name in `activation_names`.
        argument: how the caller's argument is called, for the message.

    Raises:
        ValueError: no such name; the message lists those there are.
        TypeError: not a string.
    """
    if not isinstance(activation, str):
        raise TypeError(f"{argument}: expected the name of an activation, got {type(activation).__name__}")
    if activation not in _TABLE:
        raise ValueError(f"{argument}: unknown activation {activation!r}; expected one of {', '.join(_TABLE)}")
    return _TABLE[activation]


def register_activation(
    name: str,
    forward: Callable[[Tensor], Tensor],
    derivative: Callable[[Tensor], Tensor],
    *,
    from_output: bool = False,
    triton: tuple[Any, Any] | None = None,
    non_negative: bool = False,
) -> Activation:
    """Add an activation of your own to the table.

    Args:
        name: a new name; it is then accepted wherever a built-in name is.
        forward: f, elementwise differentiable PyTorch, not in place.
        derivative: f′ as differentiable PyTorch, a function of f's input, or of f's output if `from_output`. It serves
            where the activation is f; where it is g, and under torch.func, autograd differentiates `forward`, so the
            two have to agree.
        from_output: what `derivative` reads. From the output is cheaper: an encode-decode that keeps its latent then
            saves that latent and nothing else.
        triton: optionally ``(f, f′)`` as ``@triton.jit`` functions ``f(a) -> h`` and ``f′(a, h) -> derivative`` over
            fp32 tiles; with `from_output`, f′ may be given h in the place of a. Without the pair the Triton kernels do
            not serve the activation and the tiled PyTorch backend does.
        non_negative: whether f(a) ≥ 0 for every a; `tiedfused.losses.weighted_l1` asks for that.

    Returns:
        The new entry.

    Raises:
        ValueError: the name is taken, or one of the functions is not elementwise or works in place.
        TypeError: `name` is not a string, `forward` or `derivative` is not callable.

    Example:
        >>> import tiedfused
        >>> _ = tiedfused.register_activation("squared_relu", lambda a: a.relu() ** 2, lambda a: 2 * a.relu())
        >>> "squared_relu" in tiedfused.activation_names()
        True
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")
    if name in _TABLE:
        raise ValueError(f"name: activation {name!r} is already registered; choose another name")
    for argument, value in (("forward", forward), ("derivative", derivative)):
        if not callable(value):
            raise TypeError(f"{argument}: expected a function of a tensor, got {type(value).__name__}")
    _try_out(forward, derivative, from_output)
    entry = Activation(
        name,
        forward,
        lambda grad, saved: (grad * derivative(saved)).to(grad.dtype),  # it may be a mask made with .float()
        from_output,
        triton,
        non_negative=non_negative,
    )
    _TABLE[name] = entry
    return entry


def _try_out(forward: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor], from_output: bool) -> None:
    """A ValueError for what would give wrong results later, or an error that does not say whose fault it is."""
    with torch.inference_mode(False), contextlib.suppress(RuntimeError):  # not every function takes a tensor on the CPU
        saved = torch.linspace(-2.0, 2.0, 6, dtype=torch.float32, device="cpu").view(2, 3)
        for argument, function in (("forward", forward), ("derivative", derivative)):
            version = saved._version
            out = function(saved)
            if saved._version != version:
                raise ValueError(f"{argument}: expected a new tensor, got one made by changing the argument in place")
            shape = list(getattr(out, "shape", ()))
            if shape != [2, 3] and (argument == "forward" or shape not in ([], [1])):
                raise ValueError(f"{argument}: expected an elementwise function, got shape {shape} for shape [2, 3]")
            saved = out if from_output else saved
