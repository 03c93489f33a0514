"""Losses of sparse and tied autoencoders, from y, the latent's statistics and the weight: none reads the latent.

Every function returns a differentiable scalar, computed in float32 at least. Penalties are means over rows, so that
their coefficient does not depend on the size of a batch:

>>> import torch, tiedfused
>>> layer = tiedfused.TiedLinear(64, 512, bias=True, activation="relu")
>>> x = torch.randn(32, 64)
>>> y, stats = layer(x, return_stats=True)
>>> (mse(y, x) + 1e-3 * l1(stats)).backward()
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import is_autocast_available

from tiedfused.activations import get_activation
from tiedfused.reference import LatentStats, stats_dtype


def mse(y: Tensor, target: Tensor) -> Tensor:
    """The mean of (y − target)² over all entries. Both ``[..., d]``.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> float(mse(torch.ones(2, 3), torch.zeros(2, 3)))
        1.0
    """
    _check_shapes(y, target)
    wide = stats_dtype(y.dtype)
    return F.mse_loss(y.to(wide), target.to(wide))


def normalized_mse(y: Tensor, target: Tensor) -> Tensor:
    """Σ (y − target)² / Σ (target − mean row of target)²: 0 is perfect, 1 is no better than always predicting the mean.

    It is also called the fraction of variance unexplained. The baseline is that of Gao et al., "Scaling and evaluating
    sparse autoencoders" (2024), taken over the rows at hand. Both ``[..., d]``, with at least two different rows.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> x = torch.randn(100, 3)
        >>> round(float(normalized_mse(x.mean(0).expand(100, 3), x)), 4)
        1.0
    """
    _check_shapes(y, target)
    wide = stats_dtype(y.dtype)
    rows = target.reshape(-1, target.shape[-1]).to(wide)
    return (y.to(wide) - target.to(wide)).square().sum() / (rows - rows.mean(0)).square().sum()


def _check_shapes(y: Tensor, target: Tensor) -> None:
    if y.shape != target.shape:  # broadcasting, [N, 1, d] with [N, d] say, would compare every row with every other
        raise ValueError(f"target: expected shape {list(y.shape)}, as y, got {list(target.shape)}")


def l1(stats: LatentStats) -> Tensor:
    """The mean over rows of Σⱼ |hₙⱼ|.

    Example:
        >>> import torch, tiedfused
        >>> layer, x = tiedfused.TiedLinear(8, 32, activation="relu"), torch.randn(5, 8)
        >>> _, stats = layer(x, return_stats=True)
        >>> torch.allclose(l1(stats), layer.encode(x).sum(1).mean())
        True
    """
    return stats.l1.mean()


def weighted_l1(stats: LatentStats, weight: Tensor, *, activation: str) -> Tensor:
    """The mean over rows of Σⱼ |hₙⱼ| ‖wⱼ‖₂, wⱼ the rows of `weight`: an L1 penalty that rescaling an atom cannot evade.

    A plain L1 penalty can be made small by short latents and long atoms; weighting by the atoms' norms closes that way
    (Conerly et al., "Update on how we train SAEs", Transformer Circuits, April 2024). For h ≥ 0 it is
    Σⱼ meanⱼ ‖wⱼ‖, which needs no weighted sum inside the kernels; that is why f has to be one that is never negative.

    Args:
        stats: of the call.
        weight: W, ``[H, d]``.
        activation: f of that call.

    Raises:
        ValueError: f takes negative values.

    Example:
        >>> import torch, tiedfused
        >>> layer, x = tiedfused.TiedLinear(8, 32, activation="relu"), torch.randn(5, 8)
        >>> _, stats = layer(x, return_stats=True)
        >>> penalty = weighted_l1(stats, layer.weight, activation="relu")
        >>> torch.allclose(penalty, (layer.encode(x) @ layer.weight.norm(dim=1)).mean())
        True
    """
    if not get_activation(activation).non_negative:
        raise ValueError(
            f"activation: expected one that is never negative, such as relu, as Σ |h| ‖w‖ is had from the latents' "
            f"means, got {activation!r}"
        )
    # no product of vectors: autocast would round both to 16 bits
    return (stats.mean * weight.to(stats.mean.dtype).norm(dim=1)).sum()


def kl_to_rate(mean: Tensor, rate: float) -> Tensor:
    """Σⱼ KL(rate ‖ meanⱼ) = Σⱼ rate · log(rate / meanⱼ) + (1 − rate) · log((1 − rate) / (1 − meanⱼ)).

    Pulls each latent's mean activation to `rate`, read as the probability that it is on (Ng, "Sparse autoencoder",
    CS294A lecture notes, 2011). Meant for a sigmoid latent: it is infinite where a mean is 0 or 1, and NaN outside.

    Args:
        mean: ``LatentStats.mean``, ``[H]``.
        rate: the target, between 0 and 1.

    Raises:
        ValueError: `rate` is not between 0 and 1.

    Example:
        >>> import torch
        >>> round(float(kl_to_rate(torch.full((10,), 0.05), 0.05)), 6) + 0  # all means are at the rate
        0.0
        >>> float(kl_to_rate(torch.full((10,), 0.5), 0.05)) > 1
        True
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate: expected a number between 0 and 1, got {rate!r}")
    on = rate * (math.log(rate) - mean.log())
    off = (1 - rate) * (math.log1p(-rate) - (-mean).log1p())
    return (on + off).sum()


def orthogonality(weight: Tensor) -> Tensor:
    """‖W Wᵀ − I‖²_F: 0 where the atoms, the rows of `weight` ``[H, d]``, are orthonormal, which takes H ≤ d.

    For H > d it is computed as ‖WᵀW‖²_F − 2‖W‖²_F + H, so that the largest matrix is ``[min(H, d), min(H, d)]``. There
    nothing cancels: the value is at least H − d.

    Example:
        >>> import torch
        >>> float(orthogonality(torch.eye(3, 5))), float(orthogonality(torch.eye(5, 3)))
        (0.0, 2.0)
    """
    h, d = weight.shape
    weight = weight.to(stats_dtype(weight.dtype))
    device = weight.device
    # autocast would round the products to 16 bits
    full = torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()
    with full:
        if h <= d:
            return (weight @ weight.t() - torch.eye(h, dtype=weight.dtype, device=device)).square().sum()
        return (weight.t() @ weight).square().sum() - 2 * weight.square().sum() + h
