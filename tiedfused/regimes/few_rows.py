"""few rows: a batch so small that reading W is the whole cost. W is read once, by the whole GPU. Forward only.

It is the stream regime's kernel with a tile of as few rows as there are: x then takes so little room that d up to 2048
fits, and the rest goes to the rows of W that are on their way. Every program streams its own part of W, and the parts'
fp32 sums, [parts, N, d], are combined in a fixed order; they are small, and stay in the L2 cache.

With the latent's statistics a program also writes, of its part of W, what it sums over each row, and for each latent
what it sums over its tile of rows; these parts, too, are added up afterwards.

Executed: the 2 products of 2NdH, with N rounded up to 16, 32 or 64 rows. Where there are fewer than 8 rows of W for a
warp, or of 64 rows of x fewer than 16, warps repeat the first product: y of a wide d needs the registers of 8 warps.
"""

from __future__ import annotations

import math

from tiedfused import tiles
from tiedfused.regimes.common import (
    STATS_LAUNCHES,
    Part,
    Pass,
    Request,
    efficiency,
    kernel_ms,
    lookup,
    stats_bytes,
    why_not_triton,
)
from tiedfused.tiles import ARCHITECTURES, Tile

MAX_ROWS = 64
MAX_D = 2048
# Of the peak, with 16 rows an instruction. Not measured.
EFFICIENCY = 0.4
MOST_RESIDENT = 2


def forward(r: Request, keep: bool) -> Part | str:
    """The stream regime's forward, split over H."""
    if (refusal := why_not_triton(r)) is not None:
        return refusal
    if r.n > MAX_ROWS:
        return f"N {r.n} is above {MAX_ROWS}: arithmetic counts beside reading W"
    if r.d > MAX_D:
        return f"d {r.d} is above {MAX_D}: 16 rows and their accumulator no longer fit on chip"
    if keep:
        return "its kernel never stores the latent"
    bucket = next(name for name in tiles.FEW_ROWS_KERNELS if r.n <= int(name.rpartition("_")[2]))
    try:
        tile, source = lookup(r, bucket)
    except ValueError as error:
        return str(error)
    assert isinstance(tile, Tile)

    ways = (_pass(r, bucket, tile, source, at_once) for at_once in range(1, _resident(r, bucket, tile) + 1))
    best = min(ways, key=lambda one: one.predicted_ms)
    return Part("few_rows", "triton", (best,), f"N {r.n} ≤ {MAX_ROWS}: the weight is read once, by the whole GPU")


def _resident(r: Request, bucket: str, tile: Tile) -> int:
    """How many blocks a multiprocessor can work on at once: one computes while the other waits for memory."""
    shared = tiles.resources(bucket, tile, tiles.block_d(r.d), r.itemsize, r.gpu).shared_bytes
    return max(1, min(MOST_RESIDENT, ARCHITECTURES[r.gpu].shared_bytes // shared))


def _pass(r: Request, bucket: str, tile: Tile, source: str, at_once: int) -> Pass:
    """With as many parts as `at_once` blocks on every multiprocessor, none of them empty."""
    row_tiles, weight_tiles = math.ceil(r.n / tile.block_n), math.ceil(r.h / tile.block_h)
    each = math.ceil(weight_tiles / max(1, at_once * r.multiprocessors // row_tiles))
    parts = math.ceil(weight_tiles / each)
    x, w = r.n * r.d * r.itemsize, r.h * r.d * r.itemsize
    sums = parts * r.n * r.d * 4 if parts > 1 else 0
    sums += stats_bytes(r, r.n, r.h, parts, row_tiles)
    encode, decode = tiles.repeats(bucket, tile, tiles.block_d(r.d), r.operands, r.gpu)
    flops = int(2 * (encode + decode) * r.n * sum(tiles.block_d(r.d)) * r.h)
    predicted = kernel_ms(
        r,
        flops=flops * (row_tiles * tile.block_n / r.n),
        efficiency=efficiency(r, bucket, EFFICIENCY),
        memory_bytes=2 * x + w,
        cached_bytes=row_tiles * w,  # the first row tile brings W to the cache for the others
        exposed_seconds=2 * sums / r.device.cached_bandwidth(True),
        blocks=parts * row_tiles,
        launches=1 + (parts > 1) + STATS_LAUNCHES * r.stats,
    )
    return Pass(bucket, tile, source, parts, flops, 2 * x + w + 2 * sums, sums, predicted)


def backward(r: Request, keep: bool) -> str:
    """There is none."""
    return "it has a forward only"
