"""Reaching the two halves of every tied pair in a model, which no module hook sees on its own.

`TiedLinear.encode` and `decode` are methods, not modules, and `forward` computes both at once. For the time of a
`with` block `replaced` puts other functions in their place, on the instances: an attribute of an instance comes before
the method of its class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from tiedfused.nn import TiedConv1d, TiedConv2d, TiedDecoder, TiedLinear
from tiedfused.reference import LatentStats, latent_stats

Method = Callable[..., Any]
TiedLayer = TiedLinear | TiedConv1d | TiedConv2d
TIED_LAYERS = (TiedLinear, TiedConv1d, TiedConv2d)


def tied_layers(module: nn.Module) -> Iterator[tuple[str, TiedLayer]]:
    """Every layer in `module` that is both halves in one, and its name; "" is the module itself."""
    for name, m in module.named_modules():
        if isinstance(m, TIED_LAYERS):
            yield name, m


def mirrors(module: nn.Module) -> Iterator[tuple[str, TiedDecoder]]:
    """Every `TiedDecoder` in `module`, and its name."""
    for name, m in module.named_modules():
        if isinstance(m, TiedDecoder):
            yield name, m


@contextlib.contextmanager
def replaced(replacements: Sequence[tuple[nn.Module, str, Method]]) -> Iterator[None]:
    """Within the block, ``module.name`` is `method`, for each (module, name, method)."""
    for module, name, method in replacements:
        module.__dict__[name] = method
    try:
        yield
    finally:
        for module, name, _ in replacements:
            module.__dict__.pop(name, None)


@contextlib.contextmanager
def with_weight(owner: nn.Module, weight: Tensor) -> Iterator[None]:
    """Within the block ``owner.weight`` is `weight`: in the place of a parameter, of what pruning left as a plain
    attribute, or of the property of the class that a parametrization made for this module.
    """
    places: tuple[dict[str, Any], ...] = (owner._parameters, vars(owner))
    place = next((place for place in places if "weight" in place), None)
    before = type(owner).weight if place is None else place["weight"]  # type: ignore[attr-defined]

    def put(value: Any) -> None:
        if place is None:
            type(owner).weight = value  # type: ignore[attr-defined]
        else:
            place["weight"] = value

    put(weight)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def unfused(module: nn.Module) -> Iterator[None]:
    """Within the block every tied layer computes ``decode(encode(x))``, which stores its latent."""
    with replaced([(layer, "forward", _both_halves(layer)) for _, layer in tied_layers(module)]):
        yield


def _both_halves(layer: TiedLayer) -> Method:
    def forward(x: Tensor, return_stats: bool = False) -> Tensor | tuple[Tensor, LatentStats]:
        h = layer.encode(x)
        if isinstance(layer, TiedLinear):
            y = layer.decode(h)
            return (y, latent_stats(h)) if return_stats else y
        return layer.decode(h, x.shape[-layer.dimensions :])

    return forward


def shape(value: Any) -> str:
    """The shape of a tensor as text, of a tuple of them too, and the type's name of anything else."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, tuple):
        return ", ".join(map(shape, value))
    return type(value).__name__
