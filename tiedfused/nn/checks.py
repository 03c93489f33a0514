"""The checks that modules share: one line that names the module, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn


def describe(module: nn.Module) -> str:
    """The module in one line, without its children."""
    return f"{module._get_name()}({module.extra_repr()})"


def refuse_script(module: nn.Module) -> nn.Module:
    """A layer's ``__prepare_scriptable__``, which `torch.jit.script` calls first: by itself it fails less clearly."""
    raise RuntimeError(f"{describe(module)}: torch.jit.script cannot compile it; torch.compile and torch.export can")


def checked_size(name: str, size: int, least: int = 1) -> int:
    """`size` as an int, of NumPy's integers too; a ValueError unless it is an integer of at least `least`."""
    if isinstance(size, torch.SymInt) or torch.jit.is_tracing():  # of an input whose size a traced graph leaves open
        return size  # type: ignore[return-value]
    if not isinstance(size, Integral) or isinstance(size, bool) or size < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {size!r}")
    return int(size)


def check_tensor(module: nn.Module, name: str, t: Tensor) -> None:
    """A TypeError unless `t` is a tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{describe(module)}: {name}: expected a tensor, got {type(t).__name__}")


def check_features(module: nn.Module, name: str, t: Tensor, size: int) -> None:
    """A ValueError unless `t` is ``[..., size]``."""
    check_tensor(module, name, t)
    if t.shape[-1:] != (size,):
        raise ValueError(f"{describe(module)}: {name}: expected shape [..., {size}], got {list(t.shape)}")


def per_dimension(name: str, value: int | Sequence[int], dimensions: int, least: int) -> tuple[int, ...]:
    """One integer of at least `least` for each spatial dimension, from one for all or a sequence of them."""
    sizes = tuple(value) if isinstance(value, Sequence) else (value,) * dimensions
    if len(sizes) != dimensions:
        raise ValueError(f"{name}: expected an integer or {dimensions} of them, got {value!r}")
    return tuple(checked_size(name, size, least) for size in sizes)
