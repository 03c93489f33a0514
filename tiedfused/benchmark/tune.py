"""`tiedfused tune`: search the tiles of the Triton kernels on the GPU that is here.

Every kernel is timed by itself, as `benchmark.kernels` launches it. Candidates that the resource model of
`tiedfused.tiles` lets run are timed once in random order, the best of them interleaved; operands are taken in turn, so
that none is in the cache when its turn comes. What is written is the tile, and the fraction of the device's peak that
the kernel reaches with it, with which the regimes then predict instead of the one they assume.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tiedfused import settings, tiles
from tiedfused.benchmark import console
from tiedfused.benchmark import device as devices
from tiedfused.benchmark.kernels import Planned, kernels_of, launches, planned
from tiedfused.benchmark.measure import UNCALIBRATED, relative_error
from tiedfused.benchmark.peers import Operands
from tiedfused.benchmark.shapes import Shape, parse_all
from tiedfused.devices import cuda_capability, fp32_precision, interpreting, known_capability
from tiedfused.tiles import NOT_MEASURED, AnyTile, GemmTile, LatentTile, Tile, check_tile, config_key, packaged, padded

DTYPES = ("bfloat16",)
CALLS = 8  # timed launches of a candidate at a time
FINALISTS, FINAL_ROUNDS = 4, 7
# Sets of operands are taken in turn, so many that together they hold more than the cache; a few when that is a lot.
MOST_SETS = 16


def _numbers(dtype: torch.dtype, device: torch.device) -> str:
    return tiles.operands(str(dtype).removeprefix("torch."), fp32_precision(device.type))


def _powers(low: int, high: int) -> list[int]:
    return [1 << k for k in range(low.bit_length() - 1, high.bit_length())]


def _space(kernel: str, before: AnyTile, width: int) -> Iterator[AnyTile]:
    """What a kernel's tile may be: `before` with other blocks, warps and stages."""
    if isinstance(before, GemmTile):
        blocks = {"block_m": _powers(32, 256), "block_n": _powers(32, 256), "block_k": _powers(32, 128)}
    elif isinstance(before, LatentTile):
        latents = [width] if kernel == "bottleneck_forward" else _powers(64, width)
        blocks = {"block_n": _powers(16, 128), "block_h": latents, "block_d": _powers(32, 128)}
    else:
        assert isinstance(before, Tile)
        rows = int(kernel.rpartition("_")[2]) if kernel in tiles.FEW_ROWS_KERNELS else 256
        blocks = {"block_n": _powers(16, rows), "block_h": _powers(16, 256)}
    ranges = {**blocks, "num_warps": [2, 4, 8], "num_stages": [1, 2, 3, 4, 5]}
    if isinstance(before, Tile):
        ranges["warp_specialize"] = [False, True]
    for values in itertools.product(*ranges.values()):
        yield dataclasses.replace(before, **dict(zip(ranges, values, strict=True)))  # type: ignore[arg-type]


def candidates(kernel: str, before: AnyTile, size: int, operands: str, capability: int) -> list[AnyTile]:
    """The tiles that the resource model lets run, in random order, after those that are packaged to be tried.

    The order is random so that a search that runs out of time has seen tiles of every kind. `size` is d, or H in the
    bottleneck regime, `operands` the dtype of `tiles.lookup`.
    """
    index = (kernel, capability, tiles.listed(operands), config_key(kernel, size))
    fitting = [one.tile for one in packaged() if one.candidate and one[:4] == index]
    space = list(_space(kernel, before, sum(padded(kernel, size))))
    random.Random(0).shuffle(space)
    for tile in space:
        if tile in fitting:
            continue
        try:
            check_tile(kernel, tile, padded(kernel, size), tiles.ITEMSIZE[operands], capability)
        except ValueError:
            continue
        fitting.append(tile)
    return fitting


@dataclasses.dataclass(frozen=True)
class Found:
    """The best tile of one kernel at one shape.

    Args:
        tile: the fastest.
        ms: its time, median, interleaved with the other finalists.
        before: the tile that was in force.
        before_ms: its time in the same rounds.
        tried: how many candidates ran.
        of: how many the resource model left.
        efficiency: the fraction of the peak that it reaches; None where arithmetic is not what bounds it.
    """

    tile: AnyTile
    ms: float
    before: AnyTile
    before_ms: float
    tried: int
    of: int
    efficiency: float | None


class _Kernel:
    """One kernel at one shape and dtype: makes the call that a tile stands for."""

    def __init__(self, kernel: str, shape: Shape, dtype: torch.dtype, device: torch.device, capability: int) -> None:
        self.kernel, self.shape, self.dtype, self.device, self.capability = kernel, shape, dtype, device, capability
        self._folder = tempfile.TemporaryDirectory()
        one = shape.bytes("step", dtype.itemsize)
        sets = 1 if interpreting() else min(MOST_SETS, max(2, 2 * devices.cache_bytes(device) // one))
        self.operands = [Operands.random(shape, dtype, device, seed) for seed in range(sets)]

    @property
    def numbers(self) -> str:
        """The dtype of `tiles.lookup`."""
        return _numbers(self.dtype, self.device)

    @property
    def size(self) -> int:
        """What the kernel holds whole."""
        return self.shape.h if self.kernel in tiles.BOTTLENECK_KERNELS else self.shape.d

    def close(self) -> None:
        self._folder.cleanup()

    def planned(self, tile: AnyTile | None = None, efficiency: float | None = None) -> Planned:
        """The kernel in its plan, with `tile` in place of its own, and predicted with `efficiency`.

        Raises:
            ValueError: the plan does not take the tile.
        """
        config_dir = settings.current().config_dir
        if tile is not None:
            folder = Path(self._folder.name, "-".join(map(str, (*dataclasses.astuple(tile), efficiency))))
            folder.mkdir(exist_ok=True)
            tables: dict[str, Any] = {"tiles": dataclasses.astuple(tile), "efficiency": efficiency}
            config: dict[str, Any] = {"status": "candidate", "tiles": {}}
            for table, value in tables.items():
                if value is not None:
                    by_key = {config_key(self.kernel, self.size): value}
                    config[table] = {self.kernel: {tiles.listed(self.numbers): by_key}}
            (folder / f"sm{self.capability}.json").write_text(json.dumps(config))
            config_dir = str(folder)
        with settings.override(config_dir=config_dir):
            found = planned(self.kernel, self.shape, self.dtype, self.device, self.capability)
        if found is None or (tile is not None and found.one.tile != tile):
            raise ValueError(f"{self.kernel}: the plan does not take {tile}")
        return found

    def calls(self, tile: AnyTile) -> list[Callable[[], tuple[torch.Tensor, ...]]]:
        """A launch of the kernel for each set of operands."""
        return launches(self.planned(tile), self.operands)

    def ms(self, calls: Sequence[Callable[[], Any]], times: int = CALLS) -> float:
        """Milliseconds a call, over `times` of them on operands in turn."""
        turn = itertools.cycle(calls)
        devices.keep_busy(self.device)
        if self.device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(times):
                next(turn)()
            stop.record()
            stop.synchronize()
            return float(start.elapsed_time(stop)) / times
        begin = time.perf_counter()
        for _ in range(times):
            next(turn)()
        return (time.perf_counter() - begin) * 1e3 / times

    def efficiency(self, tile: AnyTile, ms: float) -> float | None:
        """The fraction of the peak at which the cost model predicts a launch to take `ms`.

        None where the model does not hold arithmetic, at the peak, to be the longest of what overlaps: then the
        fraction is not what `ms` tells. Also in fp32.
        """
        if self.dtype.itemsize != 2:
            return None
        try:
            whole, half, quarter = (self.planned(tile, fraction) for fraction in (1.0, 0.5, 0.25))
        except ValueError:  # with another efficiency the plan takes the tile with fewer rows
            return None
        arithmetic = half.one.predicted_ms - whole.one.predicted_ms
        rest = whole.one.predicted_ms - arithmetic
        if abs(4 * arithmetic + rest - quarter.one.predicted_ms) > 0.05 * quarter.one.predicted_ms:
            return None
        left = ms * whole.launches(self.shape) - rest
        return arithmetic / left if left > 0 and arithmetic > 0 else None


def search(one: _Kernel, budget: float) -> Found:
    """The fastest tile of a kernel: all candidates once, then the best ones interleaved."""
    begin = time.perf_counter()
    before: Any = one.planned().one.tile
    space = candidates(one.kernel, before, one.size, one.numbers, one.capability)
    once = 1 if interpreting() else CALLS
    times: dict[AnyTile, float] = {}
    tried = 0
    for tile in [before, *(t for t in space if t != before)]:
        if time.perf_counter() - begin > 0.8 * budget and tried > 1:
            break
        tried += 1
        try:
            calls = one.calls(tile)
            one.ms(calls, 1)  # compiles, and is warm
            # a tile three times slower than the best is not worth all its launches
            if one.ms(calls, 1) < 3 * min(times.values(), default=float("inf")):
                times[tile] = one.ms(calls, once)
        except Exception as error:  # the compiler's own limits are tighter than the model's: then it is no candidate
            if devices.has_failed(one.device):
                raise RuntimeError(f"{tile}: {(str(error).splitlines() or [''])[0]}") from error
            if tile == before:
                raise
    finalists = sorted(times, key=times.__getitem__)[:FINALISTS]
    if before not in finalists:
        finalists.append(before)
    calls_of = {tile: one.calls(tile) for tile in finalists}
    expected = _tensors(calls_of[before][0]())
    for tile in finalists:
        if not _agree(_tensors(calls_of[tile][0]()), expected, one.dtype):
            del calls_of[tile]
            console.warn(f"{one.kernel}: {tile} gives another result than {before}, and is not taken")
    if before not in calls_of:
        raise ValueError(f"{before}, which is in force, gives results that are not finite")
    rounds: dict[AnyTile, list[float]] = {tile: [] for tile in calls_of}
    for _ in range(1 if interpreting() else FINAL_ROUNDS):
        for tile, calls in calls_of.items():
            rounds[tile].append(one.ms(calls, once))
    medians = {tile: statistics.median(values) for tile, values in rounds.items()}
    best = min(medians, key=medians.__getitem__)
    efficiency = one.efficiency(best, medians[best])
    return Found(best, medians[best], before, medians[before], tried, len(space), efficiency)


def _tensors(results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """With the parts of a split sum, which are as many as the tile makes them, added up."""
    return [t.sum(0) if t.dim() == 3 else t for t in results]


def _agree(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], dtype: torch.dtype) -> bool:
    return all(relative_error(a, b) <= UNCALIBRATED[dtype] for a, b in zip(found, expected, strict=True))


Work = dict[tuple[str, str, str], tuple[Shape, str]]


def _work(shapes: Sequence[Shape], dtypes: Sequence[str], device: torch.device, capability: int) -> Work:
    """(kernel, operands, key) → the shape and dtype that decide: of several, the largest shape of the first dtype."""
    found: Work = {}
    largest = sorted(shapes, key=lambda shape: -shape.n * shape.d * shape.h)
    for dtype, shape in itertools.product(dtypes, largest):
        torch_dtype: torch.dtype = getattr(torch, dtype)
        for kernel in kernels_of(shape, torch_dtype, device, capability):
            if kernel == "weight_grad_atomic" and not settings.current().atomics:
                continue
            size = shape.h if kernel in tiles.BOTTLENECK_KERNELS else shape.d
            index = (kernel, tiles.listed(_numbers(torch_dtype, device)), config_key(kernel, size))
            found.setdefault(index, (shape, dtype))
    return found


def tune(
    *,
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    device: str = "",
    out: Path | None = None,
    budget: float = 600,
    problems: list[str] | None = None,
) -> Path | None:
    """Tune every kernel that the problems use, and write the config after each.

    Args:
        shapes: names of `shapes.LISTS` or ``N,d,H``; empty for those of "tune". Of several for which a kernel has
            one tile, the largest decides.
        dtypes: names; empty for bfloat16.
        device: a GPU; empty for the current one.
        out: folder of the config; None for the user's own (`Settings.config_dir`), where it takes effect at once in
            every new process. What the file already holds of other kernels and widths is kept.
        budget: seconds for everything.
        problems: one line is appended for each thing that could not be done.

    Returns:
        The config file, or None if nothing was tuned.
    """
    problems = [] if problems is None else problems

    def problem(line: str) -> None:
        problems.append(line)
        console.warn(line)

    try:
        where = devices.resolve(device)
    except ValueError as error:
        problem(str(error))
        return None
    if where.type == "cpu" and not interpreting():
        problem("tune: nothing to tune on a CPU: its tiles follow from the cache sizes in tiedfused/regimes/tiled.py")
        return None
    if out is None and not settings.current().config_dir:
        problem("out: got nothing, and TIEDFUSED_CONFIG_DIR is empty; expected a folder")
        return None
    wanted = parse_all(shapes or ["tune"], problems)
    for line in problems:
        console.warn(line)
    capability = known_capability(cuda_capability(where.index) if where.type == "cuda" else None)
    name = "interpreter" if interpreting() else devices.name(where)
    folder = Path(settings.current().config_dir) if out is None else out
    path = folder / f"{tiles.config_name(name)}.json"
    config = _start(path, name, capability)

    work = _work(wanted, dtypes or DTYPES, where, capability)
    if wanted and not work:
        problem("nothing to tune: tiles of PyTorch serve all of these problems")
    begin = time.perf_counter()
    rows = []
    with devices.on(where), console.progress(len(work)) as update:
        for i, ((kernel, operands, key), (shape, dtype)) in enumerate(work.items()):
            label = f"{kernel} ({shape}) {dtype}"
            update(label, i)
            left = budget - (time.perf_counter() - begin)
            if left <= 0:
                problem(f"{label}: not tuned, the budget of {budget:.0f} s is used up")
                continue
            one = None
            try:
                one = _Kernel(kernel, shape, getattr(torch, dtype), where, capability)
                found = search(one, left / (len(work) - i))
            except Exception as error:  # too little memory, a compiler or a GPU that fails: the other kernels go on
                problem(f"{label}: {(str(error).splitlines() or [type(error).__name__])[0]}")
                if devices.has_failed(where):
                    problem(f"the GPU has failed: {len(work) - i - 1} more kernels are not tuned")
                    break
                continue
            finally:
                if one is not None:
                    one.close()
            _enter(config, (kernel, operands, key), shape, dtype, found)
            _write(config, path)
            gain = found.before_ms / found.ms
            rows.append([
                label, _text(found.before), f"{found.before_ms:.3g}", _text(found.tile), f"{found.ms:.3g}",
                f"{gain:.2f}", "—" if found.efficiency is None else f"{100 * found.efficiency:.0f}",
                f"{found.tried} of {found.of}",
            ])  # fmt: skip
        update("done", len(work))
    if not rows:
        return None
    columns = ["kernel", "tile in force", "ms", "best tile", "ms", "gain", "% peak", "tried"]
    console.print_table(f"{name}: {config['status']}", columns, rows, "tile: blocks, warps, stages")
    print(f"written: {path}" + ("" if interpreting() else "; `tiedfused explain N D H` shows which config is used"))
    return path


def _text(tile: AnyTile) -> str:
    return " ".join(map(str, dataclasses.astuple(tile)))


def _start(path: Path, name: str, capability: int) -> dict[str, Any]:
    """The config to fill: what `path` holds, if it can be read, under a new head."""
    old: dict[str, Any] = {}
    if path.is_file():
        try:
            old = json.loads(path.read_text())
        except ValueError:
            console.warn(f"{path}: cannot be read as a config, and is written anew")
    return {
        "status": f"{NOT_MEASURED}, not measured" if interpreting() else "measured",
        "gpu": name,
        "capability": capability,
        "versions": devices.versions(),
        "commit": devices.commit(),
        "command": devices.command_line(),
        "date": time.strftime("%Y-%m-%d"),
        "index": ["kernel", "bytes of an element or tf32", "block_d; block_h for the bottleneck; or any"],
        "tiles": old.get("tiles", {}),
        "efficiency": old.get("efficiency", {}),
        "measured": old.get("measured", {}),
    }


def _enter(config: dict[str, Any], index: tuple[str, str, str], shape: Shape, dtype: str, found: Found) -> None:
    kernel, operands, key = index
    entries = {
        "tiles": list(dataclasses.astuple(found.tile)),
        "efficiency": found.efficiency,
        "measured": {"shape": list(shape), "dtype": dtype, **dataclasses.asdict(found)},
    }
    for table, value in entries.items():
        by_key = config[table].setdefault(kernel, {}).setdefault(operands, {})
        by_key.pop(key, None)
        if value is not None:
            by_key[key] = value


def _write(config: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(config, indent=1) + "\n")
    os.replace(unfinished, path)
