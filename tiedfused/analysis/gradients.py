"""What each half of a tied pair contributes to the gradient of the one weight, and how gradients fare in depth."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tiedfused.analysis.halves import Method, mirrors, replaced, tied_layers, unfused, with_weight
from tiedfused.analysis.show import Shown, group, table

SMALL_SHARE = 0.01  # below this the weight is trained by one half alone
OPPOSED = -0.9  # a cosine below this: most of what the halves ask for cancels
VANISHING = 1e-3  # of the gradient's rms, from the last stage to the first


@dataclasses.dataclass(frozen=True)
class Pair:
    """One weight's gradient W̄ = āᵀx + hᵀō: the norms of both terms, of the sum, of W, and the terms' cosine."""

    name: str
    encoder: float
    decoder: float
    cosine: float
    total: float
    weight: float

    @property
    def share(self) -> float:
        """The encoder's part of the two norms, 0 to 1; nan if both are 0."""
        both = self.encoder + self.decoder
        return self.encoder / both if both else float("nan")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One half in the order of execution: the rms of its pre-activation (or pre-output), and of the gradient there."""

    name: str
    value: float
    gradient: float


@dataclasses.dataclass
class GradientReport(Shown):
    """Filled when the block of `gradient_report` ends.

    Args:
        pairs: a tied weight each.
        stages: a half each, in the order of execution: the norms through the depth of a stack.
        warnings: what looks wrong, in words.
    """

    pairs: list[Pair] = dataclasses.field(default_factory=list)
    stages: list[Stage] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def __rich__(self):  # type: ignore[no-untyped-def]
        pairs = table("weight", "‖āᵀx‖", "‖hᵀō‖", "encoder's share", "cosine", "‖W̄‖", "‖W̄‖ / ‖W‖")
        for p in self.pairs:
            numbers = (f"{v:.3g}" for v in (p.encoder, p.decoder))
            relative = p.total / p.weight if p.weight else float("nan")
            pairs.add_row(p.name, *numbers, f"{p.share:.0%}", f"{p.cosine:+.2f}", f"{p.total:.3g}", f"{relative:.2g}")
        stages = table("half", "rms", "gradient rms")
        for s in self.stages:
            stages.add_row(s.name, f"{s.value:.3g}", f"{s.gradient:.3g}")
        return group(pairs, stages, *(f"warning: {w}" for w in self.warnings))


@contextlib.contextmanager
def gradient_report(module: nn.Module) -> Iterator[GradientReport]:
    """Watch one forward and backward pass through a model's tied pairs.

    Gradients arrive in ``.grad`` as always, so the block can be a training step. Within it tied layers run as their two
    halves and store the latent, as plain PyTorch would: a step every hundred costs next to nothing in time, and where
    memory is short a part of a batch will do. Of a parametrized or pruned weight W is what comes of it, and W̄ the
    gradient there. Call the module itself in the block, not a compiled version of it.

    Args:
        module: anything with `TiedLinear`, `TiedAutoencoder`, `TiedConv1d`, `TiedConv2d` or `TiedDecoder` in it.

    Yields:
        The report, filled when the block ends.

    Example:
        >>> import torch, tiedfused
        >>> model = tiedfused.nn.TiedAutoencoder([16, 8, 4], bias=True)
        >>> x = torch.randn(32, 16)
        >>> with tiedfused.analysis.gradient_report(model) as report:
        ...     (model(x) - x).square().mean().backward()
        >>> [pair.name for pair in report.pairs]
        ['layers.0', 'layers.1']
        >>> [stage.name for stage in report.stages]
        ['layers.0.encode', 'layers.1.encode', 'layers.1.decode', 'layers.0.decode']
    """
    report = GradientReport()
    watched = _Watched()
    replacements: list[tuple[nn.Module, str, Method]] = []
    for name, layer in tied_layers(module):
        for half in ("encode", "decode"):
            method = f"forward_{half[:3]}"
            stage = f"{name}.{half}".lstrip(".")
            replacements.append((layer, method, watched.half(name, layer, getattr(layer, method), half, stage)))
    names = {m: name for name, m in module.named_modules()}
    encoders = {}
    for name, mirror in mirrors(module):
        encoder = mirror.encoder
        encoders[encoder] = pair = names.get(encoder, "encoder")
        replacements.append((mirror, "forward", watched.half(pair, encoder, mirror.forward, "decode", name)))
    for encoder, pair in encoders.items():
        replacements.append((encoder, "forward", watched.half(pair, encoder, encoder.forward, "encode", pair)))
    with unfused(module), replaced(replacements):
        yield report
    report.pairs.extend(watched.pairs())
    report.stages.extend(Stage(name, *rms) for name, rms in watched.stages.items())  # type: ignore[arg-type]
    report.warnings.extend(_warnings(report))


class _Watched:
    """Collects, for each half, the gradient that it sends to the weight, and the rms at its output."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor | None] = {}
        self.shares: dict[tuple[str, str], Tensor] = {}
        self.stages: dict[str, list[float]] = {}

    def half(self, pair: str, owner: nn.Module, method: Method, which: str, stage: str) -> Method:
        """`method` with an alias of the weight in its place, so that its part of the gradient passes by itself."""
        self.weights[pair] = None  # pairs are reported in the order of this

        def watching(*args: Any, **kwargs: Any) -> Tensor:
            weight: Tensor = owner.weight  # type: ignore[assignment]
            self.weights[pair] = weight.detach()
            if not (torch.is_grad_enabled() and weight.requires_grad):
                return method(*args, **kwargs)
            alias = weight.view_as(weight)
            alias.register_hook(self._add((pair, which)))
            with with_weight(owner, alias):
                out = method(*args, **kwargs)
            rms = self.stages[stage] = [_rms(out), float("nan")]
            out.register_hook(lambda grad: rms.__setitem__(1, _rms(grad)))
            return out

        return watching

    def _add(self, key: tuple[str, str]) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            before = self.shares.get(key)
            self.shares[key] = grad.detach().clone() if before is None else before + grad

        return hook

    def pairs(self) -> Iterator[Pair]:
        for name, weight in self.weights.items():
            if weight is None:
                continue
            zero = torch.zeros_like(weight)
            terms = (self.shares.get((name, "encode"), zero), self.shares.get((name, "decode"), zero))
            encoder, decoder = (t.double().flatten() for t in terms)
            norms = encoder.norm(), decoder.norm()
            cosine = torch.dot(encoder, decoder) / (norms[0] * norms[1])
            total = (encoder + decoder).norm()
            yield Pair(name, *map(float, (*norms, cosine, total, weight.double().norm())))


def _rms(t: Tensor) -> float:
    return float(t.detach().double().square().mean().sqrt())


def _warnings(report: GradientReport) -> Iterator[str]:
    if not any(p.encoder or p.decoder for p in report.pairs):
        yield "no gradient reached a tied weight: call the module and backward() inside the block"
        return
    for p in report.pairs:
        if not torch.isfinite(torch.tensor([p.encoder, p.decoder])).all():
            yield f"{p.name}: the gradient is not finite"
        elif p.share < SMALL_SHARE or p.share > 1 - SMALL_SHARE:
            who = "decoder" if p.share < SMALL_SHARE else "encoder"
            yield f"{p.name}: more than {1 - SMALL_SHARE:.0%} of the gradient comes from the {who}"
        elif p.cosine < OPPOSED:
            yield f"{p.name}: the two terms nearly cancel, cosine {p.cosine:+.2f}"
    first, last = report.stages[0], report.stages[-1]
    if first.gradient < VANISHING * last.gradient:
        yield f"vanishing: the gradient is {last.gradient:.1e} at {last.name}, {first.gradient:.1e} at {first.name}"
    elif VANISHING * first.gradient > last.gradient:
        yield f"exploding: the gradient is {last.gradient:.1e} at {last.name}, {first.gradient:.1e} at {first.name}"
