"""`TiedConv1d` and `TiedConv2d`: one filter bank that convolves to encode and transposes to decode."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiedfused.activations import get_activation
from tiedfused.functional import tied_encode_decode
from tiedfused.nn.checks import check_tensor, checked_size, describe, per_dimension, refuse_script
from tiedfused.nn.tied_linear import mean_slope
from tiedfused.planning import DTYPES

_CONVOLUTION = {1: F.conv1d, 2: F.conv2d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d}


def transposed_convolution(
    module: nn.Module,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    output_size: int | Sequence[int] | None,
) -> Tensor:
    """The transpose of the convolution with `weight`, to exactly `output_size`.

    Args:
        module: named in errors.
        h: ``[N, out_channels, …]`` or ``[out_channels, …]``.
        weight: ``[out_channels, in_channels / groups, *kernel_size]``, as the convolution has it.
        bias: ``[in_channels]`` or None.
        stride: of the convolution; so are padding, dilation and groups.
        padding: zeros on either side.
        dilation: distance of the kernel's elements.
        groups: of channels.
        output_size: the spatial size to decode to; None for the smallest that encodes to h's.

    Raises:
        ValueError: h's shape does not fit, or no input of `output_size` encodes to h's size.
    """
    dimensions = len(stride)
    _check_image(module, "h", h, weight.shape[0], dimensions)
    sizes = h.shape[-dimensions:]
    smallest = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1
        for n, s, p, d, k in zip(sizes, stride, padding, dilation, weight.shape[2:], strict=True)
    ]
    wanted = smallest if output_size is None else list(per_dimension("output_size", output_size, dimensions, 1))
    extra = [w - n for w, n in zip(wanted, smallest, strict=True)]
    if not all(0 <= e < s for e, s in zip(extra, stride, strict=True)):
        possible = ", ".join(f"{n}" if s == 1 else f"{n}…{n + s - 1}" for n, s in zip(smallest, stride, strict=True))
        raise ValueError(
            f"{describe(module)}: output_size: expected [{possible}], the sizes that encode to {list(sizes)}, "
            f"got {wanted}"
        )
    return _TRANSPOSED[dimensions](h, weight, bias, stride, padding, extra, groups, dilation)  # type: ignore[operator]


def _check_image(module: nn.Module, name: str, t: Tensor, channels: int, dimensions: int) -> None:
    check_tensor(module, name, t)
    if t.dim() not in (dimensions + 1, dimensions + 2) or t.shape[-dimensions - 1] != channels:
        space = ", ".join(("length",) if dimensions == 1 else ("height", "width"))
        expected = f"[N, {channels}, {space}] or [{channels}, {space}]"
        raise ValueError(f"{describe(module)}: {name}: expected shape {expected}, got {list(t.shape)}")


class _TiedConv(nn.Module):
    """What `TiedConv1d` and `TiedConv2d` share; they differ in `dimensions` alone."""

    dimensions: int
    bias_enc: nn.Parameter | None
    bias_dec: nn.Parameter | None
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        activation: str = "identity",
        output_activation: str = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.groups = checked_size("groups", groups)
        self.in_channels = checked_size("in_channels", in_channels)
        self.out_channels = checked_size("out_channels", out_channels)
        for name, size in (("in_channels", in_channels), ("out_channels", out_channels)):
            if size % groups:
                raise ValueError(f"{name}: expected a multiple of groups, {groups}, got {size}")
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        get_activation(activation)
        get_activation(output_activation, "output_activation")
        self.kernel_size = per_dimension("kernel_size", kernel_size, self.dimensions, 1)
        self.stride = per_dimension("stride", stride, self.dimensions, 1)
        self.padding = per_dimension("padding", padding, self.dimensions, 0)
        self.dilation = per_dimension("dilation", dilation, self.dimensions, 1)
        self.activation = activation
        self.output_activation = output_activation
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        for name, size in (("bias_enc", out_channels), ("bias_dec", in_channels)):
            value = nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if bias else None
            self.register_parameter(name, value)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as `TiedLinear` does, the biases to 0.

        W ~ N(0, s²) with s² = 1 / (max(d, H) · E[f′(z)]), where d is the size of a patch, in_channels / groups ·
        kernel, and H the latents that describe as much of the input, out_channels / groups times the overlap of the
        patches, kernel / stride.
        """
        kernel, stride = math.prod(self.kernel_size), math.prod(self.stride)
        patch = self.in_channels // self.groups * kernel
        latents = self.out_channels // self.groups * max(1.0, kernel / stride)
        self.weight.normal_(0.0, 1 / math.sqrt(max(patch, latents) * mean_slope(self.activation)))
        for bias in (self.bias_enc, self.bias_dec):
            if bias is not None:
                bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """y = decode(encode(x)) of exactly x's size; fused where the patches tile x."""
        self._check_input(x)
        if self._patches_tile(x):
            return self._fused(x)
        return self.decode(self.encode(x), x.shape[-self.dimensions :])

    def forward_enc(self, x: Tensor) -> Tensor:
        """The pre-activation: the convolution of x with `weight`, + b_enc."""
        self._check_input(x)
        return _CONVOLUTION[self.dimensions](  # type: ignore[operator]
            x, self.weight, self.bias_enc, self.stride, self.padding, self.dilation, self.groups
        )

    def forward_dec(self, h: Tensor, output_size: int | Sequence[int] | None = None) -> Tensor:
        """The pre-output: the transposed convolution of h with `weight`, + b_dec, to `output_size`."""
        return transposed_convolution(
            self,
            h,
            self.weight,
            self.bias_dec,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            output_size,
        )

    def encode(self, x: Tensor) -> Tensor:
        """The latent f(`forward_enc` (x)). ``[N, in_channels, …]`` → ``[N, out_channels, …]``, N optional."""
        return get_activation(self.activation).forward(self.forward_enc(x))

    def decode(self, h: Tensor, output_size: int | Sequence[int] | None = None) -> Tensor:
        """The reconstruction g(`forward_dec` (h)). ``[N, out_channels, …]`` → ``[N, in_channels, …]``, N optional.

        Args:
            h: the latent.
            output_size: the spatial size of the result, one of those that encode to h's: with stride s there are s.
                None takes the smallest.

        Raises:
            ValueError: h's shape does not fit, or no input of `output_size` encodes to h's size.
        """
        return get_activation(self.output_activation).forward(self.forward_dec(h, output_size))

    def _check_input(self, x: Tensor) -> None:
        _check_image(self, "x", x, self.in_channels, self.dimensions)
        sizes = x.shape[-self.dimensions :]
        least = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(self.kernel_size, self.dilation, self.padding, strict=True)]
        if any(n < m for n, m in zip(sizes, least, strict=True)):
            raise ValueError(f"{describe(self)}: x: expected a spatial size of at least {least}, got {list(sizes)}")

    def _patches_tile(self, x: Tensor) -> bool:
        sizes = x.shape[-self.dimensions :]
        return (
            self.kernel_size == self.stride
            and not any(self.padding)
            and max(self.dilation) == self.groups == 1
            and not any(n % k for n, k in zip(sizes, self.kernel_size, strict=True))
        )

    def _fused(self, x: Tensor) -> Tensor:
        """Patches that do not overlap and leave nothing over are the rows of a tied linear layer."""
        *batch, channels = x.shape[: -self.dimensions]
        counts = [n // k for n, k in zip(x.shape[-self.dimensions :], self.kernel_size, strict=True)]
        split = [size for pair in zip(counts, self.kernel_size, strict=True) for size in pair]
        lead = len(batch)
        at = range(lead + 1, lead + 1 + 2 * self.dimensions)
        order = [*range(lead), *at[::2], lead, *at[1::2]]  # [N, counts, channels, kernel]
        patches = x.reshape(*batch, channels, *split).permute(order)
        kernel = math.prod(self.kernel_size)
        y = tied_encode_decode(
            patches.flatten(lead + self.dimensions),
            self.weight.flatten(1),
            self.bias_enc,
            None if self.bias_dec is None else self.bias_dec.repeat_interleave(kernel),
            activation=self.activation,
            output_activation=self.output_activation,
        )
        back = sorted(range(len(order)), key=order.__getitem__)
        return y.view(patches.shape).permute(back).reshape(x.shape)

    def extra_repr(self) -> str:
        """One line: sizes and what is not a default."""
        parts = [f"{self.in_channels}", f"{self.out_channels}", f"kernel_size={self.kernel_size}"]
        defaults = {"stride": 1, "padding": 0, "dilation": 1}
        parts += [
            f"{name}={getattr(self, name)}"
            for name, default in defaults.items()
            if getattr(self, name) != (default,) * self.dimensions
        ]
        parts += [f"groups={self.groups}"] * (self.groups > 1)
        parts.append(f"bias={self.bias_enc is not None}")
        parts += [
            f"{name}={getattr(self, name)!r}"
            for name in ("activation", "output_activation")
            if getattr(self, name) != "identity"
        ]
        return ", ".join(parts)


class TiedConv1d(_TiedConv):
    """`TiedConv2d` over one spatial dimension: x ``[N, in_channels, length]`` or ``[in_channels, length]``.

    Example:
        >>> import torch
        >>> from tiedfused.nn import TiedConv1d
        >>> layer = TiedConv1d(2, 16, kernel_size=9, stride=4, padding=4, activation="relu")
        >>> x = torch.randn(8, 2, 101)
        >>> layer.encode(x).shape, layer(x).shape
        (torch.Size([8, 16, 26]), torch.Size([8, 2, 101]))
    """

    dimensions = 1


class TiedConv2d(_TiedConv):
    """A tied convolutional encode-decode layer: one filter bank, convolved to encode, transposed to decode.

    h = f(conv(x, W) + b_enc) and y = g(conv_transpose(h, W) + b_dec), where conv_transpose is the transpose of that
    convolution as a linear map, to exactly x's size. Where the patches tile the input (kernel_size = stride, no
    padding, dilation 1, groups 1, and the size a multiple of the stride), they are the rows of a tied linear layer,
    and `tiedfused.functional.tied_encode_decode` computes the same without storing the latent.

    Args:
        in_channels: of x and y.
        out_channels: of the latent.
        kernel_size: one integer, or one a dimension; so are stride, padding and dilation.
        stride: of the convolution.
        padding: zeros on either side of x.
        dilation: distance of the kernel's elements.
        groups: of channels, as in `nn.Conv2d`.
        bias: whether there are b_enc, ``[out_channels]``, and b_dec, ``[in_channels]``.
        activation: f, a name of `tiedfused.activation_names`.
        output_activation: g, likewise.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: ``[out_channels, in_channels / groups, *kernel_size]``, one parameter.
        bias_enc: ``[out_channels]``, or None.
        bias_dec: ``[in_channels]``, or None.

    Raises:
        ValueError: an argument that makes no sense; a shape that does not fit, with the module, expected and got.

    Example:
        >>> import torch
        >>> from tiedfused.nn import TiedConv2d
        >>> layer = TiedConv2d(3, 64, kernel_size=3, stride=2, padding=1, bias=True, activation="relu")
        >>> x = torch.randn(8, 3, 32, 31)
        >>> layer.encode(x).shape, layer(x).shape
        (torch.Size([8, 64, 16, 16]), torch.Size([8, 3, 32, 31]))
        >>> layer.decode(layer.encode(x)).shape  # 31 or 32 both encode to 16; not told which, it takes the smaller
        torch.Size([8, 3, 31, 31])
        >>> TiedConv2d(3, 64, kernel_size=8, stride=8)(torch.randn(8, 3, 32, 32)).shape  # patches: fused
        torch.Size([8, 3, 32, 32])
    """

    dimensions = 2
