"""`tiedfused bench`: every cell in turn, and the results file written after each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tiedfused.benchmark import console, plots, report
from tiedfused.benchmark import device as devices
from tiedfused.benchmark import peers as all_peers
from tiedfused.benchmark.measure import measure_cell, memory_sweep
from tiedfused.benchmark.shapes import MEMORY_SWEEP, Shape, default_list, parse_all
from tiedfused.tiles import config_name

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
BUDGET_S = {("cpu", True): 110, ("cpu", False): 400, ("cuda", True): 150, ("cuda", False): 480}
QUICK_PEERS = ("eager", "compile", "checkpoint", "epilogue")  # max-autotune compiles for as long as the rest runs

# On a quiet machine the percentiles of a call are closer than this, and a large product keeps this much of its rate.
SPREAD, STEADY = 1.5, 0.8

Problem = tuple[Shape, str, str]


def part_of(text: str) -> tuple[int, int]:
    """``"2/3"`` as (2, 3): the second of three parts.

    Raises:
        ValueError: it is not of that form.
    """
    k, _, n = text.partition("/")
    if k.isdigit() and n.isdigit() and 1 <= int(k) <= int(n):
        return int(k), int(n)
    raise ValueError(f"part: got {text!r}; expected K/N with 1 ≤ K ≤ N, such as 1/3")


def problems_of(shapes: Sequence[Shape], dtypes: Sequence[str], passes: Sequence[str], part: str) -> list[Problem]:
    """The cells to measure; without `passes` forward and step, and forward alone for few rows."""
    k, n = part_of(part)
    return [
        (shape, dtype, which)
        for dtype in dtypes
        for shape in shapes[k - 1 :: n]
        for which in (passes or (("fwd",) if shape.few_rows else ("fwd", "step")))
    ]


def bench(
    *,
    quick: bool = False,
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    passes: Sequence[str] = (),
    peers: Sequence[str] = (),
    device: str = "",
    out: Path,
    budget: float | None = None,
    part: str = "1/1",
    pictures: bool = True,
    problems: list[str] | None = None,
) -> Path | None:
    """Measure, write the results file and its pictures, and return the file's path.

    Args:
        quick: fewer problems, without the slowest peer.
        shapes: names of `shapes.LISTS` or ``N,d,H``; empty for the device's own list.
        dtypes: names; empty for fp32 and bf16 on a CPU, bf16 on a GPU.
        passes: ``"fwd"``, ``"bwd"``, ``"step"``; empty for forward and step (forward alone for few rows).
        peers: names of `peers.PEERS`, or regimes; empty for all peers.
        device: ``"cpu"``, ``"cuda:1"``, …; empty for the GPU, or the CPU where there is none.
        out: folder of the results.
        budget: seconds that decide how often each cell is timed. A cell whose turn comes when one and a half of it
            have passed is left out. Cells that something else on the machine disturbed are measured again at the end,
            within twice the budget.
        part: ``"K/N"``: only every N-th problem, from the K-th on.
        pictures: also draw them.
        problems: one line is appended for each thing that was asked for and could not be done. Also in the results.

    Returns:
        The file, or None if there was nothing to measure.
    """
    problems = [] if problems is None else problems
    try:
        where = devices.resolve(device)
        part_of(part)
    except ValueError as error:
        problems.append(str(error))
        console.warn(problems[-1])
        return None
    began = len(problems)
    wanted = parse_all(shapes or [default_list(where.type, quick)], problems)
    names = all_peers.chosen(list(peers or (QUICK_PEERS if quick else ())), problems)
    for line in problems[began:]:
        console.warn(line)
    cells = problems_of(wanted, list(dtypes or DTYPES[where.type]), passes, part)
    if not cells:
        if len(problems) == began:
            problems.append(f"part: got {part!r}; there are no more than {len(wanted)} problems")
            console.warn(problems[-1])
        return None

    results: dict[str, Any] = {
        "schema": report.SCHEMA,
        "command": devices.command_line(),
        "commit": devices.commit(),
        "date": time.strftime("%Y-%m-%d"),
        "part": part,
        "device": devices.describe(where),
        "versions": devices.versions(),
        "gemm": {},
        "problems": problems,
        "cells": [],
        "memory": [],
    }
    suffix = "" if part == "1/1" else f"-part-{part.replace('/', '-of-')}"
    path = out / f"{config_name(results['device']['name'])}{suffix}.json"
    budget = BUDGET_S[where.type, quick] if budget is None else budget
    try:
        with devices.on(where):
            _measure(results, path, cells, names, where, budget, quick, sweep=not shapes and part.startswith("1/"))
    finally:
        if results["cells"]:  # else an earlier file with something in it stays
            report.save(results, path)
    if not results["cells"]:
        return None
    if pictures:
        plots.draw_all(results, path)
    return path


def _measure(
    results: dict[str, Any],
    path: Path,
    cells: Sequence[Problem],
    names: Sequence[str],
    where: torch.device,
    budget: float,
    quick: bool,
    sweep: bool,
) -> None:
    """Fill `results`, and write them after every step."""
    begin = time.perf_counter()
    dtypes = dict.fromkeys(dtype for _, dtype, _ in cells)
    steps = len(cells) + sweep

    def problem(line: str) -> None:
        results["problems"].append(line)
        console.warn(line)

    with console.progress(steps) as update, devices.Clocks(where) as clocks:
        if sweep:
            update("memory against H", 0)
            sweep_shapes = MEMORY_SWEEP[where.type][: -2 if quick else None]
            try:
                results["memory"] = memory_sweep(sweep_shapes, getattr(torch, next(iter(dtypes))), names, where)
            except torch.OutOfMemoryError as error:
                problem(f"memory against H: not enough memory: {str(error).splitlines()[0]}")
            report.save(results, path)
        reference = None
        for i, (shape, dtype, which) in enumerate(cells):
            label = f"({shape}) {dtype} {which}"
            update(label, i + sweep)
            passed = time.perf_counter() - begin
            if passed > 1.5 * budget:
                left = "; ".join(f"({shape}) {dtype} {which}" for shape, dtype, which in cells[i:])
                problem(f"not measured, since the budget of {budget:.0f} s is used up: {left}")
                break
            try:
                if dtype not in results["gemm"]:
                    reference = devices.ceilings(where, getattr(torch, dtype))
                    results["gemm"][dtype] = reference.library
                share = max(0.0, budget - passed) / (len(cells) - i)
                assert reference is not None
                cell = measure_cell(shape, getattr(torch, dtype), which, names, where, reference, share)
            except torch.OutOfMemoryError as error:
                problem(f"{label}: not enough memory: {str(error).splitlines()[0]}")
                torch.cuda.empty_cache()
                continue
            except RuntimeError as error:
                problem(f"{label}: {str(error).splitlines()[0]}")
                if devices.has_failed(where):
                    problem(f"the GPU has failed: {len(cells) - i - 1} more problems are not measured")
                    break
                continue
            cell["clocks"] = clocks.seen()
            results["cells"].append(cell)
            for peer, reason in cell["skipped"].items():
                problem(f"{label}: {peer}: {reason}")
            report.save(results, path)
        _again(results, path, names, where, begin + 2 * budget, update, problem)
        update("done", steps)


def disturbance(cell: dict[str, Any], cells: Sequence[dict[str, Any]]) -> float:
    """Above 1 if something else ran on the machine: times of one call are far apart, or products were slower."""
    spread = max((p80 / p20 for _, p20, p80 in cell["ms"].values()), default=1.0)
    best = max(other["rates"]["gemm"] for other in cells if other["dtype"] == cell["dtype"])
    return float(max(spread / SPREAD, STEADY * best / cell["rates"]["gemm"]))


def _again(
    results: dict[str, Any],
    path: Path,
    names: Sequence[str],
    where: torch.device,
    end: float,
    update: Callable[[str, int], None],
    problem: Callable[[str], None],
) -> None:
    """Measure disturbed cells a second time, and take the less disturbed of both; say which stay disturbed."""
    cells = results["cells"]
    for i, cell in enumerate(cells):
        if disturbance(cell, cells) <= 1:
            continue
        shape, dtype = Shape(*cell["shape"]), getattr(torch, cell["dtype"])
        label = f"({shape}) {cell['dtype']} {cell['pass']}"
        if (left := end - time.perf_counter()) > 0:
            update(f"disturbed, again: {label}", i)
            with contextlib.suppress(RuntimeError):
                reference = devices.ceilings(where, dtype)
                second = measure_cell(shape, dtype, cell["pass"], names, where, reference, left / (len(cells) - i))
                second["clocks"] = cell["clocks"]
                cells[i] = min(cell, second, key=lambda one: disturbance(one, [*cells, second]))
                report.save(results, path)
        if disturbance(cells[i], cells) > 1:
            problem(f"{label}: disturbed by something else on this machine; its times are not to be relied on")


def show(path: Path, against: Path | None, problems: list[str], *, draw: bool = False) -> bool:
    """Print the table of a results file and, beside an earlier one, what changed; whether anything is slower now."""
    try:
        results = report.load(path)
    except ValueError as error:
        problems.append(str(error))
        console.warn(problems[-1])
        return False
    columns, table = report.full_table(results)
    if not console.fits(columns, table):
        columns, table = report.headline_table(results)
    console.print_table(report.title(results), columns, table, report.CAPTION, left=3)
    pictures = plots.draw_all(results, path) if draw else sorted(path.parent.glob(f"{path.stem}-*.png"))
    console.warn(f"written: {', '.join(map(str, [path, *pictures]))}")
    if against is None:
        return False
    try:
        changes = report.compare(results, report.load(against))
    except ValueError as error:
        problems.append(str(error))
        console.warn(problems[-1])
        return False
    columns = ["N, d, H", "dtype", "pass", "peer", "ratio before", "now", "change", ""]
    lines = [
        [*c.key, c.peer, f"{c.before:.2f}", f"{c.now:.2f}", f"{100 * (c.now / c.before - 1):+.0f}%", c.verdict]
        for c in changes
    ]
    counts = {verdict: sum(c.verdict == verdict for c in changes) for verdict in ("slower", "same", "faster")}
    caption = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    console.print_table(f"against {against}", columns, lines, f"{caption}; same: within the percentiles' range", left=4)
    return counts["slower"] > 0
