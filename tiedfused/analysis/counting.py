"""What tying and fusing save: parameters, optimiser state, memory of a step, FLOPs."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tiedfused.analysis.halves import mirrors, tied_layers, unfused
from tiedfused.analysis.show import Shown, table
from tiedfused.profile import peak_memory
from tiedfused.settings import MIB

ADAM_STATES = 2


@dataclasses.dataclass(frozen=True)
class Summary(Shown):
    """The cost of a training step.

    Args:
        batch: the shape it was measured on.
        parameters: as it is, tied.
        untied_parameters: with a decoder weight of its own for each pair, without a parametrization.
        parameter_bytes: of the parameters as it is.
        untied_parameter_bytes: of the parameters untied.
        step_bytes: measured peak of forward and backward above parameters and batch, gradients included; None on
            devices where PyTorch does not count.
        unfused_step_bytes: the same with every latent stored.
        flops: of forward and backward in theory; tying and fusing change nothing about it.
    """

    batch: tuple[int, ...]
    parameters: int
    untied_parameters: int
    parameter_bytes: int
    untied_parameter_bytes: int
    step_bytes: int | None
    unfused_step_bytes: int | None
    flops: int

    def __rich__(self):  # type: ignore[no-untyped-def]
        shown = table("", "tied, fused", "tied, unfused", "untied", title=f"a training step on {list(self.batch)}")
        more = self.untied_parameter_bytes - self.parameter_bytes  # untied: so much more gradient in the same step
        untied_step = None if self.unfused_step_bytes is None else self.unfused_step_bytes + more
        count = f"{self.parameters:,}"
        shown.add_row("parameters", count, count, f"{self.untied_parameters:,}")
        for label, factor in (("parameters, MiB", 1), ("Adam's state, MiB", ADAM_STATES)):
            tied = _mib(factor * self.parameter_bytes)
            shown.add_row(label, tied, tied, _mib(factor * self.untied_parameter_bytes))
        shown.add_row("peak of a step, MiB", _mib(self.step_bytes), _mib(self.unfused_step_bytes), _mib(untied_step))
        shown.add_row("FLOPs", *[f"{self.flops:.3g}"] * 3)
        return shown


def summary(module: nn.Module, batch: Tensor) -> Summary:
    """Count and measure a training step of a model with tied pairs.

    Runs the model on `batch` a few times, forward and backward on the mean square of its output, in the mode that it is
    in; gradients that it has are kept, buffers (running means) are not.

    Args:
        module: a model that takes one tensor.
        batch: that tensor.

    Raises:
        ValueError: the model has no parameter that needs a gradient.

    Example:
        >>> import torch, tiedfused
        >>> result = tiedfused.analysis.summary(tiedfused.TiedLinear(64, 512, True), torch.randn(32, 64))
        >>> result.parameters, result.untied_parameters, result.flops  # the last 10 · 32 · 64 · 512
        (33344, 66112, 10485760)
        >>> print(result)
         a training step on [32, 64]
        ...
    """
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ValueError("module: expected a parameter that requires a gradient, got none")
    weights: list[Tensor] = [layer.weight for _, layer in tied_layers(module)]
    weights += [mirror.encoder.weight for _, mirror in mirrors(module)]

    def step() -> None:
        torch.autograd.grad(module(batch).square().mean(), trained, allow_unused=True)

    def peak() -> int | None:
        if batch.device.type not in ("cpu", "cuda"):
            return None
        step()
        return peak_memory(step, batch.device)

    with FlopCounterMode(display=False) as counter:
        # of what leads to leaves: its hooks refuse a leaf as the argument of a module, as a parametrization's is
        aliases = {name: p.view_as(p) for name, p in module.named_parameters()}
        out = torch.func.functional_call(module, aliases, batch.view_as(batch))
        torch.autograd.grad(out.square().mean(), trained, allow_unused=True)
    fused = peak()
    with unfused(module):
        plain = peak()
    return Summary(
        tuple(batch.shape),
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters) + sum(w.numel() for w in weights),
        sum(p.nbytes for p in parameters),
        sum(p.nbytes for p in parameters) + sum(w.nbytes for w in weights),
        fused,
        plain,
        counter.get_total_flops(),
    )


def _mib(n_bytes: int | None) -> str:
    return "not measured" if n_bytes is None else f"{n_bytes / MIB:.2f}"
