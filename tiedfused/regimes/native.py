"""native: few rows of x through the native ops of csrc/. Each row of W is read from memory once. Inference only.

A thread of the CPU, or a block of the GPU, takes a range of W's rows, a block of rows at a time: the block's latents
for every row of x, then, with the block still at hand, its part of y. The parts are added up in a fixed order.

Executed: the 2 products of 2NdH.
"""

from __future__ import annotations

import torch

from tiedfused import devices
from tiedfused.extension import EXTENSION, MAX_ROWS
from tiedfused.regimes.common import NativeTile, Part, Pass, Request, kernel_ms
from tiedfused.regimes.tiled import CPU_TILE_H
from tiedfused.tiles import ARCHITECTURES

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.bfloat16, torch.float16)
EFFICIENCY = 0.8
# Where tiled, which then has nothing to add up, can be faster in fp32: ms of native and tiled on 2 threads of an EPYC
# (Zen 5) at (64, 768, 768) 0.47 and 0.44, but in bf16 0.26 and 0.30; with 32 rows of (1024, 1024) 0.41 and 0.57, and at
# (64, 256, 256) 0.082 and 0.097.
MAX_ROWS_OF_ONE_TILE = 32
ONE_TILE_MIN_D = 512
# Four floats a register: at (N, 768, 24576) in fp32 3.2, 8.0, 8.9, 15 and 29 ms for N 1, 4, 8, 16 and 32 there; eager
# on BLAS took 7.5, 14, 15, 18 and 26.
PORTABLE_MAX_ROWS = 8


# csrc/cuda/few_rows.cu: columns of W in a slot, and shared memory of a slot and for each 8 rows of x
CUDA_CHUNK_D = 512
CUDA_SLOT_BYTES = 16656
CUDA_GROUP_BYTES = 4544


def why_not(r: Request) -> str | None:
    """Why the native ops do not serve a request, or None if they do."""
    if r.device_type not in ("cpu", "cuda"):
        return f"there are native ops for the CPU and for CUDA devices, the tensors are on {r.device_type}"
    if r.grad:
        return "the native ops have no backward"
    if r.n == 0:
        return "there are no rows: y is empty"
    if r.n > MAX_ROWS:
        return f"N {r.n} is above {MAX_ROWS}: arithmetic counts beside reading W"
    if (missing := EXTENSION.why_not) is not None:
        return missing
    if not {r.f.name, r.g.name} <= set(EXTENSION.activations):
        unknown = r.f.name if r.f.name not in EXTENSION.activations else r.g.name
        return f"the native ops do not have activation {unknown!r}"
    dtypes = CPU_DTYPES if r.device_type == "cpu" else CUDA_DTYPES
    if r.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"the native op takes {names}, not {r.dtype_name}"
    if r.device_type == "cpu":
        if devices.interpreting():
            return "Triton's interpreter stands in for a GPU"
        return _slower(r) if r.in_force.regime != "native" else None
    if r.in_force.regime != "native":
        return "its CUDA kernels have not been measured; TIEDFUSED_REGIME=native asks for them"
    if not EXTENSION.cuda:
        return "the native CUDA op was not built" + (f": {EXTENSION.note}" if EXTENSION.note else "")
    if r.gpu not in {int(arch.rstrip("af")) for arch in EXTENSION.cuda}:
        return f"its CUDA kernels were built for {', '.join(EXTENSION.cuda)}, not for compute capability {r.gpu / 10}"
    chunks, groups = -(-r.d // CUDA_CHUNK_D), -(-r.n // 8)
    if r.d % 8 != 0 or _power_of_two(chunks) * _power_of_two(groups) > 8:
        return f"its CUDA kernels do not keep {r.n} rows of {r.d} in registers"
    if chunks * CUDA_SLOT_BYTES + _power_of_two(groups) * CUDA_GROUP_BYTES > ARCHITECTURES[r.gpu].shared_bytes:
        return f"its CUDA kernels do not keep 16 rows of W of {r.d} in this GPU's shared memory"
    return None


def _slower(r: Request) -> str | None:
    """Why the tiled regime is faster on the CPU, or None if it is not; in float16 it never is, by 10 times and more.

    Nor where host time is all there is: µs of native and tiled at (1, 8, 16) 5.7 and 8.9 in fp32, 5.8 and 10 in bf16,
    at (1, 256, 256) 10 and 15, in bf16 9 and 49.
    """
    if r.dtype == torch.float16:
        return None
    if EXTENSION.cpu == "portable" and r.n > PORTABLE_MAX_ROWS:
        return f"N {r.n} is above {PORTABLE_MAX_ROWS}: its build for any CPU is slower than PyTorch's products"
    # Beyond that every block of W streams both past: at d 16384, H 4096 in fp32, native takes 12.8 ms for 8 rows and 41
    # for 16, tiled 25 and 31; in bf16 6.0 and 20, tiled 16 and 18.
    if r.n * r.d * (r.itemsize + 4) > r.device.l2_bytes // r.threads:
        return f"{r.n} rows of {r.d} and their sums do not fit a core's L2 cache beside W"
    one_tile = r.n > MAX_ROWS_OF_ONE_TILE and r.d > ONE_TILE_MIN_D and r.h <= CPU_TILE_H
    if one_tile and r.dtype == torch.float32:
        return f"the latent of H {r.h} is one tile: plain products do with nothing to add up"
    return None


def _power_of_two(n: int) -> int:
    """The next one, as the CUDA kernels' instances have them."""
    return 1 << (n - 1).bit_length()


def forward(r: Request, keep: bool) -> Part | str:
    """The whole layer in one call."""
    if (refusal := why_not(r)) is not None:
        return refusal
    on_cpu = r.device_type == "cpu"
    x, w = r.n * r.d * r.itemsize, r.h * r.d * r.itemsize
    parts = torch.ops.tiedfused.few_rows_parts(r.n, r.d, r.h, r.threads) if on_cpu else r.multiprocessors
    stats = 12 * (r.n + r.h) if r.stats else 0  # fp32 and int64
    sums = parts * r.n * (r.d * 4 + ((12 if on_cpu else 8) if r.stats else 0))
    # on the CPU beside the sums a copy of x and a row of zeros, in rows that are padded
    workspace = torch.ops.tiedfused.few_rows_workspace(r.n, r.d, r.stats, parts) if on_cpu else sums
    flops = 4 * r.ndh
    predicted = kernel_ms(r, flops=flops, efficiency=EFFICIENCY, memory_bytes=2 * x + w + stats)
    tile = NativeTile(EXTENSION.cpu if on_cpu else "cuda")
    one = Pass("few_rows", tile, "default", parts, flops, 2 * x + w + stats + 2 * sums, workspace, predicted)
    return Part("native", "native", (one,), f"N {r.n} ≤ {MAX_ROWS}: every row of W is read once, for both products")


def backward(r: Request, keep: bool) -> str:
    """There is none."""
    return "the native ops have no backward"
