"""One table: tiedfused against eager and torch.compile on the CPU, interleaved in one run.

python bench/table.py [--dtype float32] [--rounds 7] [--out results.json]
python bench/table.py --show results.json [--markdown]
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peers import CPU_SHAPES, DTYPES, WRONG, Operands, interleaved, peers, relative_error
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import tiedfused
from tiedfused.profile import peak_memory
from tiedfused.settings import MIB

COLUMNS = ("N, d, H", "dtype", "pass", "eager ms", "compile ms", "tiedfused ms", "× eager", "× best", "GFLOP/s",
           "low memory ms", "MiB eager", "MiB", "MiB low")  # fmt: skip
CAPTION = (
    "ms: median (20th to 80th percentile) of interleaved calls. × eager: eager's time over tiedfused's; × best: the "
    "faster of eager's and torch.compile's over tiedfused's. GFLOP/s on theoretical FLOPs. MiB: peak memory of the "
    "call above inputs, outputs and gradients; low memory is recompute=True."
)


def main(
    dtype: Annotated[list[str], typer.Option(help="may be given several times")] = list(DTYPES),  # noqa: B006
    rounds: Annotated[int, typer.Option(min=3, help="timed calls of every peer")] = 7,
    out: Annotated[Path | None, typer.Option(help="also write the results here, as JSON, as they come")] = None,
    show: Annotated[Path | None, typer.Option(help="measure nothing, show these results")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print Markdown")] = False,
) -> None:
    """Measure every shape, forward and forward + backward, and print one table."""
    unknown = [name for name in dtype if name not in DTYPES]
    if unknown:
        raise typer.BadParameter(f"dtype: got {unknown[0]!r}; expected {', '.join(DTYPES)}")
    results = json.loads(show.read_text()) if show else _measure_all(dtype, rounds, out)
    table = Table(title=_title(results), caption=CAPTION, box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:3] else "right", no_wrap=True)
    for row in results["rows"]:
        table.add_row(*_cells(row))
    if markdown:
        table.title = table.caption = None
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _measure_all(dtypes: list[str], rounds: int, out: Path | None) -> dict[str, Any]:
    results: dict[str, Any] = {
        "tiedfused": tiedfused.__version__,
        "torch": torch.__version__,
        "device": f"{torch.get_num_threads()} threads of {_cpu_name()}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
        "rows": [],
    }
    cases = [(shape, name, which) for name in dtypes for shape in CPU_SHAPES for which in ("forward", "step")]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for shape, name, which in cases:
            progress.update(task, description=f"{shape} {name} {which}")
            measured = _measure(shape, DTYPES[name], which, rounds)
            results["rows"].append({"shape": shape, "dtype": name, "pass": which, **measured})
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(results, indent=1) + "\n")
            progress.advance(task)
    return results


def _measure(shape: tuple[int, int, int], dtype: torch.dtype, which: str, rounds: int) -> dict[str, Any]:
    operands = Operands.random(*shape, dtype)
    calls = {name: getattr(operands, which)(layer) for name, layer in peers().items()}
    expected, found = (calls[name]() for name in ("eager", "tiedfused"))
    pairs = list(zip(found, expected, strict=True)) if which == "step" else [(found, expected)]
    error = max(relative_error(*pair) for pair in pairs)
    if error > WRONG[dtype]:
        return {"wrong": error}
    kept = operands.grad_y.nbytes + (sum(t.nbytes for t, _ in pairs) if which == "step" else 0)  # y, and gradients
    del expected, found, pairs
    times = interleaved(calls, rounds)
    return {
        "ms": {name: [t.median, t.p20, t.p80] for name, t in times.items()},
        "bytes": {name: peak_memory(calls[name]) - kept for name in ("eager", "tiedfused", "low memory")},
    }


def _cells(row: dict[str, Any]) -> list[str]:
    n, d, h = row["shape"]
    start = [f"{n}, {d}, {h}", row["dtype"], row["pass"]]
    if "wrong" in row:
        return [*start, f"wrong result, error {row['wrong']:.1e}: no speed"]
    median = {name: ms[0] for name, ms in row["ms"].items()}
    text = {name: f"{ms[0]:.0f} ({ms[1]:.0f}-{ms[2]:.0f})" for name, ms in row["ms"].items()}
    ours = median["tiedfused"]
    flops = (4 if row["pass"] == "forward" else 12) * n * d * h
    return [
        *start,
        *(text[name] for name in ("eager", "compile", "tiedfused")),
        f"{median['eager'] / ours:.2f}",
        f"{min(median['eager'], median['compile']) / ours:.2f}",
        f"{flops / ours / 1e6:.0f}",
        text["low memory"],
        *(f"{max(0, b) / MIB:.0f}" for b in row["bytes"].values()),
    ]


def _title(results: dict[str, Any]) -> str:
    return "tiedfused {tiedfused}, PyTorch {torch}, {device}, {date}".format(**results)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    typer.run(main)
