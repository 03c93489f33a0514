"""What sparse autoencoders are judged by, from y and the latent's statistics. Nothing here has a gradient.

>>> import torch, tiedfused
>>> layer = tiedfused.TiedLinear(64, 512, bias=True, activation="relu")
>>> x = torch.randn(32, 64)
>>> with torch.no_grad():
...     y, stats = layer(x, return_stats=True)
>>> 0 < l0(stats) < 512, float(dead_fraction(stats.fired)) < 1
(tensor(True), True)

Statistics of several batches add up: sum `fired` and the rows, then ask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiedfused import losses
from tiedfused.reference import LatentStats


@torch.no_grad()
def l0(stats: LatentStats) -> Tensor:
    """Active latents a row, on average: a scalar.

    Example:
        >>> import torch, tiedfused
        >>> layer, x = tiedfused.TiedLinear(8, 32, activation="relu"), torch.randn(5, 8)
        >>> _, stats = layer(x, return_stats=True)
        >>> torch.equal(l0(stats), (layer.encode(x) > 0).sum(1).float().mean())
        True
    """
    return stats.l0.to(stats.l1.dtype).mean()


@torch.no_grad()
def explained_variance(y: Tensor, target: Tensor) -> Tensor:
    """1 − Σ (y − target)² / Σ (target − mean row)²: 1 is perfect, 0 is no better than the mean row. Both ``[..., d]``.

    The residual is not centred: a constant offset of y counts as an error.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> x = torch.randn(100, 3)
        >>> float(explained_variance(x, x))
        1.0
    """
    return 1 - losses.normalized_mse(y, target)


@torch.no_grad()
def dead_fraction(fired: Tensor) -> Tensor:
    """The share of latents that fired on no row, a scalar. `fired` is ``LatentStats.fired`` or a sum of such.

    Example:
        >>> import torch
        >>> float(dead_fraction(torch.tensor([0, 3, 0, 12])))
        0.5
    """
    return (fired == 0).float().mean()


@torch.no_grad()
def feature_density(fired: Tensor, rows: int) -> Tensor:
    """The share of rows that each latent fired on, ``[H]`` float32.

    Args:
        fired: ``LatentStats.fired``, or a sum of them, ``[H]``.
        rows: how many rows that counts, 1 or more.

    Raises:
        ValueError: `rows` is less than 1.

    Example:
        >>> import torch
        >>> feature_density(torch.tensor([0, 3, 12]), rows=12)
        tensor([0.0000, 0.2500, 1.0000])
    """
    if rows < 1:
        raise ValueError(f"rows: expected 1 or more, got {rows!r}")
    return fired.float() / rows
