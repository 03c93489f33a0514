"""The definition in plain PyTorch: what every backend is compared with, and the one home of each formula.

    a = x Wᵀ + b_enc      pre-activation  [N, H]
    h = f(a)              latent          [N, H]
    z = h W + b_dec       pre-output      [N, d]
    y = g(z)              reconstruction  [N, d]

    ō = ȳ ⊙ g′(z)         h̄ = ō Wᵀ        ā = h̄ ⊙ f′(a)
    x̄ = ā W               W̄ = āᵀ x + hᵀ ō
    b̄_enc = Σₙ ā          b̄_dec = Σₙ ō

W is used twice, so its gradient has two terms: āᵀx from the encoder, hᵀō from the decoder. Everything here is
differentiable, any number of times, and works under torch.func; it stores the latent like any PyTorch expression.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tiedfused.activations import Activation, get_activation


def pre_activation(x: Tensor, weight: Tensor, bias_enc: Tensor | None = None) -> Tensor:
    """a = x Wᵀ + b_enc. x ``[..., d]``, weight ``[H, d]``, bias_enc ``[H]`` → ``[..., H]``."""
    return F.linear(x, weight, bias_enc)


def pre_output(h: Tensor, weight: Tensor, bias_dec: Tensor | None = None) -> Tensor:
    """z = h W + b_dec. h ``[..., H]``, weight ``[H, d]``, bias_dec ``[d]`` → ``[..., d]``."""
    return F.linear(h, weight.mT, bias_dec)


def encode(x: Tensor, weight: Tensor, bias_enc: Tensor | None = None, *, activation: str = "relu") -> Tensor:
    """The latent h = f(x Wᵀ + b_enc). x ``[..., d]``, weight ``[H, d]``, bias_enc ``[H]`` → ``[..., H]``."""
    return get_activation(activation).forward(pre_activation(x, weight, bias_enc))


def decode(h: Tensor, weight: Tensor, bias_dec: Tensor | None = None, *, output_activation: str = "identity") -> Tensor:
    """The reconstruction y = g(h W + b_dec). h ``[..., H]``, weight ``[H, d]``, bias_dec ``[d]`` → ``[..., d]``."""
    return get_activation(output_activation, "output_activation").forward(pre_output(h, weight, bias_dec))


def tied_encode_decode(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None = None,
    bias_dec: Tensor | None = None,
    *,
    activation: str = "relu",
    output_activation: str = "identity",
) -> Tensor:
    """y = g(f(x Wᵀ + b_enc) W + b_dec), unfused.

    Args:
        x: ``[..., d]``.
        weight: ``[H, d]``.
        bias_enc: ``[H]`` or None.
        bias_dec: ``[d]`` or None.
        activation: f, a name of `tiedfused.activation_names`.
        output_activation: g, likewise.

    Returns:
        ``[..., d]``.
    """
    h = encode(x, weight, bias_enc, activation=activation)
    return decode(h, weight, bias_dec, output_activation=output_activation)


def gradients(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None = None,
    bias_dec: Tensor | None = None,
    *,
    activation: str = "relu",
    output_activation: str = "identity",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The closed-form gradients of Σ grad_y ⊙ y.

    Args:
        grad_y: ȳ, ``[N, d]``.
        x: ``[N, d]``.
        weight: ``[H, d]``.
        bias_enc: ``[H]`` or None.
        bias_dec: ``[d]`` or None.
        activation: f, a name of `tiedfused.activation_names`.
        output_activation: g, likewise.

    Returns:
        x̄ ``[N, d]``, W̄ ``[H, d]``, b̄_enc ``[H]``, b̄_dec ``[d]``; of a bias that is None, what it would be.
    """
    f, g = get_activation(activation), get_activation(output_activation, "output_activation")
    a = pre_activation(x, weight, bias_enc)
    z = pre_output(f.forward(a), weight, bias_dec)
    grad_z = g.backward(grad_y, g.forward(z) if g.from_output else z)
    grad_x, grad_weight, grad_bias_enc = latent_gradients(grad_z, x, weight, a, f)
    return grad_x, grad_weight, grad_bias_enc, grad_z.sum(0)


def latent_gradients(
    grad_z: Tensor, x: Tensor, weight: Tensor, a: Tensor, f: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """x̄, W̄ and b̄_enc from ō = ``grad_z`` ``[N, d]`` and the pre-activation ``a`` ``[N, H]``."""
    h = f.forward(a)
    grad_a = f.backward(pre_activation(grad_z, weight), h if f.from_output else a)
    return grad_a @ weight, grad_a.mT @ x + h.mT @ grad_z, grad_a.sum(0)
