"""`TiedLinear`: one weight that encodes and decodes."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tiedfused.activations import get_activation
from tiedfused.functional import SPARSE, tied_encode_decode
from tiedfused.nn.checks import check_features, checked_size, describe, refuse_script
from tiedfused.planning import DTYPES
from tiedfused.reference import LatentStats

BIAS_MODES = ("none", "independent", "pre", "latent")


class TiedLinear(nn.Module):
    """The tied encode-decode layer, y = g(f(x Wᵀ + b_enc) W + b_dec), fused.

    Args:
        in_features: d, the size of x and y.
        out_features: H, the size of the latent.
        bias: whether there are biases; `bias_mode` says which.
        activation: f, a name of `tiedfused.activation_names`.
        output_activation: g, likewise.
        bias_mode: how the biases go together; by default ``"independent"`` if `bias`, else ``"none"``:

            - ``"none"``: no biases.
            - ``"independent"``: b_enc and b_dec are parameters of their own.
            - ``"pre"``: b_dec is also subtracted from the input, f((x − b_dec) Wᵀ + b_enc) W + b_dec: the latent then
              describes x relative to a learned centre, as usual for sparse autoencoders on model activations.
            - ``"latent"``: only b_enc is a parameter and b_dec = −b_enc W: the decoder takes back what the encoder's
              bias added, so y = (f(x Wᵀ + b_enc) − b_enc) W before g.

            b_dec = −b_enc, the first coupling that comes to mind, does not exist: b_enc has H entries, b_dec has d.
        normalize_atoms: use W with every row divided by its norm, differentiably: the loss then cannot be lowered by
            scaling atoms, and `weight`'s gradient is at right angles to them. For H > d and a latent that is not sparse
            y starts about H / d times too large. The other way to unit atoms, `project_atoms_` after the optimiser's
            step, costs nothing in the forward pass.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: W, ``[out_features, in_features]``; row j is dictionary atom j.
        bias_enc: b_enc, ``[out_features]``, or None.
        bias_dec: b_dec, ``[in_features]``, or None.

    These are also the keys of its state_dict. The weight is one parameter, registered once: optimisers, FSDP and
    safetensors see it once, and it cannot come untied.

    Example:
        >>> import torch, tiedfused
        >>> layer = tiedfused.TiedLinear(64, 256, bias=True, activation="relu")
        >>> layer(torch.randn(8, 64)).shape, layer.encode(torch.randn(8, 64)).shape
        (torch.Size([8, 64]), torch.Size([8, 256]))
    """

    bias_enc: nn.Parameter | None
    bias_dec: nn.Parameter | None
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        activation: str = "identity",
        output_activation: str = "identity",
        bias_mode: str | None = None,
        normalize_atoms: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = checked_size("in_features", in_features)
        out_features = checked_size("out_features", out_features)
        if bias_mode is None:
            bias_mode = "independent" if bias else "none"
        if bias_mode not in BIAS_MODES:
            why = ""
            if out_features != in_features:
                why = (
                    f"; b_dec = −b_enc is none of them, as b_enc has {out_features} entries and b_dec has "
                    f"{in_features}: 'latent' is b_dec = −b_enc W"
                )
            raise ValueError(f"bias_mode: expected one of {', '.join(BIAS_MODES)}, got {bias_mode!r}{why}")
        if bias and bias_mode == "none":
            raise ValueError("bias_mode: expected independent, pre or latent, as bias is True, got 'none'")
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        get_activation(activation)
        get_activation(output_activation, "output_activation")
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.output_activation = output_activation
        self.bias_mode = bias_mode
        self.normalize_atoms = normalize_atoms
        new = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **new))  # type: ignore[arg-type]
        for name, size, modes in (
            ("bias_enc", out_features, ("independent", "pre", "latent")),
            ("bias_dec", in_features, ("independent", "pre")),
        ):
            value = nn.Parameter(torch.empty(size, **new)) if bias_mode in modes else None  # type: ignore[arg-type]
            self.register_parameter(name, value)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, init: str = "isometric") -> None:
        """Initialise the weight, and set the biases to 0.

        Args:
            init: ``"isometric"`` (default) draws W ~ N(0, s²) with s² = 1 / (max(d, H) · E[f′(z)]), z ~ N(0, 1). WᵀW
                (or, for H < d, WWᵀ) is then close to the identity times 1 / E[f′], and by Stein's lemma
                E[f(Wx) W] ≈ E[f′] WᵀW x: the layer starts near the identity or a projection. ``"small"`` draws
                0.01 · N(0, 1), which starts next to the saddle at W = 0: small, but slow to leave.

        Raises:
            ValueError: an unknown `init`.
        """
        if init == "isometric":
            std = 1 / math.sqrt(max(self.in_features, self.out_features) * mean_slope(self.activation))
        elif init == "small":
            std = 0.01
        else:
            raise ValueError(f"init: expected isometric or small, got {init!r}")
        self.weight.normal_(0.0, std)
        for bias in (self.bias_enc, self.bias_dec):
            if bias is not None:
                bias.zero_()

    @overload
    def forward(self, x: Tensor, return_stats: Literal[False] = ...) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, return_stats: Literal[True]) -> tuple[Tensor, LatentStats]: ...

    def forward(self, x: Tensor, return_stats: bool = False) -> Tensor | tuple[Tensor, LatentStats]:
        """y = decode(encode(x)), fused. x ``[..., in_features]`` → ``[..., in_features]``.

        With `return_stats`, y and the latent's statistics (`tiedfused.LatentStats`), for a sparsity penalty.
        """
        atoms = self.atoms()
        return tied_encode_decode(  # type: ignore[call-overload, no-any-return]
            self._centred(x),
            atoms,
            self.bias_enc,
            self._decoder_bias(atoms),
            activation=self.activation,
            output_activation=self.output_activation,
            return_stats=return_stats,
        )

    def forward_enc(self, x: Tensor) -> Tensor:
        """The pre-activation, x Wᵀ + b_enc. x ``[..., in_features]`` → ``[..., out_features]``."""
        return F.linear(self._centred(x), self.atoms(), self.bias_enc)

    def forward_dec(self, h: Tensor) -> Tensor:
        """The pre-output, h W + b_dec. h ``[..., out_features]`` → ``[..., in_features]``."""
        check_features(self, "h", h, self.out_features)
        atoms = self.atoms()
        return F.linear(h, atoms.t(), self._decoder_bias(atoms))

    def encode(self, x: Tensor) -> Tensor:
        """The latent f(`forward_enc` (x)). x ``[..., in_features]`` → ``[..., out_features]``."""
        return get_activation(self.activation).forward(self.forward_enc(x))

    def decode(self, h: Tensor) -> Tensor:
        """The reconstruction g(`forward_dec` (h)). h ``[..., out_features]`` → ``[..., in_features]``."""
        return get_activation(self.output_activation).forward(self.forward_dec(h))

    def atoms(self) -> Tensor:
        """The dictionary in use, ``[out_features, in_features]``: `weight`, or with `normalize_atoms` its unit rows."""
        weight = self.weight  # read once: a parametrization computes it at every look
        return weight / _row_norms(weight) if self.normalize_atoms else weight

    @torch.no_grad()
    def project_atoms_(self) -> None:
        """Divide every row of `weight` by its norm, in place: after the optimiser's step.

        Other libraries call it ``set_decoder_norm_to_unit_norm``. Here the encoder's rows are scaled with the
        decoder's, because they are the same, so the function changes.

        Example:
            >>> import torch, tiedfused
            >>> layer = tiedfused.TiedLinear(64, 256)
            >>> layer.project_atoms_()
            >>> torch.allclose(layer.weight.norm(dim=1), torch.ones(256))
            True

        Raises:
            RuntimeError: `weight` is not a parameter, as with a parametrization or pruning.
        """
        self._check_weight_is_a_parameter()
        self.weight.div_(_row_norms(self.weight))

    @torch.no_grad()
    def project_gradient_(self) -> None:
        """Remove from `weight`'s gradient what is parallel to each atom, in place: after backward.

        With `project_atoms_` after the step, the optimiser then spends no step, and Adam no momentum, on a length that
        is thrown away. Other libraries call it ``remove_gradient_parallel_to_decoder_directions``.

        Raises:
            RuntimeError: `weight` has no gradient, or is not a parameter.
        """
        self._check_weight_is_a_parameter()
        if self.weight.grad is None:
            raise RuntimeError(f"{describe(self)}: weight has no gradient; call project_gradient_ after backward")
        atoms = self.weight / _row_norms(self.weight)
        self.weight.grad.sub_((self.weight.grad * atoms).sum(1, keepdim=True) * atoms)

    def _check_weight_is_a_parameter(self) -> None:
        if "weight" not in self._parameters:  # what is written to it would be lost
            raise RuntimeError(
                f"{describe(self)}: weight: expected a parameter, got a tensor computed from others, as by a "
                "parametrization or pruning; normalize_atoms=True works with those"
            )

    def _centred(self, x: Tensor) -> Tensor:
        check_features(self, "x", x, self.in_features)
        # folded into b_enc, as b_enc − W b_dec, the centre would cost bf16 its precision: 5% error of the latent
        # against 0.2% where b_dec is 30 times the spread of x around it
        if self.bias_mode != "pre":
            return x
        assert self.bias_dec is not None
        return (x.to_dense() if x.layout in SPARSE else x) - self.bias_dec

    def _decoder_bias(self, atoms: Tensor) -> Tensor | None:
        if self.bias_mode == "latent":
            assert self.bias_enc is not None
            return -F.linear(self.bias_enc, atoms.t())
        return self.bias_dec

    @classmethod
    def from_linear(cls, encoder: nn.Linear, decoder: nn.Linear | None = None, **options: Any) -> TiedLinear:
        """A tied layer from an `nn.Linear` encoder, and optionally the decoder it is already tied to.

        Args:
            encoder: its weight ``[H, d]`` and bias are copied.
            decoder: its bias is copied; its weight ``[d, H]`` must be the transpose of the encoder's.
            options: as of `TiedLinear`, without sizes, bias, device and dtype; `bias_mode` is ``"independent"`` if
                either layer has a bias, else ``"none"``. With ``"pre"``, b_enc is the encoder's bias + W b_dec, so that
                the function is the same.

        Raises:
            ValueError: the decoder's weight is not the transpose of the encoder's, `bias_mode` has no place for a
                bias that there is, or `normalize_atoms` would change the function.
        """
        weight = encoder.weight.detach()
        biases = {"bias_enc": encoder.bias, "bias_dec": None if decoder is None else decoder.bias}
        if decoder is not None and not (
            decoder.weight.shape == weight.t().shape and torch.allclose(decoder.weight.detach(), weight.t())
        ):
            raise ValueError(
                f"decoder: expected the transpose of the encoder's weight {list(weight.shape)}, got a different "
                f"weight {list(decoder.weight.shape)}; tie it first"
            )
        mode = options.pop("bias_mode", "none" if all(b is None for b in biases.values()) else "independent")
        layer = cls(
            encoder.in_features,
            encoder.out_features,
            bias_mode=mode,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        with torch.no_grad():
            norms = _row_norms(weight)
            if layer.normalize_atoms and not torch.allclose(norms, torch.ones_like(norms)):
                raise ValueError(
                    f"normalize_atoms: expected rows of norm 1, got norms from {norms.min():.3g} to {norms.max():.3g}; "
                    "in a tied layer no other weight can make up for theirs"
                )
            layer.weight.copy_(weight)
            for name, value in biases.items():
                target = getattr(layer, name)
                if value is not None and target is None:
                    raise ValueError(f"bias_mode: {mode!r} has no {name}, and the given layer has that bias")
                if value is not None:
                    target.copy_(value)
            if layer.bias_mode == "pre":
                assert layer.bias_enc is not None and layer.bias_dec is not None
                layer.bias_enc.add_(F.linear(layer.bias_dec, weight))
        return layer

    @torch.no_grad()
    def to_linear_pair(self) -> tuple[nn.Linear, nn.Linear]:
        """Encoder and decoder as two `nn.Linear`, untied copies; bias couplings are folded in.

        ``decoder(f(encoder(x)))`` with g on top equals this layer's output.
        """
        bias_enc: Tensor | None = self.bias_enc
        atoms = self.atoms()
        if self.bias_mode == "pre":
            assert bias_enc is not None and self.bias_dec is not None
            bias_enc = bias_enc - F.linear(self.bias_dec, atoms)
        layers = []
        for weight, bias in ((atoms, bias_enc), (atoms.t(), self._decoder_bias(atoms))):
            layer = nn.Linear(
                weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype
            )
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
            layers.append(layer)
        return layers[0], layers[1]

    def extra_repr(self) -> str:
        """One line: sizes and what is not a default."""
        parts = [
            f"in_features={self.in_features}",
            f"out_features={self.out_features}",
            f"bias_mode={self.bias_mode!r}",
        ]
        parts += [
            f"{name}={value!r}"
            for name, value in (("activation", self.activation), ("output_activation", self.output_activation))
            if value != "identity"
        ]
        parts += ["normalize_atoms=True"] * self.normalize_atoms
        return ", ".join(parts)


def _row_norms(weight: Tensor) -> Tensor:
    """‖Wⱼ‖ as ``[H, 1]``, at least the dtype's epsilon: a row of zeros stays one, and its gradient stays finite."""
    return torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).eps)


def mean_slope(activation: str) -> float:
    """E[f′(z)] for z ~ N(0, 1), between 1/4 and 1 so that an unusual f does not blow up the weight."""
    f = get_activation(activation)
    with unset_fake_temporarily(), torch.device("cpu"):  # modules are also made under FakeTensorMode, or on "meta"
        z = torch.linspace(-6, 6, 2401, dtype=torch.float64)
        slope = f.backward(torch.ones_like(z), f.forward(z) if f.from_output else z)
        density = torch.exp(-z * z / 2)
        return min(max((slope * density).sum().item() / density.sum().item(), 0.25), 1.0)
