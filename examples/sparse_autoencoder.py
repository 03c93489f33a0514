"""Train a sparse autoencoder with an L1 penalty on MNIST pen strokes, without ever storing its latent.

The penalty, and the counts that tell how sparse the latent is, come from `return_stats=True`. The same step in plain
PyTorch and under torch.compile is timed beside it, with the peak memory of each: three tables and a picture.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from common import (
    GREY,
    HEADING,
    ORANGE,
    SIDE,
    TEAL,
    Docs,
    Grid,
    Out,
    Results,
    draw_strips,
    grid,
    load_digits,
    new_figure,
    paragraph,
    picture_path,
    print_grids,
    save_figure,
    split_figure,
    tile_images,
    where,
    write_data,
)
from matplotlib.figure import SubFigure
from rich.console import Console
from rich.progress import track
from torch import Tensor

from tiedfused import TiedLinear, losses, metrics
from tiedfused.profile import peak_memory
from tiedfused.settings import MIB

NAME = "sparse_autoencoder"
CROP = 14  # a crop is a quarter of a digit
D = CROP * CROP
ROWS = 4096  # crops a step
LATENTS = 4096
MEMORY_LATENTS = (1024, 2048, 4096, 8192)  # where the peak memory is measured
SPARSITY = 0.2  # coefficient of the L1 penalty
LEARNING_RATE = 2e-3
FIRED_STEPS = 50  # a latent that fired on no row of the last so many steps counts as dead
ROUNDS = 9
WRONG = 1e-4  # relative error of a gradient above which its speed is not worth reporting
COLORS = {"eager": GREY, "torch.compile": ORANGE, "tiedfused": TEAL}

Objective = Callable[[TiedLinear, Tensor], Tensor]


def plain(layer: TiedLinear, x: Tensor) -> Tensor:
    """The loss as one writes it in PyTorch: the reconstruction error of a row, and the L1 norm of its latent."""
    h = F.relu(F.linear(x, layer.weight, layer.bias_enc))
    y = F.linear(h, layer.weight.t(), layer.bias_dec)
    return (y - x).square().sum(1).mean() + SPARSITY * h.abs().sum(1).mean()


def fused(layer: TiedLinear, x: Tensor) -> Tensor:
    """The same loss, from the layer's statistics."""
    y, stats = layer(x, return_stats=True)
    return (y - x).square().sum(1).mean() + SPARSITY * losses.l1(stats)


def make_layer(latents: int, device: torch.device) -> TiedLinear:
    torch.manual_seed(0)
    return TiedLinear(D, latents, bias=True, activation="relu").to(device)


class Crops:
    """Random 14 × 14 crops of 5000 MNIST digits, as rows in [0, 1]."""

    def __init__(self, device: torch.device) -> None:
        self.digits = load_digits(device)
        self.windows = self.digits.view(-1, SIDE, SIDE).unfold(1, CROP, 1).unfold(2, CROP, 1)
        self.generator = torch.Generator().manual_seed(0)

    def batch(self, rows: int) -> Tensor:
        index = [
            torch.randint(size, (rows,), generator=self.generator).to(self.digits.device)
            for size in self.windows.shape[:3]
        ]
        return self.windows[index[0], index[1], index[2]].reshape(rows, D)


# ---- training -------------------------------------------------------------------------------------------------------


def train(crops: Crops, steps: int) -> tuple[TiedLinear, dict[str, list[float]], float]:
    """A sparse autoencoder; of every step its explained variance and active latents a row; the dead latents' share."""
    device = crops.digits.device
    layer = make_layer(LATENTS, device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=LEARNING_RATE, fused=True)
    fired = torch.zeros(LATENTS, dtype=torch.int64, device=device)
    history: dict[str, list[float]] = {"explained_variance": [], "l0": []}
    for step in track(range(steps), description=f"training {D}-{LATENTS}", console=Console(stderr=True)):
        x = crops.batch(ROWS)
        optimizer.zero_grad()
        y, stats = layer(x, return_stats=True)
        loss = (y - x).square().sum(1).mean() + SPARSITY * losses.l1(stats)
        loss.backward()
        optimizer.step()
        history["explained_variance"].append(float(metrics.explained_variance(y.detach(), x)))
        history["l0"].append(float(metrics.l0(stats)))
        if step >= steps - FIRED_STEPS:
            fired += stats.fired
    return layer, history, float(metrics.dead_fraction(fired))


# ---- time and memory ------------------------------------------------------------------------------------------------


def step_of(objective: Objective, layer: TiedLinear, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Loss and gradients, without the optimiser's step, which is the same for all."""
    return lambda: torch.autograd.grad(objective(layer, x), list(layer.parameters()))


def measure(crops: Crops) -> tuple[list[Results], dict[str, list[float]]]:
    """Time and peak memory of a step at the training's size, and the peak memory over numbers of latents."""
    device = crops.digits.device
    objectives: dict[str, Objective] = {"eager": plain, "torch.compile": torch.compile(plain), "tiedfused": fused}
    layer, x = make_layer(LATENTS, device), crops.batch(ROWS)
    steps = {name: step_of(objective, layer, x) for name, objective in objectives.items()}
    expected = steps["eager"]()
    for name, step in steps.items():  # also the warm-up: compiles, caches
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(step(), expected, strict=True))
        if not error <= WRONG:  # also catches nan
            raise SystemExit(f"{name}: a gradient differs from eager's by {error:.1e} relative; no speed is reported")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):  # interleaved, so that whatever else the machine does slows all
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - started))
    rows = []
    for name, step in steps.items():
        p20, *_, p80 = statistics.quantiles(times[name], n=5, method="inclusive")
        peak = peak_above_gradients(step, device)
        rows.append({"name": name, "ms": statistics.median(times[name]), "p20": p20, "p80": p80, "peak_mib": peak})
    memory: dict[str, list[float]] = {"eager": [], "tiedfused": []}
    for latents in MEMORY_LATENTS:
        layer = make_layer(latents, device)
        for name, peaks in memory.items():
            peaks.append(peak_above_gradients(step_of(objectives[name], layer, x), device))
    return rows, memory


def peak_above_gradients(step: Callable[[], tuple[Tensor, ...]], device: torch.device) -> float:
    """What forward and backward need above parameters, gradients and data, in MiB."""
    gradients = sum(t.nbytes for t in step())
    return (peak_memory(step, device) - gradients) / MIB


def shown(results: Results) -> dict[str, Grid | str]:
    """What the terminal and the documentation show."""
    eager, trained, latents = results["times"][0], results["trained"], results["memory_latents"]
    times = [
        [
            row["name"],
            f"{row['ms']:.0f} ({row['p20']:.0f}-{row['p80']:.0f})",
            f"{eager['ms'] / row['ms']:.2f}",
            f"{row['peak_mib']:.1f}",
        ]
        for row in results["times"]
    ]
    memory = [[name, *(f"{peak:.1f}" for peak in peaks)] for name, peaks in results["memory"].items()]
    return {
        "setup": paragraph(f"N {ROWS}, d {D}, float32; {results['where']}."),
        "times": grid(
            ["a training step with L1", "ms (p20-p80)", "× eager", "peak MiB"], times, f"N {ROWS}, d {D}, H {LATENTS}"
        ),
        "memory": grid(["peak MiB", *(f"H {h}" for h in latents)], memory, f"memory of a step, N {ROWS}, d {D}"),
        "trained": grid(
            ["trained", "steps", "explained variance", f"active of {LATENTS}", f"dead in the last {FIRED_STEPS} steps"],
            [
                [
                    f"{D}-{LATENTS}",
                    f"{trained['steps']}",
                    f"{trained['explained_variance']:.1%}",
                    f"{trained['l0']:.0f}",
                    f"{trained['dead_fraction']:.0%}",
                ]
            ],
        ),
    }


# ---- the picture ----------------------------------------------------------------------------------------------------


def draw_training(figure: SubFigure, layer: TiedLinear, history: dict[str, list[float]], digits: Tensor) -> None:
    """Digits, put together again from what the autoencoder makes of their quarters; explained variance and L0."""
    quarters = digits.view(-1, SIDE, SIDE).unfold(1, CROP, CROP).unfold(2, CROP, CROP)  # [n, 2, 2, CROP, CROP]
    with torch.no_grad():
        y, stats = layer(quarters.reshape(-1, D), return_stats=True)
    whole = y.view(quarters.shape).permute(0, 1, 3, 2, 4).reshape(len(digits), -1)
    figure.suptitle("A sparse autoencoder, trained without its latent", **HEADING)
    top, bottom = split_figure(figure, 2, 1, height_ratios=[1, 1.7])
    axes = top.subplots(2, 1, gridspec_kw={"left": 0.2, "right": 0.98, "top": 0.8, "bottom": 0.02})
    rebuilt = f"from {stats.l0.float().mean():.0f} of {LATENTS}\nlatents a quarter"
    draw_strips(axes, [("digits", digits), (rebuilt, whole)])
    variance, active = bottom.subplots(
        2, 1, sharex=True, gridspec_kw={"left": 0.13, "right": 0.97, "top": 0.93, "bottom": 0.12, "hspace": 0.28}
    )
    for ax, key, title in (
        (variance, "explained_variance", "explained variance"),
        (active, "l0", "active latents a row"),
    ):
        ax.plot(history[key], color=TEAL, lw=1.8)
        ax.set_title(title, loc="left", fontsize=10)
    variance.set_ylim(0, 1)
    active.set_yscale("log")
    active.set_xlabel("step")


def draw_atoms(figure: SubFigure, layer: TiedLinear, x: Tensor, columns: int = 24, count: int = 192) -> None:
    """The most active rows of W as images, each on its own scale, white at 0."""
    with torch.no_grad():
        _, stats = layer(x, return_stats=True)
        atoms = layer.weight[stats.mean.topk(count).indices]
    figure.suptitle(f"The dictionary: {count} most active of {LATENTS} atoms (rows of W)", **HEADING)
    ax = figure.subplots(gridspec_kw={"left": 0.02, "right": 0.98, "top": 0.88, "bottom": 0.02})
    ax.imshow(tile_images(atoms / atoms.abs().amax(1, keepdim=True), columns), cmap="RdBu_r", vmin=-1, vmax=1)
    ax.axis("off")


def draw_cost(figure: SubFigure, results: Results) -> None:
    """Peak memory over the latents, and the time of a step."""
    figure.suptitle("A training step with L1", **HEADING)
    memory_ax, time_ax = figure.subplots(
        1, 2, gridspec_kw={"left": 0.08, "right": 0.97, "top": 0.76, "bottom": 0.16, "wspace": 0.42}
    )
    latents = results["memory_latents"]
    for name, peaks in results["memory"].items():
        memory_ax.plot(latents, peaks, "o-", color=COLORS[name], label=name)
        memory_ax.annotate(
            f"{peaks[-1]:.0f}", (latents[-1], peaks[-1]), (0, 6), textcoords="offset points", ha="center"
        )
    memory_ax.set_xticks(latents, [str(h) for h in latents], fontsize=8)
    memory_ax.set(xlabel="latents H", ylim=(0, None))
    memory_ax.set_title("peak memory, MiB", loc="left", fontsize=10)
    memory_ax.legend(frameon=False, fontsize=9)
    names, times = [row["name"] for row in results["times"]], [row["ms"] for row in results["times"]]
    bars = time_ax.barh(names, times, color=[COLORS[name] for name in names])
    time_ax.bar_label(bars, [f"{t:.0f}" for t in times], padding=3)
    time_ax.invert_yaxis()
    time_ax.set_xticks([])
    time_ax.tick_params(left=False)
    time_ax.spines["bottom"].set_visible(False)
    time_ax.set_xlim(0, 1.2 * max(times))
    time_ax.set_title(f"time, ms (H {LATENTS})", loc="left", fontsize=10)


def draw(results: Results, history: dict[str, list[float]], layer: TiedLinear, crops: Crops, out: Path) -> None:
    """Everything in one picture."""
    figure = new_figure(15, 7.6)
    left, right = split_figure(figure, 1, 2, width_ratios=[1, 1.25])
    atoms, cost = split_figure(right, 2, 1, height_ratios=[1.15, 1])
    draw_training(left, layer, history, crops.digits[37::500])  # one of each class
    draw_atoms(atoms, layer, crops.batch(ROWS))
    draw_cost(cost, results)
    save_figure(figure, out)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 200,
    out: Out = None,
    docs: Docs = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
) -> None:
    """Train a sparse autoencoder on MNIST pen strokes, and measure its step."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    crops = Crops(torch.device(device))
    times, memory = measure(crops)
    layer, history, dead = train(crops, steps)
    results: Results = {
        "where": where(device),
        "times": times,
        "memory_latents": MEMORY_LATENTS,
        "memory": memory,
        "trained": {"steps": steps, "dead_fraction": dead, **{key: values[-1] for key, values in history.items()}},
    }
    print_grids(shown(results))
    picture = picture_path(NAME, out, docs)
    draw(results, history, layer, crops, picture)
    print(f"picture: {picture}")
    if docs:
        write_data(NAME, results, shown(results))


if __name__ == "__main__":
    typer.run(main)
