"""Draw docs/tile-path.png: what a tile of W meets on its way through the kernels, beside what plain PyTorch does.

python docs/tile_path.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, MUTED, MEMORY, CHIP, ACCENT = "#1b2430", "#66707d", "#e9edf2", "#fff4dc", "#c4472d"


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, face: str, edge: str = INK) -> None:
    """A rounded box with a text in its middle; x, y is its lower left corner."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=face, ec=edge, lw=1.2)
    ax.add_patch(shape)
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10.5, color=INK, linespacing=1.5)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK, bend: float = 0.0) -> None:
    """From start to end, bent to the left by `bend`."""
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=13, lw=1.5, color=color, connectionstyle=f"arc3,rad={bend}"
        )
    )


def area(ax: Axes, y: float, height: float, text: str, face: str, edge: str) -> None:
    """A wide box with a text in its lower left corner."""
    corners = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch((0.1, y), 6.2, height, boxstyle=corners, fc=face, ec=edge, lw=1.2))
    ax.text(0.25, y + 0.12, text, fontsize=9, color=MUTED, va="bottom")


def memory(ax: Axes, title: str) -> None:
    """The band of device memory at the foot, and a title."""
    ax.set(xlim=(0, 6.4), ylim=(0, 5.6))
    ax.axis("off")
    area(ax, 0.15, 1.35, "device memory", MEMORY, "none")
    ax.text(3.2, 5.35, title, ha="center", fontsize=12.5, color=INK, weight="bold")


def plain(ax: Axes) -> None:
    memory(ax, "plain PyTorch")
    box(ax, 0.3, 0.62, 0.8, 0.7, "x", "white")
    box(ax, 1.35, 0.62, 0.8, 0.7, "W", "white")
    box(ax, 2.45, 0.62, 2.5, 0.7, "a and h,  N × H each", "white", ACCENT)
    box(ax, 5.25, 0.62, 0.8, 0.7, "y", "white")
    for x, text in ((0.3, "x Wᵀ + b"), (2.4, "f"), (4.5, "h W + c")):
        box(ax, x, 3.0, 1.5, 0.9, text, CHIP)
    arrow(ax, (0.7, 1.32), (0.85, 3.0))
    arrow(ax, (1.75, 1.32), (1.3, 3.0))
    arrow(ax, (1.75, 3.0), (2.75, 1.32), ACCENT)
    arrow(ax, (3.1, 1.32), (2.95, 3.0), ACCENT)
    arrow(ax, (3.45, 3.0), (3.7, 1.32), ACCENT)
    arrow(ax, (4.3, 1.32), (4.9, 3.0), ACCENT)
    arrow(ax, (2.1, 1.32), (4.55, 3.0), bend=-0.12)
    arrow(ax, (5.6, 3.0), (5.65, 1.32))
    ax.text(3.2, 4.55, "the latent crosses the memory bus four times,\nW is fetched twice", ha="center", color=ACCENT)


def fused(ax: Axes) -> None:
    memory(ax, "tiedfused")
    box(ax, 0.9, 0.62, 0.8, 0.7, "x", "white")
    box(ax, 2.8, 0.62, 0.8, 0.7, "W", "white")
    box(ax, 4.75, 0.62, 0.8, 0.7, "y", "white")
    area(ax, 2.05, 2.1, "on chip", CHIP, INK)
    box(ax, 2.5, 2.45, 1.4, 0.62, "tile of W", "white")
    box(ax, 0.6, 3.3, 1.5, 0.62, "x Wᵀ + b", "white")
    box(ax, 2.6, 3.3, 1.2, 0.62, "h = f(a)", "white")
    box(ax, 4.3, 3.3, 1.5, 0.62, "y += h W", "white")
    arrow(ax, (1.3, 1.32), (1.3, 3.3))
    arrow(ax, (3.2, 1.32), (3.2, 2.45))
    arrow(ax, (2.5, 2.8), (1.75, 3.3), bend=-0.15)
    arrow(ax, (3.9, 2.8), (4.65, 3.3), bend=0.15)
    arrow(ax, (2.1, 3.61), (2.6, 3.61))
    arrow(ax, (3.8, 3.61), (4.3, 3.61))
    arrow(ax, (5.15, 3.3), (5.15, 1.32))
    gain = "a tile of W is fetched once and used for both products;\nthe latent is never written"
    ax.text(3.2, 4.55, gain, ha="center", color=INK)


def main() -> None:
    """Write the picture beside this file."""
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 10.5}):
        figure, axes = plt.subplots(1, 2, figsize=(12.8, 5.4), layout="constrained")
        plain(axes[0])
        fused(axes[1])
        figure.savefig(Path(__file__).with_name("tile-path.png"), dpi=110)


if __name__ == "__main__":
    main()
