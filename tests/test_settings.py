"""Settings in force."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

import tiedfused
from tiedfused import functional, planning, settings


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


def test_override_that_fails_changes_nothing() -> None:
    before = settings.current(), settings.number
    with pytest.raises(TypeError, match="unhashable"), settings.override(config_dir=["x"]):
        pass
    assert (settings.current(), settings.number) == before


@pytest.mark.parametrize("workspace_bytes", [1e6, 1000.5, True, "256"])
def test_workspace_is_whole_bytes(workspace_bytes: object) -> None:
    with (
        pytest.raises(ValueError, match=rf"workspace_bytes: got {workspace_bytes!r}; expected an int"),
        settings.override(workspace_bytes=workspace_bytes),
    ):
        pass


def test_no_two_settings_have_one_number() -> None:
    """Not even where one is numbered while another is, as by two threads."""
    other, numbers = settings.Settings(config_dir="one of this test"), []

    class Interrupted(settings.Settings):
        def __hash__(self) -> int:
            numbers.append(settings.number_of(other))
            return super().__hash__()

    interrupted = Interrupted(config_dir="another of this test")
    number = settings.number_of(interrupted)
    assert settings.number_of(interrupted) == number
    assert set(numbers) == {settings.number_of(other)} and number not in numbers


def test_a_plan_made_under_another_threads_settings_is_not_kept(monkeypatch) -> None:
    x, weight, planned = torch.randn(3, 9), torch.randn(20, 9).requires_grad_(), []
    keyed, changed = threading.Event(), threading.Event()
    monkeypatch.setattr(functional, "_plans", {})
    plan_for = functional.plan_for

    def slow_plan_for(*problem):
        keyed.set()
        assert changed.wait(10)
        planned.append(plan_for(*problem))
        return planned[-1]

    monkeypatch.setattr(functional, "plan_for", slow_plan_for)
    call = threading.Thread(target=lambda: tiedfused.functional.tied_encode_decode(x, weight))
    call.start()
    assert keyed.wait(10)
    with settings.override(recompute=True, regime="tiled") as others:
        changed.set()
        call.join()
    for _ in range(2):
        tiedfused.functional.tied_encode_decode(x, weight)
    assert [plan.request.in_force for plan in planned] == [others, settings.current()]
    assert [plan.save_latent for plan in planned] == [False, True]


def test_a_plan_depends_on_the_settings_of_its_request_alone() -> None:
    request = tiedfused.plan(5, 768, 1024).request
    with settings.override(workspace_bytes=0):
        assert planning.make_plan.__wrapped__(request).save_latent


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
