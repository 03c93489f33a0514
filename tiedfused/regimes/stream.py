"""stream: a tile of rows and its result stay on chip, the weight streams past once. d up to 512.

Executed, in products of 2NdH FLOPs: forward 2; W̄ and b̄_enc 4, one accumulator for both terms; x̄ 3 in a pass of its
own. With atomics on x̄ one pass of 5 does all of the backward. Nothing of size N·H exists in memory.
"""

from __future__ import annotations

import dataclasses
import math

from tiedfused import tiles
from tiedfused.regimes.common import (
    L2_SHARE,
    STATS_LAUNCHES,
    Part,
    Pass,
    Request,
    efficiency,
    kernel_ms,
    lookup,
    split,
    stats_bytes,
    why_not_triton,
)
from tiedfused.tiles import Tile

MAX_D = 512
# Of 2NdH FLOPs each: those with Wᵀ, and those that add to the result.
PRODUCTS = {"forward": (1, 1), "input_grad": (2, 1), "weight_grad": (2, 2), "weight_grad_atomic": (2, 3)}
# The fraction of the peak that each kernel is expected to reach where d is at least this: published rates of kernels
# of the kind on an H100 (attention forward in Triton 0.48, its backward 0.40, both at d 128; d 512 0.40 and 0.24).
# Not measured here.
EFFICIENCY = {
    "forward": ((385, 0.40), (64, 0.50), (32, 0.40), (1, 0.25)),
    "backward": ((385, 0.25), (193, 0.36), (64, 0.40), (32, 0.30), (1, 0.20)),
}
# Of that, where what streams past is not copied ahead, see `tiles.pipelined`. Assumed.
UNPIPELINED = 0.7


def why_not(r: Request, keep: bool) -> str | None:
    """Why the regime does not apply, or None if it does."""
    if (refusal := why_not_triton(r)) is not None:
        return refusal
    if r.d > MAX_D:
        return f"d {r.d} is above {MAX_D}: a row tile and its accumulator no longer fit on chip"
    if keep:
        return "its kernels recompute the latent"
    return None


def forward(r: Request, keep: bool) -> Part | str:
    """One kernel; for the latent's statistics launched on so many rows at a time."""
    part = _part(r, keep, ("forward",))
    if isinstance(part, str) or not r.stats:
        return part
    (one,) = part.passes
    assert isinstance(one.tile, Tile)
    return dataclasses.replace(part, chunk=(min(r.n, _tiles_at_once(r, one.tile, one.split) * one.tile.block_n), r.h))


def _tiles_at_once(r: Request, tile: Tile, parts: int) -> int:
    """How many tiles of rows a launch with statistics takes. Raises ValueError if there is no room for those of one.

    A program sees the rows of its tile only: what is summed over all rows is written for every row tile, and added up
    after the launch: 6 bytes a latent for 4 · BLOCK_N · d FLOPs. A pass of its own, with W stationary, would need no
    such sums, and execute half of the forward's FLOPs again. Two tiles for each multiprocessor fill the GPU; more in a
    launch would only take more memory. Fewer than all are as many for each, unless there is no room for one for each.
    """
    room = r.in_force.workspace_bytes // 2 // stats_bytes(r, tile.block_n, r.h, parts, 1)
    if room == 0:
        raise ValueError(f"the statistics' sums of {r.h} latents for one tile of rows do not fit the workspace")
    row_tiles = math.ceil(r.n / tile.block_n)
    at_once = min(row_tiles, 2 * r.multiprocessors, room)
    return at_once if at_once == row_tiles else at_once // r.multiprocessors * r.multiprocessors or at_once


def backward(r: Request, keep: bool) -> Part | str:
    """W̄ and x̄ in a pass each, or in one with atomics where those are allowed and fit."""
    if not r.grad_x:
        return _part(r, keep, ("weight_grad",))
    one_pass = _part(r, keep, ("weight_grad_atomic",)) if r.atomics else "atomics are not allowed"
    return _part(r, keep, ("weight_grad", "input_grad")) if isinstance(one_pass, str) else one_pass


def _part(r: Request, keep: bool, kernels: tuple[str, ...]) -> Part | str:
    if (refusal := why_not(r, keep)) is not None:
        return refusal
    try:
        passes = tuple(_pass(r, kernel) for kernel in kernels)
    except ValueError as error:
        return str(error)
    return Part(
        "stream",
        "triton",
        passes,
        f"d {r.d} ≤ {MAX_D}: a row tile stays on chip, the weight streams past once",
        deterministic="weight_grad_atomic" not in kernels,
    )


def _pass(r: Request, kernel: str) -> Pass:
    """One kernel's tile, split and cost. Raises ValueError if no tile fits."""
    tile, source = lookup(r, kernel)
    assert isinstance(tile, Tile)
    x, w = r.n * r.d * r.itemsize, r.h * r.d * r.itemsize
    # what is read (ō beside x in a backward pass) and written
    bytes_moved = {
        "forward": x + w + x,
        "input_grad": 2 * x + w + x,
        "weight_grad": 2 * x + w + w,
        "weight_grad_atomic": 2 * x + w + w + x,
    }[kernel]
    # x̄ is added up in fp32
    workspace = r.n * r.d * 4 if kernel == "weight_grad_atomic" else 0
    fixed, streamed = (r.n, tile.block_n), (r.h, tile.block_h)
    if kernel.startswith("weight_grad"):
        fixed, streamed = streamed, fixed
    blocks = math.ceil(fixed[0] / fixed[1])
    parts = split(blocks, math.ceil(streamed[0] / streamed[1]), r.multiprocessors)
    # shared memory through which specialised warps store has no room for fp32, and in their loop Triton 3.6 fails to
    # compile the statistics' and penalties' loads and stores by pointer
    if parts > 1 or r.stats:
        tile = tile.plain()
    if parts > 1:  # every part writes its [fixed, d] result in fp32, and they are combined
        sums = parts * fixed[0] * r.d * 4
        workspace, bytes_moved = workspace + sums, bytes_moved + 2 * sums
    launches, at_once, stats_of_all, stats_at_once = 1 + (parts > 1), blocks, 0, 0
    if kernel == "forward" and r.stats:
        at_once = _tiles_at_once(r, tile, parts)
        launches = math.ceil(blocks / at_once) * (launches + STATS_LAUNCHES)
        stats_of_all = stats_bytes(r, r.n, r.h, parts, blocks)
        stats_at_once = stats_bytes(r, min(r.n, at_once * tile.block_n), r.h, parts, at_once)
    # the padding to whole tiles, here of d and below of a few rows, is work like any other, and so is what warps repeat
    times = tiles.repeats(kernel, tile, tiles.block_d(r.d), r.operands, r.gpu)
    products = sum(count * repeated for count, repeated in zip(PRODUCTS[kernel], times, strict=True))
    flops = int(2 * products * r.n * sum(tiles.block_d(r.d)) * r.h)
    assumed = next(e for least, e in EFFICIENCY["forward" if kernel == "forward" else "backward"] if r.d >= least)
    assumed *= 1 if tiles.pipelined(kernel, tile, r.operands, r.gpu) else UNPIPELINED
    predicted = kernel_ms(
        r,
        flops=flops * (blocks * fixed[1] / fixed[0]),
        efficiency=efficiency(r, kernel, assumed),
        memory_bytes=bytes_moved,
        exposed_seconds=2 * stats_of_all / r.device.cached_bandwidth(stats_at_once <= r.device.l2_bytes * L2_SHARE),
        blocks=(at_once if at_once % r.multiprocessors else blocks) * parts,
        launches=launches,
    )
    bytes_moved, workspace = bytes_moved + 2 * stats_of_all, workspace + stats_at_once
    return Pass(kernel, tile, source, parts, flops, bytes_moved, workspace, predicted)
