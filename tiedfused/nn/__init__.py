"""Modules."""

from tiedfused.nn.tied_autoencoder import TiedAutoencoder
from tiedfused.nn.tied_conv import TiedConv1d, TiedConv2d
from tiedfused.nn.tied_decoder import TiedDecoder
from tiedfused.nn.tied_linear import TiedLinear

__all__ = ["TiedAutoencoder", "TiedConv1d", "TiedConv2d", "TiedDecoder", "TiedLinear"]
