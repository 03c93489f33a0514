"""The peers compute the same layer, forward and backward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from numerics import assert_layer_matches, problem

from tiedfused import functional, settings
from tiedfused.benchmark.device import milliseconds
from tiedfused.benchmark.peers import LAYERS, PEERS, Operands, chosen
from tiedfused.benchmark.shapes import Shape
from tiedfused.settings import REGIME_NAMES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("compile", "max-autotune")])
def test_same_layer(name: str, dtype: torch.dtype) -> None:
    assert_layer_matches(LAYERS[name](), problem(33, 20, 70, dtype))


def test_backward_alone_is_the_backward_of_a_step() -> None:
    operands = Operands.random(Shape(12, 8, 20), torch.float32)
    step, alone = (operands.call(LAYERS["eager"](), which) for which in ("step", "bwd"))
    with pytest.raises(IndexError):
        alone.run()  # nothing was prepared: forward is not part of what is timed
    for _ in range(2):
        for one, other in zip(step(), alone(), strict=True):
            assert torch.equal(one, other)


def test_forward_has_no_gradient() -> None:
    (y,) = Operands.random(Shape(12, 8, 20), torch.float32).call(LAYERS["tiedfused"](), "fwd")()
    assert not y.requires_grad


def test_an_unknown_peer_costs_only_itself() -> None:
    problems: list[str] = []
    assert chosen(["tiled", "compile", "nope"], problems) == ["compile", "tiled"]
    assert problems == [f"peers: got 'nope'; expected {', '.join((*PEERS, *REGIME_NAMES))}"]
    assert chosen([], problems) == list(PEERS)


@pytest.mark.parametrize("which", ["fwd", "bwd", "step"])
def test_what_is_timed_of_a_forced_regime_is_the_layer(which: str, monkeypatch) -> None:
    """Planned by the first call, under settings that change before the clock starts."""
    call = Operands.random(Shape(3, 8, 20), torch.float32).named("tiled", which)
    regimes: list[str] = []
    monkeypatch.setattr(functional, "_plans", {})
    plan_for = functional.plan_for
    monkeypatch.setattr(functional, "plan_for", lambda *problem: regimes.append(regime()) or plan_for(*problem))
    timed = dataclasses.replace(call, run=lambda: (settings_in_time.append(settings.current()), call.run()))
    settings_in_time: list[settings.Settings] = []
    for _ in range(3):
        milliseconds(timed, torch.device("cpu"), warm=True)
    assert regimes == ["tiled"]
    assert {one.regime for one in settings_in_time} == {"tiled"} and regime() == "auto"


def regime() -> str:
    return settings.current().regime
