"""A wrong result has no speed, too little memory costs one peer, and what is reported is what was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tiedfused.benchmark import device as devices
from tiedfused.benchmark import measure
from tiedfused.benchmark.measure import NAMES, Judge, measure_cell, memory_sweep, same_plan
from tiedfused.benchmark.peers import LAYERS, PEERS, Operands
from tiedfused.benchmark.shapes import Shape

CPU = torch.device("cpu")
SHAPE = Shape(300, 24, 500)


def judged(dtype: torch.dtype = torch.float32) -> tuple[Judge, list[Tensor]]:
    """A calibrated judge, and tiedfused's results."""
    operands = Operands.random(SHAPE, dtype)
    judge = Judge(operands, "step")
    judge.calibrate(operands.call(LAYERS["eager"](), "step")())
    return judge, [t.clone() for t in operands.call(LAYERS["tiedfused"](), "step")()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_right_results_pass(dtype: torch.dtype) -> None:
    judge, results = judged(dtype)
    error, why = judge.error(results)
    assert why is None
    assert 0 < error < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", range(len(NAMES)), ids=NAMES.__getitem__)
def test_a_wrong_result_does_not(which: int, dtype: torch.dtype) -> None:
    judge, results = judged(dtype)
    results[which] *= 1.2
    assert str(judge.error(results)[1]).startswith(f"{NAMES[which]} is wrong")


@pytest.mark.parametrize("which", range(3), ids=NAMES.__getitem__)
def test_nor_does_one_wrong_row_that_has_no_truth(which: int) -> None:
    judge, results = judged(torch.bfloat16)
    rows = judge._truth[NAMES[which]][0]
    assert rows is not None
    free = next(row for row in range(len(results[which])) if row not in rows)
    results[which][free] = 0
    assert "a row differs from eager's" in str(judge.error(results)[1])


@pytest.mark.parametrize("which", range(len(NAMES)), ids=NAMES.__getitem__)
def test_nor_does_a_nan(which: int) -> None:
    judge, results = judged()
    results[which].view(-1)[7] = float("nan")
    assert "is wrong" in str(judge.error(results)[1])


def test_without_eager_the_bound_is_wider() -> None:
    operands = Operands.random(SHAPE, torch.bfloat16)
    results = operands.call(LAYERS["tiedfused"](), "step")()
    assert Judge(operands, "step").error(results)[1] is None
    assert Judge(operands, "step").error([t * 1.2 for t in results])[1] is not None


def cell(which: str, peers: list[str], shape: Shape = SHAPE) -> dict[str, Any]:
    reference = devices.ceilings(CPU, torch.float32)
    return measure_cell(shape, torch.float32, which, peers, CPU, reference, budget=0.0)


@pytest.mark.usefixtures("small_machine")
def test_cell() -> None:
    found = cell("step", ["eager", "checkpoint", "epilogue"])
    assert set(found["ms"]) == {"eager", "checkpoint", "epilogue", "tiedfused", "low memory"}
    assert all(low <= median <= high for median, low, high in found["ms"].values())
    assert found["rounds"] == measure.FEWEST_ROUNDS
    assert (found["skipped"], found["warm_ms"]) == ({}, {})
    assert found["bytes"]["eager"] >= 2 * SHAPE.n * SHAPE.h * 4
    assert min(found["rates"].values()) > 0
    few = cell("fwd", ["eager", "checkpoint"], Shape(4, 24, 500))
    assert set(few["ms"]) == set(few["warm_ms"]) == {"eager", "tiedfused"}
    assert set(cell("bwd", [])["ms"]) == {"tiedfused", "low memory"}


@pytest.mark.usefixtures("small_machine")
def test_wrong_peer_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, "tiedfused", lambda: lambda *t: LAYERS["eager"]()(*t) * 1.2)
    monkeypatch.setitem(LAYERS, "epilogue", lambda: lambda *t: 1 / 0)
    found = cell("fwd", ["eager", "epilogue"])
    assert set(found["ms"]) == {"eager"}
    assert found["skipped"]["tiedfused"].startswith("y is wrong: error 0.2")
    assert found["skipped"]["epilogue"] == "ZeroDivisionError: division by zero"


@pytest.mark.usefixtures("small_machine")
def test_a_peer_that_makes_the_gpu_fail_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, "epilogue", lambda: lambda *t: 1 / 0)
    monkeypatch.setattr(devices, "has_failed", lambda _: True)
    with pytest.raises(RuntimeError, match=r"^epilogue: ZeroDivisionError: division by zero$"):
        cell("fwd", ["eager", "epilogue", "checkpoint"])


@pytest.mark.usefixtures("small_machine")
def test_too_little_memory_costs_those_who_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(2000, 8, 2000)
    monkeypatch.setattr(devices, "free_memory", lambda _: 10 << 20)
    found = cell("step", ["eager", "epilogue"], shape)
    assert set(found["ms"]) == {"tiedfused"}
    assert set(found["skipped"]) == {"eager", "epilogue"}
    assert found["skipped"]["eager"] == "not enough memory: 3 latents are 46 MiB, 10 MiB are free"
    assert memory_sweep([shape], torch.float32, list(PEERS), CPU)[0]["bytes"].keys() == {"tiedfused"}
    monkeypatch.setattr(devices, "free_memory", lambda _: 1 << 10)
    with pytest.raises(torch.OutOfMemoryError, match=r"about \d+ MiB are needed"):
        cell("step", ["eager"], shape)


def test_low_memory_is_measured_where_it_is_another_plan() -> None:
    assert same_plan(Shape(4096, 64, 4096), torch.float32, "step", CPU)
    assert not same_plan(Shape(2048, 768, 6144), torch.float32, "step", CPU)
    assert same_plan(Shape(2048, 768, 6144), torch.float32, "fwd", CPU)


def test_memory_against_h_grows_for_eager_alone() -> None:
    small, large = memory_sweep([Shape(512, 16, 4096), Shape(512, 16, 16384)], torch.float32, ["eager"], CPU)
    assert large["bytes"]["eager"] > 3.5 * small["bytes"]["eager"]
    assert large["bytes"]["tiedfused"] < 1.5 * small["bytes"]["tiedfused"]


def test_a_regime_can_be_asked_for(small_machine: None) -> None:
    """It is measured beside what the plan chooses, under its own name and with its own plan; else left out."""
    reference = devices.ceilings(CPU, torch.float32)
    cell = measure_cell(SHAPE, torch.float32, "bwd", ["eager", "tiled", "stream"], CPU, reference, 0.1)
    assert set(cell["ms"]) == {"eager", "tiled", "tiedfused", "low memory"}
    assert cell["skipped"] == {}
