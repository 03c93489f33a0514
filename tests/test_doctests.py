"""Every public function and module shows an example; that the examples are right, pytest's doctests check."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import tiedfused
from tiedfused import analysis, corruption, functional, losses, metrics, nn, profile


def public() -> list[Any]:
    """Functions and modules (not the results that they return) by their own home."""
    found = [getattr(home, name) for home in (tiedfused, analysis, nn) for name in home.__all__]
    for home in (corruption, losses, metrics, profile):
        found += [
            o for name, o in vars(home).items() if name[0] != "_" and getattr(o, "__module__", "") == home.__name__
        ]
    found.append(functional.tied_encode_decode)
    shown = (o for o in found if inspect.isfunction(o) or (inspect.isclass(o) and issubclass(o, torch.nn.Module)))
    return list(dict.fromkeys(shown))


@pytest.mark.parametrize("thing", public(), ids=lambda o: f"{o.__module__}.{o.__name__}")
def test_shows_an_example(thing: Any) -> None:
    assert ">>>" in (thing.__doc__ or "")
