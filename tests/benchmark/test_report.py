"""The results file, its tables and comparisons."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tiedfused.benchmark import report


def test_round_trip(results: dict[str, Any], tmp_path: Path) -> None:
    report.save(results, tmp_path / "new" / "results.json")
    assert report.load(tmp_path / "new" / "results.json") == results
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as results"),
        ("[]", "got schema None; expected 'tiedfused-bench/1'"),
        ('{"schema": "tiedfused-bench/0"}', "got schema 'tiedfused-bench/0'; expected 'tiedfused-bench/1'"),
        (None, "cannot be read as results"),
    ],
)
def test_a_file_that_is_something_else(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json: ") as caught:
        report.load(tmp_path / "results.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_table(results: dict[str, Any]) -> None:
    columns, rows = report.full_table(results)
    assert all(len(row) == len(columns) for row in rows)
    first = dict(zip(columns, rows[0], strict=True))
    assert first["N, d, H"] == "4096, 64, 8192"
    assert first["tiedfused ms"] == "12.8 (12.7-12.9)"
    assert first["× eager"] == "2.00 (25.6)"
    assert first["GFLOP/s"] == "671"  # 4 · 4096 · 64 · 8192 in 12.8 ms
    assert first["% GEMM"] == "168"
    assert first["MiB"] == "1"
    last = dict(zip(columns, rows[-1], strict=True))
    assert last["pass"] == "fwd warm"
    assert (last["× eager"], last["× compile"]) == ("0.80 (2)", "—")


def test_a_wrong_result_has_no_speed_in_the_table(results: dict[str, Any]) -> None:
    del results["cells"][0]["ms"]["tiedfused"]
    results["cells"][0]["skipped"]["tiedfused"] = "y is wrong"
    columns, rows = report.full_table(results)
    first = dict(zip(columns, rows[0], strict=True))
    assert (first["tiedfused ms"], first["GFLOP/s"], first["× eager"]) == ("—", "—", "— (25.6)")
    assert report.skipped(results) == ["tiedfused at (4096, 64, 8192) float32 fwd: y is wrong"]
    assert report.headline_table(results)[1][0][5:9] == ["—", "—", "—", "—"]


def test_worst_ratios(results: dict[str, Any]) -> None:
    found = report.worst(results)
    assert [(row.shape.n, peer, round(ratio, 2)) for row, peer, ratio in found][:2] == [(4, "eager", 0.8)] * 2
    assert found[2][1:] == ("compile", pytest.approx(1.5))


def test_comparison(results: dict[str, Any]) -> None:
    now = copy.deepcopy(results)
    slower, faster, noisy = (cell["ms"] for cell in now["cells"][:3])
    slower["tiedfused"] = [t * 1.2 for t in slower["tiedfused"]]
    faster["tiedfused"] = [t / 1.2 for t in faster["tiedfused"]]
    noisy["tiedfused"] = [t * f for t, f in zip(noisy["tiedfused"], (1.2, 0.8, 1.5), strict=True)]
    del now["cells"][3]
    changes = report.compare(now, results)
    by_cell: dict[tuple[str, str, str], set[str]] = {}
    for change in changes:
        by_cell.setdefault(change.key, set()).add(change.verdict)
    assert [verdicts for verdicts in by_cell.values()][:3] == [{"slower"}, {"faster"}, {"same"}]
    assert all(verdicts == {"same"} for verdicts in list(by_cell.values())[3:])
    assert len(by_cell) == len(report.rows(results)) - 1
    assert changes[0].now == pytest.approx(changes[0].before / 1.2)


def test_file_is_json_that_others_read(results: dict[str, Any], tmp_path: Path) -> None:
    report.save(results, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["cells"][0]["ms"]["eager"][0] == 25.6
