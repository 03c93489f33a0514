"""The results file: its schema, its tables, and what changed since an earlier one.

schema, command, commit, date, versions, device, problems
cells   one a problem, dtype and pass: shape, dtype, pass, plan, rounds, clocks,
        ms, warm_ms   peer → [median, 20th percentile, 80th percentile]; warm_ms for few rows only
        bytes         peer → peak memory above operands and results
        error         peer → largest relative error of a result against float64
        skipped       peer → why it has no time
        rates         gemm in FLOP/s, read and memory in bytes/s, measured in the same rounds
memory  one a problem of the sweep over H: shape, dtype, bytes
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tiedfused.benchmark.peers import PEERS
from tiedfused.benchmark.shapes import Shape
from tiedfused.settings import MIB, REGIME_NAMES

SCHEMA = "tiedfused-bench/1"
# Two runs of the same code differ by this much beyond their percentiles.
SAME = 0.03

Results = dict[str, Any]


def save(results: Results, path: Path) -> None:
    """Write the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(unfinished, path)


def load(path: Path) -> Results:
    """Read a results file.

    Raises:
        ValueError: it cannot be read, or is of another schema.
    """
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as results: {error}") from None
    found = results.get("schema") if isinstance(results, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{path}: got schema {found!r}; expected {SCHEMA!r}, which `tiedfused bench --out` writes")
    return results  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: a cell, with cold or warm caches.

    Args:
        cell: of the results file.
        warm: whether its times are the ones with warm caches.
    """

    cell: dict[str, Any]
    warm: bool = False

    @property
    def ms(self) -> dict[str, list[float]]:
        """Peer → [median, p20, p80]."""
        return self.cell["warm_ms" if self.warm else "ms"]  # type: ignore[no-any-return]

    @property
    def shape(self) -> Shape:
        """The problem."""
        return Shape(*self.cell["shape"])

    @property
    def key(self) -> tuple[str, str, str]:
        """What two results files have in common: problem, dtype, pass and state of the caches."""
        return str(self.shape), self.cell["dtype"], self.cell["pass"] + (" warm" if self.warm else "")

    @property
    def ours(self) -> float | None:
        """Median milliseconds of tiedfused."""
        return self.ms["tiedfused"][0] if "tiedfused" in self.ms else None

    @property
    def flops_per_s(self) -> float | None:
        """On theoretical operations."""
        return self.shape.flops(self.cell["pass"]) / self.ours * 1e3 if self.ours else None

    @property
    def bytes_per_s(self) -> float | None:
        """On the least traffic."""
        if not self.ours:
            return None
        return self.shape.bytes(self.cell["pass"], getattr(torch, self.cell["dtype"]).itemsize) / self.ours * 1e3

    def ratio(self, peer: str) -> float | None:
        """The peer's time over tiedfused's; above 1 tiedfused is faster."""
        return self.ms[peer][0] / self.ours if self.ours and peer in self.ms else None

    @property
    def best(self) -> float | None:
        """The ratio to the fastest peer."""
        return min((r for peer in PEERS if (r := self.ratio(peer)) is not None), default=None)


def rows(results: Results) -> list[Row]:
    """Every line of the table."""
    found = []
    for cell in results["cells"]:
        found.append(Row(cell))
        if cell["warm_ms"]:
            found.append(Row(cell, warm=True))
    return found


def title(results: Results) -> str:
    """The device and the versions."""
    names = {"tiedfused": "tiedfused", "torch": "PyTorch", "triton": "Triton", "cuda": "CUDA"}
    versions = ", ".join(
        f"{text} {results['versions'][key]}" for key, text in names.items() if key in results["versions"]
    )
    return f"{results['device']['name']}; {versions}; commit {results['commit']}, {results['date']}"


# ---- tables --------------------------------------------------------------------------------------------------------

CAPTION = (
    "ms: median (20th-80th percentile) of interleaved calls. ×: the peer's time over tiedfused's, its ms behind. "
    "FLOP/s on theoretical FLOPs (4, 8, 12 NdH), GB/s on inputs and outputs once; % of the rates of a large product "
    "and of memory in the same rounds. MiB: peak memory above operands and results. Caches are cold, or warm where it "
    "says."
)


def _ms(values: Sequence[float] | None) -> str:
    if values is None:
        return "—"
    digits = 0 if values[0] >= 100 else 1 if values[0] >= 10 else 2 if values[0] >= 1 else 3
    return f"{values[0]:.{digits}f} ({values[1]:.{digits}f}-{values[2]:.{digits}f})"


def _short(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _number(value: float | None, form: str = ".2f") -> str:
    return "—" if value is None else f"{value:{form}}"


def _percent(value: float | None, of: float) -> str:
    return "—" if value is None else f"{100 * value / of:.0f}"


def _mib(n_bytes: int | None) -> str:
    return "—" if n_bytes is None else f"{n_bytes / MIB:.0f}"


def _flops_unit(results: Results) -> tuple[str, float]:
    return ("GFLOP/s", 1e9) if results["device"]["type"] == "cpu" else ("TFLOP/s", 1e12)


def measured_peers(all_rows: Iterable[Row]) -> list[str]:
    """The peers, and the regimes beside what the plan chose, that have a time anywhere."""
    all_rows = list(all_rows)
    return [peer for peer in (*PEERS, *REGIME_NAMES) if any(peer in row.ms for row in all_rows)]


def full_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column names and cells: every row, every peer."""
    all_rows = rows(results)
    peers = measured_peers(all_rows)
    unit, scale = _flops_unit(results)
    columns = ["N, d, H", "dtype", "pass", "tiedfused ms", unit, "% GEMM", "GB/s", "% mem"]
    columns += [*(f"× {peer}" for peer in peers), "low memory ms", "MiB", "MiB low", "MiB eager"]
    table = []
    for row in all_rows:
        flops, moved, rates = row.flops_per_s, row.bytes_per_s, row.cell["rates"]
        cells = [*row.key, _ms(row.ms.get("tiedfused"))]
        cells += [_number(flops and flops / scale, ".3g"), _percent(flops, rates["gemm"])]
        cells += [_number(moved and moved / 1e9, ".3g"), _percent(moved, rates["memory"])]
        for peer in peers:
            ratio = row.ratio(peer)
            behind = f" ({_short(row.ms[peer][0])})" if peer in row.ms else ""
            cells.append("—" if not behind else f"{_number(ratio)}{behind}")
        memory = row.cell["bytes"]
        cells += [_ms(row.ms.get("low memory")), *(_mib(memory.get(p)) for p in ("tiedfused", "low memory", "eager"))]
        table.append(cells)
    return columns, table


def headline_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column names and cells: what a reader who has one minute wants to know."""
    unit, scale = _flops_unit(results)
    columns = [
        "N, d, H",
        "dtype",
        "pass",
        "eager ms",
        "compile ms",
        "tiedfused ms",
        "× eager",
        "× best",
        unit,
        "% GEMM",
    ]
    columns += ["MiB eager", "MiB"]
    table = []
    for row in rows(results):
        flops, memory = row.flops_per_s, row.cell["bytes"]
        table.append([
            *row.key,
            *(_short(row.ms[peer][0]) if peer in row.ms else "—" for peer in ("eager", "compile", "tiedfused")),
            _number(row.ratio("eager")),
            _number(row.best),
            _number(flops and flops / scale, ".3g"),
            _percent(flops, row.cell["rates"]["gemm"]),
            _mib(memory.get("eager")),
            _mib(memory.get("tiedfused")),
        ])  # fmt: skip
    return columns, table


def skipped(results: Results) -> list[str]:
    """What has no time, and why, one line a reason."""
    why: dict[tuple[str, str], list[str]] = {}
    for cell in results["cells"]:
        for peer, reason in cell["skipped"].items():
            why.setdefault((peer, reason), []).append(f"({Shape(*cell['shape'])}) {cell['dtype']} {cell['pass']}")
    return [f"{peer} at {', '.join(cells)}: {reason}" for (peer, reason), cells in why.items()]


def worst(results: Results) -> list[tuple[Row, str, float]]:
    """The three rows where tiedfused does worst beside any peer: row, that peer, the ratio."""
    found = [(row, peer, r) for row in rows(results) for peer in PEERS if (r := row.ratio(peer)) is not None]
    lowest: dict[tuple[str, str, str], tuple[Row, str, float]] = {}
    for row, peer, ratio in sorted(found, key=lambda one: one[2]):
        lowest.setdefault(row.key, (row, peer, ratio))
    return list(lowest.values())[:3]


# ---- comparison with an earlier file -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Change:
    """One ratio, before and now.

    Args:
        key: problem, dtype and pass.
        peer: what tiedfused is compared with.
        before, now: the peer's time over tiedfused's.
        verdict: ``"slower"`` or ``"faster"`` where the ranges from 20th to 80th percentile do not meet; ``"same"``.
    """

    key: tuple[str, str, str]
    peer: str
    before: float
    now: float
    verdict: str


def _range(row: Row, peer: str) -> tuple[float, float]:
    (_, low, high), (_, our_low, our_high) = row.ms[peer], row.ms["tiedfused"]
    return low / our_high * (1 - SAME), high / our_low * (1 + SAME)


def compare(now: Results, before: Results) -> list[Change]:
    """Every ratio that both files have."""
    earlier = {row.key: row for row in rows(before)}
    changes = []
    for row in rows(now):
        old = earlier.get(row.key)
        for peer in PEERS:
            new_ratio, old_ratio = row.ratio(peer), old.ratio(peer) if old is not None else None
            if old is None or new_ratio is None or old_ratio is None:
                continue
            (low, high), (old_low, old_high) = _range(row, peer), _range(old, peer)
            verdict = "slower" if high < old_low else "faster" if low > old_high else "same"
            changes.append(Change(row.key, peer, old_ratio, new_ratio, verdict))
    return changes
