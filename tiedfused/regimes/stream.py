"""stream: a tile of rows and its result stay on chip, the weight streams past once. d up to 512.

Executed, in products of 2NdH FLOPs: forward 2; W̄ and b̄_enc 4, one accumulator for both terms; x̄ 3 in a pass of its
own. With atomics on x̄ one pass of 5 does all of the backward. Nothing of size N·H exists in memory.
"""

from __future__ import annotations

import dataclasses
import math

from tiedfused import tiles
from tiedfused.regimes.common import Part, Pass, Request, efficiency, kernel_ms, split, why_not_triton
from tiedfused.tiles import Tile

MAX_D = 512
STATS_BYTES = 6  # of a latent and row tile
# The fraction of the peak that each kernel is expected to reach where d is at least this: published rates of kernels
# of the kind on an H100 (attention forward in Triton 0.48, its backward 0.40, both at d 128; d 512 0.40 and 0.24).
# Not measured here.
EFFICIENCY = {
    "forward": ((385, 0.40), (64, 0.50), (32, 0.40), (1, 0.25)),
    "backward": ((385, 0.25), (193, 0.36), (64, 0.40), (32, 0.30), (1, 0.20)),
}


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
    # A program sees the rows of its tile only: what is summed over all rows is written for every row tile, an fp32 sum
    # and a 16-bit count of each latent, and added up after the launch: 6 bytes for 4 · BLOCK_N · d FLOPs. A pass of its
    # own, with W stationary, would need no such sums, and execute half of the forward's FLOPs again. Two tiles for each
    # multiprocessor fill the GPU; more in a launch would only take more memory.
    one = part.passes[0]
    tile = one.tile
    assert isinstance(tile, Tile)
    tiles_in_all, of_a_tile = math.ceil(r.n / tile.block_n), STATS_BYTES * r.h
    at_once = min(tiles_in_all, 2 * r.multiprocessors, r.in_force.workspace_bytes // 2 // of_a_tile)
    if at_once == 0:
        return f"the statistics' sums of {r.h} latents for one tile of rows do not fit the workspace"
    one = dataclasses.replace(
        one,
        workspace_bytes=one.workspace_bytes + at_once * of_a_tile,
        bytes_moved=one.bytes_moved + 2 * tiles_in_all * of_a_tile,
    )
    return dataclasses.replace(part, passes=(one,), chunk=(min(r.n, at_once * tile.block_n), r.h))


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
    tile, source = tiles.lookup(kernel, r.d, r.dtype_name, r.gpu)
    assert isinstance(tile, Tile)
    x, w = r.n * r.d * r.itemsize, r.h * r.d * r.itemsize
    # products of 2NdH each, and what is read (ō beside x in a backward pass) and written
    products, bytes_moved = {
        "forward": (2, x + w + x),
        "input_grad": (3, 2 * x + w + x),
        "weight_grad": (4, 2 * x + w + w),
        "weight_grad_atomic": (5, 2 * x + w + w + x),
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
    # the padding to whole tiles, here of d and below of a few rows, is work like any other
    flops = 2 * products * r.n * sum(tiles.block_d(r.d)) * r.h
    assumed = next(e for least, e in EFFICIENCY["forward" if kernel == "forward" else "backward"] if r.d >= least)
    predicted = kernel_ms(
        r,
        flops=flops * (blocks * fixed[1] / fixed[0]),
        efficiency=efficiency(r, kernel, assumed),
        memory_bytes=bytes_moved,
        blocks=blocks * parts,
        launches=1 + (parts > 1),
    )
    return Pass(kernel, tile, source, parts, flops, bytes_moved, workspace, predicted)
