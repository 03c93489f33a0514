"""The shapes through a model, half by half."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from tiedfused.analysis.halves import TIED_LAYERS, Method, replaced, shape, tied_layers
from tiedfused.analysis.show import Shown, group, table
from tiedfused.nn import TiedLinear


@dataclasses.dataclass(frozen=True)
class Trace(Shown):
    """The calls of a forward pass.

    Args:
        rows: for each call that ended, in that order: name, type, input and output shapes, and a note.
        error: what stopped the pass, or None. The call that failed is the one after the last row.
    """

    rows: tuple[tuple[str, str, str, str, str], ...]
    error: str | None

    def __rich__(self):  # type: ignore[no-untyped-def]
        shown = table("call", "type", "input", "output", "", text_columns=5)
        for row in self.rows:
            shown.add_row(*row)
        return group(shown, *([] if self.error is None else [f"stopped: {self.error}"]))


@torch.no_grad()
def trace(module: nn.Module, x: Tensor) -> Trace:
    """Run a model on x and record the shape into and out of every layer, and of each half of a tied pair.

    A layer that fails does not raise: the trace ends there and says why, which is where to look for a wrong shape.

    Args:
        module: a model that takes one tensor.
        x: that tensor.

    Example:
        >>> import torch, tiedfused
        >>> model = tiedfused.nn.TiedAutoencoder([16, 8, 4])
        >>> print(tiedfused.analysis.trace(model, torch.randn(32, 16)))
        call             type             input     output
        ...
        layers.0.encode  TiedLinear       [32, 16]  [32, 8]
        layers.1         TiedLinear       [32, 8]   [32, 8]   latent [32, 4], fused
        layers.0.decode  TiedLinear       [32, 8]   [32, 16]
        (model)          TiedAutoencoder  [32, 16]  [32, 16]
    """
    rows: list[tuple[str, str, str, str, str]] = []

    def record(name: str, m: nn.Module, arguments: Any, out: Any) -> None:
        note = ""
        if isinstance(m, TIED_LAYERS) and not name.endswith(("encode", "decode")):
            note = f"latent {shape(type(m).encode(m, arguments[0]))}"  # type: ignore[arg-type]
            note += ", fused" if isinstance(m, TiedLinear) or m._patches_tile(arguments[0]) else ""
        rows.append((name, m._get_name(), ", ".join(map(shape, arguments)), shape(out), note))

    def half(name: str, m: nn.Module, method: Method) -> Method:
        def recording(*args: Any, **kwargs: Any) -> Tensor:
            out = method(*args, **kwargs)
            record(name, m, args[:1], out)
            return out

        return recording

    replacements: list[tuple[nn.Module, str, Method]] = [
        (layer, which, half(f"{name}.{which}".lstrip("."), layer, getattr(layer, which)))
        for name, layer in tied_layers(module)
        for which in ("encode", "decode")
    ]
    error = None
    with replaced(replacements), contextlib.ExitStack() as hooks:
        for name, m in module.named_modules():
            hook = m.register_forward_hook(
                lambda m, args, out, name=name or "(model)": record(name, m, args, out)  # type: ignore[misc]
            )
            hooks.callback(hook.remove)
        try:
            module(x)
        except (RuntimeError, ValueError, TypeError, IndexError) as caught:
            error = (str(caught).splitlines() or [type(caught).__name__])[0]
    return Trace(tuple(rows), error)
