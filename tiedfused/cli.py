"""The command line: `tiedfused info` and `tiedfused explain`."""

from __future__ import annotations

import enum
import platform
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import tiedfused
from tiedfused import devices, settings
from tiedfused.activations import HAS_TRITON

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


def main() -> None:
    """Entry point of the ``tiedfused`` command."""
    app()


if __name__ == "__main__":
    main()
