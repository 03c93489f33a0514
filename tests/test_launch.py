"""What `_backends/triton/launch.py` saves the host: later launches are those that would have been made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from tiedfused import settings
from tiedfused._backends.triton import chunked, launch
from tiedfused._backends.triton.combine import combine
from tiedfused.activations import get_activation
from tiedfused.planning import Plan, plan
from tiedfused.regimes import chunked as chunked_regime

N, D, H = 600, 72, 1000
BF16 = torch.bfloat16


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride(), value.storage_offset()
    return value


class Driver:
    """In the place of Triton's own launches; counts those for which Triton has to find the compiled kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, compiles: bool) -> None:
        self.launches: list[tuple[str, Any, list[Any]]] = []
        self.searches: list[str] = []
        driver = self

        class Compiled:
            def __init__(self, name: str) -> None:
                self.name = name

            def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
                return lambda *arguments: driver.note(self.name, grid[:2], list(arguments))

        def run(kernel: JITFunction, *, grid: tuple[int, int], warmup: bool, **arguments: Any) -> Compiled | None:
            driver.searches.append(kernel.__name__)
            driver.note(kernel.__name__, grid, [arguments[name] for name in kernel.arg_names])
            return Compiled(kernel.__name__) if compiles else None

        monkeypatch.setattr(JITFunction, "run", run)
        monkeypatch.setattr(launch, "CompiledKernel", Compiled)

    def note(self, name: str, grid: tuple[int, int], arguments: list[Any]) -> None:
        self.launches.append((name, grid, [described(value) for value in arguments]))


def of_chunks(rows: int, latents: int, *, stats: bool) -> Plan:
    with settings.override(regime="chunked"):
        made = plan(N, D, H, dtype=BF16, device="cuda", capability=90, recompute=True, stats=stats)
    assert made.backward is not None
    forward, backward = (dataclasses.replace(part, chunk=(rows, latents)) for part in (made.forward, made.backward))
    return dataclasses.replace(made, forward=forward, backward=backward)


def with_x_apart(made: Plan) -> Plan:
    """The same with x̄ in a sweep of its own, as where its sum does not fit the workspace."""
    assert made.backward is not None and made.backward.chunk is not None
    small = dataclasses.replace(made.request, in_force=dataclasses.replace(made.request.in_force, workspace_bytes=0))
    passes = chunked_regime._backward_passes(small, False, *made.backward.chunk)
    assert [one.kernel for one in passes].count("chunk_latent") == 2
    return dataclasses.replace(made, backward=dataclasses.replace(made.backward, passes=passes))


def step(made: Plan, offset: int) -> None:
    """Forward and backward on rows that begin `offset` numbers into wider ones."""

    def view(rows: int) -> Tensor:
        return torch.zeros(rows, D + 16, dtype=BF16)[:, offset : offset + D]

    x, weight, bias_enc, bias_dec = view(N), view(H), torch.zeros(H, dtype=BF16), torch.zeros(D, dtype=BF16)
    chunked.forward(x, weight, bias_enc, bias_dec, made)
    penalties = (torch.zeros(N), torch.zeros(H)) if made.stats else (None, None)
    chunked.backward(x, x, weight, bias_enc, None, made, (True, True, True), *penalties)


@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("rows, latents", [(N, 256), (128, H), (128, 256), (N, H)])
def test_later_launches_are_as_they_would_have_been(
    rows: int, latents: int, apart: bool, stats: bool, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = of_chunks(rows, latents, stats=stats)
    made = with_x_apart(made) if apart else made
    with monkeypatch.context() as patch:
        expected = Driver(patch, compiles=False)
        step(made, offset)
    found = Driver(monkeypatch, compiles=True)
    step(made, offset)
    assert found.launches == expected.launches
    assert len(expected.searches) == len(expected.launches)
    assert (len(found.searches) < len(expected.searches)) == ((rows, latents) != (N, H))


def test_later_rows_are_no_other_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk of rows has its own part of b̄_enc."""
    driver = Driver(monkeypatch, compiles=True)
    step(of_chunks(100, H, stats=False), 0)
    assert driver.searches.count("chunk_latent_kernel") == 2, "in forward and in backward"


def test_row_chunks_of_a_sweep_for_x_alone_are_the_same_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, compiles=True)
    step(with_x_apart(of_chunks(100, H, stats=False)), 0)
    assert driver.searches.count("chunk_latent_kernel") == 3, "in forward and in both sweeps of backward"


def test_statistics_of_later_chunks_are_the_same_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, compiles=True)
    step(of_chunks(N, 256, stats=True), 0)
    parts = [name for name, *_ in driver.launches].count("add_parts_kernel")
    # of rows, of 256 latents, of the other 232
    assert (parts, driver.searches.count("add_parts_kernel")) == (8, 3)


def test_operands_that_need_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles for dtypes and 16-byte alignment, and what is made of shapes and strides is made anew."""
    driver = Driver(monkeypatch, compiles=True)
    wide = torch.zeros(4, 64, dtype=torch.float32)
    repeats: launch.Repeats = {}

    def searched(partial: Tensor, bias: Tensor | None = None, f: str = "identity") -> bool:
        before = len(driver.searches)
        out = torch.zeros(partial.shape[1:])
        combine(partial, out, bias, activation=get_activation(f), repeats=repeats)
        return len(driver.searches) > before

    assert searched(wide[:2, None, :32])
    assert not searched(wide[2:, None, :32])
    assert not searched(wide[2:, None, 4:36])
    assert searched(wide[2:, None, 1:33]), "another alignment"
    assert searched(wide[:2, None, :16]), "another shape"
    assert searched(wide[::2, None, :32]), "another stride"
    assert searched(wide[:2, None, :32], torch.zeros(32)), "None before"
    assert searched(wide[:2, None, :32], torch.zeros(32, dtype=BF16)), "another dtype"
    assert searched(wide[:2, None, :32], f="relu"), "another activation"
