"""`TiedAutoencoder`: a stack of tied layers, decoded in the reverse order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tiedfused.nn.checks import check_features, checked_size
from tiedfused.nn.tied_linear import TiedLinear


class TiedAutoencoder(nn.Module):
    """A deep tied autoencoder: L weights encode, and the same L weights decode in the reverse order.

    With layer l of sizes[l] → sizes[l + 1]:

        h₀ = x,  hₗ₊₁ = fₗ(hₗ Wₗᵀ + b_encₗ)          the code is h_L
        r_L = h_L,  rₗ = gₗ(rₗ₊₁ Wₗ + b_decₗ)        the reconstruction is r₀

    Each layer is a `TiedLinear`. The innermost pair, whose latent is the code, is computed fused; the others cannot be,
    since something happens between their halves, and run as `TiedLinear.encode` and `TiedLinear.decode`. As many
    parameters as the encoder alone has, and a decoder bias a layer.

    Args:
        sizes: of the input, of each hidden layer and of the code: ``[784, 256, 64]`` is a stack of two layers.
        bias: as of `TiedLinear`.
        activation: f, one name for all layers or one for each: ``["relu", "identity"]`` gives a linear code.
        output_activation: g₀, what the reconstruction goes through; or one name for each layer, input first. By default
            gₗ = fₗ₋₁ for the inner ones: decoding then lands in the range that encoding left from.
        bias_mode: as of `TiedLinear`, for every layer.
        normalize_atoms: as of `TiedLinear`, for every layer.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        layers: the `TiedLinear` modules, input first. State_dict keys are ``layers.0.weight``, ``layers.0.bias_enc``,
            ``layers.0.bias_dec``, ``layers.1.weight``, … Each can be trained by itself, as in greedy pretraining.

    Raises:
        ValueError: sizes or names that make no sense, or as many names as there are not layers.

    Example:
        >>> import torch, tiedfused
        >>> model = tiedfused.nn.TiedAutoencoder([784, 256, 64], activation=["relu", "identity"], bias=True)
        >>> x = torch.randn(8, 784)
        >>> model(x).shape, model.encode(x).shape
        (torch.Size([8, 784]), torch.Size([8, 64]))
        >>> [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
        [(256, 784), (64, 256)]
    """

    def __init__(
        self,
        sizes: Sequence[int],
        bias: bool = False,
        *,
        activation: str | Sequence[str] = "relu",
        output_activation: str | Sequence[str] = "identity",
        bias_mode: str | None = None,
        normalize_atoms: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(sizes, Sequence) or isinstance(sizes, str) or len(sizes) < 2:
            raise ValueError(f"sizes: expected at least two integers, input first, got {sizes!r}")
        sizes = tuple(checked_size(f"sizes[{index}]", size) for index, size in enumerate(sizes))
        depth = len(sizes) - 1
        f = _one_each("activation", [activation] * depth if isinstance(activation, str) else activation, depth)
        g = [output_activation, *f[:-1]] if isinstance(output_activation, str) else output_activation
        g = _one_each("output_activation", g, depth)
        self.sizes = sizes
        self.layers = nn.ModuleList(
            TiedLinear(
                sizes[i],
                sizes[i + 1],
                bias,
                activation=f[i],
                output_activation=g[i],
                bias_mode=bias_mode,
                normalize_atoms=normalize_atoms,
                device=device,
                dtype=dtype,
            )
            for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction r₀ = decode(encode(x)), its innermost pair fused. x ``[..., sizes[0]]`` → the same."""
        check_features(self, "x", x, self.sizes[0])
        *outer, innermost = self.layers
        for layer in outer:
            x = layer.encode(x)  # type: ignore[operator]
        x = innermost(x)
        for layer in reversed(outer):
            x = layer.decode(x)  # type: ignore[operator]
        return x

    def encode(self, x: Tensor) -> Tensor:
        """The code h_L. x ``[..., sizes[0]]`` → ``[..., sizes[-1]]``."""
        check_features(self, "x", x, self.sizes[0])
        for layer in self.layers:
            x = layer.encode(x)  # type: ignore[operator]
        return x

    def decode(self, h: Tensor) -> Tensor:
        """The reconstruction r₀ of a code. h ``[..., sizes[-1]]`` → ``[..., sizes[0]]``."""
        check_features(self, "h", h, self.sizes[-1])
        for layer in reversed(self.layers):
            h = layer.decode(h)  # type: ignore[operator]
        return h

    def extra_repr(self) -> str:
        """The sizes."""
        return "-".join(map(str, self.sizes))


def _one_each(name: str, names: Sequence[str], depth: int) -> list[str]:
    if not isinstance(names, Sequence) or len(names) != depth:
        raise ValueError(f"{name}: expected one name, or {depth}, one a layer, got {names!r}")
    return list(names)
