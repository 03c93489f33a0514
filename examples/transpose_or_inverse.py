"""Transpose or inverse? Linear autoencoders on MNIST digits: what training does to Wᵀ, and what an inverse would cost.

Three linear autoencoders are trained to convergence on the same digits: tied, untied, and untied with an L2 penalty.
Then random weights of growing width are decoded by transpose and by pseudo-inverse, with and without noise on the
latent. Two tables and a picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
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
    write_data,
)
from torch import Tensor

from tiedfused import TiedLinear, analysis
from tiedfused.functional import tied_encode_decode

NAME = "transpose_or_inverse"
LATENTS = 16
L2 = 1e-5  # of ‖W‖² + ‖D‖², small against the loss
NOISE = 0.1  # rms on the latent, relative to the latent's
WIDTHS = (49, 98, 196, 392, 588, 686, 735, 764, 774, 784)
SHOWN_WIDTHS = (98, 392, 686, 764, 784)  # in the table
STRIP_WIDTH = 764  # of the pictured decoders
COLORS = {"tied": TEAL, "untied": GREY, "untied, L2": ORANGE}


def train(kind: str, x: Tensor, iterations: int) -> tuple[Tensor, Tensor, list[dict[str, float]]]:
    """Train with L-BFGS; returns encoder W, decoder D (both ``[H, d]``, y = x Wᵀ D) and the history."""
    torch.manual_seed(0)
    start = [TiedLinear(x.shape[1], LATENTS, dtype=x.dtype).weight for _ in range(1 if kind == "tied" else 2)]
    weights = start[0], start[-1]
    optimizer = torch.optim.LBFGS(
        start, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )
    history = []

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        w, d = weights
        y = tied_encode_decode(x, w, activation="identity") if kind == "tied" else x @ w.T @ d
        error = (y - x).square().mean()
        loss = error + (L2 * (w.square().sum() + d.square().sum()) if kind == "untied, L2" else 0)
        loss.backward()
        history.append({"error": error.item(), "orthogonality": analysis.orthogonality(w)})
        return loss

    optimizer.step(evaluate)
    return weights[0].detach(), weights[1].detach(), history


def trained_models(x: Tensor, iterations: int) -> tuple[Results, dict[str, list[dict[str, float]]]]:
    """For each kind the numbers of the table, and the histories."""
    floor = analysis.pca_error(x, LATENTS)
    found, histories = {}, {}
    for kind in COLORS:
        w, d, histories[kind] = train(kind, x, iterations)
        error = (x @ w.T @ d - x).square().mean().item()
        found[kind] = {
            "error": error,
            "above_floor": error / floor - 1,
            "orthogonality": analysis.orthogonality(w),
            "decoder_away": ((d - w).norm() / w.norm()).item(),
            "angle": analysis.subspace_angle(w, x),
            "condition": analysis.condition_number(w),
            "gain": analysis.noise_gain(d),
        }
    return {"floor": floor, "models": found}, histories


def random_weights(x: Tensor) -> list[dict[str, float]]:
    """For random weights of each width: errors and noise gains of both decoders."""
    rows = []
    for width in WIDTHS:
        torch.manual_seed(0)
        layer = TiedLinear(x.shape[1], width, dtype=x.dtype)
        result = analysis.compare_decoders(layer, x, noise=NOISE, generator=torch.Generator().manual_seed(0))
        row: dict[str, float] = {"width": width}
        for kind, error, noisy, gain in result.rows:
            if kind != "inverse":  # where H = d it is the pseudo-inverse
                row |= {f"{kind} error": error, f"{kind} noisy": noisy, f"{kind} gain": gain}
        rows.append(row)
    return rows


def shown(results: Results) -> dict[str, Grid | str]:
    """What the terminal and the documentation show."""
    models = [
        [
            kind,
            f"{m['error']:.6f}",
            f"{m['above_floor']:.0e}",
            f"{m['orthogonality']:.0e}",
            f"{m['decoder_away']:.1%}",
            f"{m['angle']:.2g}°",
            f"{m['condition']:.3g}",
        ]
        for kind, m in results["models"].items()
    ]
    widths = [
        [
            f"{r['width']}",
            *(f"{r[f'{kind} {what}']:.4f}" for what in ("error", "noisy") for kind in ("transpose", "pseudo-inverse")),
            *(f"{r[f'{kind} gain']:.3g}" for kind in ("transpose", "pseudo-inverse")),
        ]
        for r in results["random"]
        if r["width"] in SHOWN_WIDTHS
    ]
    return {
        "trained": paragraph(
            f"{results['digits']} MNIST digits minus their mean, d = {SIDE * SIDE}, float64,",
            f"{results['iterations']} iterations of L-BFGS. Linear autoencoders with H = {LATENTS}; the PCA floor,",
            f"the least error that any of them can reach, is {results['floor']:.6f}.",
            "D is the decoder's matrix, for the tied one W;",
            "*D from W* is ‖D − W‖ / ‖W‖; *angle* the largest between the rows of W and the first principal",
            f"directions. The L2 penalty is {L2:g} · (‖W‖² + ‖D‖²).",
        ),
        "trained_table": grid(
            ["model", "MSE", "above PCA", "‖WWᵀ−I‖", "D from W", "angle", "cond. W"],
            models,
            f"trained, H {LATENTS}; PCA floor {results['floor']:.6f}",
        ),
        "random": paragraph(
            "Random W ~ N(0, 1/d), nothing trained, decoded by Wᵀ and by the pseudo-inverse W⁺. *Noisy*:",
            f"Gaussian noise on the latent, {NOISE:.0%} of its rms. *Gain*: the rms of what that noise makes of",
            "y, over its own.",
        ),
        "random_table": grid(
            ["H", "MSE Wᵀ", "MSE W⁺", "noisy Wᵀ", "noisy W⁺", "gain Wᵀ", "gain W⁺"],
            widths,
            f"random W; noise {NOISE:.0%}",
        ),
    }


def draw(results: Results, histories: dict[str, list[dict[str, float]]], digits: Tensor, out: Path) -> None:
    """Training on the left, decoders on the right."""
    figure = new_figure(14, 7.4)
    left, right = split_figure(figure, 1, 2)
    left.suptitle("Trained: tied finds orthonormal rows by itself", **HEADING)
    errors, rows = left.subplots(
        2, 1, gridspec_kw={"left": 0.14, "right": 0.96, "top": 0.87, "bottom": 0.09, "hspace": 0.42}
    )
    for kind, history in histories.items():
        above = [max(h["error"] / results["floor"] - 1, 1e-12) for h in history]
        errors.plot(above, color=COLORS[kind], lw=2, label=kind)
        rows.plot([h["orthogonality"] for h in history], color=COLORS[kind], lw=2)
    errors.set_title("loss above the PCA floor, relative", loc="left", fontsize=10)
    rows.set_title("‖WWᵀ − I‖", loc="left", fontsize=10)
    rows.set_xlabel("evaluations of L-BFGS")
    for ax in (errors, rows):
        ax.set_yscale("log")
    errors.legend(frameon=False, fontsize=9)

    right.suptitle("Untrained: the pseudo-inverse is exact, until there is noise", **HEADING)
    strips, gains = split_figure(right, 2, 1, height_ratios=[1.15, 1])
    torch.manual_seed(0)
    centre = digits.mean(0)
    shown = digits[37::500].double()
    w = TiedLinear(SIDE * SIDE, STRIP_WIDTH, dtype=torch.float64).weight.detach()
    pinv = analysis.decoder_matrix(w, "pseudo-inverse")
    h = (shown - centre) @ w.T
    noise = NOISE * h.square().mean().sqrt() * torch.randn(h.shape, dtype=h.dtype)
    axes = strips.subplots(5, 1, gridspec_kw={"left": 0.2, "right": 0.97, "top": 0.78, "bottom": 0.0})
    draw_strips(
        axes,
        [
            ("original", shown),
            ("Wᵀ", h @ w + centre),
            ("Wᵀ, noisy", (h + noise) @ w + centre),
            ("W⁺", h @ pinv + centre),
            ("W⁺, noisy", (h + noise) @ pinv + centre),
        ],
    )
    strips.text(0.2, 0.81, f"random W, H = {STRIP_WIDTH}; noise: {NOISE:.0%} of the latent's rms", fontsize=10)
    ax = gains.subplots(gridspec_kw={"left": 0.2, "right": 0.97, "top": 0.86, "bottom": 0.18})
    for kind, color in (("transpose", TEAL), ("pseudo-inverse", ORANGE)):
        ax.plot(WIDTHS, [r[f"{kind} gain"] for r in results["random"]], "o-", color=color, lw=2, ms=4, label=kind)
    ax.set_yscale("log")
    ax.set_title("noise gain of the decoder", loc="left", fontsize=10)
    ax.set_xlabel(f"H (d = {SIDE * SIDE})")
    ax.legend(frameon=False, fontsize=9)
    save_figure(figure, out)


def main(
    iterations: Annotated[int, typer.Option(min=1, help="Of L-BFGS.")] = 300,
    out: Out = None,
    docs: Docs = False,
) -> None:
    """Linear autoencoders on digits: transpose, inverse, pseudo-inverse."""
    torch.set_num_threads(1)  # the problems are small, and one thread makes the numbers the same everywhere
    digits = load_digits().double()
    x = (digits - digits.mean(0))[::5]
    results, histories = trained_models(x, iterations)
    results |= {"digits": len(x), "iterations": iterations, "random": random_weights(x)}
    print_grids(shown(results))
    picture = picture_path(NAME, out, docs)
    draw(results, histories, digits, picture)
    print(f"picture: {picture}")
    if docs:
        write_data(NAME, results, shown(results))


if __name__ == "__main__":
    typer.run(main)
