"""tiled: tiles of plain PyTorch. Every device, every dtype, every size; what all else falls back to.

Executed, in products of 2NdH FLOPs: forward 2; backward 3 for W̄ (h̄ and two terms), 1 more for x̄ and 1 to recompute the
latent where it is not kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tiedfused import devices
from tiedfused.regimes.common import Part, Pass, Request, TorchTile, kernel_ms
from tiedfused.settings import MIB

# A tile of the latent is written and read back at once, so it should stay in the L2 cache: of 256…2048 rows × 512…2048
# latents, d 64…784, 512 × 1024 in fp32 and 1024 × 1024 in bf16, both 2 MiB, were the fastest or within 3% of it, on a
# 2-core EPYC (Zen 5) with 2 MiB of L2 in all.
CPU_TILE_H = 1024
CPU_TILE_BYTES = 2 * MIB
# In 16 bits every tile's parts of y, x̄ and W̄ are widened and added in fp32: with products this wide, and where the
# latent is kept and memory is not what counts, large tiles are better, by 12% at (2500, 784, 1024) and 4% at
# (4096, 768, 6144).
CPU_KEPT_HALF_TILE_H = 1536
CPU_KEPT_HALF_TILE_BYTES = 8 * MIB
# The same thought for a GPU whose L2 holds 40 MB or more; not measured.
GPU_TILE_H = 2048
GPU_TILE_BYTES = 16 * MIB
# From here on reading the kept latent is cheaper than the product that recomputes it: on the CPU above, fp32, keeping
# is 40% slower at d 64, 10% at d 128, even at d 256 and 12% faster at d 768.
KEEP_LATENT_MIN_D = 512
# Below this many multiply-adds a call is bound by its host cost, where BLAS is 9 µs cheaper than oneDNN.
ONEDNN_MIN_WORK = 1 << 20
# What the BLAS of a GPU reaches of the peak: published for cuBLAS in bf16 on an H100, 588 to 700 of 989 TFLOP/s.
EFFICIENCY = 0.66


def forward(r: Request, keep: bool) -> Part:
    """One sweep over the tiles."""
    tile = _tile(r, keep)
    x, w, saved = r.n * r.d * r.itemsize, r.h * r.d * r.itemsize, r.latent_bytes if keep else 0
    rows = min(tile.block_n, r.n) * r.d
    bytes_moved = 2 * x + 2 * w + saved
    workspace = 2 * _latent_tile(r, tile)
    if not _is_one(r, tile):
        workspace += rows * (_sum_bytes(r) * (r.itemsize < 4) + r.itemsize)
    if r.stats:  # they widen the tile, and make one more of it
        workspace += (1 + (r.itemsize < 4)) * _latent_tile(r, tile) // r.itemsize * _sum_bytes(r)
    # the first product writes, f reads and writes, the second product reads; keeping is a copy
    trips = (6 if keep else 4) + 8 * r.stats  # of the statistics two copies and four sums
    one = _pass(
        r, tile, "forward", 2, bytes_moved, workspace, latent_trips=trips, sums=r.n * math.ceil(r.h / tile.block_h)
    )
    return Part("tiled", "tiled", (one,), _reason(r, keep))


def backward(r: Request, keep: bool) -> Part:
    """One sweep for all gradients; two where the fp32 sum of all of x̄ would exceed the workspace."""
    tile = _tile(r, keep)
    x, w, saved = r.n * r.d * r.itemsize, r.h * r.d * r.itemsize, r.latent_bytes if keep else 0
    products, trips = (1, 5) if keep else (2, 8)  # h̄, and h where it is recomputed
    trips += 5 * r.stats  # a penalty's term: the sign reads and writes, its sum reads two and writes
    workspace = (4 + r.stats) * _latent_tile(r, tile)
    if _is_one(r, tile):
        workspace += w
    else:
        workspace += min(tile.block_h, r.h) * r.d * (_sum_bytes(r) + r.itemsize)
        workspace += 2 * min(tile.block_n, r.n) * r.d * r.itemsize
    sum_x = r.n * r.d * _sum_bytes(r) if r.grad_x and r.itemsize < 4 and tile.block_h < r.h else 0
    sums_x, sums_w = r.n * math.ceil(r.h / tile.block_h), 2 * r.h * math.ceil(r.n / tile.block_n)
    weight = _pass(r, tile, "weight_grad", products + 2, 2 * x + 2 * w + saved, workspace, trips, sums_w)
    if not r.grad_x:
        return Part("tiled", "tiled", (weight,), _reason(r, keep))
    if sum_x and workspace + sum_x > r.in_force.workspace_bytes:
        alone = _pass(r, tile, "input_grad", products + 1, 3 * x + w + saved, workspace, trips, sums_x)
        return Part("tiled", "tiled", (alone, weight), _reason(r, keep))
    joint = _pass(r, tile, "backward", products + 3, 3 * x + 2 * w + saved, workspace + sum_x, trips, sums_x + sums_w)
    return Part("tiled", "tiled", (joint,), _reason(r, keep))


def keeps_latent(
    n: int, h: int, d: int, dtype: torch.dtype, most_bytes: int, known: Callable[[bool], bool] = bool
) -> bool:
    """Whether the CPU keeps the latent of a training step, of `most_bytes`. `known` decides for symbolic sizes."""
    latent_bytes = n * h * dtype.itemsize
    # one tile's worth costs nothing to keep, and saves the host time of a product on tiny problems
    cheap = known(d >= KEEP_LATENT_MIN_D) or known(latent_bytes <= CPU_TILE_BYTES)
    return cheap and known(latent_bytes <= most_bytes)


def _pass(
    r: Request,
    tile: TorchTile,
    kernel: str,
    products: int,
    bytes_moved: int,
    workspace: int,
    latent_trips: int,
    sums: int,
) -> Pass:
    """One sweep. Its elementwise operations pass over the latent `latent_trips` times, and it adds `sums` rows of d
    elements to sums: each is written as a part, read, and added to what is read and written.
    """
    flops = 2 * products * r.ndh
    tiles = math.ceil(r.n / tile.block_n) * math.ceil(r.h / tile.block_h)
    traffic = latent_trips * r.latent_bytes
    in_cache = 2 * _latent_tile(r, tile) <= r.device.l2_bytes
    bytes_of_sums = sums * r.d * 2 * (r.itemsize + _sum_bytes(r)) if tiles > 1 else 0
    predicted = kernel_ms(
        r,
        flops=flops,
        efficiency=EFFICIENCY,
        memory_bytes=bytes_moved,
        exposed_seconds=bytes_of_sums / r.device.bandwidth + traffic / r.device.cached_bandwidth(in_cache),
        launches=tiles * (products + latent_trips),
    )
    bytes_moved += bytes_of_sums + traffic * (not in_cache)
    return Pass(kernel, tile, "default", 1, flops, bytes_moved, workspace, predicted)


def _fits_one_tile(r: Request) -> bool:
    """Whether on a CPU the whole latent should be one tile, and the buffers for it fit the workspace.

    A latent no wider than x takes no more memory than x, which is there anyway: tiles would save next to nothing, and
    sums over them cost. (4096, 784, 64) in bf16 on the CPU above takes 1.6 times as long in four tiles, its step 1.3.
    """
    if r.asked_recompute and r.latent_bytes > CPU_TILE_BYTES:  # memory is what counts
        return False
    workspace = r.in_force.workspace_bytes
    return r.h <= min(r.d, CPU_TILE_H) and r.latent_bytes <= workspace // 8 and r.h * r.d * r.itemsize <= workspace // 4


def _sum_bytes(r: Request) -> int:
    """Of an element of a sum over tiles, which is in fp32 at least."""
    return max(r.itemsize, 4)


def _latent_tile(r: Request, tile: TorchTile) -> int:
    return min(tile.block_n, r.n) * min(tile.block_h, r.h) * r.itemsize


def _is_one(r: Request, tile: TorchTile) -> bool:
    """Whether one tile holds the whole latent."""
    return r.n <= tile.block_n and r.h <= tile.block_h


def _reason(r: Request, keep: bool) -> str:
    if not r.grad:
        return "tiles of the latent stay in cache; nothing is kept without gradients"
    if r.asked_recompute is not None:
        return f"recompute={not keep} was asked for"
    if keep:
        return "the latent fits the workspace budget, and reading it is cheaper than recomputing it"
    if r.latent_bytes > r.in_force.workspace_bytes:
        budget = r.in_force.workspace_bytes / MIB
        return (
            f"the latent, {r.latent_bytes / MIB:.1f} MiB, exceeds the workspace budget of {budget:.1f} MiB: "
            "it is recomputed"
        )
    return f"recomputing a tile of the latent is cheaper than storing it at d {r.d}"


def _tile(r: Request, keep: bool) -> TorchTile:
    if r.device_type != "cpu":
        tile_bytes, most_latents, products = GPU_TILE_BYTES, GPU_TILE_H, "blas"
    else:
        large = keep and r.itemsize == 2 and r.d >= KEEP_LATENT_MIN_D
        tile_bytes = CPU_KEPT_HALF_TILE_BYTES if large else CPU_TILE_BYTES
        most_latents = CPU_KEPT_HALF_TILE_H if large else CPU_TILE_H
        fast = r.dtype in (torch.float32, torch.bfloat16) and r.ndh > ONEDNN_MIN_WORK
        products = "onednn" if fast and devices.onednn_missing() is None else "blas"
        if _fits_one_tile(r):
            return TorchTile(max(r.n, 1), r.h, products)
    # the sums of a tile's part of y and of W̄ are d wide, and may take an eighth of the workspace each
    widest = max(1, r.in_force.workspace_bytes // (128 * r.d * _sum_bytes(r))) * 16
    latents = _even(r.h, min(most_latents, widest))
    rows = tile_bytes // (latents * r.itemsize)
    return TorchTile(_even(r.n, min(rows, widest)), latents, products)


def _even(size: int, block: int) -> int:
    """At most `block`, a multiple of 16, and such that the blocks of `size` are of nearly the same size."""
    blocks = max(1, math.ceil(size / block))
    return max(1, size if blocks == 1 else 16 * math.ceil(size / blocks / 16))
