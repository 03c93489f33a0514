"""Few rows of x on the CPU, forward only: the native op beside eager, torch.compile and tiles, interleaved in one run.

python bench/few_rows.py [--shape 2304,16384] [--n 1] [--dtype float32] [--rounds 9] [--out results.json]
python bench/few_rows.py --show results.json [--markdown]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peers import DTYPES, WRONG, Operands, eager, interleaved, relative_error
from rich import box
from rich.console import Console
from rich.table import Table
from table import _commit, _cpu_name
from torch import Tensor

import tiedfused
from tiedfused import planning
from tiedfused._backends import BACKENDS
from tiedfused.activations import IDENTITY, get_activation
from tiedfused.extension import EXTENSION

SHAPES = ["768,24576", "2304,16384", "4096,32768"]  # d, H
ROWS = [1, 4, 8, 16, 64]
COLUMNS = ("N, d, H", "dtype", "eager ms", "compile ms", "tiled ms", "native ms", "× eager", "× best", "× tiled",
           "GB/s", "% of read", "GFLOP/s", "plan")  # fmt: skip
CAPTION = (
    "ms: median (20th to 80th percentile) of interleaved calls. × best: the faster of eager's and torch.compile's over "
    "the native op's. GB/s counts W once; % of read: of the rate at which the same run sums W. GFLOP/s on 4NdH."
)


def main(
    shape: Annotated[list[str], typer.Option(help="d,H; may be given several times")] = SHAPES,
    n: Annotated[list[int], typer.Option(min=1, max=64, help="rows of x; may be given several times")] = ROWS,
    dtype: Annotated[list[str], typer.Option(help="may be given several times")] = list(DTYPES),  # noqa: B006
    rounds: Annotated[int, typer.Option(min=3, help="timed calls of every peer")] = 9,
    out: Annotated[Path | None, typer.Option(help="add the results to this JSON file, as they come")] = None,
    show: Annotated[Path | None, typer.Option(help="measure nothing, show these results")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print Markdown")] = False,
) -> None:
    """Measure, and print one table."""
    if show is None and EXTENSION.why_not is not None:
        raise typer.BadParameter(EXTENSION.why_not)
    results = json.loads(show.read_text()) if show else _measure_all(shape, n, dtype, rounds, out)
    table = Table(title=_title(results), caption=CAPTION, box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right", no_wrap=True)
    for row in results["rows"]:
        table.add_row(*_cells(row))
    if markdown:
        table.title = table.caption = None
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _measure_all(shapes: list[str], ns: list[int], dtypes: list[str], rounds: int, out: Path | None) -> dict[str, Any]:
    results: dict[str, Any] = {"rows": []}
    if out is not None and out.exists():
        results = json.loads(out.read_text())
    results |= {
        "tiedfused": tiedfused.__version__,
        "torch": torch.__version__,
        "device": f"{torch.get_num_threads()} threads of {_cpu_name()}",
        "native": EXTENSION.cpu,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "command": "python bench/few_rows.py",
    }
    for name in dtypes:
        for d, h in (map(int, shape.split(",")) for shape in shapes):
            for n in ns:
                found = {"shape": [n, d, h], "dtype": name, **_measure(n, d, h, DTYPES[name], rounds)}
                same = [r for r in results["rows"] if (r["shape"], r["dtype"]) == (found["shape"], name)]
                if same:
                    results["rows"][results["rows"].index(same[0])] = found
                else:
                    results["rows"].append(found)
                if out is not None:
                    out.parent.mkdir(parents=True, exist_ok=True)
                    out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _backend(name: str, operands: Operands) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The layer by that backend, whatever the plan would choose."""
    (n, d), h, f = operands.x.shape, operands.weight.shape[0], get_activation("relu")
    with tiedfused.settings.override(regime=name):
        request = planning.request(n, d, h, operands.x.dtype, operands.x.device, f, IDENTITY, False, False, None)
    plan = planning.make_plan(request)
    return lambda *tensors: BACKENDS[name].forward(*tensors, plan)[0]


def _measure(n: int, d: int, h: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    operands = Operands.random(n, d, h, dtype)
    torch.compiler.reset()
    layers = {"eager": eager, "compile": torch.compile(eager, dynamic=False)}
    layers |= {name: _backend(name, operands) for name in ("tiled", "native")}
    calls: dict[str, Callable[[], Tensor]] = {name: operands.forward(layer) for name, layer in layers.items()}
    error = relative_error(calls["native"](), calls["eager"]())
    if error > WRONG[dtype]:
        return {"wrong": error}
    words = operands.weight.detach().view(torch.float32)
    calls["read"] = lambda: words.sum()
    times = interleaved(calls, rounds)
    chosen = tiedfused.plan(n, d, h, dtype=dtype, grad=False).regime
    return {"ms": {name: [t.median, t.p20, t.p80] for name, t in times.items()}, "plan": chosen}


def _cells(row: dict[str, Any]) -> list[str]:
    n, d, h = row["shape"]
    start = [f"{n}, {d}, {h}", row["dtype"]]
    if "wrong" in row:
        return [*start, f"wrong result, error {row['wrong']:.1e}: no speed"]
    median = {name: ms[0] for name, ms in row["ms"].items()}
    ours = median["native"]
    return [
        *start,
        *(f"{m:.1f} ({p20:.1f}-{p80:.1f})" for m, p20, p80 in (row["ms"][p] for p in COLUMN_PEERS)),
        f"{median['eager'] / ours:.2f}",
        f"{min(median['eager'], median['compile']) / ours:.2f}",
        f"{median['tiled'] / ours:.2f}",
        f"{d * h * DTYPES[row['dtype']].itemsize / ours / 1e6:.1f}",
        f"{100 * median['read'] / ours:.0f}",
        f"{4 * n * d * h / ours / 1e6:.0f}",
        row["plan"],
    ]


COLUMN_PEERS = ("eager", "compile", "tiled", "native")


def _title(results: dict[str, Any]) -> str:
    return "tiedfused {tiedfused} ({native}), PyTorch {torch}, {device}, {date}".format(**results)


if __name__ == "__main__":
    typer.run(main)
