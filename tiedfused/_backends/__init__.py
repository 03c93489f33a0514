"""The implementations behind the op, one a module, each with the same two functions.

    forward(x, weight, bias_enc, bias_dec, plan) -> (y, latent | None, LatentStats | None)
    backward(grad_z, x, weight, bias_enc, latent, plan, needs, grad_l1=None, grad_total=None)
        -> (x̄ | None, W̄ | None, b̄_enc | None)

x and grad_z are [N, d] with N ≥ 1 and a last stride of 1, weight [H, d] likewise; `plan` has already been checked
against what the backend can do. The latent, None where it is not kept, is one contiguous [N, H] in x's dtype, whichever
backend writes or reads it: h where f's gradient can be read off it (`Activation.from_output`), else the pre-activation.
If `plan.stats`, forward also returns the latent's statistics, Σₙ h taking the place of its mean, and backward adds to h̄
what their gradients give, [N] and [H], contiguous, in fp32 at least, or None:
``grad_l1[n] · sign(h[n, j]) + grad_total[j]``.
"""

from __future__ import annotations

import dataclasses

import torch

from tiedfused import planning
from tiedfused._backends import native, tiled
from tiedfused.activations import HAS_TRITON, IDENTITY
from tiedfused.extension import EXTENSION
from tiedfused.regimes.common import why_not_triton

BACKENDS = {"native": native, "tiled": tiled}
if HAS_TRITON:
    from tiedfused._backends import triton

    BACKENDS["triton"] = triton


@dataclasses.dataclass(frozen=True)
class BackendStatus:
    """A backend, and why it is not usable here (None if it is)."""

    name: str
    why_not: str | None


def backends() -> tuple[BackendStatus, ...]:
    """Each backend and, if it is not usable on this machine, why not.

    Example:
        >>> import tiedfused
        >>> [status.name for status in tiedfused.backends() if status.why_not is None][-1]
        'tiled'
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    smallest = planning.request(1, 1, 1, torch.float32, device, IDENTITY, IDENTITY, False, False, None)
    return (
        BackendStatus("triton", why_not_triton(smallest)),
        BackendStatus("native", EXTENSION.why_not),
        BackendStatus("tiled", None),
    )
