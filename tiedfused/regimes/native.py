"""native: few rows of x through the native ops of csrc/. Each row of W is read from memory once. Inference only.

A thread of the CPU, or a block of the GPU, takes a range of W's rows, a block of rows at a time: the block's latents for
every row of x, then, with the block still at hand, its part of y. The parts are added up in a fixed order.

Executed: the 2 products of 2NdH.
"""

from __future__ import annotations

import torch

from tiedfused import devices
from tiedfused.extension import EXTENSION, MAX_ROWS
from tiedfused.regimes.common import NativeTile, Part, Pass, Request, kernel_ms

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.bfloat16, torch.float16)
EFFICIENCY = 0.8


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
        return "Triton's interpreter stands in for a GPU" if devices.interpreting() else None
    if r.in_force.regime != "native":
        return "its CUDA kernels have not been measured; TIEDFUSED_REGIME=native asks for them"
    if not EXTENSION.cuda:
        return "the native CUDA op was not built" + (f": {EXTENSION.note}" if EXTENSION.note else "")
    if r.d % 8 != 0 or -(-r.n // 8) * _chunks(r.d) > 8:
        return f"its CUDA kernels do not keep {r.n} rows of {r.d} in registers"
    return None


def _chunks(d: int) -> int:
    """Of 512 columns, as the CUDA kernels' instances have them: 1, 2, 4, 8, 16, …"""
    return 1 << (-(-d // 512) - 1).bit_length()


def forward(r: Request, keep: bool) -> Part | str:
    """The whole layer in one call."""
    if (refusal := why_not(r)) is not None:
        return refusal
    on_cpu = r.device_type == "cpu"
    x, w = r.n * r.d * r.itemsize, r.h * r.d * r.itemsize
    parts = r.threads if on_cpu else r.multiprocessors
    sums = parts * r.n * r.d * 4
    workspace = sums + (r.n + 1) * r.d * 4 if on_cpu else sums
    flops = 4 * r.ndh
    predicted = kernel_ms(r, flops=flops, efficiency=EFFICIENCY, memory_bytes=2 * x + w)
    tile = NativeTile(EXTENSION.cpu if on_cpu else "cuda")
    one = Pass("few_rows", tile, "default", parts, flops, 2 * x + w + 2 * sums, workspace, predicted)
    return Part("native", "native", (one,), f"N {r.n} ≤ {MAX_ROWS}: every row of W is read once, for both products")


def backward(r: Request, keep: bool) -> str:
    """There is none."""
    return "the native ops have no backward"
