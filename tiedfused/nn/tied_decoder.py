"""`TiedDecoder`: any linear or convolutional encoder layer, run backwards with its own weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiedfused.nn.checks import check_features, check_tensor, refuse_script
from tiedfused.nn.tied_conv import transposed_convolution


class TiedDecoder(nn.Module):
    """The mirror of an encoder layer, with the encoder's weight and a bias of its own.

    Of ``nn.Linear(d, H)`` it is h W + b: ``[..., H]`` → ``[..., d]``; of an `nn.Conv1d` or `nn.Conv2d` the transposed
    convolution with the same stride, padding, dilation and groups. Activations, dropout and normalisation stay modules
    of their own, so any encoder can be mirrored layer by layer.

    The weight is the encoder's and is not registered a second time: it is one parameter with one state_dict key, under
    the encoder; optimisers, safetensors and FSDP see it once. It is looked up in the encoder at every call, so it stays
    tied through `load_state_dict`, `to` and copies of the model that both are in. The encoder has to be part of the
    same model; under FSDP, in the same unit (`fully_shard` the model, not the encoder's layers one by one).

    Args:
        encoder: an `nn.Linear`, `nn.Conv1d` or `nn.Conv2d` (zero padding).
        bias: whether the decoder has one, ``[in_features]`` or ``[in_channels]``, 0 at first.
        output_size: of a convolution, the spatial size to decode to, where it is always the same; `forward` takes one
            too. A strided convolution maps several input sizes to one output size, so its mirror has to be told which;
            by default the smallest.

    Attributes:
        encoder: the layer it mirrors, not registered as a submodule.
        bias: the parameter, or None.

    Raises:
        TypeError: another kind of layer.
        ValueError: a lazy layer that was not called yet, a padding mode other than zeros, a padding with no mirror,
            `output_size` for an `nn.Linear`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tiedfused.nn import TiedDecoder
        >>> first, second = nn.Linear(784, 256), nn.Linear(256, 64)
        >>> encoder = nn.Sequential(first, nn.LayerNorm(256), nn.GELU(), nn.Dropout(0.1), second)
        >>> decoder = nn.Sequential(TiedDecoder(second), nn.GELU(), TiedDecoder(first))
        >>> model = nn.Sequential(encoder, decoder)
        >>> model(torch.randn(8, 784)).shape
        torch.Size([8, 784])
        >>> [name for name in model.state_dict() if "weight" in name]
        ['0.0.weight', '0.1.weight', '0.4.weight']
    """

    encoder: nn.Linear | nn.Conv1d | nn.Conv2d
    bias: nn.Parameter | None
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        encoder: nn.Linear | nn.Conv1d | nn.Conv2d,
        bias: bool = True,
        output_size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Linear | nn.Conv1d | nn.Conv2d):
            raise TypeError(f"encoder: expected nn.Linear, nn.Conv1d or nn.Conv2d, got {type(encoder).__name__}")
        if isinstance(encoder.weight, nn.UninitializedParameter):
            raise ValueError(
                f"encoder: expected a layer with a weight, got {type(encoder).__name__}, which has none yet"
            )
        if isinstance(encoder, nn.Linear):
            self.padding: tuple[int, ...] = ()
            if output_size is not None:
                raise ValueError(f"output_size: expected None, as the encoder is an nn.Linear, got {output_size!r}")
        else:
            self.padding = _padding(encoder)
        object.__setattr__(self, "encoder", encoder)  # past nn.Module, which would register it
        self.output_size = output_size
        size = encoder.in_features if isinstance(encoder, nn.Linear) else encoder.in_channels
        weight = encoder.weight
        value = nn.Parameter(torch.empty(size, device=weight.device, dtype=weight.dtype)) if bias else None
        self.register_parameter("bias", value)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the bias to 0, also after `to_empty`; the weight is the encoder's to initialise."""
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, h: Tensor, output_size: int | Sequence[int] | None = None) -> Tensor:
        """The encoder's mirror.

        Args:
            h: ``[..., H]`` for an `nn.Linear`, ``[N, H, …]`` or ``[H, …]`` for a convolution.
            output_size: of a convolution, the spatial size of the result; None stands for the constructor's.

        Raises:
            ValueError: h is not what the encoder puts out, or no input of `output_size` encodes to h's size.
        """
        encoder = self.encoder
        if isinstance(encoder, nn.Linear):
            check_features(self, "h", h, encoder.out_features)
            return F.linear(h, encoder.weight.t(), self.bias)
        check_tensor(self, "h", h)
        return transposed_convolution(
            self,
            h,
            encoder.weight,
            self.bias,
            encoder.stride,
            self.padding,
            encoder.dilation,
            encoder.groups,
            self.output_size if output_size is None else output_size,
        )

    def extra_repr(self) -> str:
        """What it mirrors."""
        size = "" if self.output_size is None else f", output_size={self.output_size}"
        return f"mirror of {self.encoder}, bias={self.bias is not None}{size}"


def _padding(encoder: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    """The encoder's zero padding as one integer a dimension."""
    if encoder.padding_mode != "zeros":
        raise ValueError(f"encoder: expected padding_mode 'zeros', got {encoder.padding_mode!r}")
    if encoder.padding == "valid":
        return (0,) * len(encoder.kernel_size)
    if encoder.padding == "same":
        total = [d * (k - 1) for d, k in zip(encoder.dilation, encoder.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            raise ValueError(
                f"encoder: padding 'same' of an even kernel {encoder.kernel_size} pads one side more than the other, "
                "which a transposed convolution cannot; give the padding in numbers"
            )
        return tuple(t // 2 for t in total)
    assert not isinstance(encoder.padding, str)
    return tuple(encoder.padding)
