"""Which backend serves a problem, with which tiles and workspace, what it costs, and why.

`plan` answers for any problem, on a device that is present or not; the op asks the same function before it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable

import torch

from tiedfused import settings, tiles
from tiedfused.activations import HAS_TRITON, IDENTITY, Activation, get_activation
from tiedfused.tiles import Tile

TRITON_MAX_D = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_MIN_CAPABILITY = 80
DEFAULT_CAPABILITY = 90  # what "cuda" means where no GPU is present

# A tile of the latent is written and read back at once, so it should stay in the L2 cache: of 256…2048 rows × 512…2048
# latents, d 64…784, 512 × 1024 in fp32 and 1024 × 1024 in bf16, both 2 MiB, were the fastest or within 3% of it, on a
# 2-core EPYC (Zen 5) with 2 MiB of L2 in all.
CPU_TILE_H = 1024
CPU_TILE_BYTES = 2 * settings.MIB
# In 16 bits every tile's part of W̄ is widened and added in fp32: with products this wide, and where the latent is kept
# and memory is not what counts, larger tiles are better: 12% at (2500, 784, 1024), 2% at (4096, 768, 6144).
CPU_KEPT_HALF_TILE_BYTES = 8 * settings.MIB
# The same thought for a GPU whose L2 holds 40 MB or more (bf16: 32 MiB); not measured.
GPU_TILE_N, GPU_TILE_H = 8192, 2048
# From here on reading the kept latent is cheaper than the product that recomputes it: on the CPU above, fp32, keeping
# is 40% slower at d 64, 10% at d 128, even at d 256 and 12% faster at d 768.
KEEP_LATENT_MIN_D = 512
# Below this many multiply-adds a call is bound by its host cost, where BLAS is 9 µs cheaper than oneDNN.
ONEDNN_MIN_WORK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Device:
    """What the roofline knows of a device: dense peak rates in FLOP/s, memory bandwidth in bytes/s, multiprocessors."""

    half: float
    tf32: float
    fp32: float
    bandwidth: float
    multiprocessors: int


# Vendor data sheets, dense, fp32 accumulation: A100 SXM 80 GB, RTX 3090, RTX 4090, H100 SXM, B200, RTX 5090.
GPUS = {
    80: Device(312e12, 156e12, 19.5e12, 2.04e12, 108),
    86: Device(71e12, 35.6e12, 35.6e12, 0.936e12, 82),
    89: Device(165e12, 82.6e12, 82.6e12, 1.008e12, 128),
    90: Device(989e12, 494e12, 67e12, 3.35e12, 132),
    100: Device(2250e12, 1100e12, 80e12, 8.0e12, 148),
    120: Device(209e12, 105e12, 105e12, 1.79e12, 170),
}
# Nominal, not measured: FLOP a cycle and core in fp32 (two FMA units) at 3 GHz; memory at 20 GB/s a core.
CPU_FLOP_PER_CYCLE = {"AVX512": 64, "AVX2": 32}


@dataclasses.dataclass(frozen=True)
class TorchTile:
    """A tile of the tiled PyTorch backend: [block_n, block_h] of the latent, and the library that multiplies."""

    block_n: int
    block_h: int
    products: str


@dataclasses.dataclass(frozen=True)
class Pass:
    """One sweep over the weight.

    Args:
        kernel: ``forward``, ``weight_grad`` (W̄ and b̄_enc), ``input_grad`` (x̄), ``weight_grad_atomic`` (all three, x̄
            by atomics) or, in the tiled backend, ``backward`` (all three).
        tile: its tile sizes.
        tile_source: where the tile comes from.
        split: into how many parts the streamed dimension is split; parts are combined in a fixed order.
        flops: executed, recomputation included.
        bytes_moved: inputs and outputs once, and what is stored in between written and read once.
        workspace_bytes: what it allocates besides its results.
    """

    kernel: str
    tile: Tile | TorchTile
    tile_source: str
    split: int
    flops: int
    bytes_moved: int
    workspace_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will run for one problem. `str` gives it as text, the command line as a table.

    Args:
        n: rows N.
        d: ``in_features``.
        h: ``out_features`` H.
        dtype: of every operand.
        device: ``"cpu"``, ``"cuda"``, …
        activation: f.
        output_activation: g if the kernels apply it, in inference; else the identity, and g follows as an operation.
        regime: ``"stream-H"`` or ``"tiled"``.
        backend: ``"triton"`` or ``"tiled"``.
        precision: of fp32 products in the Triton kernels, ``"ieee"`` or ``"tf32"``.
        passes: the forward and then the backward passes; forward alone where nothing needs a gradient.
        save_latent: whether forward keeps the latent for backward; it is recomputed otherwise.
        saved_bytes: kept from forward to backward besides the inputs and the output.
        deterministic: whether results are bitwise reproducible.
        roofline_ms: the sum over the passes of max(flops / peak, bytes / bandwidth); no kernel is faster.
        reason: why this backend and this memory mode.
        not_taken: each path that would be better, and why it is not taken.
    """

    n: int
    d: int
    h: int
    dtype: torch.dtype
    device: str
    activation: Activation
    output_activation: Activation
    regime: str
    backend: str
    precision: str
    passes: tuple[Pass, ...]
    save_latent: bool
    saved_bytes: int
    deterministic: bool
    roofline_ms: float
    reason: str
    not_taken: tuple[tuple[str, str], ...]

    @property
    def theoretical_flops(self) -> int:
        """4NdH forward; backward 6NdH for W̄ and 2NdH more for x̄: what throughput is quoted on."""
        backward = 0
        if len(self.passes) > 1:
            backward = 6 + 2 * any(p.kernel in ("input_grad", "weight_grad_atomic", "backward") for p in self.passes)
        return (4 + backward) * self.n * self.d * self.h

    @property
    def executed_flops(self) -> int:
        """Theoretical FLOPs and what is recomputed."""
        return sum(p.flops for p in self.passes)

    @property
    def bytes_moved(self) -> int:
        """Of all passes."""
        return sum(p.bytes_moved for p in self.passes)

    @property
    def workspace_bytes(self) -> int:
        """The largest workspace of a pass, and what is kept between them."""
        return max((p.workspace_bytes for p in self.passes), default=0) + self.saved_bytes

    def rows(self) -> list[tuple[str, str]]:
        """The plan as (label, value) pairs, for tables and text."""
        shape = f"N {self.n}, d {self.d}, H {self.h}, {str(self.dtype).removeprefix('torch.')} on {self.device}"
        functions = f"f {self.activation.name}, g inside {self.output_activation.name}"
        rows = [("problem", f"{shape}; {functions}"), ("regime", self.regime), ("backend", self.backend)]
        for p in self.passes:
            sizes = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(p.tile).items())
            split = f", split {p.split}" if p.split > 1 else ""
            rows.append((p.kernel, f"{sizes}{split} ({p.tile_source})"))
        return [
            *rows,
            ("latent", f"kept, {_mib(self.saved_bytes)}" if self.save_latent else "never stored"),
            ("workspace", _mib(self.workspace_bytes)),
            ("FLOPs", f"{self.theoretical_flops:.3e} theoretical, {self.executed_flops:.3e} executed"),
            ("bytes moved", f"{self.bytes_moved:.3e}"),
            ("roofline", f"{self.roofline_ms:.3g} ms"),
            ("deterministic", "yes" if self.deterministic else "no"),
            ("reason", self.reason),
            *((f"not {path}", why) for path, why in self.not_taken),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / settings.MIB:.1f} MiB"


def plan(
    n: int,
    d: int,
    h: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    activation: str = "relu",
    output_activation: str = "identity",
    grad: bool = True,
    grad_x: bool = True,
    recompute: bool | None = None,
    capability: int | None = None,
) -> Plan:
    """Which kernel, tiles and workspace a problem gets, its cost, and why.

    Args:
        n: rows N, 0 or more.
        d: ``in_features``, 1 or more.
        h: ``out_features`` H, 1 or more.
        dtype: of every operand.
        device: need not be present: ``"cuda"`` without a GPU stands for one of compute capability 9.0.
        activation: f, a name of `tiedfused.activation_names`.
        output_activation: g, likewise.
        grad: plan a training step; False plans inference.
        grad_x: whether x needs a gradient too.
        recompute: True never keeps the latent, False always does, None lets the plan choose within
            ``TIEDFUSED_WORKSPACE_MIB``.
        capability: plan for this compute capability (80, 90, 100, …) instead of the device's own.

    Raises:
        ValueError: a size, dtype or activation that makes no sense.
        TypeError: `recompute` is neither None nor a bool.

    Example:
        >>> import tiedfused, torch
        >>> p = tiedfused.plan(8192, 128, 8192, dtype=torch.float32)
        >>> p.backend, p.save_latent
        ('tiled', False)
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; expected {', '.join(map(str, DTYPES))}")
    if recompute is not None and not isinstance(recompute, bool):
        raise TypeError(f"recompute: expected None, True or False, got {recompute!r}")
    for name, value, least in (("n", n, 0), ("d", d, 1), ("h", h, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: got {value!r}; expected an integer of {least} or more")
    device = torch.device(device)
    f = get_activation(activation)
    g = fused_output(get_activation(output_activation, "output_activation"), grad)
    if capability is None and device.type == "cuda":
        capability = cuda_capability(device.index)
    return make_plan(
        n, d, h, dtype, device.type, device.index, capability, f, g, grad, grad_x, recompute,
        fp32_precision(device.type), torch.get_num_threads(), allow_atomics(), settings.current(),
    )  # fmt: skip


def fused_output(g: Activation, grad: bool) -> Activation:
    """What the op applies to the pre-output: g in inference, if the kernels have it; else the identity, g following."""
    return IDENTITY if grad or g.triton is None else g


def fp32_precision(device_type: str) -> str:
    """``"tf32"`` where PyTorch may round fp32 products on that device to it, else ``"ieee"``.

    Read from the backend's own setting: `torch.get_float32_matmul_precision` raises once a user has set that one.
    """
    return "tf32" if device_type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def allow_atomics() -> bool:
    """Whether x̄ may be added with atomics: asked for, and determinism not asked for."""
    return settings.current().atomics and not torch.are_deterministic_algorithms_enabled()


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@torch.compiler.assume_constant_result
def cuda_capability(index: int | None) -> int:
    """Compute capability as one integer (90 for 9.0) of a CUDA device; where there is none, `DEFAULT_CAPABILITY`."""
    if not torch.cuda.is_available():
        return DEFAULT_CAPABILITY
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def why_not_triton(
    d: int,
    dtype: torch.dtype,
    device_type: str,
    capability: int | None,
    f: Activation,
    keep_latent: bool,
) -> str | None:
    """Why the Triton kernels do not serve a problem, or None if they do."""
    if settings.current().backend == "tiled":
        return "TIEDFUSED_BACKEND is tiled"
    if device_type != "cuda" and not (device_type == "cpu" and interpreting()):
        return f"its kernels need a CUDA device, the tensors are on {device_type}"
    if torch.version.hip is not None:
        return "its kernels have not been tried on ROCm"
    if not HAS_TRITON:
        return "Triton is not installed"
    if capability is not None and capability < TRITON_MIN_CAPABILITY:
        return f"compute capability {capability / 10} is below {TRITON_MIN_CAPABILITY / 10}"
    if dtype not in TRITON_DTYPES:
        return f"its kernels take bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if d > TRITON_MAX_D:
        return f"d {d} is above {TRITON_MAX_D}: a row tile and its accumulator no longer fit on chip"
    if f.triton is None:
        return f"activation {f.name!r} was registered without Triton functions"
    if keep_latent:
        return "its kernels recompute the latent, and recompute=False asks to keep it"
    return None


def keeps_latent(
    n: int,
    d: int,
    h: int,
    dtype: torch.dtype,
    triton_serves: bool,
    recompute: bool | None,
    known: Callable[[bool], bool] = bool,
) -> bool:
    """Whether a training step keeps the latent from forward to backward; `known` decides where sizes are symbolic."""
    in_force = settings.current()
    recompute = in_force.recompute if recompute is None else recompute
    if recompute is not None:
        return not recompute
    if triton_serves:
        return False
    latent_bytes = n * h * dtype.itemsize
    # one tile's worth costs nothing to keep, and saves the host time of a product on tiny problems
    cheap = known(d >= KEEP_LATENT_MIN_D) or known(latent_bytes <= CPU_TILE_BYTES)
    return cheap and known(latent_bytes <= in_force.workspace_bytes)


@functools.lru_cache(maxsize=4096)
def make_plan(
    n: int,
    d: int,
    h: int,
    dtype: torch.dtype,
    device_type: str,
    device_index: int | None,
    capability: int | None,
    f: Activation,
    g: Activation,
    grad: bool,
    grad_x: bool,
    recompute: bool | None,
    precision: str,
    threads: int,
    atomics: bool,
    in_force: settings.Settings,
) -> Plan:
    """`plan` for the op: checked arguments, and everything the answer depends on among them, so that it is cached."""
    known = max((c for c in GPUS if c <= (capability or DEFAULT_CAPABILITY)), default=min(GPUS))
    itemsize = dtype.itemsize
    asked_to_keep = grad and (in_force.recompute if recompute is None else recompute) is False
    not_taken: tuple[tuple[str, str], ...] = ()
    passes: tuple[Pass, ...] = ()
    refusal = why_not_triton(d, dtype, device_type, capability, f, asked_to_keep)
    if n == 0:
        refusal = "there are no rows: y is empty, gradients are zero"
    if refusal is None:
        kernels = ["forward"]
        if grad:
            kernels += ["weight_grad_atomic"] if grad_x and atomics else ["weight_grad"] + ["input_grad"] * grad_x
        multiprocessors = GPUS[known].multiprocessors
        if torch.cuda.is_available() and device_type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device_index).multi_processor_count
        with_atomics = "weight_grad_atomic" in kernels
        try:
            passes = tuple(_triton_pass(kernel, n, d, h, dtype, known, multiprocessors) for kernel in kernels)
        except ValueError as error:
            if with_atomics:  # the one pass needs more room on chip than the two
                return make_plan(
                    n, d, h, dtype, device_type, device_index, capability, f, g, grad, grad_x, recompute,
                    precision, threads, False, in_force,
                )  # fmt: skip
            refusal = str(error)
    save_latent = grad and keeps_latent(n, d, h, dtype, refusal is None, recompute)

    if refusal is None:
        peak = GPUS[known]
        regime, backend = "stream-H", "triton"
        reason = f"d {d} ≤ {TRITON_MAX_D}: a row tile stays on chip, the weight streams past once"
        if grad and grad_x and not atomics:
            not_taken = (
                ("one pass with atomics", "10 instead of 14 NdH executed, but not reproducible; not measured"),
            )
    else:
        peak = _cpu(threads) if device_type == "cpu" else GPUS[known]
        regime = backend = "tiled"
        passes = _tiled_passes(n, d, h, dtype, device_type, grad, grad_x, save_latent)
        reason = _memory_reason(n, d, h, itemsize, grad, save_latent, recompute, in_force)
        not_taken = (("triton", refusal),)

    tf32 = precision == "tf32" and device_type == "cuda"
    rate = peak.half if itemsize == 2 else peak.tf32 if tf32 else peak.fp32
    return Plan(
        n=n,
        d=d,
        h=h,
        dtype=dtype,
        device=device_type,
        activation=f,
        output_activation=g,
        regime=regime,
        backend=backend,
        precision=precision,
        passes=passes,
        save_latent=save_latent,
        saved_bytes=n * h * itemsize if save_latent else 0,
        deterministic=all(p.kernel != "weight_grad_atomic" for p in passes),
        roofline_ms=1e3 * sum(max(p.flops / rate, p.bytes_moved / peak.bandwidth) for p in passes),
        reason=reason,
        not_taken=not_taken,
    )


def _triton_pass(
    kernel: str, n: int, d: int, h: int, dtype: torch.dtype, capability: int, multiprocessors: int
) -> Pass:
    """One Triton kernel's tile, split and cost. Raises ValueError if no tile fits."""
    tile, source = tiles.lookup(kernel, d, str(dtype).removeprefix("torch."), capability)
    x, w = n * d * dtype.itemsize, h * d * dtype.itemsize
    # products of 2NdH each, and what is read (ō beside x in a backward pass) and written
    products, bytes_moved = {
        "forward": (2, x + w + x),
        "input_grad": (3, 2 * x + w + x),
        "weight_grad": (4, 2 * x + w + w),
        "weight_grad_atomic": (5, 2 * x + w + w + x),
    }[kernel]
    # x̄ is added up in fp32
    workspace = n * d * 4 if kernel == "weight_grad_atomic" else 0
    fixed, streamed = (n, tile.block_n), (h, tile.block_h)
    if kernel.startswith("weight_grad"):
        fixed, streamed = streamed, fixed
    split = _split(math.ceil(fixed[0] / fixed[1]), math.ceil(streamed[0] / streamed[1]), multiprocessors)
    if split > 1:  # every part writes its [fixed, d] result in fp32, and they are combined
        parts = split * fixed[0] * d * 4
        workspace, bytes_moved = workspace + parts, bytes_moved + 2 * parts
    return Pass(kernel, tile, source, split, 2 * products * n * d * h, bytes_moved, workspace)


def _tiled_passes(
    n: int, d: int, h: int, dtype: torch.dtype, device_type: str, grad: bool, grad_x: bool, save_latent: bool
) -> tuple[Pass, ...]:
    """The tiled backend's sweeps: forward, and one backward for all gradients."""
    tile = _torch_tile(n, d, h, dtype, device_type, save_latent)
    itemsize = dtype.itemsize
    x, w, saved = n * d * itemsize, h * d * itemsize, n * h * itemsize if save_latent else 0
    latent_tile = min(tile.block_n, n) * min(tile.block_h, h) * itemsize
    sums = max(itemsize, 4)
    forward = Pass("forward", tile, "default", 1, 4 * n * d * h, 2 * x + w + saved, 2 * latent_tile)
    if not grad:
        return (forward,)
    products = 3 + (not save_latent) + grad_x
    workspace = 4 * latent_tile + min(tile.block_h, h) * d * sums
    workspace += 2 * min(tile.block_n, n) * d * itemsize + n * d * sums * (grad_x and itemsize < sums)
    bytes_moved = 2 * x + 2 * w + x * grad_x + saved
    return forward, Pass("backward", tile, "default", 1, 2 * products * n * d * h, bytes_moved, workspace)


def _memory_reason(
    n: int,
    d: int,
    h: int,
    itemsize: int,
    grad: bool,
    save_latent: bool,
    recompute: bool | None,
    in_force: settings.Settings,
) -> str:
    if not grad:
        return "tiles of the latent stay in cache; nothing is kept without gradients"
    if recompute is not None or in_force.recompute is not None:
        return f"recompute={not save_latent} was asked for"
    if save_latent:
        return "the latent fits the workspace budget, and reading it is cheaper than recomputing it"
    if d < KEEP_LATENT_MIN_D:
        return f"d {d} < {KEEP_LATENT_MIN_D}: recomputing a tile of the latent is cheaper than storing it"
    budget = _mib(in_force.workspace_bytes)
    return f"the latent, {_mib(n * h * itemsize)}, exceeds the workspace budget of {budget}: it is recomputed"


def _split(blocks: int, streamed_blocks: int, multiprocessors: int) -> int:
    """Parts of the streamed dimension, so that a grid of few blocks fills the GPU; at least 4 tiles a part."""
    if blocks >= multiprocessors:
        return 1
    return max(1, min(multiprocessors // blocks, streamed_blocks // 4))


def _torch_tile(n: int, d: int, h: int, dtype: torch.dtype, device_type: str, save_latent: bool) -> TorchTile:
    if device_type != "cpu":
        return TorchTile(_even(n, GPU_TILE_N), _even(h, GPU_TILE_H), "blas")
    onednn = dtype in (torch.float32, torch.bfloat16) and n * d * h > ONEDNN_MIN_WORK and onednn_missing() is None
    large = save_latent and dtype.itemsize == 2 and d >= KEEP_LATENT_MIN_D
    rows = (CPU_KEPT_HALF_TILE_BYTES if large else CPU_TILE_BYTES) // (CPU_TILE_H * dtype.itemsize)
    return TorchTile(_even(n, rows), _even(h, CPU_TILE_H), "onednn" if onednn else "blas")


def _even(size: int, block: int) -> int:
    """At most `block`, a multiple of 16, and such that the blocks of `size` are of nearly the same size."""
    blocks = max(1, math.ceil(size / block))
    return max(1, size if blocks == 1 else 16 * math.ceil(size / blocks / 16))


@functools.cache
def onednn_missing() -> str | None:
    """Why the products on the CPU do not go to oneDNN, or None if they do.

    On AVX-512 CPUs the fp32 products of oneDNN reach twice the rate of the BLAS that PyTorch calls by default where
    that BLAS does not use AVX-512 (an EPYC with MKL: 450 against 210 GFLOP/s on 2 cores); elsewhere it is not measured.
    """
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch does not expose oneDNN's linear"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the CPU has no AVX-512"
    return None


def _cpu(threads: int) -> Device:
    fp32 = CPU_FLOP_PER_CYCLE.get(torch.backends.cpu.get_cpu_capability(), 16) * 3e9 * threads
    return Device(half=2 * fp32, tf32=fp32, fp32=fp32, bandwidth=20e9 * threads, multiprocessors=0)
