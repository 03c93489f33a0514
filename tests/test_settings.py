"""Settings in force."""

from __future__ import annotations

import contextlib

import pytest
import torch

import tiedfused
from tiedfused import functional, settings


def test_override_is_undone_after_an_error() -> None:
    before = settings.current()
    with contextlib.suppress(RuntimeError), settings.override(recompute=True, regime="tiled"):
        assert settings.current().recompute is True
        raise RuntimeError
    assert settings.current() is before


def test_override_refuses_what_the_environment_would() -> None:
    with (
        pytest.raises(ValueError, match="expected auto, stream, few_rows, bottleneck, chunked, native, tiled"),
        settings.override(regime="cublas"),
    ):
        pass


def test_a_plan_is_made_once_for_settings_that_come_again(monkeypatch) -> None:
    x, weight, planned = torch.randn(3, 8), torch.randn(20, 8), []
    monkeypatch.setattr(functional, "_plans", {})
    plan_for = functional.plan_for
    monkeypatch.setattr(functional, "plan_for", lambda *problem: planned.append(made := plan_for(*problem)) or made)
    for regime in ("tiled", "auto", "tiled", "auto"):
        with settings.override(regime=regime, recompute=True), settings.override(recompute=False):
            tiedfused.functional.tied_encode_decode(x, weight.requires_grad_())
    assert [plan.request.in_force.regime for plan in planned] == ["tiled", "auto"]
    assert all(plan.save_latent for plan in planned)
