"""Transpose or inverse? How far Wᵀ is from undoing W, and what an inverse would cost.

The encoder is a = x Wᵀ with W ``[H, d]``; a linear decoder is a matrix D ``[H, d]`` with y = a D. The tied one is
D = W. Everything here is computed in float64.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from tiedfused import nn
from tiedfused.activations import get_activation
from tiedfused.analysis.show import Shown, table

KINDS = ("transpose", "inverse", "pseudo-inverse")


def decoder_matrix(weight: Tensor, kind: str) -> Tensor:
    """D ``[H, d]`` in float64, so that y = (x Wᵀ) D.

    Args:
        weight: W, ``[H, d]``.
        kind: ``"transpose"``: W. ``"inverse"``: W⁻ᵀ, for H = d. ``"pseudo-inverse"``: the Moore-Penrose inverse of Wᵀ.
            For H < d that is (WWᵀ)⁻¹W and y is x projected on the rows of W; for H > d it undoes Wᵀ and is, of the
            many that do, the one with the least norm. Where the rows are orthonormal it equals W.

    Raises:
        ValueError: an unknown kind, or an inverse of a weight that is not square.

    Example:
        >>> import torch
        >>> rows = torch.linalg.qr(torch.randn(8, 3)).Q.T
        >>> torch.allclose(decoder_matrix(rows, "pseudo-inverse"), decoder_matrix(rows, "transpose"), atol=1e-5)
        True
    """
    w = _matrix(weight)
    h, d = w.shape
    if kind == "transpose":
        return w
    if kind == "pseudo-inverse":
        return torch.linalg.pinv(w).T
    if kind != "inverse":
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if h < d:
        raise ValueError(
            f"kind: no inverse exists for H {h} < d {d}: x Wᵀ drops {d - h} of x's {d} dimensions, and nothing brings "
            "them back; 'pseudo-inverse' restores the others"
        )
    if h > d:
        raise ValueError(f"kind: many matrices undo Wᵀ for H {h} > d {d}; 'pseudo-inverse' is the smallest of them")
    return torch.linalg.inv(w).T


def orthogonality(weight: Tensor) -> float:
    """‖WWᵀ − I‖, Frobenius: 0 where the rows are orthonormal, which takes H ≤ d; else it is at least √(H − d).

    Example:
        >>> import torch
        >>> orthogonality(torch.eye(3, 5)), orthogonality(torch.zeros(4, 5))
        (0.0, 2.0)
    """
    w = _matrix(weight)
    squares = torch.linalg.svdvals(w).square()
    return math.sqrt(float((squares - 1).square().sum()) + max(w.shape[0] - w.shape[1], 0))


def condition_number(weight: Tensor) -> float:
    """The largest over the smallest of the min(H, d) singular values; inf if that is 0.

    Example:
        >>> import torch
        >>> condition_number(torch.diag(torch.tensor([4.0, 2.0])))
        2.0
    """
    values = torch.linalg.svdvals(_matrix(weight))
    return float(values[0] / values[-1])


def noise_gain(decoder: Tensor) -> float:
    """How much a decoder D ``[H, d]`` amplifies noise on its latent: rms of ε D over rms of ε, ‖D‖ / √H.

    The size of ε D is its norm over all d, the size of ε its norm over all H; ε is white. 1 for orthonormal rows.

    Example:
        >>> import torch
        >>> w = torch.diag(torch.tensor([1.0, 0.1]))
        >>> round(noise_gain(decoder_matrix(w, "transpose")), 2), round(noise_gain(decoder_matrix(w, "inverse")), 2)
        (0.71, 7.11)
    """
    d = _matrix(decoder)
    return float(d.norm()) / math.sqrt(d.shape[0])


def pca_error(x: Tensor, components: int) -> float:
    """The mean squared error of the best rank-`components` linear reconstruction of x ``[N, d]``: no linear
    autoencoder with that many latents does better (Eckart and Young, 1936).

    x is taken as it is; subtract its mean for the PCA of a layer with biases.

    Example:
        >>> import torch
        >>> pca_error(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)  # 1² over 9 entries
        0.111...
    """
    x = _matrix(x, "x")
    eigenvalues = torch.linalg.eigvalsh(x.T @ x)  # ascending
    return float(eigenvalues[: max(x.shape[1] - components, 0)].clamp_min(0).sum()) / x.numel()


def subspace_angle(weight: Tensor, x: Tensor) -> float:
    """The largest angle, in degrees, between the rows of W ``[H, d]`` and the H leading principal directions of x.

    0 means that they span the same subspace. x ``[N, d]`` is taken as it is; subtract its mean for the usual PCA. The
    angle is computed from its sine where it is small, where the cosine has no digits left (Björck and Golub, 1973).

    Raises:
        ValueError: H > d, or d differs.

    Example:
        >>> import torch
        >>> x = torch.randn(100, 3) * torch.tensor([9.0, 5.0, 1.0])
        >>> subspace_angle(torch.linalg.svd(x).Vh[:2].flip(0), x) < 1e-3
        True
    """
    w, x = _matrix(weight), _matrix(x, "x")
    h, d = w.shape
    if x.shape[1] != d:
        raise ValueError(f"x: expected shape [N, {d}], as weight is [{h}, {d}], got {list(x.shape)}")
    if h > d:
        raise ValueError(f"weight: expected H ≤ d, got [{h}, {d}]: its rows span the whole space")
    rows = torch.linalg.qr(w.T).Q
    directions = torch.linalg.eigh(x.T @ x).eigenvectors[:, d - h :]
    cosines = directions.T @ rows
    sine = torch.linalg.matrix_norm(rows - directions @ cosines, 2)
    if sine < 0.7:
        return math.degrees(math.asin(float(sine)))
    return math.degrees(math.acos(min(1.0, float(torch.linalg.svdvals(cosines)[-1]))))


@dataclasses.dataclass(frozen=True)
class DecoderComparison(Shown):
    """What each decoder makes of the same latents.

    Args:
        rows: for each decoder its kind, the mean squared error of its reconstruction, the same with noise on the
            latent, and its `noise_gain`.
        noise: the rms of that noise, in units of the rms of the latent.
    """

    rows: tuple[tuple[str, float, float, float], ...]
    noise: float

    def __rich__(self):  # type: ignore[no-untyped-def]
        shown = table("decoder", "MSE", f"MSE, {self.noise:.0%} noise on the latent", "noise gain")
        for kind, error, noisy, gain in self.rows:
            shown.add_row(kind, f"{error:.6f}", f"{noisy:.6f}", f"{gain:.3g}")
        return shown


@torch.no_grad()
def compare_decoders(
    layer: nn.TiedLinear, x: Tensor, *, noise: float = 0.1, generator: torch.Generator | None = None
) -> DecoderComparison:
    """Decode the latent of x by the transpose, by the inverse where there is one, and by the pseudo-inverse.

    Args:
        layer: encodes x; its decoder bias and output activation are kept, its decoder matrix is replaced.
        x: ``[N, d]``.
        noise: the rms of Gaussian noise added to the latent, in units of the latent's own rms.
        generator: of that noise; the same noise for every decoder.

    Example:
        >>> import torch, tiedfused
        >>> layer = tiedfused.TiedLinear(8, 4, dtype=torch.float64)
        >>> result = compare_decoders(layer, torch.randn(50, 8, dtype=torch.float64))
        >>> [row[0] for row in result.rows]  # no inverse: H < d
        ['transpose', 'pseudo-inverse']
    """
    atoms = layer.atoms()
    h = layer.encode(x).double()
    error = torch.randn(h.shape, generator=generator, dtype=h.dtype, device=h.device)
    noisy = h + noise * h.square().mean().sqrt() * error
    g = get_activation(layer.output_activation)
    bias = layer._decoder_bias(atoms)
    rows = []
    for kind in KINDS:
        if kind == "inverse" and atoms.shape[0] != atoms.shape[1]:
            continue
        matrix = decoder_matrix(atoms, kind)
        errors = [
            float((g.forward(latent @ matrix + (0 if bias is None else bias)) - x).square().mean())
            for latent in (h, noisy)
        ]
        rows.append((kind, *errors, noise_gain(matrix)))
    return DecoderComparison(tuple(rows), noise)  # type: ignore[arg-type]


def _matrix(t: Tensor, name: str = "weight") -> Tensor:
    if t.dim() != 2 or 0 in t.shape:
        raise ValueError(f"{name}: expected a matrix, got shape {list(t.shape)}")
    return t.detach().double()
