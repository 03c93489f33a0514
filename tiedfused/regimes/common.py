"""What all regimes are planned with: the request, the parts a plan is made of, and the cost model."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from tiedfused import devices, settings, tiles
from tiedfused.activations import HAS_TRITON, Activation
from tiedfused.devices import Device
from tiedfused.tiles import AnyTile

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_MIN_CAPABILITY = 80
# Kernels count rows, latents and columns in 32 bits, up to some tiles beyond the last one; elements in 64.
TRITON_MAX_SIZE = 2**31 - 2**17
# Host time between two launches, in s; hidden where the kernels take longer than that. Assumed.
LAUNCH_SECONDS = 4e-6
# Small ones that follow a kernel with statistics: the parts of the rows' and of the latents' are added up.
STATS_LAUNCHES = 2
# A buffer of more of the L2 cache does not stay there until it is read back, with the operands streaming past in
# between. Assumed.
L2_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Request:
    """One problem: everything that a plan depends on.

    Args:
        n: rows N.
        d: ``in_features``.
        h: ``out_features`` H.
        dtype: of every operand.
        device_type: ``"cpu"``, ``"cuda"``, …
        device_index: of the CUDA device, or None.
        capability: its compute capability as one integer (90), or None where there is none.
        f: the activation.
        g: the output activation as far as it is part of the op: in inference; else the identity.
        grad: whether a backward pass follows.
        grad_x: whether x needs a gradient.
        recompute: as the caller passed it; None leaves it to the settings, then to the plan.
        stats: whether forward also returns the latent's statistics, and backward takes their gradients.
        precision: of fp32 products in the Triton kernels, ``"ieee"`` or ``"tf32"``.
        threads: of the CPU.
        atomics: whether x̄ may be added with atomics.
        in_force: the settings.
    """

    n: int
    d: int
    h: int
    dtype: torch.dtype
    device_type: str
    device_index: int | None
    capability: int | None
    f: Activation
    g: Activation
    grad: bool
    grad_x: bool
    recompute: bool | None
    stats: bool
    precision: str
    threads: int
    atomics: bool
    in_force: settings.Settings

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """``"bfloat16"`` and the like."""
        return str(self.dtype).removeprefix("torch.")

    @functools.cached_property
    def operands(self) -> str:
        """As `tiles.lookup` names them: ``"tf32"`` where fp32 is multiplied as that, else the dtype's name."""
        return tiles.operands(self.dtype_name, self.precision)

    @property
    def ndh(self) -> int:
        """Multiply-adds of one product; 2NdH FLOPs."""
        return self.n * self.d * self.h

    @property
    def latent_bytes(self) -> int:
        """Of the whole [N, H] latent."""
        return self.n * self.h * self.itemsize

    @property
    def asked_recompute(self) -> bool | None:
        """What the caller or the settings ask for; None leaves it to the plan."""
        return self.in_force.recompute if self.recompute is None else self.recompute

    @functools.cached_property
    def gpu(self) -> int:
        """The compute capability that is planned for, one of `devices.GPUS`."""
        return devices.known_capability(self.capability)

    @functools.cached_property
    def device(self) -> Device:
        """What the cost model knows of the device; of the GPU that is stood in for, in Triton's interpreter."""
        if self.device_type == "cpu" and not devices.interpreting():
            return devices.cpu(self.threads)
        return devices.GPUS[self.gpu]

    @functools.cached_property
    def multiprocessors(self) -> int:
        """Of the device itself where it is present."""
        present = devices.multiprocessors(self.device_index) if self.device_type == "cuda" else None
        return present or self.device.multiprocessors


@dataclasses.dataclass(frozen=True)
class TorchTile:
    """A tile of the tiled PyTorch backend: [block_n, block_h] of the latent, and the library that multiplies."""

    block_n: int
    block_h: int
    products: str


@dataclasses.dataclass(frozen=True)
class NativeTile:
    """What the kernel was built for: an instruction set; its blocks are csrc's own matter."""

    build: str


@dataclasses.dataclass(frozen=True)
class Pass:
    """One kernel's share of a part.

    Args:
        kernel: a name of `tiedfused.tiles.KERNELS`, or ``forward`` and ``backward`` of the tiled backend.
        tile: its tile sizes.
        tile_source: where the tile comes from.
        split: into how many parts the summed dimension is split; parts are combined in a fixed order.
        flops: executed, recomputation included, and in the stream kernels the padding of d.
        bytes_moved: to and from memory: inputs and outputs once, and what is stored in between written and read once.
        workspace_bytes: what it allocates besides its results.
        predicted_ms: what the cost model expects.
    """

    kernel: str
    tile: AnyTile | TorchTile | NativeTile
    tile_source: str
    split: int
    flops: int
    bytes_moved: int
    workspace_bytes: int
    predicted_ms: float


@dataclasses.dataclass(frozen=True)
class Part:
    """How one direction, forward or backward, runs.

    Args:
        regime: a name of `tiedfused.regimes.REGIMES`.
        backend: a name of `tiedfused.backends`.
        passes: the kernels, in the order of their launch.
        reason: why this regime suits the sizes.
        chunk: rows and latents of the latent that are worked on at a time, where the regime works in chunks.
        deterministic: whether results are bitwise reproducible.
    """

    regime: str
    backend: str
    passes: tuple[Pass, ...]
    reason: str
    chunk: tuple[int, int] | None = None
    deterministic: bool = True

    @property
    def predicted_ms(self) -> float:
        """Sum over the passes."""
        return sum(p.predicted_ms for p in self.passes)

    @property
    def workspace_bytes(self) -> int:
        """The largest of a pass; passes of one part share what they hand to each other."""
        return max(p.workspace_bytes for p in self.passes)


def why_not_triton(r: Request) -> str | None:
    """Why no Triton kernel serves a request, whatever its sizes; None if one may."""
    if r.n == 0:
        return "there are no rows: y is empty, gradients are zero"
    if r.device_type != "cuda" and not (r.device_type == "cpu" and devices.interpreting()):
        return f"its kernels need a CUDA device, the tensors are on {r.device_type}"
    if torch.version.hip is not None:
        return "its kernels have not been tried on ROCm"
    if not HAS_TRITON:
        return "Triton is not installed"
    if r.device_type == "cuda" and torch.cuda.is_available() and (missing := devices.launcher_missing()) is not None:
        return missing
    if r.capability is not None and r.capability < TRITON_MIN_CAPABILITY:
        return f"compute capability {r.capability / 10} is below {TRITON_MIN_CAPABILITY / 10}"
    if r.dtype not in TRITON_DTYPES:
        return f"its kernels take bfloat16, float16 and float32, not {r.dtype_name}"
    if max(r.n, r.d, r.h) > TRITON_MAX_SIZE:
        return f"its kernels count to {TRITON_MAX_SIZE}, N, d or H is {max(r.n, r.d, r.h)}"
    if r.f.triton is None:
        return f"activation {r.f.name!r} was registered without Triton functions"
    return None


def split(blocks: int, streamed_blocks: int, multiprocessors: int) -> int:
    """Parts of the streamed dimension, so that a grid of few blocks fills the GPU; at least 4 tiles a part."""
    if blocks >= multiprocessors:
        return 1
    return max(1, min(multiprocessors // blocks, streamed_blocks // 4))


def stats_bytes(r: Request, rows: int, latents: int, row_parts: int, latent_parts: int) -> int:
    """Of the partial sums for the statistics of ``[rows, latents]`` of the latent: `row_parts` of each row, an fp32 sum
    and a 32-bit count, and `latent_parts` of each latent, an fp32 sum and a 16-bit count. 0 where none are asked for.
    """
    return (8 * rows * row_parts + 6 * latents * latent_parts) * r.stats


def lookup(r: Request, kernel: str) -> tuple[AnyTile, str]:
    """The tile to launch `kernel` with, and where it comes from. Raises ValueError if none fits."""
    return tiles.lookup(*_of_tiles(r, kernel))


def measured_efficiency(r: Request, kernel: str) -> tuple[float, str] | None:
    """The fraction of the peak that `kernel` was measured to reach on this GPU, and which config says so."""
    return tiles.measured_efficiency(*_of_tiles(r, kernel))


def _of_tiles(r: Request, kernel: str) -> tuple[str, int, str, int, str]:
    """What `tiles.lookup` takes."""
    size = r.h if kernel in tiles.BOTTLENECK_KERNELS else r.d
    return kernel, size, r.operands, r.gpu, r.in_force.config_dir


def efficiency(r: Request, kernel: str, assumed: float) -> float:
    """The fraction of the peak that `kernel` is expected to reach: the measured one, else what a regime assumes."""
    measured = measured_efficiency(r, kernel)
    return assumed if measured is None else measured[0]


def kernel_ms(
    r: Request,
    *,
    flops: float,
    efficiency: float,
    memory_bytes: float,
    cached_bytes: float = 0,
    exposed_seconds: float = 0,
    blocks: int = 0,
    launches: int = 1,
    launch_seconds: float = LAUNCH_SECONDS,
) -> float:
    """Predicted time of a kernel, in ms.

    The larger of arithmetic, memory and launches, since they overlap, and what does not overlap with them: what an
    epilogue writes, and what a prologue reads.

    Args:
        r: the request; its device's peak rates are used.
        flops: executed.
        efficiency: the fraction of the peak that a kernel of the kind reaches.
        memory_bytes: streamed from and to memory while the kernel computes.
        cached_bytes: of that kind through the L2 cache, where blocks read the same again and it counts.
        exposed_seconds: spent on traffic that nothing overlaps with.
        blocks: of the grid, where it is counted: the last, partly filled wave takes as long as a full one.
        launches: how many there are.
        launch_seconds: host time of each.
    """
    device = r.device
    waves = blocks / r.multiprocessors
    idle = math.ceil(waves) / waves if blocks else 1.0
    arithmetic = flops / (device.rate(r.dtype, r.precision) * efficiency) * idle
    # a multiprocessor draws its share of what the cache delivers, and one without a block nothing
    cached = device.cached_bandwidth(True) * (min(1.0, waves) if blocks else 1.0)
    memory = max(memory_bytes / min(device.bandwidth, cached), cached_bytes / cached)
    overlapped = max(arithmetic, memory, launches * launch_seconds)
    return 1e3 * (overlapped + exposed_seconds)
