"""bottleneck: a row of the latent fits on chip whole, and d streams past. H up to 512, any d.

Executed, in products of 2NdH FLOPs: forward 2; backward 2 for a and h̄, 2 for W̄ and 1 for x̄. Up to H ≈ 300 these are
fewer FLOPs than the memory can feed: what counts is how often x, ō and y pass by.

Forward, one kernel: x is read once, y written once; W is read twice by each program, from the L2 cache. A batch of few
row tiles leaves most of the GPU idle, so it is encoded over parts of d, whose fp32 sums [parts, N, H] are combined, and
decoded over tiles of d: h [N, H] then passes through memory, 2 N·H beside the 2 N·d of x and y.

The latent's statistics: the one kernel writes what it sums over its rows, 6 bytes a latent and row tile, to be added
up. Of h in memory PyTorch's own sums take them: parts, and their sums, would be as many launches. In backward the
penalties' terms are added where ā is made: where d is in parts, when those are combined.

Backward, three kernels that hand ā and h [N, H] on, in memory that is freed at its end: (1) ā and h from x and ō,
(2) W̄, (3) x̄. A program of (2) needs ā and h of all rows; without them it would recompute both from all of d, d / 128
times 4NdH FLOPs, to save 4 N·H of the 4 N·d + 4 N·H elements that (1) and (2) move. (3) is not one kernel with (1):
that would save reading ā, N·H of the 5 N·d + 5 N·H in all, and leave most of the GPU idle where row tiles are few.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

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
from tiedfused.tiles import GemmTile, LatentTile

MAX_H = 512
# Of the peak; not measured, and of no weight where memory decides.
EFFICIENCY = 0.5
# Where the latent is in memory, PyTorch's own sums take the statistics.
STATS_OF_LATENT_LAUNCHES = 5


def why_not(r: Request, keep: bool) -> str | None:
    """Why the regime does not apply, or None if it does."""
    if (refusal := why_not_triton(r)) is not None:
        return refusal
    if r.h > MAX_H:
        return f"H {r.h} is above {MAX_H}: a row of the latent no longer fits on chip"
    if keep:
        return "its kernels recompute the latent"
    return None


def forward(r: Request, keep: bool) -> Part | str:
    """One kernel, or ``bottleneck_latent`` and ``bottleneck_decode`` where that is faster."""
    if (refusal := why_not(r, keep)) is not None:
        return refusal
    latent_bytes = r.latent_bytes
    try:
        ways = ((_fused(r),), (_latent(r, 1, latent_bytes), _decode(r, latent_bytes)))
    except ValueError as error:
        return str(error)
    return _fastest(r, ways)


def backward(r: Request, keep: bool) -> Part | str:
    """``bottleneck_latent_grad``, ``bottleneck_weight_grad`` and, where x needs a gradient, ``bottleneck_decode``."""
    if (refusal := why_not(r, keep)) is not None:
        return refusal
    held = 2 * r.latent_bytes  # ā and h
    try:
        passes = (_latent(r, 2, held), _weight_grad(r, held), *([_decode(r, held)] if r.grad_x else []))
    except ValueError as error:
        return str(error)
    return _fastest(r, (passes,))


def _fastest(r: Request, ways: tuple[tuple[Pass, ...], ...]) -> Part | str:
    reason = f"H {r.h} ≤ {MAX_H}: a row of the latent stays on chip, d streams past"
    parts = [Part("bottleneck", "triton", passes, reason) for passes in ways]
    fitting = [part for part in parts if part.workspace_bytes <= r.in_force.workspace_bytes]
    if not fitting:
        return f"it needs {min(part.workspace_bytes for part in parts)} bytes of workspace, above the limit"
    return min(fitting, key=lambda part: part.predicted_ms)


def _fused(r: Request) -> Pass:
    packaged, source = lookup(r, "bottleneck_forward")
    assert isinstance(packaged, LatentTile)
    x, w = r.n * r.d * r.itemsize, r.h * r.d * r.itemsize
    flops, bytes_moved = 4 * r.ndh, 2 * x + w

    def with_tile(tile: LatentTile, launches: int = 1 + STATS_LAUNCHES * r.stats) -> Pass:
        blocks = math.ceil(r.n / tile.block_n)
        stats = stats_bytes(r, r.n, r.h, 1, blocks)
        predicted = _ms(
            r,
            "bottleneck_forward",
            flops,
            tile.block_h,
            bytes_moved,
            blocks,
            launches=launches,
            exposed_seconds=_exposed_seconds(r, 2 * stats, stats),
            cached_bytes=2 * w * blocks,
        )
        return Pass("bottleneck_forward", tile, source, 1, flops, bytes_moved + 2 * stats, stats, predicted)

    return with_tile(min(_fewer_rows(packaged), key=lambda tile: with_tile(tile, launches=0).predicted_ms))


def _latent(r: Request, inputs: int, held: int) -> Pass:
    """h from x alone, or h and ā from x and ō (`inputs` 2)."""
    kernel = "bottleneck_latent_grad" if inputs == 2 else "bottleneck_latent"
    packaged, source = lookup(r, kernel)
    assert isinstance(packaged, LatentTile)
    x, w = r.n * r.d * r.itemsize, r.h * r.d * r.itemsize
    flops = 2 * inputs * r.ndh
    bytes_moved = inputs * (x + r.latent_bytes) + w
    # forward's statistics: h is compared with 0 and summed up twice, and the byte that says whether it is active, too
    active = r.n * r.h if r.stats and inputs == 1 else 0
    stats = 3 * (r.latent_bytes + active) if active else 0

    def with_tile(tile: LatentTile, launches: int | None = None) -> Pass:
        row_tiles, latent_tiles = math.ceil(r.n / tile.block_n), math.ceil(r.h / tile.block_h)
        blocks = row_tiles * latent_tiles
        parts = split(blocks, math.ceil(r.d / tile.block_d), r.multiprocessors)
        sums = parts * inputs * r.n * r.h * 4 if parts > 1 else 0
        predicted = _ms(
            r,
            kernel,
            flops,
            tile.block_h,
            bytes_moved,
            blocks * parts,
            launches=1 + (parts > 1) + STATS_OF_LATENT_LAUNCHES * (active > 0) if launches is None else launches,
            exposed_seconds=_exposed_seconds(r, 2 * sums, sums) + _exposed_seconds(r, stats, r.latent_bytes + active),
            cached_bytes=inputs * x * latent_tiles + w * row_tiles,
        )
        moved, workspace = bytes_moved + 2 * sums + stats, held + max(sums, active)
        return Pass(kernel, tile, source, parts, flops, moved, workspace, predicted)

    return with_tile(min(_fewer_rows(packaged), key=lambda tile: with_tile(tile, launches=0).predicted_ms))


def _weight_grad(r: Request, held: int) -> Pass:
    tile, source = lookup(r, "bottleneck_weight_grad")
    assert isinstance(tile, GemmTile)
    blocks = math.ceil(r.h / tile.block_m) * math.ceil(r.d / tile.block_n)
    parts = split(blocks, math.ceil(r.n / tile.block_k), r.multiprocessors)
    sums = parts * r.h * r.d * 4 if parts > 1 else 0
    x, w = r.n * r.d * r.itemsize, r.h * r.d * r.itemsize
    flops = 4 * r.ndh
    bytes_moved = 2 * (x + r.latent_bytes) + w
    predicted = _ms(
        r,
        "bottleneck_weight_grad",
        flops,
        tile.block_m,
        bytes_moved,
        blocks * parts,
        launches=1 + (parts > 1),
        exposed_seconds=_exposed_seconds(r, 2 * sums, sums),
    )
    return Pass("bottleneck_weight_grad", tile, source, parts, flops, bytes_moved + 2 * sums, held + sums, predicted)


def _decode(r: Request, held: int) -> Pass:
    """y from h, or x̄ from ā."""
    tile, source = lookup(r, "bottleneck_decode")
    assert isinstance(tile, GemmTile)
    blocks = math.ceil(r.n / tile.block_m) * math.ceil(r.d / tile.block_n)
    flops = 2 * r.ndh
    bytes_moved = r.n * r.d * r.itemsize + r.latent_bytes + r.h * r.d * r.itemsize
    predicted = _ms(r, "bottleneck_decode", flops, tile.block_k, bytes_moved, blocks, launches=1)
    return Pass("bottleneck_decode", tile, source, 1, flops, bytes_moved, held, predicted)


def _fewer_rows(tile: LatentTile) -> Iterator[LatentTile]:
    """The tile, and what fits as well: the same with half its rows, a quarter, … down to 16."""
    while True:
        yield tile
        if tile.block_n == 16:
            return
        tile = dataclasses.replace(tile, block_n=tile.block_n // 2)


def _exposed_seconds(r: Request, traffic: int, buffer_bytes: int) -> float:
    """Of `traffic` of a buffer that is written to be read by another kernel, and read."""
    return traffic / r.device.cached_bandwidth(buffer_bytes <= r.device.l2_bytes * L2_SHARE)


def _ms(
    r: Request,
    kernel: str,
    flops: int,
    block: int,
    memory_bytes: int,
    blocks: int,
    *,
    launches: int,
    exposed_seconds: float = 0,
    cached_bytes: int = 0,
) -> float:
    """`block` latents are worked on at a time."""
    return kernel_ms(
        r,
        flops=flops * math.ceil(r.h / block) * block / r.h,
        efficiency=efficiency(r, kernel, EFFICIENCY),
        memory_bytes=memory_bytes,
        cached_bytes=cached_bytes,
        exposed_seconds=exposed_seconds,
        blocks=blocks,
        launches=launches,
    )
