"""Write the generated blocks of the pages in this folder; each stands between two comments that name this command.

    python docs/generate.py

What an example found is in data/, written by `python examples/NAME.py --docs`; its blocks here are made of that.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tiedfused import plan, settings
from tiedfused.planning import Plan
from tiedfused.regimes import REGIMES

FOLDER = Path(__file__).parent
BLOCK = re.compile(r"(<!-- python docs/generate.py: ([\w.]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
SHAPES = (
    (16384, 64, 16384),
    (16384, 128, 32768),
    (16384, 256, 16384),
    (8192, 512, 16384),
    (4096, 768, 24576),
    (8192, 4096, 32768),
    (4096, 784, 64),
    (16, 4096, 131072),
)
DTYPE = torch.bfloat16


def eager(n: int, d: int, h: int) -> tuple[int, int, int]:
    """FLOPs, bytes and workspace of a training step in eager PyTorch with relu and without x̄.

    The latent is written by the first product, read and written by relu, and read by the second; backward writes h̄,
    reads it and h and writes ā, and reads ā and h for the two products of W̄.
    """
    x, w, latent = (rows * columns * DTYPE.itemsize for rows, columns in ((n, d), (h, d), (n, h)))
    forward = 2 * x + 2 * w + 4 * latent
    backward = 3 * x + w + 6 * latent + 4 * w
    return 10 * n * d * h, forward + backward, 3 * latent


def row(regime: str, p: Plan) -> str:
    cells = (
        f"{regime}, latent kept" if p.save_latent else regime,
        f"{p.executed_flops / (p.n * p.d * p.h):g}",
        f"{p.bytes_moved / 1e9:.2f}",
        f"{p.workspace_bytes / settings.MIB:.0f}",
        f"{p.predicted_ms:.2f}",
        f"{p.roofline_ms:.2f}",
    )
    return "| | " + " | ".join(cells) + " |"


def regimes() -> str:
    """The markdown table: for each shape eager PyTorch, what the plan chooses, and each regime by itself."""
    lines = [
        "| N, d, H | regime | FLOPs / NdH | GB moved | MiB | predicted ms | roofline ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for n, d, h in SHAPES:
        flops, moved, workspace = eager(n, d, h)
        counts = f"{flops / (n * d * h):g} | {moved / 1e9:.2f} | {workspace / settings.MIB:.0f}"
        lines.append(f"| {n}, {d}, {h} | eager | {counts} | | |")
        options = {"dtype": DTYPE, "device": "cuda", "grad_x": False, "capability": 90}
        chosen = plan(n, d, h, **options)
        lines.append(row(f"**{chosen.regime}**", chosen))
        for regime in REGIMES:
            with settings.override(regime=regime):
                p = plan(n, d, h, recompute=True, **options)
            if p.regime == regime and p.parts != chosen.parts:
                lines.append(row(regime, p))
    return "\n".join(lines) + "\n"


def few_rows() -> str:
    """The markdown table of bench/results/few-rows: the native regime beside PyTorch and tiles, with W out of cache."""
    files = [json.loads(path.read_text()) for path in sorted((FOLDER.parent / "bench/results/few-rows").glob("*.json"))]
    cells = [cell for results in files for cell in results["cells"]]
    cells.sort(key=lambda cell: (cell["dtype"] != "float32", cell["shape"][1:], cell["shape"][0]))
    lines = [
        "| N, d, H | dtype | eager | compile | tiled | native ms | × eager | × tiled | GB/s | read | % of it | plan |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        (n, d, h), ms = cell["shape"], {peer: times[0] for peer, times in cell["ms"].items()}
        if cell["plan"]["regime"] == "native":
            ms["native"] = ms["tiedfused"]  # forced, it was planned anew in every call when these were measured
        rate = d * h * getattr(torch, cell["dtype"]).itemsize / ms["native"] * 1e3
        times = (f"{ms[peer]:.3g}" for peer in ("eager", "compile", "tiled", "native"))
        gains = (f"{ms[peer] / ms['native']:.2f}" for peer in ("eager", "tiled"))
        read = cell["rates"]["read"]
        rates = (f"{rate / 1e9:.1f}", f"{read / 1e9:.0f}", f"{100 * rate / read:.0f}")
        row_cells = (f"{n}, {d}, {h}", cell["dtype"], *times, *gains, *rates, cell["plan"]["regime"])
        lines.append("| " + " | ".join(row_cells) + " |")
    return "\n".join(lines) + "\n"


def environment() -> str:
    """The table of environment variables, from where they are read."""
    return "\n".join(line for line in (settings.__doc__ or "").splitlines() if line.startswith("|")) + "\n"


def markdown(part: str | dict[str, Any]) -> str:
    """A part of what an example shows: text as it is, or a table, its first columns left, the others right."""
    if isinstance(part, str):
        return part + "\n"
    left, right = part["text_columns"], len(part["columns"]) - part["text_columns"]
    cells = [part["columns"], ["---"] * left + ["---:"] * right, *part["rows"]]
    return "".join("| " + " | ".join(row) + " |\n" for row in cells)


def blocks() -> dict[str, Callable[[], str]]:
    """Every block by its name; those of an example are named ``example.part``, of what its --docs wrote to data/."""
    found: dict[str, Callable[[], str]] = {"regimes": regimes, "few_rows": few_rows, "environment": environment}
    for path in sorted((FOLDER / "data").glob("*.json")):
        for name, part in json.loads(path.read_text(encoding="utf-8"))["shown"].items():
            found[f"{path.stem}.{name}"] = functools.partial(markdown, part)
    return found


BLOCKS = blocks()


def rendered(page: str) -> str:
    """The page with its blocks made anew."""
    return BLOCK.sub(lambda found: found[1] + BLOCKS[found[2]]() + found[3], page)


def pages() -> list[Path]:
    """Those that have generated blocks."""
    return [page for page in sorted(FOLDER.glob("*.md")) if BLOCK.search(page.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    for path in pages():
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
