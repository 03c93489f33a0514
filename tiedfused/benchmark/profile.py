"""`tiedfused profile`: one problem kernel by kernel, from torch.profiler and from what the compiler made of each."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from tiedfused.activations import HAS_TRITON
from tiedfused.benchmark import console, plots
from tiedfused.benchmark import device as devices
from tiedfused.benchmark.kernels import function_name
from tiedfused.benchmark.peers import Operands
from tiedfused.benchmark.shapes import Shape
from tiedfused.devices import interpreting
from tiedfused.planning import Plan, plan
from tiedfused.tiles import config_name

RANGE = "tiedfused"  # the NVTX range around one call
WARM_UP, STEPS = 3, 5
MOST_LINES = 12
# A kernel further than this from both ceilings is held up by something else.
NEAR = 0.4
# With less of the time than this in kernels, the device waits for the host.
BUSY = 0.7

_WARP = 32
_REGISTER_GRANULE = 256  # registers are given to a warp in units of this many
_RESERVED_SHARED = 1024  # bytes of every block that the driver takes, compute capability 8.0 on
_MOST_BLOCKS = 32


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the compiler and the launcher know of a Triton kernel.

    Args:
        blocks: of the grid.
        threads: of a block.
        registers: of a thread.
        shared_bytes: of a block.
        spills: registers of a thread that live in memory.
    """

    blocks: int
    threads: int
    registers: int
    shared_bytes: int
    spills: int

    def resident(self, gpu: Any) -> int:
        """Blocks that a multiprocessor of `gpu` (`torch.cuda.get_device_properties`) holds at once."""
        warps = math.ceil(self.threads / _WARP)
        a_warp = math.ceil(self.registers * _WARP / _REGISTER_GRANULE) * _REGISTER_GRANULE
        limits = [
            gpu.regs_per_multiprocessor // max(1, a_warp * warps),
            gpu.shared_memory_per_multiprocessor // (self.shared_bytes + _RESERVED_SHARED),
            gpu.max_threads_per_multi_processor // self.threads,
            _MOST_BLOCKS,
        ]
        return min(limits)

    def occupancy(self, gpu: Any) -> float:
        """The share of the multiprocessor's threads that can be resident."""
        return self.resident(gpu) * self.threads / float(gpu.max_threads_per_multi_processor)

    def waves(self, gpu: Any) -> float:
        """How many times the grid fills the GPU."""
        return self.blocks / max(1, self.resident(gpu) * gpu.multi_processor_count)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, or on a CPU one operator, in one call of the layer.

    Args:
        name: of the function that runs.
        count: launches.
        ms: time.
        flops: executed operations, None where they are not known.
        bytes: least traffic, None where it is not known.
        launch: what is known of a Triton kernel.
    """

    name: str
    count: float
    ms: float
    flops: int | None = None
    bytes: int | None = None
    launch: Launch | None = None

    def share_of(self, amount: int | None, rate: float) -> float | None:
        """The achieved rate of `amount` over `rate`."""
        return None if amount is None or not self.ms else amount / self.ms * 1e3 / rate


# ---- what an operator does -----------------------------------------------------------------------------------------

# operator → which of its inputs are the two factors, and whether the second is transposed
_PRODUCTS = {
    "aten::mm": (0, 1, False),
    "aten::addmm": (1, 2, False),
    "aten::addmm_": (1, 2, False),
    "aten::_addmm_activation": (1, 2, False),
    "mkldnn::_linear_pointwise": (0, 1, True),
}
_READ_ONLY = {"aten::sum", "aten::copy_", "aten::fill_", "aten::zero_"}  # copy_ lists what it writes as an input
_ELEMENTWISE = (
    "add add_ mul mul_ relu relu_ clamp_min clamp_min_ threshold_backward gelu gelu_backward silu silu_backward "
    "sigmoid sigmoid_backward tanh tanh_backward"
)
_READ_AND_WRITTEN = {f"aten::{name}" for name in _ELEMENTWISE.split()}


def operator_cost(name: str, shapes: Sequence[Sequence[int]], itemsize: int) -> tuple[int | None, int | None]:
    """Operations and least bytes of one call, each None where it is not known; every element counts `itemsize`.

    Example:
        >>> operator_cost("aten::mm", [[4, 8], [8, 2]], itemsize=4)
        (128, 224)
    """
    sizes = [math.prod(shape) if shape else 0 for shape in shapes]
    if name in _PRODUCTS:
        first, second, transposed = _PRODUCTS[name]
        (m, k), n = shapes[first], shapes[second][0 if transposed else 1]
        result = m * n * (2 if name == "aten::addmm_" else 1)
        return 2 * m * n * k, (m * k + k * n + result) * itemsize
    if name in _READ_ONLY:
        return None, sum(sizes) * itemsize
    if name in _READ_AND_WRITTEN and sizes:
        return None, (sum(sizes) + max(sizes)) * itemsize
    return None, None


# ---- what ran ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _record_launches(found: dict[str, Launch]) -> Iterator[None]:
    """Note what is known of every Triton kernel that is launched."""
    if not HAS_TRITON or interpreting():
        yield
        return
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def recording(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        if compiled is not None and not callable(grid):
            threads = _WARP * compiled.metadata.num_warps
            found[self.__name__] = Launch(
                math.prod(grid), threads, compiled.n_regs or 0, compiled.metadata.shared, compiled.n_spills or 0
            )
        return compiled

    with mock.patch.object(JITFunction, "run", recording):
        yield


def _costs_in_plan(used: Plan) -> dict[str, tuple[int, int]]:
    """Function name of each Triton kernel → executed operations and bytes, in one call, of all passes it serves."""
    found: dict[str, tuple[int, int]] = {}
    for part in used.parts:
        for one in part.passes if part.backend == "triton" else ():
            flops, moved = found.get(function_name(one.kernel), (0, 0))
            found[function_name(one.kernel)] = flops + one.flops, moved + one.bytes_moved
    return found


class _Sum:
    """Adds up the events of one kernel; what is not known of one event is not known of the sum."""

    def __init__(self) -> None:
        self.count, self.us = 0, 0.0
        self.flops: int | None = 0
        self.bytes: int | None = 0

    def add(self, us: float, cost: tuple[int | None, int | None]) -> None:
        self.count += 1
        self.us += us
        self.flops = None if self.flops is None or cost[0] is None else self.flops + cost[0]
        self.bytes = None if self.bytes is None or cost[1] is None else self.bytes + cost[1]


def kernels(
    events: Iterable[Any], device_type: str, itemsize: int, used: Plan, launches: dict[str, Launch], steps: int
) -> list[Kernel]:
    """What the profiler saw, by name, in one of `steps` calls, the longest first.

    Args:
        events: `torch.profiler.profile.events()`.
        device_type: ``"cpu"``: operators by their own time; ``"cuda"``: kernels.
        itemsize: bytes of an element.
        used: the plan, for the operations of its Triton kernels.
        launches: what `_record_launches` found.
        steps: calls that were profiled.
    """
    events = list(events)
    sums: dict[str, _Sum] = {}
    if device_type == "cpu":
        for event in events:
            if event.name not in (RANGE, "ProfilerStep*"):
                cost = operator_cost(event.name, event.input_shapes or [], itemsize)
                sums.setdefault(event.name, _Sum()).add(event.self_cpu_time_total, cost)
    else:
        costs: dict[str, tuple[int | None, int | None]] = {}
        for event in events:  # an operator's work is done by the longest of its kernels
            if event.device_type == DeviceType.CPU and event.kernels:
                longest = max(event.kernels, key=lambda kernel: kernel.duration)
                costs.setdefault(longest.name, operator_cost(event.name, event.input_shapes or [], itemsize))
        for event in events:
            if event.device_type == DeviceType.CUDA and event.name != RANGE:
                cost = costs.get(event.name, (None, None))
                sums.setdefault(event.name, _Sum()).add(event.time_range.elapsed_us(), cost)
        for name, (flops, moved) in _costs_in_plan(used).items():
            if name in sums and name in launches:
                sums[name].flops, sums[name].bytes = steps * flops, steps * moved

    def a_step(amount: int | None) -> int | None:
        return amount // steps if amount else None

    found = [
        Kernel(name, s.count / steps, s.us / steps / 1e3, a_step(s.flops), a_step(s.bytes), launches.get(name))
        for name, s in sums.items()
    ]
    return sorted(found, key=lambda kernel: -kernel.ms)


def bound(hottest: Kernel, total_ms: float, wall_ms: float, rates: dict[str, float], gpu: Any = None) -> str:
    """One sentence that says what bounds the problem."""
    if gpu is not None and total_ms < BUSY * wall_ms:
        return (
            f"Bound by the host: kernels fill {100 * total_ms / wall_ms:.0f}% of the {wall_ms:.3g} ms a call takes; "
            "larger problems, torch.compile or CUDA graphs help, faster kernels do not."
        )
    who = f"{hottest.name}, {100 * hottest.ms / total_ms:.0f}% of the kernels' time,"
    compute = hottest.share_of(hottest.flops, rates["gemm"])
    traffic = hottest.share_of(hottest.bytes, rates["memory"])
    if compute is None and traffic is None:
        return f"Bound by what is not counted here: {who} does work of unknown size; see the trace."
    rates_text = (
        f"{100 * (compute or 0):.0f}% of the rate of a large product and {100 * (traffic or 0):.0f}% of memory's"
    )
    if max(compute or 0, traffic or 0) >= NEAR:
        what = "arithmetic" if (compute or 0) >= (traffic or 0) else "memory"
        return f"Bound by {what}: {who} reaches {rates_text}."
    launch = hottest.launch
    if launch is not None and launch.spills:
        why = f"{launch.spills} spilled registers a thread"
    elif launch is not None and gpu is not None and launch.waves(gpu) < 1:
        why = f"a grid that fills {100 * launch.waves(gpu):.0f}% of the GPU"
    else:
        why = "latency: instructions that wait for each other or for the cache"
    return f"Bound by neither ceiling: {who} reaches {rates_text}; look at {why}."


def ncu_command(kernel: str, arguments: Sequence[str], out: Path) -> str:
    """The Nsight Compute command line that looks into one launch of `kernel`."""
    ncu = ["ncu", "--set", "full", "--nvtx", "--nvtx-include", f"{RANGE}/", "--kernel-name", kernel]
    ncu += ["--launch-count", "1", "--force-overwrite", "--export", str(out / f"{config_name(kernel)}.ncu-rep")]
    return shlex.join([*ncu, "tiedfused", "profile", *arguments, "--only-run"])


def _unit(device_type: str) -> tuple[str, float]:
    return ("GFLOP/s", 1e9) if device_type == "cpu" else ("TFLOP/s", 1e12)


# ---- the command ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _range(device: torch.device) -> Iterator[None]:
    """A range that torch.profiler, and on a GPU Nsight, shows around a call."""
    nvtx = torch.cuda.nvtx.range(RANGE) if device.type == "cuda" else contextlib.nullcontext()
    with nvtx, record_function(RANGE):
        yield


def _run(call: Callable[[], Any], device: torch.device, times: int) -> None:
    for _ in range(times):
        with _range(device):
            call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _host_ms(call: Callable[[], Any], device: torch.device) -> float:
    """The time that the host takes to launch a call; on a CPU there is none beside the call's own."""
    if device.type != "cuda":
        return 0.0
    times = []
    for _ in range(STEPS):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def columns_and_rows(
    found: Sequence[Kernel], rates: dict[str, float], gpu: Any = None
) -> tuple[list[str], list[list[str]]]:
    """The per-kernel table; kernels after the first dozen are added up in its last line."""
    total = sum(kernel.ms for kernel in found)
    unit, scale = _unit("cpu" if gpu is None else "cuda")
    columns = ["kernel", "calls", "ms", "% time", unit, "% GEMM", "GB/s", "% memory"]
    if gpu is not None:
        columns += ["registers", "shared KiB", "spills", "occupancy", "waves", "last wave"]
    rest = found[MOST_LINES:]
    shown = list(found[:MOST_LINES])
    if rest:
        shown.append(Kernel(f"{len(rest)} others", sum(k.count for k in rest), sum(k.ms for k in rest)))

    def rate(kernel: Kernel, amount: int | None, unit: float, ceiling: float) -> list[str]:
        share = kernel.share_of(amount, ceiling)
        return ["—", "—"] if share is None else [f"{share * ceiling / unit:.3g}", f"{100 * share:.0f}"]

    table = []
    for kernel in shown:
        row = [kernel.name[:60], f"{kernel.count:g}", f"{kernel.ms:.3g}", f"{100 * kernel.ms / total:.1f}"]
        row += rate(kernel, kernel.flops, scale, rates["gemm"]) + rate(kernel, kernel.bytes, 1e9, rates["memory"])
        if gpu is not None and kernel.launch is None:
            row += ["—"] * 6
        elif gpu is not None and kernel.launch is not None:
            one, waves = kernel.launch, kernel.launch.waves(gpu)
            row += [f"{one.registers}", f"{one.shared_bytes / 1024:.0f}", f"{one.spills}"]
            row += [f"{100 * one.occupancy(gpu):.0f}%", f"{waves:.2f}", f"{100 * (waves / math.ceil(waves)):.0f}% full"]
        table.append(row)
    return columns, table


def profile(
    shape: tuple[int, int, int],
    dtype: str | None,
    which: str,
    device: str,
    out: Path,
    *,
    only_run: bool = False,
    pictures: bool = True,
) -> list[str]:
    """Profile one problem; print the table and the sentence, and write the trace and the roofline into `out`.

    Args:
        shape: N, d, H.
        dtype: of every operand; None for fp32, on a GPU bf16.
        which: ``"fwd"``, ``"bwd"`` or ``"step"``.
        device: ``"cpu"``, ``"cuda:1"``, …; empty for the GPU, or the CPU where there is none.
        out: a folder, made if it is not there.
        only_run: do nothing but run the layer in NVTX ranges.
        pictures: also draw the roofline.

    Returns:
        The lines printed under the table, and the table itself as Markdown.

    Raises:
        ValueError: the device is not present.
        torch.OutOfMemoryError: the operands do not fit.
    """
    where = devices.resolve(device)
    dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    torch_dtype: torch.dtype = getattr(torch, dtype)
    problem = Shape(*shape)
    with devices.on(where):
        operands = Operands.random(problem, torch_dtype, where)
        call = operands.named("tiedfused", which)
        for _ in range(WARM_UP):
            call()
        if only_run:
            _run(call, where, STEPS)
            return []
        launches: dict[str, Launch] = {}
        with _record_launches(launches):
            call()
        reference = devices.ceilings(where, torch_dtype)
        times = devices.interleaved({**reference.calls, "layer": call}, where, STEPS)
        rates = reference.rates(times)
        wall_ms = max(times["layer"].median, _host_ms(call, where))
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (where.type == "cuda")
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start and stop on stderr
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            _run(call, where, STEPS)

    used = plan(*shape, dtype=torch_dtype, device=where, grad=which != "fwd")
    found = kernels(profiler.events(), where.type, torch_dtype.itemsize, used, launches, STEPS)
    if not found:
        raise RuntimeError("the profiler saw no kernel: is another profiler, or a debugger, attached to this GPU?")
    gpu = torch.cuda.get_device_properties(where) if where.type == "cuda" else None
    total_ms = sum(kernel.ms for kernel in found)
    stem = f"{config_name(devices.name(where))}-{problem.n}-{problem.d}-{problem.h}-{dtype}-{which}"
    out.mkdir(parents=True, exist_ok=True)
    trace = out / f"{stem}.trace.json.gz"
    profiler.export_chrome_trace(str(trace))

    flops, moved = problem.flops(which), problem.bytes(which, torch_dtype.itemsize)
    intensity, ridge = flops / moved, rates["gemm"] / rates["memory"]
    achieved = flops / wall_ms * 1e3
    unit, scale = _unit(where.type)
    roof = min(rates["gemm"], intensity * rates["memory"])
    heading = f"({problem}) {dtype} {which} on {devices.name(where)}: {wall_ms:.3g} ms a call"
    lines = [
        f"plan: {used.regime}; {'; '.join(dict.fromkeys(part.reason for part in used.parts))}",
        f"roofline: {intensity:.3g} FLOP/byte, the ridge is at {ridge:.3g}; {achieved / scale:.3g} {unit} on "
        f"theoretical FLOPs in {wall_ms:.3g} ms, {100 * achieved / roof:.0f}% of the roof "
        f"({rates['gemm'] / scale:.3g} {unit}, {rates['memory'] / 1e9:.3g} GB/s, measured here)",
        bound(found[0], total_ms, wall_ms, rates, gpu),
        f"trace: {trace} (chrome://tracing or ui.perfetto.dev)",
    ]
    if where.type == "cuda":
        arguments = [*map(str, shape), "--dtype", dtype, "--pass", which, "--device", str(where)]
        lines.append(f"Nsight Compute: {ncu_command(found[0].name, arguments, out)}")
    if pictures and (picture := _draw(found, rates, (intensity, achieved), where.type, out / f"{stem}.png", heading)):
        lines.append(f"roofline plot: {picture}")
    columns, table = columns_and_rows(found, rates, gpu)
    console.print_table(heading, columns, table)
    print("\n".join(lines))
    return [heading, "", console.markdown(columns, table), "", *lines]


def _draw(
    found: Sequence[Kernel],
    rates: dict[str, float],
    whole: tuple[float, float],
    device_type: str,
    path: Path,
    title: str,
) -> Path | None:
    """The roofline with the whole call and each kernel whose operations and bytes are known."""
    points = {k.name: (k.flops / k.bytes, k.flops / k.ms * 1e3, k.ms) for k in found if k.flops and k.bytes and k.ms}
    unit, scale = _unit(device_type)

    def draw(ax: Any) -> None:
        at = [whole, *(point[:2] for point in points.values())]
        plots.draw_roof(ax, at, rates["gemm"], rates["memory"], scale, unit)
        longest = max([p[2] for p in points.values()], default=1.0)
        for name, (x, y, ms) in points.items():
            ax.scatter(x, y / scale, s=60 + 240 * ms / longest, color=plots.COLORS["compile"], alpha=0.75, ec="white")
            ax.annotate(name[:40], (x, y / scale), xytext=(12, 0), textcoords="offset points", fontsize=9, va="center")
        ax.plot(whole[0], whole[1] / scale, "*", color=plots.OURS, ms=16, mec="white")
        ax.annotate("whole call, theoretical FLOPs", (whole[0], whole[1] / scale), xytext=(0, 12), ha="center",
                    textcoords="offset points", fontsize=9, color=plots.OURS)  # fmt: skip
        ax.set_ylabel(unit)
        ax.set_title(title)

    return plots.draw_one(draw, path)
