"""One table: tiedfused against eager and torch.compile on the CPU, interleaved in one run.

python bench/table.py [--dtype float32] [--rounds 5]
"""

from __future__ import annotations

import platform
import time
from typing import Annotated

import torch
import typer
from peers import CPU_SHAPES, DTYPES, WRONG, Operands, Timing, interleaved, peers, relative_error
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import tiedfused
from tiedfused.profile import peak_memory
from tiedfused.settings import MIB


def main(
    dtype: Annotated[list[str], typer.Option(help="may be given several times")] = list(DTYPES),  # noqa: B006
    rounds: Annotated[int, typer.Option(min=3, help="timed calls of every peer")] = 7,
) -> None:
    """Measure every shape, forward and forward + backward, and print one table."""
    unknown = [name for name in dtype if name not in DTYPES]
    if unknown:
        raise typer.BadParameter(f"dtype: got {unknown[0]!r}; expected {', '.join(DTYPES)}")
    table = Table(
        title=f"tiedfused {tiedfused.__version__}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads of "
        f"{_cpu_name()}, {time.strftime('%Y-%m-%d')}",
        caption="ms: median (20th to 80th percentile) of interleaved calls. × : eager's time over tiedfused's, and the "
        "faster of eager's and torch.compile's over tiedfused's. GFLOP/s on theoretical FLOPs. MiB: peak memory of the "
        "call above inputs, including outputs and gradients; low is recompute=True.",
    )
    for column in ("N, d, H", "dtype", "pass", "eager ms", "compile ms", "tiedfused ms", "× eager", "× best",
                   "GFLOP/s", "low memory ms", "MiB eager", "MiB", "MiB low"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("N, d, H", "dtype", "pass") else "right")

    cases = [(shape, name, which) for name in dtype for shape in CPU_SHAPES for which in ("forward", "step")]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for shape, name, which in cases:
            progress.update(task, description=f"{shape} {name} {which}")
            table.add_row(", ".join(map(str, shape)), name, which, *_measure(shape, DTYPES[name], which, rounds))
            progress.advance(task)
    Console(width=None if Console().is_terminal else 200).print(table)


def _measure(shape: tuple[int, int, int], dtype: torch.dtype, which: str, rounds: int) -> list[str]:
    operands = Operands.random(*shape, dtype)
    calls = {name: getattr(operands, which)(layer) for name, layer in peers().items()}
    expected, found = (calls[name]() for name in ("eager", "tiedfused"))
    pairs = zip(found, expected, strict=True) if which == "step" else [(found, expected)]
    error = max(relative_error(*pair) for pair in pairs)
    if error > WRONG[dtype]:
        return [f"wrong result: relative error {error:.1e}"]
    del expected, found
    times = interleaved(calls, rounds)
    ours = times["tiedfused"].median
    best = min(times["eager"].median, times["compile"].median)
    n, d, h = shape
    flops = (4 if which == "forward" else 12) * n * d * h
    memory = [peak_memory(calls[name]) / MIB for name in ("eager", "tiedfused", "low memory")]
    return [
        *(_ms(times[name]) for name in ("eager", "compile", "tiedfused")),
        f"{times['eager'].median / ours:.2f}",
        f"{best / ours:.2f}",
        f"{flops / ours / 1e6:.0f}",
        _ms(times["low memory"]),
        *(f"{m:.0f}" for m in memory),
    ]


def _ms(t: Timing) -> str:
    return f"{t.median:.0f} ({t.p20:.0f}-{t.p80:.0f})"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    typer.run(main)
