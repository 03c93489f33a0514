"""Pictures are drawn from the results alone, say which results they show, and are not needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tiedfused.benchmark import plots


def test_every_picture(results: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = plots.draw_all(results, tmp_path / "r.json")
    assert [path.name for path in written] == [
        f"r-{kind}.png" for kind in ("throughput", "ratios", "memory", "roofline")
    ]
    for path in written:
        assert plots.fingerprint(results).encode() in path.read_bytes()
    results["cells"][0]["ms"]["eager"][0] += 1
    assert plots.fingerprint(results).encode() not in written[0].read_bytes()


def test_what_throughput_shows(results: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    figure = plots.throughput(results)
    assert figure is not None
    panels = [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes]
    assert panels == [
        f"{which}, {dtype}" for dtype in ("float32", "bfloat16") for which in ("forward", "forward + backward")
    ]
    ours = max(figure.axes[0].lines, key=lambda line: line.get_linewidth())
    assert list(ours.get_xdata()) == [64, 128, 256]
    assert ours.get_ydata()[0] == pytest.approx(4 * 4096 * 64 * 8192 / 12.8e-3 / 1e9)


@pytest.mark.parametrize("missing", ["cells", "memory"])
def test_results_that_have_little(results: dict[str, Any], missing: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results[missing] = results[missing][:1] if missing == "memory" else []
    assert len(plots.draw_all(results, tmp_path / "r.json")) == (1 if missing == "cells" else 3)


def test_without_matplotlib(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.draw_all(results, tmp_path / "r.json") == []
    assert capsys.readouterr().err == "pictures: matplotlib is not installed, none is drawn\n"
