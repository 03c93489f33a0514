"""The command line: `tiedfused info`, `explain`, `bench`, `profile` and `tune`."""

from __future__ import annotations

import contextlib
import enum
import io
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import tiedfused
from tiedfused import devices, settings
from tiedfused.activations import HAS_TRITON
from tiedfused.extension import EXTENSION

app = typer.Typer(
    help="The tied encode-decode layer y = g(f(x Wᵀ + b_enc) W + b_dec), fused.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Dtype(str, enum.Enum):
    """The dtypes that the layer takes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


def _table(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, value)
    Console().print(table)


@app.command()
def info() -> None:
    """Show versions, devices, the settings in force, and each backend with why it is or is not usable."""
    rows = [
        ("tiedfused", tiedfused.__version__),
        ("Python", platform.python_version()),
        ("PyTorch", torch.__version__),
        ("Triton", _triton_version()),
        ("CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        ("CPU products", f"BLAS: {why}" if (why := devices.onednn_missing()) else "oneDNN for float32 and bfloat16"),
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        rows.append((f"cuda:{index}", f"{gpu.name}, {capability}, {gpu.multi_processor_count} SMs, {memory}"))
    if not torch.cuda.is_available():
        rows.append(("CUDA", "no device"))
    for status in tiedfused.backends():
        rows.append((f"backend {status.name}", "usable" if status.why_not is None else f"not used: {status.why_not}"))
    if EXTENSION.why_not is None:
        cuda = "with" if EXTENSION.cuda else "without"
        note = f"; {EXTENSION.note}" if EXTENSION.note else ""
        rows.append(("native ops", f"CPU kernel for {EXTENSION.cpu}, {cuda} CUDA{note}"))
    for field, value in vars(settings.current()).items():
        rows.append((f"setting {field}", str(value)))
    _table("tiedfused", rows)


def _triton_version() -> str:
    if not HAS_TRITON:
        return "not installed"
    import triton

    return triton.__version__ + (" (interpreting)" if devices.interpreting() else "")


@app.command()
def explain(
    n: Annotated[int, typer.Argument(metavar="N", help="rows of x")],
    d: Annotated[int, typer.Argument(metavar="D", help="in_features")],
    h: Annotated[int, typer.Argument(metavar="H", help="out_features")],
    dtype: Annotated[Dtype, typer.Option(help="of every operand")] = Dtype.float32,
    device: Annotated[str, typer.Option(help="cpu, cuda, …; need not be present")] = "",
    activation: Annotated[str, typer.Option(help="f")] = "relu",
    output_activation: Annotated[str, typer.Option(help="g")] = "identity",
    inference: Annotated[bool, typer.Option("--inference", help="forward only")] = False,
    grad_x: Annotated[bool, typer.Option(help="whether x needs a gradient too")] = True,
    recompute: Annotated[bool | None, typer.Option(help="force or forbid recomputing the latent")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="with the latent's statistics (return_stats=True)")] = False,
    capability: Annotated[int | None, typer.Option(help="plan for this compute capability: 80, 90, 100, …")] = None,
) -> None:
    """Show the plan of one problem: backend, tiles, memory, FLOPs, the roofline, the reason, and what was not taken."""
    if not device:
        device = "cuda" if torch.cuda.is_available() or capability is not None else "cpu"
    try:
        plan = tiedfused.plan(
            n,
            d,
            h,
            dtype=getattr(torch, dtype.value),
            device=device,
            activation=activation,
            output_activation=output_activation,
            grad=not inference,
            grad_x=grad_x,
            recompute=recompute,
            stats=stats,
            capability=capability,
        )
    except (ValueError, RuntimeError) as error:  # RuntimeError: torch.device of an unknown name
        raise typer.BadParameter(str(error).splitlines()[0]) from None
    _table("plan", plan.rows())


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """One line for a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.filename is None or out not in (Path(error.filename), *Path(error.filename).parents):
            raise
        raise typer.BadParameter(f"out: {error}") from None


class Pass(str, enum.Enum):
    """What of the layer runs: forward without gradients, backward alone, or both with all gradients."""

    fwd = "fwd"
    bwd = "bwd"
    step = "step"


_SHAPES = typer.Option(help="N,d,H or the name of a list (an unknown one lists them); several times")


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="about two minutes: fewer problems, no max-autotune")] = False,
    shapes: Annotated[list[str] | None, _SHAPES] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="several times; fp32 and bf16, on a GPU bf16")] = None,
    which: Annotated[list[Pass] | None, typer.Option("--pass", help="several times; fwd and step")] = None,
    peers: Annotated[list[str] | None, typer.Option(help="several times; also regimes; all peers")] = None,
    device: Annotated[list[str] | None, typer.Option(help="cpu, cuda:1, …; several times; the GPU if any")] = None,
    out: Annotated[Path, typer.Option(help="folder of the results: JSON and PNG")] = Path("tiedfused-bench"),
    budget: Annotated[float | None, typer.Option(help="seconds; they decide how often each call is timed")] = None,
    part: Annotated[str, typer.Option(help="K/N: every N-th problem, from the K-th on")] = "1/1",
    against: Annotated[Path | None, typer.Option(help="compare ratio by ratio with these earlier results")] = None,
    show: Annotated[Path | None, typer.Option(help="measure nothing: show these results, and draw them anew")] = None,
) -> None:
    """Time the layer beside its peers: correct first, then interleaved medians; a table, JSON and plots.

    Exit status: 0; 1 if something asked for could not be done, or is slower than in the earlier results; 2 if nothing
    could.
    """
    from tiedfused.benchmark import bench as benchmark

    problems: list[str] = []
    written = [show] if show is not None else []
    for one in [] if show is not None else device or [""]:
        found: list[str] = []  # each results file tells its own
        with _writing(out):
            path = benchmark.bench(
                quick=quick,
                shapes=shapes or (),
                dtypes=[name.value for name in dtype or ()],
                passes=[name.value for name in which or ()],
                peers=peers or (),
                device=one,
                out=out,
                budget=budget,
                part=part,
                problems=found,
            )
        problems += found
        written += [path] if path is not None else []
    slower = [benchmark.show(path, against, problems, draw=show is not None) for path in written]
    raise typer.Exit(0 if written and not problems and not any(slower) else 1 if written else 2)


@app.command()
def profile(
    n: Annotated[int, typer.Argument(metavar="N", help="rows of x", min=1)],
    d: Annotated[int, typer.Argument(metavar="D", help="in_features", min=1)],
    h: Annotated[int, typer.Argument(metavar="H", help="out_features", min=1)],
    dtype: Annotated[Dtype | None, typer.Option(help="of every operand; fp32, on a GPU bf16")] = None,
    which: Annotated[Pass, typer.Option("--pass", help="what runs")] = Pass.step,
    device: Annotated[str, typer.Option(help="cpu, cuda:1, …; the GPU if any")] = "",
    out: Annotated[Path, typer.Option(help="folder of the trace and the picture")] = Path("tiedfused-profile"),
    only_run: Annotated[bool, typer.Option("--only-run", help="run it in NVTX ranges, for ncu and nsys")] = False,
) -> None:
    """Show one problem kernel by kernel: time, rates, what the compiler made of it, and what bounds it."""
    from tiedfused.benchmark import profile as profiler

    try:
        with _writing(out):
            profiler.profile((n, d, h), dtype and dtype.value, which.value, device, out, only_run=only_run)
    except (ValueError, RuntimeError) as error:  # RuntimeError: not enough memory
        raise typer.BadParameter(str(error).splitlines()[0]) from None


@app.command()
def tune(
    shapes: Annotated[list[str] | None, _SHAPES] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="several times; bf16")] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, …")] = "",
    out: Annotated[
        Path | None, typer.Option(help="folder of the config; the user's, where every process finds it")
    ] = None,
    budget: Annotated[float, typer.Option(help="seconds for all of it")] = 600,
) -> None:
    """Search the fastest tiles of the Triton kernels on this GPU, and write them where they are found again."""
    from tiedfused.benchmark import tune as tuner

    problems: list[str] = []
    written = tuner.tune(
        shapes=shapes or (), dtypes=[one.value for one in dtype or ()], device=device, out=out, budget=budget,
        problems=problems,
    )  # fmt: skip
    raise typer.Exit(0 if written and not problems else 1 if written else 2)


def main() -> None:
    """Entry point of the ``tiedfused`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # the encoding of a pipe may lack ᵀ and ≤
    app()


if __name__ == "__main__":
    main()
