"""`tiedfused tune` from end to end on interpreted kernels, whose times must never be taken for a GPU's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 set before triton is imported", allow_module_level=True)

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from tiedfused import tiles
from tiedfused.benchmark import device, kernels, tune
from tiedfused.benchmark.peers import Operands
from tiedfused.benchmark.shapes import Shape
from tiedfused.planning import Plan
from tiedfused.tiles import AnyTile, GemmTile, LatentTile, Tile

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")
STREAM = ("forward", "input_grad", "weight_grad")
SPACE: dict[type[AnyTile], list[AnyTile]] = {
    Tile: [Tile(16, 16, 4, 2), Tile(16, 32, 4, 2), Tile(4096, 16, 4, 2)],
    GemmTile: [GemmTile(32, 32, 32, 4, 2), GemmTile(4096, 32, 32, 4, 2)],
    LatentTile: [LatentTile(32, 64, 32, 4, 2), LatentTile(4096, 64, 32, 4, 2)],
}


@pytest.fixture(autouse=True)
def _few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_space", lambda kernel, before, width: iter(SPACE[type(before)]))


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Tune these kernels alone."""
    of = tune.kernels_of
    monkeypatch.setattr(tune, "kernels_of", lambda *arguments: [name for name in of(*arguments) if name in names])


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_a_launch_is_the_kernel_s_work(kernel: str) -> None:
    """What is timed as a kernel computes what that kernel is for, on operands of its own for each call."""
    rows = int(kernel.rpartition("_")[2]) if kernel in tiles.FEW_ROWS_KERNELS else 100
    shape = Shape(rows, 24, 200)
    if kernel in ("bottleneck_latent", "bottleneck_decode"):  # in the plan where there are too few row tiles
        shape = Shape(16, 2000, 200)
    p = kernels.planned(kernel, shape, torch.float32, CPU, 90)
    assert p is not None
    assert (p.block(shape), p.launches(shape)) == (shape, 1)
    sets = [Operands.random(shape, torch.float32, seed=seed) for seed in range(2)]
    for operands, call in zip(sets, kernels.launches(p, sets), strict=True):
        x, weight, bias_enc, bias_dec = (t.detach() for t in operands.leaves)
        a, grad_y = x @ weight.t() + bias_enc, operands.grad_y
        h, grad_a = a.relu(), (grad_y @ weight.t()) * (a > 0)
        y, grad_x, grad_weight = h @ weight + bias_dec, grad_a @ weight, grad_a.t() @ x + h.t() @ grad_y
        found = tune._tensors(call())
        expected = {
            "forward": (y,),
            "input_grad": (grad_x,),
            "weight_grad": (grad_weight, grad_a.sum(0)),
            "weight_grad_atomic": (grad_weight, grad_a.sum(0), grad_x),
            "chunk_encode": (h,),
            "chunk_latent": (h, grad_a),
            "bottleneck_forward": (y,),
            "bottleneck_latent": (h,),
            "bottleneck_latent_grad": (h, grad_a),
        }.get("forward" if kernel in tiles.FEW_ROWS_KERNELS else kernel)
        if expected is None:  # of buffers that only the call knows: the shape, and the operands that enter
            assert found[0].shape == (weight if kernel.endswith("weight_grad") else x).shape
            assert torch.isfinite(found[0]).all()
            assert found[0].abs().max() > 0.1
            continue
        for result, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(result, truth, rtol=1e-3, atol=1e-3)


def test_names_are_those_of_the_functions() -> None:
    from tiedfused._backends import triton as backend

    for kernel in tiles.KERNELS:
        name = kernels.function_name(kernel)
        module = __import__(f"{backend.__name__}.{name.removesuffix('_kernel')}", fromlist=[name])
        assert getattr(module, name).__name__ == name


def run(out: Path, *shapes: str, **options: object) -> tuple[Path | None, list[str]]:
    problems: list[str] = []
    arguments = {"shapes": shapes, "dtypes": ["float32"], "device": "cpu", "out": out, "problems": problems}
    return tune.tune(**{**arguments, **options}), problems  # type: ignore[arg-type]


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, *STREAM, "chunk_weight_grad", "bottleneck_forward")
    path, problems = run(tmp_path, "40,16,48", "nope")
    assert path == tmp_path / "interpreter.json"
    assert [line.split(":")[0] for line in problems] == ["shapes"]
    config = json.loads(path.read_text())
    assert config["status"] == "interpreter, not measured"
    for kernel, key, kind in (
        *((name, "16", Tile) for name in STREAM),
        ("chunk_weight_grad", "any", GemmTile),
        ("bottleneck_forward", "64", LatentTile),
    ):
        fits = [list(dataclasses.astuple(tile)) for tile in SPACE[kind][:-1]]
        measured = config["measured"][kernel]["4"][key]
        assert measured["shape"] == [40, 16, 48]
        assert 0 < measured["ms"] <= measured["before_ms"]
        assert measured["of"] == len(fits)
        assert config["tiles"][kernel]["4"][key] in [*fits, list(measured["before"].values())]
        assert key not in config["efficiency"].get(kernel, {}).get("4", {})

    # a second run keeps what it does not tune
    run(tmp_path, "40,32,48")
    config = json.loads(path.read_text())
    assert set(config["tiles"]["forward"]["4"]) == {"16", "32"}

    # even under the name of an architecture it is not used
    path.rename(tmp_path / "sm90.json")
    with pytest.warns(UserWarning, match="interpreter, not measured"):
        assert tiles.lookup("forward", 16, "float32", 90, str(tmp_path))[1] == "configs/sm90.json"


Calls = list[Callable[[], tuple[torch.Tensor, ...]]]


def test_a_tile_that_gives_another_result_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(p: kernels.Planned, sets: list[Operands]) -> Calls:
        factor = 1.5 if p.one.tile in SPACE[Tile] else 1.0
        return [lambda call=call: tuple(factor * t for t in call()) for call in kernels.launches(p, sets)]

    only(monkeypatch, "forward")
    monkeypatch.setattr(tune, "launches", wrong)
    path, _ = run(tmp_path, "40,16,48")
    assert path is not None
    config = json.loads(path.read_text())
    before = config["measured"]["forward"]["4"]["16"]["before"]
    assert config["tiles"]["forward"]["4"]["16"] == list(before.values())


def test_a_tile_in_force_that_gives_no_number_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(p: kernels.Planned, sets: list[Operands]) -> Calls:
        return [lambda call=call: tuple(t * float("nan") for t in call()) for call in kernels.launches(p, sets)]

    only(monkeypatch, "forward")
    monkeypatch.setattr(tune, "launches", wrong)
    path, (problem,) = run(tmp_path, "40,16,48")
    assert path is None
    assert problem.endswith(", which is in force, gives results that are not finite")


def test_a_kernel_that_fails_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(p: kernels.Planned, sets: list[Operands]) -> Calls:
        if p.one.kernel == "forward":
            raise RuntimeError("out of resources\nsecond line")
        return kernels.launches(p, sets)

    only(monkeypatch, *STREAM)
    monkeypatch.setattr(tune, "launches", fails)
    path, problems = run(tmp_path, "40,16,48")
    assert problems == ["forward (40, 16, 48) float32: out of resources"]
    assert path is not None
    assert set(json.loads(path.read_text())["tiles"]) == {"input_grad", "weight_grad"}


def test_a_tile_that_makes_the_gpu_fail_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, and nothing else is blamed or compiled in vain."""
    tried: list[Any] = []

    def fails(p: kernels.Planned, sets: list[Operands]) -> Calls:
        tried.append(p.one.tile)
        if p.one.tile in SPACE[Tile]:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access\nsecond line")
        return kernels.launches(p, sets)

    only(monkeypatch, *STREAM)
    monkeypatch.setattr(tune, "launches", fails)
    monkeypatch.setattr(device, "has_failed", lambda _: tried[-1] in SPACE[Tile])
    path, problems = run(tmp_path, "40,16,48")
    assert path is None
    assert problems == [
        f"forward (40, 16, 48) float32: {tried[-1]}: Triton Error [CUDA]: an illegal memory access",
        "the GPU has failed: 2 more kernels are not tuned",
    ]
    assert len(tried) == 2


def test_a_budget_that_is_used_up(tmp_path: Path) -> None:
    path, problems = run(tmp_path, "40,16,48", budget=0.0)
    assert path is None
    assert problems[0] == "forward (40, 16, 48) float32: not tuned, the budget of 0 s is used up"
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder() -> None:
    problems: list[str] = []
    assert tune.tune(shapes=["40,16,48"], device="cpu", problems=problems) is None
    assert problems == ["out: got nothing, and TIEDFUSED_CONFIG_DIR is empty; expected a folder"]


@pytest.mark.parametrize("regime", ["stream", "bottleneck", "chunked"])
def test_a_regime_that_is_asked_for_serves_both_passes(regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiedfused._backends import triton as backend

    served: list[str] = []

    def note(name: str) -> None:
        of = getattr(backend, name)

        def noting(*operands: Any) -> Any:
            made = next(one for one in operands if isinstance(one, Plan))
            served.append((made.forward if name == "forward" else made.backward).regime)
            return of(*operands)

        monkeypatch.setattr(backend, name, noting)

    note("forward")
    note("backward")
    Operands.random(Shape(100, 24, 200), torch.float32).named(regime, "bwd")()
    assert served == [regime, regime]
