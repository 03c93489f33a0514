"""Tied against untied, honestly: held-out reconstruction of MNIST digits.

A relu autoencoder, tied and untied, at equal width and at equal parameters, on a small and on a large training set,
with a linear output and with a sigmoid one, trained for some time and for twice as long. Each gets its own learning
rate, chosen on validation digits, and is taken where its validation error was least. Tied and untied start as the same
function, see the same batches, and are tested on the same digits. A table and a picture.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from common import (
    GREY,
    ORANGE,
    TEAL,
    Docs,
    Grid,
    Out,
    Results,
    grid,
    new_figure,
    paragraph,
    picture_path,
    print_grids,
    save_figure,
    split_digits,
    write_data,
)
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from tiedfused import TiedLinear

NAME = "tied_vs_untied"
D = 784
SMALL, LARGE, VALIDATION, TEST = 300, 3500, 500, 1000
BATCH = 100
CHECK_EVERY = 25  # steps between looks at the validation loss
SEEDS = (0, 1, 2)
COLORS = (TEAL, GREY, ORANGE)
LABELS = ("tied", "untied, equal width", "untied, equal parameters")
EFFORTS = (1, 2)  # times the steps


@dataclasses.dataclass(frozen=True)
class Task:
    """What the contestants compete in."""

    digits: int
    width: int
    output: str  # linear: trained on the squared error; sigmoid: on the cross-entropy of each pixel

    @property
    def rates(self) -> tuple[float, ...]:
        return (1e-3, 3e-3, 1e-2) if self.output == "linear" else (3e-3, 1e-2, 3e-2, 1e-1)


TASKS = [
    *(Task(digits, width, "linear") for digits in (SMALL, LARGE) for width in (32, 128)),
    *(Task(digits, 128, "sigmoid") for digits in (SMALL, LARGE)),
]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One kind of model."""

    name: str
    width: int
    tied: bool

    @property
    def parameters(self) -> int:
        return (1 if self.tied else 2) * D * self.width + D + self.width

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        tied = TiedLinear(D, self.width, True, activation="relu")
        if self.tied:
            return tied
        encoder, decoder = tied.to_linear_pair()
        return nn.Sequential(encoder, nn.ReLU(), decoder)


def contestants(width: int) -> list[Contestant]:
    return [
        Contestant("tied", width, True),
        Contestant("untied", width, False),
        Contestant("untied", width // 2, False),
    ]


def train(who: Contestant, task: Task, steps: int, rate: float, seed: int) -> tuple[float, float]:
    """Least validation error, and the test error there."""
    train_digits, *held_out = split_digits([LARGE, VALIDATION, TEST])
    sigmoid = task.output == "sigmoid"
    loss = F.binary_cross_entropy_with_logits if sigmoid else F.mse_loss
    model = who.build(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def error(x: Tensor) -> float:
        y = model(x)
        return F.mse_loss(y.sigmoid() if sigmoid else y, x).item()

    best = math.inf, math.inf
    for step in range(1, steps + 1):
        x = train_digits[torch.randint(task.digits, (BATCH,), generator=order)]
        optimizer.zero_grad()
        loss(model(x), x).backward()
        optimizer.step()
        schedule.step()
        if step % CHECK_EVERY == 0 or step == steps:
            validation, test = held_out
            best = min(best, (error(validation), error(test)))
    return best


def tuned(who: Contestant, task: Task, steps: int) -> Results:
    """Choose the rate with the first seed, then run the others."""
    tried = {rate: train(who, task, steps, rate, SEEDS[0]) for rate in task.rates}
    rate = min(tried, key=lambda rate: tried[rate][0])
    errors = [tried[rate][1], *(train(who, task, steps, rate, seed)[1] for seed in SEEDS[1:])]
    return {"steps": steps, "rate": rate, "mse": mean(errors), "spread": stdev(errors)}


def compete(job: tuple[Contestant, Task, int]) -> Results:
    """A row of the table."""
    torch.set_num_threads(1)  # the problems are small: two of them at once are faster than one on two cores
    who, task, steps = job
    trained = [tuned(who, task, effort * steps) for effort in EFFORTS]
    return {
        **dataclasses.asdict(who),
        "parameters": who.parameters,
        "task": dataclasses.asdict(task),
        "trained": trained,
    }


def groups(results: Results) -> list[list[Results]]:
    """The contestants of each task."""
    runs = results["runs"]
    return [[r for r in runs if r["task"] == dataclasses.asdict(task)] for task in TASKS]


def shown(results: Results) -> dict[str, Grid | str]:
    """What the terminal and the documentation show."""
    rows = [
        [
            f"{r['name']}, H {r['width']}",
            f"{r['task']['digits']}, {r['task']['output']}",
            f"{r['parameters'] / 1e3:.0f}k",
            ", ".join(f"{1e3 * t['rate']:g}" for t in r["trained"]),
            *(f"{1e3 * t['mse']:.1f} ± {1e3 * t['spread']:.1f}" for t in r["trained"]),
            f"{r['trained'][-1]['mse'] / group[0]['trained'][-1]['mse'] - 1:+.0%}" if r is not group[0] else "",
        ]
        for group in groups(results)
        for r in group
    ]
    steps = [f"{t['steps']} steps" for t in results["runs"][0]["trained"]]
    linear, sigmoid = (", ".join(f"{rate:g}" for rate in task.rates) for task in (TASKS[0], TASKS[-1]))
    setup = paragraph(
        f"Test MSE · 10³ on {TEST} held-out MNIST digits, mean and standard deviation over {len(SEEDS)} seeds; the",
        "last column compares the longer trainings with the tied layer's. relu latents; the linear output is trained",
        "on the squared error, the sigmoid on the cross-entropy of each pixel. Adam with a cosine schedule, batches of",
        f"{BATCH}. The learning rate is one of {linear}, for the sigmoid one of {sigmoid}, chosen with the first seed",
        "for each number of steps; a run is taken at the step where it is best; both by",
        f"{VALIDATION} validation digits.",
    )
    columns = ["model", "digits, output", "params", "lr·10³", *steps, "vs tied"]
    return {"setup": setup, "table": grid(columns, rows, "test MSE · 10³ on held-out digits", text_columns=2)}


def draw(results: Results, out: Path) -> None:
    """A group of bars a task; the bar is the longer training, the line the shorter."""
    figure = new_figure(13, 5.2)
    figure.suptitle("Tied or untied? Held-out error on digits", x=0.02, ha="left", fontsize=16, fontweight="bold")
    ax = figure.subplots(gridspec_kw={"left": 0.06, "right": 0.98, "top": 0.86, "bottom": 0.24})
    ticks = []
    for i, group in enumerate(groups(results)):
        for j, (r, color, label) in enumerate(zip(group, COLORS, LABELS, strict=True)):
            shorter, longer = r["trained"]
            x, value, spread = i * (len(group) + 1) + j, 1e3 * longer["mse"], 1e3 * longer["spread"]
            ax.bar(x, value, 0.9, color=color, yerr=spread, ecolor="#444", capsize=3, label="" if i else label)
            ax.plot([x - 0.45, x + 0.45], [1e3 * shorter["mse"]] * 2, color="#444", lw=1.5, ls=":")
            ax.text(x, value / 2, f"{value:.1f}", ha="center", va="center", fontsize=9, color="white")
        ticks.append(i * (len(group) + 1) + (len(group) - 1) / 2)
    ax.plot([], [], color="#444", lw=1.5, ls=":", label="trained half as long")
    ax.set_xticks(ticks, [f"H {task.width}, {task.output}\n{task.digits} digits" for task in TASKS])
    ax.tick_params(bottom=False)
    ax.set_ylabel("test MSE · 10³ (less is better)")
    figure.legend(loc="lower center", ncols=4, frameon=False, fontsize=10)
    save_figure(figure, out)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps; each is also trained for twice as many.")] = 400,
    out: Out = None,
    docs: Docs = False,
) -> None:
    """Tied against untied autoencoders on held-out digits."""
    jobs = [(who, task, steps) for task in TASKS for who in contestants(task.width)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = pool.map(compete, jobs)
        runs = list(track(done, description="training", total=len(jobs), console=Console(stderr=True)))
    results = {"runs": runs}
    print_grids(shown(results))
    picture = picture_path(NAME, out, docs)
    draw(results, picture)
    print(f"picture: {picture}")
    if docs:
        write_data(NAME, results, shown(results))


if __name__ == "__main__":
    typer.run(main)
