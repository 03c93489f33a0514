"""The definition in plain PyTorch: what every backend is compared with, and the one home of each formula.

    a = x Wᵀ + b_enc      pre-activation  [N, H]
    h = f(a)              latent          [N, H]
    z = h W + b_dec       pre-output      [N, d]
    y = g(z)              reconstruction  [N, d]

    ō = ȳ ⊙ g′(z)         h̄ = ō Wᵀ        ā = h̄ ⊙ f′(a)
    x̄ = ā W               W̄ = āᵀ x + hᵀ ō
    b̄_enc = Σₙ ā          b̄_dec = Σₙ ō

W is used twice, so its gradient has two terms: āᵀx from the encoder, hᵀō from the decoder. A loss may also read the
latent's statistics, L1ₙ = Σⱼ |hₙⱼ| and mⱼ = Σₙ hₙⱼ / N; their gradients enter as a per-row and a per-latent term:

    h̄ₙⱼ = (ō Wᵀ)ₙⱼ + L̄1ₙ · sign(hₙⱼ) + m̄ⱼ / N

Everything here is differentiable, any number of times, and works under torch.func; it stores the latent like any
PyTorch expression.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiedfused.activations import Activation, get_activation


class LatentStats(NamedTuple):
    """What a sparsity penalty and its metrics read of the latent h, without h. N is all rows of x, ``[..., d]``.

    Args:
        l1: Σⱼ |hₙⱼ|, ``[...]``, float32 (float64 for a float64 x), differentiable.
        l0: how many latents of a row are active, hₙⱼ ≠ 0 in x's dtype, ``[...]``, int64. A NaN counts as active.
        mean: Σₙ hₙⱼ / N, ``[H]``, dtype as l1, differentiable; NaN where there are no rows, as of `torch.mean`.
        fired: on how many rows a latent is active, ``[H]``, int64.

    Example:
        >>> import torch, tiedfused
        >>> layer = tiedfused.TiedLinear(8, 32, activation="relu")
        >>> y, stats = layer(torch.randn(5, 8), return_stats=True)
        >>> [(name, tuple(t.shape)) for name, t in stats._asdict().items()]
        [('l1', (5,)), ('l0', (5,)), ('mean', (32,)), ('fired', (32,))]
    """

    l1: Tensor
    l0: Tensor
    mean: Tensor
    fired: Tensor


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over the latent are kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def latent_stats(h: Tensor) -> LatentStats:
    """The statistics of a latent ``[..., H]``."""
    rows, active, wide = h.reshape(-1, h.shape[-1]), h != 0, stats_dtype(h.dtype)
    return LatentStats(
        l1=h.abs().sum(-1, dtype=wide),
        l0=active.sum(-1),
        mean=rows.mean(0, dtype=wide),
        fired=active.reshape(rows.shape).sum(0),
    )


def zero_stats(x: Tensor, weight: Tensor) -> LatentStats:
    """The statistics of x ``[N, d]`` with weight ``[H, d]``, before anything is added to them."""
    n, h, wide = x.shape[0], weight.shape[0], stats_dtype(x.dtype)
    return LatentStats(
        l1=x.new_zeros(n, dtype=wide),
        l0=x.new_zeros(n, dtype=torch.int64),
        mean=x.new_zeros(h, dtype=wide),
        fired=x.new_zeros(h, dtype=torch.int64),
    )


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
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LatentStats]:
    """y = g(f(x Wᵀ + b_enc) W + b_dec), unfused.

    Args:
        x: ``[..., d]``.
        weight: ``[H, d]``.
        bias_enc: ``[H]`` or None.
        bias_dec: ``[d]`` or None.
        activation: f, a name of `tiedfused.activation_names`.
        output_activation: g, likewise.
        return_stats: whether to return the latent's statistics too.

    Returns:
        y ``[..., d]``; with `return_stats`, y and its `LatentStats`.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(5, 8), torch.randn(32, 8)
        >>> torch.equal(tied_encode_decode(x, weight), (x @ weight.T).relu() @ weight)
        True
    """
    h = encode(x, weight, bias_enc, activation=activation)
    y = decode(h, weight, bias_dec, output_activation=output_activation)
    return (y, latent_stats(h)) if return_stats else y


def gradients(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None = None,
    bias_dec: Tensor | None = None,
    *,
    activation: str = "relu",
    output_activation: str = "identity",
    grad_l1: Tensor | None = None,
    grad_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The closed-form gradients of Σ grad_y ⊙ y + Σ grad_l1 ⊙ l1 + Σ grad_mean ⊙ mean.

    Args:
        grad_y: ȳ, ``[N, d]``.
        x: ``[N, d]``.
        weight: ``[H, d]``.
        bias_enc: ``[H]`` or None.
        bias_dec: ``[d]`` or None.
        activation: f, a name of `tiedfused.activation_names`.
        output_activation: g, likewise.
        grad_l1: L̄1, ``[N]``, or None.
        grad_mean: m̄, ``[H]``, or None.

    Returns:
        x̄ ``[N, d]``, W̄ ``[H, d]``, b̄_enc ``[H]``, b̄_dec ``[d]``; of a bias that is None, what it would be.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(5, 8), torch.randn(32, 8, requires_grad=True)
        >>> y = tied_encode_decode(x, weight)
        >>> y.backward(torch.ones_like(y))
        >>> torch.allclose(gradients(torch.ones_like(y), x, weight)[1], weight.grad, atol=1e-4)
        True
    """
    f, g = get_activation(activation), get_activation(output_activation, "output_activation")
    a = pre_activation(x, weight, bias_enc)
    z = pre_output(f.forward(a), weight, bias_dec)
    grad_z = g.backward(grad_y, g.forward(z) if g.from_output else z)
    grad_x, grad_weight, grad_bias_enc = latent_gradients(grad_z, x, weight, a, f, grad_l1, grad_mean)
    return grad_x, grad_weight, grad_bias_enc, grad_z.sum(0)


def latent_gradients(
    grad_z: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    f: Activation,
    grad_l1: Tensor | None = None,
    grad_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x̄, W̄ and b̄_enc from ō = ``grad_z`` ``[N, d]``, the pre-activation ``a`` ``[N, H]``, L̄1 ``[N]`` and m̄ ``[H]``."""
    h = f.forward(a)
    grad_h = pre_activation(grad_z, weight)
    if grad_l1 is not None:
        grad_h = grad_h + (h.sgn() * grad_l1[:, None]).to(h.dtype)
    if grad_mean is not None:
        grad_h = grad_h + (grad_mean / a.shape[0]).to(h.dtype)
    grad_a = f.backward(grad_h, h if f.from_output else a)
    return grad_a @ weight, grad_a.mT @ x + h.mT @ grad_z, grad_a.sum(0)
