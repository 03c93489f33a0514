"""Corruptions for denoising autoencoders: the input is corrupted, the target is not (Vincent et al., 2008, 2010).

    loss = (model(corruption.mask(x, 0.3)) - x).square().mean()

Each returns a new tensor and draws from `generator`, which has to be on x's device, or from PyTorch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask(x: Tensor, rate: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Set every entry to 0 with probability `rate`; the others stay as they are, unlike in dropout.

    Raises:
        ValueError: a rate outside 0…1.
        TypeError: x is not a floating-point tensor.

    Example:
        >>> import torch
        >>> from tiedfused import corruption
        >>> y = corruption.mask(torch.ones(1000, 10), 0.3)
        >>> sorted(set(y.flatten().tolist())), 0.27 < 1 - float(y.mean()) < 0.33
        ([0.0, 1.0], True)
    """
    _check(x, "rate", rate, 1.0)
    return x.masked_fill(_uniform(x, generator) < rate, 0.0)


def gaussian(x: Tensor, std: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Add Gaussian noise of standard deviation `std`.

    Raises:
        ValueError: a negative std.
        TypeError: x is not a floating-point tensor.

    Example:
        >>> import torch
        >>> from tiedfused import corruption
        >>> y = corruption.gaussian(torch.zeros(1000, 10), 0.5, generator=torch.Generator().manual_seed(0))
        >>> round(float(y.std()), 1)
        0.5
    """
    _check(x, "std", std, float("inf"))
    return x + std * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def salt_and_pepper(
    x: Tensor, rate: float, *, low: float = 0.0, high: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Replace every entry with probability `rate`, by `low` or `high` with equal chance.

    Raises:
        ValueError: a rate outside 0…1.
        TypeError: x is not a floating-point tensor.

    Example:
        >>> import torch
        >>> from tiedfused import corruption
        >>> y = corruption.salt_and_pepper(torch.full((1000, 10), 0.5), 0.2)
        >>> sorted(set(y.flatten().tolist()))
        [0.0, 0.5, 1.0]
    """
    _check(x, "rate", rate, 1.0)
    u = _uniform(x, generator)
    return x.masked_fill(u < rate, high).masked_fill(u < rate / 2, low)


def _uniform(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """In fp32 whatever x is: 16 bits have too few values near 0 and 1 for small rates."""
    return torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)


def _check(x: Tensor, name: str, value: float, most: float) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if not 0 <= value <= most:
        raise ValueError(f"{name}: expected {'0 or more' if most > 1 else '0 to 1'}, got {value!r}")
