"""Pictures of a results file: throughput, time ratios, memory, roofline."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tiedfused.benchmark import console
from tiedfused.benchmark.peers import PEERS
from tiedfused.benchmark.report import Results, Row, rows
from tiedfused.benchmark.shapes import Shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = "#0b7a75"
COLORS = {
    "tiedfused": OURS,
    "low memory": "#7cc6b8",
    "eager": "#8a929b",
    "compile": "#d1873a",
    "max-autotune": "#a8501f",
    "checkpoint": "#7d6bb3",
    "epilogue": "#4b7fc0",
}
MARKERS = {"eager": "o", "compile": "s", "max-autotune": "D", "checkpoint": "^", "epilogue": "v"}
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6e9",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.dpi": 110,
    "svg.hashsalt": "tiedfused",
}
PASS_NAMES = {"fwd": "forward", "bwd": "backward", "step": "forward + backward"}


def fingerprint(results: Results) -> str:
    """What a picture carries to say which results it shows."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def _pyplot() -> Any | None:
    """matplotlib's pyplot, drawing into files; None, and a line, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        console.warn("pictures: matplotlib is not installed, none is drawn")
        return None
    matplotlib.use("Agg")  # before pyplot: a benchmark has to run without a display
    from matplotlib import pyplot

    return pyplot


def draw_all(results: Results, path: Path) -> list[Path]:
    """Write each picture that the results allow beside the results file `path`; nothing where matplotlib is missing.

    The metadata field ``Description`` of each PNG is the `fingerprint` of its results.
    """
    pyplot = _pyplot()
    if pyplot is None:
        return []
    written = []
    with pyplot.rc_context(STYLE):
        for kind, draw in DRAWINGS.items():
            figure = draw(results)
            if figure is not None:
                written.append(path.with_name(f"{path.stem}-{kind}.png"))
                figure.savefig(written[-1], metadata={"Description": fingerprint(results), "Software": None})
                pyplot.close(figure)
    return written


def draw_one(draw: Callable[[Axes], None], path: Path) -> Path | None:
    """Write a picture of one panel, which `draw` fills; None where matplotlib is missing."""
    pyplot = _pyplot()
    if pyplot is None:
        return None
    with pyplot.rc_context(STYLE):
        figure, ax = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
        draw(ax)
        figure.savefig(path)
        pyplot.close(figure)
    return path


def _figure(
    results: Results, title: str, panels: int, width: float, height: float, wide: int = 4
) -> tuple[Figure, Any]:
    """A figure of panels of a size in inches, at most `wide` beside each other, under a title and what was measured."""
    from matplotlib import pyplot as plt

    columns = min(panels, wide)
    lines = math.ceil(panels / columns)
    size = 1.2 + width * columns, 0.6 + height * lines
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=14, fontweight="bold")
    versions = results["versions"]
    about = f"{results['device']['name']}, PyTorch {versions['torch']}, tiedfused {versions['tiedfused']}"
    figure.text(0.01, 1 - 0.34 / size[1], about, fontsize=9.5, color="#5b6570", va="top")
    for ax in axes.flat[panels:]:
        ax.set_visible(False)
    return figure, axes.flat[:panels]


def _scale(results: Results) -> tuple[str, float]:
    return ("GFLOP/s", 1e9) if results["device"]["type"] == "cpu" else ("TFLOP/s", 1e12)


def _groups(all_rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.cell["dtype"], row.cell["pass"]) for row in all_rows))


def _label_ends(ax: Axes, ends: Sequence[tuple[str, float, float]]) -> None:
    """Name each line at its right end, the names pushed apart until they are readable."""
    gap = 0.062
    low, high = ax.get_ylim()
    ends = sorted(ends, key=lambda end: end[2])
    if ax.get_yscale() == "log":
        at = [math.log(y / low) / math.log(high / low) for _, _, y in ends]
    else:
        at = [(y - low) / (high - low) for _, _, y in ends]
    for _ in range(100):
        for i in range(len(at) - 1):
            if (overlap := gap - (at[i + 1] - at[i])) > 0:
                at[i] -= overlap / 2
                at[i + 1] += overlap / 2
    for (name, x, y), height in zip(ends, at, strict=True):
        ax.annotate(
            name, (x, y), (1.02, height), textcoords="axes fraction", va="center", fontsize=9.5, color=COLORS[name],
            fontweight="bold" if name == "tiedfused" else "normal", annotation_clip=False,
        )  # fmt: skip


def throughput(results: Results) -> Figure | None:
    """Theoretical FLOP/s against d, a panel a dtype and pass, the measured rate of a large product drawn in."""
    stream = [row for row in rows(results) if not row.shape.few_rows and row.shape.h > row.shape.d and row.ours]
    stream = [row for row in stream if row.cell["pass"] != "bwd"]
    groups = [group for group in _groups(stream) if len({r.shape.d for r in stream if _in(r, group)}) > 1]
    if not groups:
        return None
    unit, scale = _scale(results)
    figure, axes = _figure(results, "Throughput against the width d", len(groups), width=4.4, height=3.7, wide=2)
    for ax, group in zip(axes, groups, strict=True):
        points = sorted((row for row in stream if _in(row, group)), key=lambda row: row.shape.d)
        ceiling = statistics.median(row.cell["rates"]["gemm"] for row in points) / scale
        ax.set_xscale("log", base=2)
        widths = sorted({row.shape.d for row in points})
        ax.set_xticks(widths, [str(d) for d in widths])
        ax.minorticks_off()
        ends = []
        for name in ("tiedfused", *PEERS):
            line = [(r.shape.d, r.shape.flops(group[1]) / r.ms[name][0] * 1e3 / scale) for r in points if name in r.ms]
            if not line:
                continue
            bold = name == "tiedfused"
            ax.plot(*zip(*line, strict=True), color=COLORS[name], lw=2.8 if bold else 1.4, marker="o",
                    ms=6 if bold else 4, zorder=3 if bold else 2)  # fmt: skip
            ends.append((name, *line[-1]))
        ax.axhline(ceiling, color="#22272d", ls=(0, (5, 3)), lw=1.2)
        ax.text(widths[0], ceiling * 1.012, f"one large product: {ceiling:.0f}", fontsize=9.5, va="bottom")
        ax.set_ylim(0, max(ceiling, *(end[2] for end in ends)) * 1.12)
        ax.set_title(f"{PASS_NAMES[group[1]]}, {group[0]}")
        ax.set_xlabel("d")
        _label_ends(ax, ends)
    for ax in axes[::2]:
        ax.set_ylabel(f"{unit} on theoretical FLOPs")
    return figure


def _in(row: Row, group: tuple[str, str]) -> bool:
    return (row.cell["dtype"], row.cell["pass"]) == group


def ratios(results: Results) -> Figure | None:
    """The time of each peer over tiedfused's, a line a problem, on a logarithmic axis."""
    timed = [row for row in rows(results) if row.best is not None]
    if not timed:
        return None
    dtypes = list(dict.fromkeys(row.cell["dtype"] for row in timed))
    tallest = max(sum(row.cell["dtype"] == dtype for row in timed) for dtype in dtypes)
    figure, axes = _figure(
        results, "How many times faster than each peer", len(dtypes), width=6, height=1.3 + 0.34 * tallest
    )
    for ax, dtype in zip(axes, dtypes, strict=True):
        lines = [row for row in timed if row.cell["dtype"] == dtype]
        found = [r for row in lines for peer in PEERS if (r := row.ratio(peer)) is not None]
        low, high = min(0.9, *found) / 1.06, max(2.0, *found) * 1.06
        for y, row in enumerate(reversed(lines)):
            present = {peer: r for peer in PEERS if (r := row.ratio(peer)) is not None}
            ax.plot([min(present.values()), max(present.values())], [y, y], color="#c9ced4", lw=3, zorder=1)
            for peer, r in present.items():
                ax.plot(r, y, MARKERS[peer], color=COLORS[peer], ms=7.5, mec="white", mew=0.7, zorder=3)
        ax.axvspan(low, 1, color="#f5e3e0", zorder=0)
        ax.axvline(1, color="#22272d", lw=1.2)
        ax.set_xscale("log")
        ticks = [t for t in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32) if low <= t <= high]
        ax.set_xticks(ticks, [f"{t:g}×" for t in ticks])
        ax.minorticks_off()
        ax.set_xlim(low, high)
        ax.set_ylim(-0.7, len(lines) - 0.3)
        labels = [f"{row.shape}  {row.key[2]}" for row in reversed(lines)]
        ax.set_yticks(range(len(lines)), labels, fontsize=9.5)
        ax.grid(axis="y", visible=False)
        ax.set_title(dtype)
        ax.set_xlabel("time of the peer / time of tiedfused")
    peers = [peer for peer in PEERS if any(peer in row.ms for row in timed)]
    handles = [
        axes[0].plot([], [], MARKERS[peer], color=COLORS[peer], ms=7.5, mec="white", label=peer)[0] for peer in peers
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def memory(results: Results) -> Figure | None:
    """Peak memory of a training step against H."""
    sweep = results["memory"]
    if len(sweep) < 2:
        return None
    figure, (ax,) = _figure(results, "Memory of a training step against H", 1, width=6.6, height=4.0)
    ends = []
    for name in ("eager", "checkpoint", "epilogue", "tiedfused"):
        line = [(e["shape"][2], max(e["bytes"][name] / 2**20, 0.1)) for e in sweep if name in e["bytes"]]
        if line:
            bold = name == "tiedfused"
            ax.plot(
                *zip(*line, strict=True), color=COLORS[name], marker="o", lw=2.8 if bold else 1.6, ms=6 if bold else 4
            )
            ends.append((name, *line[-1]))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_ylim(ax.get_ylim()[0], ax.get_ylim()[1] * 1.5)
    widths = [e["shape"][2] for e in sweep]
    ax.set_xticks(widths, [f"{h // 1024}k" for h in widths])
    low, high = (math.log2(limit) for limit in ax.get_ylim())
    powers = [2**k for k in range(math.ceil(low), math.floor(high) + 1, 2)]
    ax.set_yticks(powers, [f"{p:g} MiB" if p < 1024 else f"{p // 1024:g} GiB" for p in powers])
    ax.minorticks_off()
    n, d, _ = sweep[0]["shape"]
    ax.set_xlabel(f"H (latents), at N {n}, d {d}, {sweep[0]['dtype']}")
    ax.set_title("peak above operands, output and gradients")
    _label_ends(ax, ends)
    return figure


def roofline(results: Results) -> Figure | None:
    """Achieved FLOP/s of every problem against its arithmetic intensity, under the measured ceilings."""
    timed = [row for row in rows(results) if row.ours]
    if not timed:
        return None
    dtypes = list(dict.fromkeys(row.cell["dtype"] for row in timed))
    unit, scale = _scale(results)
    figure, axes = _figure(results, "Roofline: how close to what the machine does", len(dtypes), width=5.6, height=4.2)
    for ax, dtype in zip(axes, dtypes, strict=True):
        points = [row for row in timed if row.cell["dtype"] == dtype]
        gemm, bandwidth = (statistics.median(row.cell["rates"][k] for row in points) for k in ("gemm", "memory"))
        coordinates = {}
        for row in points:
            intensity = _intensity(row.shape, row.cell["pass"], dtype)
            for name in ("eager", "tiedfused"):
                if name in row.ms:
                    coordinates[row.key, name] = intensity, row.shape.flops(row.cell["pass"]) / row.ms[name][0] * 1e3
        draw_roof(ax, list(coordinates.values()), gemm, bandwidth, scale, unit)
        for name, style in (("eager", {"alpha": 0.9}), ("tiedfused", {"zorder": 4})):
            at = [(x, y / scale) for (_, n), (x, y) in coordinates.items() if n == name]
            if at:
                ax.plot(*zip(*at, strict=True), "o", color=COLORS[name], ms=7, mec="white", label=name, **style)
        ax.set_title(dtype)
        ax.legend(loc="lower right")
    axes[0].set_ylabel(f"{unit} on theoretical FLOPs")
    return figure


def draw_roof(
    ax: Axes, points: Sequence[tuple[float, float]], gemm: float, bandwidth: float, scale: float, unit: str
) -> None:
    """The two measured ceilings, over a range that holds the points (FLOP/byte, FLOP/s) and the ridge."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    ridge = gemm / bandwidth
    low, high = min(ridge, *(x for x, _ in points)) / 2, max(ridge, *(x for x, _ in points)) * 2
    bottom = min(low * bandwidth, *(y for _, y in points)) / scale / 1.5
    ax.plot([low, ridge, high], [low * bandwidth / scale, gemm / scale, gemm / scale], color="#22272d", lw=1.6)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(bottom, gemm / scale * 1.7)
    for axis in (ax.xaxis, ax.yaxis):
        bottom, top = axis.get_view_interval()
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if top / bottom < 1000 else (1,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(LogLocator(10, subs=()))
    ax.text(high, gemm / scale * 1.06, f"one large product: {gemm / scale:.3g} {unit}", ha="right", fontsize=9.5)
    slope = ax.transData.transform([(low, low * bandwidth / scale), (ridge, gemm / scale)])
    angle = math.degrees(math.atan2(slope[1][1] - slope[0][1], slope[1][0] - slope[0][0]))
    middle = math.sqrt(low * ridge)
    ax.annotate(
        f"memory: {bandwidth / 1e9:.3g} GB/s", (middle, middle * bandwidth / scale), xytext=(-4, 8), fontsize=9.5,
        textcoords="offset points", rotation=angle, rotation_mode="anchor", ha="center",
    )  # fmt: skip
    ax.set_xlabel("FLOP / byte of inputs and outputs")


def _intensity(shape: Shape, which: str, dtype: str) -> float:
    return shape.flops(which) / shape.bytes(which, getattr(torch, dtype).itemsize)


DRAWINGS: dict[str, Callable[[Results], Figure | None]] = {
    "throughput": throughput,
    "ratios": ratios,
    "memory": memory,
    "roofline": roofline,
}
