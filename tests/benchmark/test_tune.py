"""`tiedfused tune`, as far as it goes without running a kernel; the rest is in tests/interpreter."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from tiedfused import settings, tiles
from tiedfused.benchmark import tune
from tiedfused.benchmark.kernels import planned
from tiedfused.benchmark.shapes import LISTS, Shape
from tiedfused.cli import app
from tiedfused.planning import make_plan, plan
from tiedfused.tiles import FEW_ROWS_KERNELS, KERNELS, check_tile, lookup, packaged, padded

RUN = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1"})


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [64, 128, 512])
def test_candidates_fit_and_hold_what_is_shipped(kernel: str, size: int) -> None:
    shipped, _ = lookup(kernel, size, "bfloat16", 90)
    found = tune.candidates(kernel, shipped, size, "bfloat16", 90)
    assert len(set(found)) == len(found)
    assert shipped in found
    for tile in found:
        check_tile(kernel, tile, padded(kernel, size), 2, 90)
    named = [one.tile for one in packaged() if one.candidate and one[:4] == (kernel, 90, "2", str(size))]
    assert found[: len(named)] == named, "what is packaged to be tried comes first"
    assert len(found) < len(list(tune._space(kernel, shipped, sum(padded(kernel, size))))), "the resource model prunes"


def test_the_default_list_tunes_every_kernel() -> None:
    work = tune._work(LISTS["tune"], ["bfloat16"], torch.device("cuda"), 90)
    assert {kernel for kernel, _, _ in work} == set(KERNELS) - {"weight_grad_atomic"}
    with settings.override(atomics=True):
        assert {kernel for kernel, _, _ in tune._work(LISTS["tune"], ["bfloat16"], torch.device("cuda"), 90)} == set(
            KERNELS
        )
    assert tune._work(LISTS["tune"], ["float64"], torch.device("cuda"), 90) == {}


def test_the_largest_problem_decides() -> None:
    shapes = [Shape(1024, 64, 2048), Shape(8192, 64, 4096), Shape(4096, 100, 4096)]
    work = tune._work(shapes, ["bfloat16", "float16"], torch.device("cuda"), 90)
    assert work["forward", "2", "64"] == (shapes[1], "bfloat16")
    assert work["forward", "2", "128"] == (shapes[2], "bfloat16")
    assert work["chunk_decode", "2", "any"] == (shapes[1], "bfloat16")


@pytest.mark.parametrize(
    ("kernel", "shape"),
    [
        ("forward", Shape(16384, 128, 32768)),
        ("weight_grad", Shape(16384, 100, 20000)),
        ("chunk_latent", Shape(16384, 512, 16384)),
    ],
)
def test_efficiency_is_what_the_cost_model_needs_to_predict_the_time(kernel: str, shape: Shape) -> None:
    one = tune._Kernel.__new__(tune._Kernel)
    with tempfile.TemporaryDirectory() as folder:
        one.kernel, one.shape, one.dtype, one.capability = kernel, shape, torch.bfloat16, 90
        one.device, one._folder = torch.device("cuda"), SimpleNamespace(name=folder)  # type: ignore[assignment]
        tile = one.planned().one.tile
        for fraction in (0.2, 0.45):
            predicted = one.planned(tile, fraction)
            found = one.efficiency(tile, predicted.one.predicted_ms / predicted.launches(shape))
            assert found == pytest.approx(fraction, rel=0.05)
        one.dtype = torch.float32
        assert one.efficiency(tile, 1.0) is None, "the peak in fp32 depends on the precision"


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_regime_predicts_with_it(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(128, 17768, 512) if kernel in ("bottleneck_latent", "bottleneck_decode") else Shape(4096, 128, 256)
    if kernel in FEW_ROWS_KERNELS:
        shape = Shape(int(kernel.rpartition("_")[2]), 128, 4096)
    predicted = []
    for fraction in (1.0, 0.001):
        figures = {kernel: (fraction, "test")}
        monkeypatch.setattr(tiles, "measured_efficiency", lambda name, *_, figures=figures: figures.get(name))
        make_plan.cache_clear()
        found = planned(kernel, shape, torch.bfloat16, torch.device("cuda"), 90)
        predicted.append(math.inf if found is None else found.one.predicted_ms)  # none: another kernel is faster then
    make_plan.cache_clear()
    assert predicted[0] < math.inf
    assert predicted[1] > 2 * predicted[0]


def test_where_memory_decides_there_is_no_efficiency(tmp_path: Path) -> None:
    one = tune._Kernel("few_rows_16", Shape(16, 512, 4096), torch.bfloat16, torch.device("cpu"), 90)
    one.device = torch.device("cuda")
    assert one.efficiency(one.planned().one.tile, 1.0) is None
    one.close()


def test_on_a_cpu_there_is_nothing_to_tune(tmp_path: Path) -> None:
    result = RUN.invoke(app, ["tune", "--device", "cpu", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr.startswith("tune: nothing to tune on a CPU: ")
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_device() -> None:
    result = RUN.invoke(app, ["tune", "--device", "abacus"])
    assert result.exit_code == 2
    assert result.stderr.startswith("device: got 'abacus'; expected cpu")


def test_what_is_found_is_written_where_the_plan_looks(tmp_path: Path) -> None:
    """Tile and efficiency; a later run that finds none takes back what an earlier one found."""
    shape, index = Shape(16384, 128, 32768), ("forward", "2", "128")
    tile, _ = lookup("forward", 128, "bfloat16", 90)
    config = {"status": "measured", "tiles": {}, "efficiency": {}, "measured": {}}
    for name, efficiency in (("first", 0.125), ("second", None)):
        tune._enter(config, index, shape, "bfloat16", tune.Found(tile, 1.0, tile, 1.0, 1, 1, efficiency))
        file = tmp_path / name / "sm90.json"
        tune._write(config, file)
        with settings.override(config_dir=str(file.parent)):
            made = plan(*shape, dtype=torch.bfloat16, device="cuda", capability=90)
        assert ("12% of the peak measured" in str(made)) == (efficiency is not None and made.regime == "stream")
        key, source = ("forward", 128, "bfloat16", 90, str(file.parent)), f"user config {file}"
        assert lookup(*key) == (tile, source)
        assert tiles.measured_efficiency(*key) == (None if efficiency is None else (efficiency, source))
