"""Settings in force."""

from __future__ import annotations

import contextlib

import pytest

from tiedfused import settings


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
