"""Denoising autoencoders: tied layers trained to undo masking, Gaussian and salt-and-pepper noise on MNIST digits.

One layer is trained on clean digits and one on each corruption; each is tested, on digits it has not seen, on all of
them. A table of errors and a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from common import (
    HEADING,
    Docs,
    Grid,
    Out,
    Results,
    draw_strips,
    grid,
    new_figure,
    paragraph,
    picture_path,
    print_grids,
    save_figure,
    split_digits,
    split_figure,
    tile_images,
    write_data,
)
from torch import Tensor

from tiedfused import TiedLinear, corruption

NAME = "denoising"
D, LATENTS = 784, 512
TRAIN, TEST = 4000, 1000
BATCH, RATE = 250, 2e-3

Corruption = Callable[[Tensor, torch.Generator], Tensor]
CORRUPTIONS: dict[str, Corruption] = {
    "none": lambda x, g: x,
    "masking": lambda x, g: corruption.mask(x, 0.5, generator=g),
    "Gaussian": lambda x, g: corruption.gaussian(x, 0.5, generator=g),
    "salt, pepper": lambda x, g: corruption.salt_and_pepper(x, 0.3, generator=g),
}


def train(corrupt: Corruption, digits: Tensor, steps: int) -> TiedLinear:
    """A layer that maps corrupted digits to clean ones."""
    torch.manual_seed(0)
    layer = TiedLinear(D, LATENTS, True, activation="relu")
    layer.reset_parameters("small")  # atoms then show strokes before they show the noise they started from
    optimizer = torch.optim.Adam(layer.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = digits[torch.randint(len(digits), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        F.mse_loss(layer(corrupt(x, generator)), x).backward()
        optimizer.step()
        schedule.step()
    return layer


@torch.no_grad()
def test_errors(layers: dict[str, TiedLinear], corrupted: dict[str, Tensor], clean: Tensor) -> list[list[float]]:
    """Mean squared error against the clean digits: of the input itself, then a row a layer; a column a corruption."""
    untouched = [F.mse_loss(x, clean).item() for x in corrupted.values()]
    return [untouched, *([F.mse_loss(layer(x), clean).item() for x in corrupted.values()] for layer in layers.values())]


def shown(results: Results) -> dict[str, Grid | str]:
    """What the terminal and the documentation show."""
    rows = [
        [name, *(f"{1e3 * e:.1f}" for e in row)]
        for name, row in zip(["(the input itself)", *CORRUPTIONS], results["errors"], strict=True)
    ]
    setup = paragraph(
        f"MSE · 10³ against the clean digits, on {TEST} digits not seen in training. Each row is a tied layer,",
        f"{D}-{LATENTS} with relu, trained for {results['steps']} steps on digits with one kind of noise,",
        "one seed; each column is what it was given.",
    )
    return {"setup": setup, "table": grid(["trained on", *CORRUPTIONS], rows, "MSE · 10³ against clean digits")}


@torch.no_grad()
def draw(layers: dict[str, TiedLinear], corrupted: dict[str, Tensor], clean: Tensor, rows: Tensor, out: Path) -> None:
    """What goes in and comes out on the left, atoms on the right."""
    figure = new_figure(15, 8.4)
    left, right = split_figure(figure, 1, 2, width_ratios=[1.25, 1])
    left.suptitle("Digits not seen in training", **HEADING)
    strips = [("original", clean[rows])]
    for name in list(CORRUPTIONS)[1:]:
        x = corrupted[name][rows]
        strips += [(name, x), ("trained without noise", layers["none"](x)), ("denoiser", layers[name](x))]
    gaps = [1, 0.35, *[1, 1, 1, 0.35] * 3][:-1]
    axes = left.subplots(
        len(gaps),
        1,
        height_ratios=gaps,
        gridspec_kw={"left": 0.24, "right": 0.98, "top": 0.93, "bottom": 0.02, "hspace": 0.1},
    )
    for ax, gap in zip(axes, gaps, strict=True):
        ax.set_axis_off() if gap < 1 else None
    draw_strips([ax for ax, gap in zip(axes, gaps, strict=True) if gap == 1], strips)
    columns, count = 12, 48
    right.suptitle("The most used atoms (rows of W)", **HEADING)
    panels = right.subplots(
        2, 1, gridspec_kw={"left": 0.03, "right": 0.97, "top": 0.89, "bottom": 0.02, "hspace": 0.14}
    )
    names = ("none", "Gaussian")
    for ax, name, title in zip(panels, names, ("trained without noise", "trained on Gaussian noise"), strict=True):
        layer = layers[name]
        used = layer.encode(corrupted[name]).mean(0).topk(count).indices
        atoms = layer.weight[used]
        shown = tile_images(atoms / atoms.abs().amax(1, keepdim=True), columns)
        ax.imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        ax.set_title(title, loc="left", fontsize=10)
        ax.axis("off")
    save_figure(figure, out)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each layer.")] = 600,
    out: Out = None,
    docs: Docs = False,
) -> None:
    """Tied denoising autoencoders on digits."""
    torch.set_num_threads(1)  # the problems are small, and one thread makes the numbers the same everywhere
    digits, clean = split_digits([TRAIN, TEST])
    generator = torch.Generator().manual_seed(1)
    corrupted = {name: corrupt(clean, generator) for name, corrupt in CORRUPTIONS.items()}
    layers = {name: train(corrupt, digits, steps) for name, corrupt in CORRUPTIONS.items()}
    results = {"steps": steps, "errors": test_errors(layers, corrupted, clean)}
    print_grids(shown(results))
    picture = picture_path(NAME, out, docs)
    draw(layers, corrupted, clean, torch.arange(12), picture)
    print(f"picture: {picture}")
    if docs:
        write_data(NAME, results, shown(results))


if __name__ == "__main__":
    typer.run(main)
