"""A deep tied stack on MNIST digits: from scratch, layer by layer first, and against one layer of the same code size.

Prints the shapes through the stack, what a step costs, how gradients fare at the start, and the errors on held-out
digits; draws the training and the reconstructions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from common import (
    GREY,
    HEADING,
    LIGHT,
    TEAL,
    Docs,
    Grid,
    Out,
    Results,
    code,
    draw_strips,
    grid,
    new_figure,
    paragraph,
    picture_path,
    print_grids,
    save_figure,
    split_digits,
    split_figure,
    write_data,
)
from rich.console import Console
from torch import Tensor

from tiedfused import TiedLinear, analysis
from tiedfused.nn import TiedAutoencoder

NAME = "deep_stack"
SIZES = (784, 256, 64, 16)
TRAIN, TEST = 4000, 1000
BATCH, RATE = 250, 2e-3
WIDE = 4096  # latents of one layer, whose cost is shown beside the stack's
COLORS = {"one layer": GREY, "stack": TEAL, "stack, pretrained": LIGHT}


def stack(*sizes: int) -> TiedAutoencoder:
    """tanh between the layers, a linear code, linear pixels: with one layer, PCA by gradient descent."""
    torch.manual_seed(0)
    activation = ["tanh"] * (len(sizes) - 2) + ["identity"]
    return TiedAutoencoder(sizes, True, activation=activation)


def train(model: TiedAutoencoder | TiedLinear, digits: Tensor, steps: int) -> list[float]:
    """Minimise the reconstruction error; returns the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        x = digits[torch.randint(len(digits), (BATCH,), generator=order)]
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), x)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def pretrain(model: TiedAutoencoder, digits: Tensor, steps: int) -> None:
    """Each layer as an autoencoder of what the layers before it put out."""
    x = digits
    for layer in model.layers:
        assert isinstance(layer, TiedLinear)
        train(layer, x, steps)
        with torch.no_grad():
            x = layer.encode(x)


@torch.no_grad()
def test_error(model: TiedAutoencoder, digits: Tensor) -> float:
    return F.mse_loss(model(digits), digits).item()


def shown(results: Results) -> dict[str, Grid | str]:
    """What the terminal and the documentation show."""
    rows = [[m["name"], m["sizes"], f"{m['parameters']:,}", f"{1e3 * m['mse']:.1f}"] for m in results["models"]]
    setup = paragraph(
        f"Test MSE on {TEST} held-out MNIST digits after {results['steps']} steps of Adam, one seed.",
        f"Pretrained: each layer by itself first, {results['steps'] // 4} steps.",
    )
    columns = ["model", "sizes", "parameters", "test MSE · 10³"]
    return {
        "trace": code(results["trace"]),
        "summary": code(results["summary"]),
        "report": code(results["report"]),
        "wide": code(results["wide"]),
        "setup": setup,
        "table": grid(columns, rows, "held-out digits", text_columns=2),
    }


def draw(histories: dict[str, list[float]], models: dict[str, TiedAutoencoder], digits: Tensor, out: Path) -> None:
    """Losses on the left, reconstructions on the right."""
    figure = new_figure(14, 4.6)
    left, right = split_figure(figure, 1, 2, width_ratios=[1, 1.35])
    left.suptitle("784 pixels through a code of 16", **HEADING)
    ax = left.subplots(gridspec_kw={"left": 0.13, "right": 0.95, "top": 0.86, "bottom": 0.13})
    for name, losses in histories.items():
        ax.plot(losses, color=COLORS[name], lw=1.4, label=name)
    ax.set_yscale("log")
    ax.set_yticks([0.02, 0.05, 0.1, 0.2], ["0.02", "0.05", "0.1", "0.2"])
    ax.minorticks_off()
    ax.set_ylabel("mean squared error")
    ax.set_xlabel("step")
    ax.legend(frameon=False, fontsize=9)
    right.suptitle("Digits not seen in training", **HEADING)
    axes = right.subplots(4, 1, gridspec_kw={"left": 0.17, "right": 0.98, "top": 0.88, "bottom": 0.03})
    with torch.no_grad():
        draw_strips(axes, [("original", digits), *((name, model(digits)) for name, model in models.items())])
    save_figure(figure, out)


def main(
    steps: Annotated[int, typer.Option(min=4, help="Optimiser steps of each model.")] = 1600,
    out: Out = None,
    docs: Docs = False,
) -> None:
    """A deep tied stack on digits."""
    torch.set_num_threads(1)  # the problems are small, and one thread makes the numbers the same everywhere
    digits, held_out = split_digits([TRAIN, TEST])
    x = digits[:BATCH]
    models = dict(zip(COLORS, (stack(SIZES[0], SIZES[-1]), stack(*SIZES), stack(*SIZES)), strict=True))
    deep = models["stack"]
    with analysis.gradient_report(deep) as report:
        F.mse_loss(deep(x), x).backward()
    parts: dict[str, analysis.Trace | analysis.Summary | analysis.GradientReport] = {
        "trace": analysis.trace(deep, x),
        "summary": analysis.summary(deep, x),
        "report": report,
    }
    wide = TiedLinear(SIZES[0], WIDE, True, activation="relu")
    parts["wide"] = analysis.summary(wide, digits[: 4 * BATCH])
    for part in parts.values():
        Console().print(part)
    pretrain(models["stack, pretrained"], digits, steps // 4)
    histories = {name: train(model, digits, steps) for name, model in models.items()}
    found = [
        {
            "name": name,
            "sizes": "-".join(map(str, model.sizes)),
            "parameters": sum(p.numel() for p in model.parameters()),
            "mse": test_error(model, held_out),
        }
        for name, model in models.items()
    ]
    results: Results = {"steps": steps, "models": found, **{name: str(part) for name, part in parts.items()}}
    print_grids(shown(results))
    picture = picture_path(NAME, out, docs)
    draw(histories, models, held_out[:12], picture)
    print(f"picture: {picture}")
    if docs:
        write_data(NAME, results, shown(results))


if __name__ == "__main__":
    typer.run(main)
