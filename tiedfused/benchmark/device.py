"""The device that is measured: what it is, its clocks, its own rates, and how a call on it is timed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiedfused
from tiedfused.activations import HAS_TRITON
from tiedfused.benchmark.peers import Call
from tiedfused.devices import onednn_missing
from tiedfused.settings import MIB

# Large enough for the full rate: cuBLAS levels off at about 8192 in 16 bits; 2048 on a CPU with a few cores.
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
# Without instructions for it PyTorch's own loops multiply: on an EPYC (Zen 5) 2.1 s for a product of 1024, 0.1 for 512.
CPU_FLOAT16_GEMM_SHARE = 4
COPY_BYTES = {"cpu": 128 * MIB, "cuda": 1024 * MIB}
# 1 ms at 2 GHz: longer than the host takes to launch a step of any peer
BUSY_CYCLES = 2_000_000


def resolve(text: str) -> torch.device:
    """The device that `text` names; the GPU, or the CPU where there is none, for an empty text.

    Raises:
        ValueError: it names none that can be measured here.
    """
    if not text:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    expected = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"device: got {text!r}; expected {expected}") from None
    if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
        return torch.device("cuda", device.index or 0)
    if device.type != "cpu":
        raise ValueError(f"device: {text!r} is not present; expected {expected}")
    return device


def name(device: torch.device) -> str:
    """The device as tables call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' * (threads != 1)}"


@functools.cache
def cpu_name() -> str:
    """The CPU's name as the system gives it."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of everything that a time depends on."""
    found = {"tiedfused": tiedfused.__version__, "python": platform.python_version(), "torch": torch.__version__}
    if HAS_TRITON:
        import triton

        found["triton"] = triton.__version__
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str:
    """The commit that runs, with ``-dirty`` where files differ from it; ``"unknown"`` outside a checkout."""
    root = Path(tiedfused.__file__).parents[1]
    with contextlib.suppress(OSError):
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() or "unknown"
    return "unknown"


def describe(device: torch.device) -> dict[str, Any]:
    """What identifies the device in a results file."""
    common = {"name": name(device), "type": device.type, "cpu": cpu_name(), "threads": torch.get_num_threads()}
    if device.type != "cuda":
        return common | {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count()}
    gpu = torch.cuda.get_device_properties(device)
    return common | {
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "driver": _nvidia_smi(device, "driver_version") or "unknown",
        "max_sm_clock_mhz": _nvidia_smi(device, "clocks.max.sm") or "unknown",
        "power_limit_w": _nvidia_smi(device, "power.limit") or "unknown",
    }


def free_memory(device: torch.device) -> int:
    """Bytes that a call may still allocate, as far as the system tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own cache
        return torch.cuda.mem_get_info(device)[0] + unused
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return 1 << 62


def has_failed(device: torch.device) -> bool:
    """Whether nothing runs on a GPU any more: an illegal access fails every later call of the process.

    Asked of the GPU: what reports it first says "CUDA error", or "Triton Error [CUDA]" as of a launch that is merely
    refused.
    """
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False


# ---- clocks --------------------------------------------------------------------------------------------------------


def _smi_index(device: torch.device) -> str:
    """How nvidia-smi calls the device; CUDA_VISIBLE_DEVICES renumbers them, the UUID stays."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"GPU-{uuid}" if uuid else str(device.index or 0)


def _nvidia_smi(device: torch.device, field: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "-i", _smi_index(device)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return None


class Clocks:
    """The clocks seen while something runs: of a GPU by nvidia-smi twice a second, of a CPU when asked.

    Use it as a context manager; `seen` says what has been seen since it was last asked.
    """

    FIELDS = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._smi: subprocess.Popen[str] | None = None
        self._file = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115 - both are open for as long as this is
        self._reader = Path(self._file.name).open()  # noqa: SIM115

    def __enter__(self) -> Clocks:
        if self._device.type == "cuda":
            query = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu"
            command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-i", _smi_index(self._device), "-lms"]
            with contextlib.suppress(OSError):
                self._smi = subprocess.Popen([*command, "500"], stdout=self._file, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._smi is not None:
            self._smi.terminate()
            self._smi.wait()
        self._reader.close()
        self._file.close()

    def seen(self) -> dict[str, list[float]]:
        """The lowest, median and highest of each quantity since the last call; empty where nothing is known."""
        samples: list[list[float]] = []
        if self._smi is not None:
            for line in self._reader.read().splitlines():
                with contextlib.suppress(ValueError):  # "[N/A]", or a line that is only half written
                    samples.append([float(value) for value in line.split(",")])
        elif self._device.type == "cpu":
            with contextlib.suppress(OSError):
                cpuinfo = Path("/proc/cpuinfo").read_text()
                samples = [[float(mhz)] for mhz in re.findall(r"^cpu MHz\s*: ([\d.]+)", cpuinfo, re.MULTILINE)]
        fields = self.FIELDS if self._smi is not None else ("mhz",)
        samples = [sample for sample in samples if len(sample) == len(fields)]
        columns = zip(fields, zip(*samples, strict=True), strict=False)
        return {field: [min(values), statistics.median(values), max(values)] for field, values in columns}


# ---- time ----------------------------------------------------------------------------------------------------------


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Of the last level of cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    with contextlib.suppress(OSError, ValueError):
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    return 32 * MIB


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.zeros(2 * cache_bytes(device) // 4, dtype=torch.int32, device=device)


def flush(device: torch.device) -> None:
    """Leave nothing useful in the last level of cache.

    By reading: what a write leaves there has to be written back while the next call runs. On an EPYC with 32 MB, 24 MB
    of floats were read at 151 GB/s from cache, at 77 after a write, so in part still from cache, at 54 after a read.
    """
    _flush_buffer(device).sum()


def keep_busy(device: torch.device) -> None:
    """Give a GPU something to do while the host launches what is timed next; its caches stay as they are."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda._sleep(BUSY_CYCLES)


def milliseconds(call: Call, device: torch.device, *, warm: bool = False) -> float:
    """The time of one call: on a GPU between two events, on a CPU by the clock.

    Args:
        call: what to time, after its preparation.
        device: where it runs.
        warm: start with what an untimed call just before leaves in the caches; otherwise with caches that hold
            something else.

    A GPU is busy while the host launches the call: what is timed is the GPU's work, and of the host's only what takes
    longer than `BUSY_CYCLES`.
    """
    with call.within():
        if warm:
            call()
        if call.prepare is not None:
            call.prepare()
        if not warm:
            flush(device)
        keep_busy(device)
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call.run()
            stop.record()
            stop.synchronize()
            return float(start.elapsed_time(stop))
        begin = time.perf_counter()
        call.run()
        return (time.perf_counter() - begin) * 1e3


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, times: list[float]) -> Timing:
        """The quantiles of at least two times."""
        quintiles = statistics.quantiles(times, n=5, method="inclusive")
        return cls(statistics.median(times), quintiles[0], quintiles[3])


def interleaved(
    calls: Mapping[str, Call], device: torch.device, rounds: int, *, warm: bool = False
) -> dict[str, Timing]:
    """Time every call once a round, so that whatever else the machine does hits all of them alike."""
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items():
            times[label].append(milliseconds(call, device, warm=warm))
    return {label: Timing.of(t) for label, t in times.items()}


# ---- the device's own rates ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The calls that show what the device can do, and what each amounts to.

    Args:
        calls: "gemm", one square product; "copy" and "read" of a buffer that no cache holds.
        amounts: floating-point operations of the first, bytes of the others.
        library: what multiplies.
    """

    calls: dict[str, Call]
    amounts: dict[str, int]
    library: str

    def rates(self, times: Mapping[str, Timing]) -> dict[str, float]:
        """FLOP/s of the product, bytes/s of the read and of the faster of copy and read, from `interleaved`'s times."""
        per_s = {label: 1e3 * amount / times[label].median for label, amount in self.amounts.items()}
        return {"gemm": per_s["gemm"], "read": per_s["read"], "memory": max(per_s["copy"], per_s["read"])}


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """What `dtype` products and memory are held against on `device`.

    On a CPU the faster of PyTorch's own product and oneDNN's: PyTorch calls a BLAS for fp32, which need not be the
    faster of the two.
    """
    size = GEMM_SIZE[device.type] // (2 if device.type == "cuda" and dtype.itemsize > 2 else 1)
    if device.type == "cpu" and dtype == torch.float16:
        size //= CPU_FLOAT16_GEMM_SHARE
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    products: dict[str, Callable[[], Any]] = {"torch.mm": lambda: a @ b}
    if device.type == "cpu" and onednn_missing() is None and dtype in (torch.float32, torch.bfloat16):
        linear = torch.ops.mkldnn._linear_pointwise.default
        products["oneDNN"] = lambda: linear(a, b, None, "none", [], "")
    calls = {label: Call(run) for label, run in products.items()}
    for call in calls.values():
        call()
    library = min(products, key=lambda label: interleaved(calls, device, 2)[label].median)
    return Ceilings(
        {"gemm": calls[library], "copy": Call(lambda: target.copy_(source)), "read": Call(lambda: source.sum())},
        {"gemm": 2 * size**3, "copy": 2 * source.nbytes, "read": source.nbytes},
        library,
    )


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Make `device` the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


def command_line() -> str:
    """How this process was started, as a user types it."""
    program = Path(sys.argv[0])
    if program.name in ("cli.py", "tiedfused"):
        return " ".join(["tiedfused", *sys.argv[1:]])
    return " ".join(["python", program.name, *sys.argv[1:]])
