"""tiedfused: the tied encode-decode layer, y = g(f(x Wᵀ + b_enc) W + b_dec), fused."""

from tiedfused import analysis, corruption, functional, losses, metrics, nn, reference, settings
from tiedfused._backends import backends
from tiedfused.activations import activation_names, register_activation
from tiedfused.nn import TiedLinear
from tiedfused.planning import Plan, plan
from tiedfused.reference import LatentStats

__version__ = "0.1.0"

__all__ = [
    "LatentStats",
    "Plan",
    "TiedLinear",
    "activation_names",
    "analysis",
    "backends",
    "corruption",
    "functional",
    "losses",
    "metrics",
    "nn",
    "plan",
    "reference",
    "register_activation",
    "settings",
]
