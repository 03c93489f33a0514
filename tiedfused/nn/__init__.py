"""Modules."""

from tiedfused.nn.tied_linear import TiedLinear

__all__ = ["TiedLinear"]
