"""Train tied autoencoders on MNIST digits, once with plain PyTorch and once with tiedfused, and compare.

Both start from the same weights and see the same batches in the same order, step by step in turn, so that whatever
else the machine does slows both. The result is one table and one picture.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from common import GREY, HEADING, LIGHT, SIDE, TEAL, draw_strips, load_digits, new_figure, save_figure, tile_images
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullFormatter
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import tiedfused
from tiedfused.profile import peak_memory

MIB = 2**20
TOLERANCE = 1e-4  # relative difference of the final losses; rounding in fp32 accounts for about 1e-6
# tf32 keeps 10 of the 23 bits, and training enlarges what becomes of the others: with operands rounded to it and with
# them cut off, both emulated on a CPU, the final losses of the two models are 2.1e-3 and 1.7e-3 apart.
TF32_TOLERANCE = 1e-2
UNTIMED_STEPS = 2  # the first steps allocate and, on a GPU, compile

PLAIN = "plain PyTorch"
FUSED = "tiedfused"
LOW_MEMORY = "low memory"  # the same layer, told never to keep the latent for backward
COLORS = {PLAIN: GREY, FUSED: TEAL, LOW_MEMORY: LIGHT}


@dataclass(frozen=True)
class Setting:
    """One autoencoder and how to train it."""

    latents: int
    output_activation: str
    epochs: int
    lr: float
    init: str  # of `TiedLinear.reset_parameters`

    @property
    def title(self) -> str:
        return f"{SIDE * SIDE}-{self.latents}, relu / {self.output_activation}"


# The small initialisation shows pen strokes in the atoms after 100 steps, where the default's larger noise would still
# cover them. The overcomplete model keeps the default, and a rate at which its loss does not jump in the first steps.
SETTINGS = (
    Setting(1024, "sigmoid", epochs=50, lr=4e-3, init="small"),
    Setting(8192, "identity", epochs=12, lr=2e-4, init="isometric"),
)


class PlainTiedLinear(nn.Module):
    """What one writes without tiedfused; same parameters as `tiedfused.TiedLinear`."""

    def __init__(self, in_features: int, out_features: int, output_activation: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias_enc = nn.Parameter(torch.empty(out_features))
        self.bias_dec = nn.Parameter(torch.empty(in_features))
        self.output: nn.Module = nn.Sigmoid() if output_activation == "sigmoid" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.linear(x, self.weight, self.bias_enc))
        return self.output(F.linear(h, self.weight.t(), self.bias_dec))


@dataclass
class Run:
    """One implementation in training, and what was measured."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    final_loss: float = float("nan")
    peak_bytes: int = 0

    @property
    def ms(self) -> float:
        timed = self.seconds[UNTIMED_STEPS:] or self.seconds
        return median(timed) * 1e3

    def gradients(self, x: Tensor) -> Tensor:
        """Forward and backward; returns the loss."""
        with tiedfused.settings.override(recompute=True if self.name == LOW_MEMORY else None):
            loss = F.mse_loss(self.model(x), x)
            loss.backward()
        return loss.detach()

    def step(self, x: Tensor) -> None:
        started = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.gradients(x)
        self.optimizer.step()
        self.losses.append(loss.item())  # item() waits for the device
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        self.seconds.append(time.perf_counter() - started)

    def measure(self, digits: Tensor, batch: int) -> None:
        """Loss over all digits, and the peak memory of forward and backward above model, optimiser state and data."""
        with torch.no_grad():
            errors = [(self.model(x) - x).double().square().sum().item() for x in digits.split(batch)]
        self.final_loss = sum(errors) / digits.numel()
        self.optimizer.zero_grad()
        x = digits[:batch]
        self.peak_bytes = peak_memory(lambda: self.gradients(x), digits.device)
        self.optimizer.zero_grad()


def start_runs(setting: Setting, device: torch.device) -> list[Run]:
    """Every implementation with the same initial parameters."""
    torch.manual_seed(0)
    d, h, g = SIDE * SIDE, setting.latents, setting.output_activation

    def fused() -> tiedfused.TiedLinear:
        return tiedfused.TiedLinear(d, h, bias=True, activation="relu", output_activation=g)

    start = fused()
    start.reset_parameters(setting.init)
    models = {PLAIN: PlainTiedLinear(d, h, g), FUSED: fused(), LOW_MEMORY: fused()}
    runs = []
    for name, model in models.items():
        model.load_state_dict(start.state_dict())
        model.to(device)
        runs.append(Run(name, model, torch.optim.Adam(model.parameters(), lr=setting.lr, fused=True)))
    return runs


def train(
    runs: list[Run], digits: Tensor, epochs: int, batch: int, on_step: Callable[[float], None] = lambda loss: None
) -> None:
    """Train all runs on the same batches, in turn at every step."""
    order = torch.Generator().manual_seed(0)
    n = len(digits) // batch * batch
    for _ in range(epochs):
        for rows in torch.randperm(len(digits), generator=order)[:n].split(batch):
            x = digits[rows.to(digits.device)]
            for run in runs:
                run.step(x)
            on_step(runs[0].losses[-1])
    for run in runs:
        run.measure(digits, batch)


def relative_difference(run: Run, plain: Run) -> float:
    return abs(run.final_loss - plain.final_loss) / plain.final_loss


def results_table(results: dict[Setting, list[Run]], batch: int) -> Table:
    """One row per model and implementation; fits a terminal of 80 columns."""
    table = Table(
        title=f"5000 MNIST digits, {batch} rows a step",
        caption="faster, less: times, against plain PyTorch. low memory: tiedfused with recompute=True.\n"
        "peak: memory of forward and backward above the model, optimiser state and data.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("model", "implementation"):
        table.add_column(column, no_wrap=True)
    for column in ("final\nloss", "rel.\ndiff.", "ms a\nstep", "faster", "peak\nMiB", "less"):
        table.add_column(column, justify="right", no_wrap=True)
    for setting, runs in results.items():
        plain = runs[0]
        for run in runs:
            compared = run is not plain
            table.add_row(
                "" if compared else f"{SIDE * SIDE}-{setting.latents}",
                run.name,
                f"{run.final_loss:.6f}",
                f"{relative_difference(run, plain):.1e}" if compared else "",
                f"{run.ms:.1f}",
                f"{plain.ms / run.ms:.1f}×" if compared else "",
                f"{run.peak_bytes / MIB:.0f}",
                f"{plain.peak_bytes / run.peak_bytes:.1f}×" if compared else "",
                end_section=run is runs[-1],
            )
    return table


# ---- the picture ----------------------------------------------------------------------------------------------------


def draw_digits(figure: Figure | SubFigure, results: dict[Setting, list[Run]], digits: Tensor) -> None:
    """The original digits and what each model makes of them, plain and fused."""
    originals = digits[37::500]  # one of each class
    strips = [("original", originals)]
    for setting, runs in results.items():
        for run in runs[:2]:
            with torch.no_grad():
                strips.append((f"{setting.latents} latents\n{run.name}", run.model(originals)))
    figure.suptitle("The same reconstructions", **HEADING)
    axes = figure.subplots(len(strips), 1, gridspec_kw={"left": 0.2, "right": 0.98, "top": 0.9, "bottom": 0.02})
    draw_strips(axes, strips)


def draw_losses(figure: Figure | SubFigure, results: dict[Setting, list[Run]]) -> None:
    """The fused loss dashed over the plain one, a panel a model."""
    figure.suptitle("The same training", **HEADING)
    axes = figure.subplots(1, len(results), gridspec_kw={"left": 0.11, "right": 0.98, "top": 0.8, "bottom": 0.17})
    for ax, (setting, runs) in zip(axes, results.items(), strict=True):
        plain, fused = runs[:2]
        ax.plot(plain.losses, color="#c3c9cf", lw=6, solid_capstyle="round", label=PLAIN)
        ax.plot(fused.losses, color=COLORS[FUSED], lw=1.8, ls=(0, (4, 2)), label=FUSED)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_title(setting.title, loc="left", fontsize=10)
        ax.set_xlabel("step")
        ax.text(
            0.97,
            0.93,
            f"final losses differ by\n{relative_difference(fused, plain):.0e} relative",
            transform=ax.transAxes,
            ha="right",
            va="top",
            fontsize=9,
            color="#555",
        )
    axes[0].set_ylabel("mean squared error")
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")


def draw_atoms(figure: Figure | SubFigure, setting: Setting, run: Run, digits: Tensor) -> None:
    """The most active rows of W as images, each on its own scale, white at 0."""
    columns, count = 14, 112
    model = run.model
    assert isinstance(model, tiedfused.TiedLinear)
    with torch.no_grad():
        busiest = model.encode(digits[::5]).mean(0).topk(count).indices
        atoms = model.weight[busiest]
    scaled = atoms / atoms.abs().amax(1, keepdim=True)
    title = f"The dictionary: {count} most active of {setting.latents} atoms (rows of W)"
    figure.suptitle(title, **HEADING)
    ax = figure.subplots(gridspec_kw={"left": 0.02, "right": 0.98, "top": 0.9, "bottom": 0.02})
    ax.imshow(tile_images(scaled, columns), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    ax.axis("off")


def draw_bars(
    ax: Axes, results: dict[Setting, list[Run]], value: Callable[[Run], float], words: tuple[str, str], title: str
) -> None:
    """A group of bars a model, a bar an implementation, each with its value and its ratio to plain PyTorch."""
    labels, positions = [], []
    largest = max(value(run) for runs in results.values() for run in runs)
    for group, (setting, runs) in enumerate(results.items()):
        for i, run in enumerate(runs):
            y = group * (len(runs) + 0.8) + i
            ax.barh(y, value(run), height=0.86, color=COLORS[run.name], label=run.name if group == 0 else None)
            ratio = value(runs[0]) / value(run)
            better, worse = words
            note = f"  {ratio:.1f}× {better}" if ratio >= 1 else f"  {1 / ratio:.1f}× {worse}"
            ax.text(value(run) + largest * 0.015, y, f"{value(run):.0f}{note if i else ''}", va="center", fontsize=9)
        labels.append(f"{setting.latents}\nlatents")
        positions.append(group * (len(runs) + 0.8) + (len(runs) - 1) / 2)
    ax.set_yticks(positions, labels)
    ax.invert_yaxis()
    ax.set_xlim(0, largest * 1.3)
    ax.set_xticks([])
    ax.tick_params(left=False)
    ax.spines["bottom"].set_visible(False)
    ax.set_title(title, loc="left", fontsize=10)


def draw(results: dict[Setting, list[Run]], digits: Tensor, batch: int, device_name: str, out: Path) -> None:
    """Everything in one 16:9 picture."""
    figure = new_figure(16, 9)
    heading, body = figure.subfigures(2, 1, height_ratios=[0.09, 1])  # type: ignore[misc]
    heading.text(0.012, 0.42, "One weight, used twice", fontsize=22, fontweight="bold", va="center")
    heading.text(0.285, 0.40, r"$y = g\,(f(x W^\top + b_{enc})\,W + b_{dec})$", fontsize=19, va="center")
    heading.text(
        0.988,
        0.42,
        f"5000 MNIST digits, {batch} a step, float32\n{device_name}, torch {torch.__version__}",
        ha="right",
        va="center",
        fontsize=10,
        color="#666",
    )
    left, right = body.subfigures(1, 2, width_ratios=[1, 1])
    digits_part, loss_part = left.subfigures(2, 1, height_ratios=[1.25, 1])
    atoms_part, bars_part = right.subfigures(2, 1, height_ratios=[1.25, 1])
    draw_digits(digits_part, results, digits)
    draw_losses(loss_part, results)
    setting, runs = next(iter(results.items()))
    draw_atoms(atoms_part, setting, runs[1], digits)
    bars_part.suptitle("Time and memory", **HEADING)
    time_ax, memory_ax = bars_part.subplots(
        1, 2, gridspec_kw={"left": 0.09, "right": 0.99, "top": 0.8, "bottom": 0.13, "wspace": 0.24}
    )
    draw_bars(time_ax, results, lambda run: run.ms, ("faster", "slower"), "a training step, ms (median)")
    draw_bars(
        memory_ax,
        results,
        lambda run: run.peak_bytes / MIB,
        ("less", "more"),
        "peak memory of a step, MiB",
    )
    handles, _ = time_ax.get_legend_handles_labels()
    labels = (PLAIN, FUSED, "tiedfused, low memory")
    bars_part.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, out)


def main(
    epochs: Annotated[int | None, typer.Option(help="Epochs of every model; by default each has its own.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=5000, help="Digits a step.")] = 2500,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("demo.png"),
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    tf32: Annotated[bool, typer.Option(help="On a GPU: let all products round their operands to tf32.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Two epochs: to see that it runs.")] = False,
) -> None:
    """Train on MNIST digits with plain PyTorch and with tiedfused; print a table, draw a picture."""
    console = Console()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    tf32 = tf32 and where.type == "cuda"
    if tf32:
        torch.set_float32_matmul_precision("high")
        name += ", tf32"
    console.print(f"tiedfused {tiedfused.__version__}, torch {torch.__version__}, {name} ({platform.machine()})")
    for setting in SETTINGS:
        plan = tiedfused.plan(batch, SIDE * SIDE, setting.latents, device=where, grad_x=False)
        console.print(f"{setting.title}: served by {plan.backend} ({plan.regime}), `tiedfused explain` says why")
    digits = load_digits(where)
    results: dict[Setting, list[Run]] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.5f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for setting in SETTINGS:
            n_epochs = epochs or (2 if quick else setting.epochs)
            task = progress.add_task(setting.title, total=n_epochs * (len(digits) // batch), loss=float("nan"))
            results[setting] = start_runs(setting, where)
            train(
                results[setting],
                digits,
                n_epochs,
                batch,
                lambda loss, task=task: progress.update(task, advance=1, loss=loss),  # type: ignore[misc]
            )
    console.print(results_table(results, batch))
    draw(results, digits, batch, name, out)
    console.print(f"picture: {out}")
    worst = max(relative_difference(run, runs[0]) for runs in results.values() for run in runs)
    tolerance = TF32_TOLERANCE if tf32 else TOLERANCE
    if not worst <= tolerance:  # also catches nan
        console.print(f"[red]final losses differ by {worst:.1e} relative, more than {tolerance:.0e}")
        raise typer.Exit(1)
    console.print(f"final losses agree within {worst:.1e} relative")


if __name__ == "__main__":
    typer.run(main)
