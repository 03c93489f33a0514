"""chunked: matrix products with fused epilogues over chunks of the latent, [rows, latents], that stay in the L2 cache.

Executed, in products of 2NdH FLOPs: forward 2 (encode, decode); backward 4 for W̄ (a and h̄ in one kernel that fetches
W once for both; ``[ā; h]ᵀ [x; ō]`` in one accumulator) and 1 for x̄; the latent is recomputed, which is 1 of those, or
read where it was kept. Products run at the rate of plain ones, and memory sees the latent only where it is kept.

Where the fp32 sum of all of x̄ would exceed the workspace, x̄ gets a sweep of its own, in which only a chunk's rows of it
are summed up, and 2 more products: a and h̄ are then computed twice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

from tiedfused.regimes.common import (
    L2_SHARE,
    LAUNCH_SECONDS,
    STATS_LAUNCHES,
    Part,
    Pass,
    Request,
    kernel_ms,
    lookup,
    measured_efficiency,
    split,
    stats_bytes,
    why_not_triton,
)
from tiedfused.tiles import GemmTile

# The fraction of the peak that the products are expected to reach: below the 0.66 of cuBLAS in bf16 on an H100. Not
# measured here.
EFFICIENCY = 0.60
# Of it, with half of a packaged tile's columns: on compute capability 9.0 a step's products then take 512 cycles of a
# multiprocessor instead of 1024, the instructions beside them 126 to 192 instead of 152 to 226. Counted, not measured.
HALF_TILE_RATE = 0.93
SMALLEST_HALF = 64
SMALLEST_CHUNK = 128
# Each part of a split sum is written and read in fp32.
MOST_PARTS = 16
# Of the host, where launches follow each other: 10 to 12 µs on an EPYC (Zen 5) with a driver that does nothing, see
# launch.py. Where there is one chunk, launches of other regimes take as long, and all are compared as if captured.
CHUNK_LAUNCH_SECONDS = 12e-6

_Passes = tuple[Pass, ...]


def why_not(r: Request, keep: bool) -> str | None:
    """Why the regime does not apply, or None if it does."""
    if (refusal := why_not_triton(r)) is not None:
        return refusal
    if keep and not r.f.from_output:
        return f"it keeps h, and the gradient of {r.f.name} is not read off h"
    return None


def forward(r: Request, keep: bool) -> Part | str:
    """``chunk_encode`` and ``chunk_decode`` for every chunk; a kept latent is written where it stays."""
    return _best(r, keep, _forward_passes)


def backward(r: Request, keep: bool) -> Part | str:
    """``chunk_latent``, ``chunk_weight_grad`` and, where x needs a gradient, ``chunk_decode`` for every chunk."""
    return _best(r, keep, _backward_passes)


def _best(r: Request, keep: bool, passes_of: Callable[[Request, bool, int, int], _Passes]) -> Part | str:
    """The part with the chunk that the cost model expects to be fastest, of those that fit the workspace."""
    if (refusal := why_not(r, keep)) is not None:
        return refusal
    least: tuple[float, int] | None = None
    chosen: Part | None = None
    fits_any = False
    for chunk in _chunks(r):
        part = Part("chunked", "triton", passes_of(r, keep, *chunk), _reason(r, chunk), chunk)
        fits = part.workspace_bytes <= r.in_force.workspace_bytes
        rank = (part.predicted_ms, part.workspace_bytes) if fits else (float(part.workspace_bytes), 0)
        if (fits, fits_any) == (True, False) or (fits == fits_any and (least is None or rank < least)):
            least, chosen, fits_any = rank, part, fits
    assert chosen is not None
    if not fits_any:
        return f"its smallest chunk needs {chosen.workspace_bytes} bytes of workspace, above the limit"
    return chosen


def _chunks(r: Request) -> Iterator[tuple[int, int]]:
    """Halves, quarters, … of the rows and of the latents, in whole tiles."""
    for rows in _fractions(r.n):
        for latents in _fractions(r.h):
            yield rows, latents


def _fractions(size: int) -> Iterator[int]:
    whole, parts = size, 1
    yield whole
    while whole > SMALLEST_CHUNK:
        parts *= 2
        smaller = SMALLEST_CHUNK * math.ceil(size / parts / SMALLEST_CHUNK)
        if smaller < whole:
            whole = smaller
            yield whole


def _reason(r: Request, chunk: tuple[int, int]) -> str:
    what = "the whole latent" if chunk == (r.n, r.h) else f"chunks of {chunk[0]} × {chunk[1]} of the latent"
    return f"products at the rate of plain ones, {what} at a time"


class _Traffic:
    """What a kernel moves, over all chunks.

    Operands are streamed while it computes. What it writes in its epilogue or reads in its prologue is exposed, but
    cheaper where a buffer is small enough to stay in the L2 cache.
    """

    def __init__(self, r: Request) -> None:
        self.device = r.device
        self.streamed = 0.0
        self.memory = 0.0
        self.exposed_seconds = 0.0

    def _cached(self, buffer_bytes: float) -> bool:
        return buffer_bytes <= self.device.l2_bytes * L2_SHARE

    def stream(self, traffic: float, buffer_bytes: float | None = None) -> None:
        """`traffic` of operands; those of a buffer that stays in the cache do not reach memory."""
        if buffer_bytes is None or not self._cached(buffer_bytes):
            self.streamed += traffic
            self.memory += traffic

    def expose(self, traffic: float, buffer_bytes: float) -> None:
        """`traffic` of a buffer that is written, or read back, at once."""
        cached = self._cached(buffer_bytes)
        self.memory += traffic * (not cached)
        self.exposed_seconds += traffic / self.device.cached_bandwidth(cached)


def _parts(r: Request, blocks: int, steps: int) -> int:
    """Into how many parts a sum over `steps` is split."""
    return min(MOST_PARTS, split(blocks, steps, r.multiprocessors))


@dataclasses.dataclass(frozen=True)
class _Launch:
    """How a kernel makes ``[rows, columns]``.

    Args:
        tile: the packaged one, or with half of its columns.
        source: where the tile comes from.
        parts: into how many the sum is split.
        blocks: of all parts.
        padding: what whole tiles compute, over what is asked for.
        efficiency: the fraction of the peak that is expected.
    """

    tile: GemmTile
    source: str
    parts: int
    blocks: int
    padding: float
    efficiency: float

    def cost(self, multiprocessors: int) -> float:
        """In proportion to the time that it takes."""
        return math.ceil(self.blocks / multiprocessors) / self.blocks * self.padding / self.efficiency


def _launch(
    r: Request, kernel: str, rows: int, columns: int, *, products: int = 1, depth: int | None = None
) -> _Launch:
    """With the tile that wastes less, in its last wave and beyond the last column.

    `products` have their right operand in common; a sum over `depth` may be split.
    """
    packaged, source = lookup(r, kernel)
    assert isinstance(packaged, GemmTile)
    measured = measured_efficiency(r, kernel)

    def launch(tile: GemmTile, source: str, rate: float) -> _Launch:
        blocks = math.ceil(rows / tile.block_m) * math.ceil(columns / tile.block_n)
        parts = 1 if depth is None else _parts(r, blocks, math.ceil(depth / tile.block_k))
        padding = blocks * tile.block_m * tile.block_n / (rows * columns)
        if measured is None:  # at most what the cache can feed, from which every block reads its operands
            step_bytes = (products * tile.block_m + tile.block_n) * r.itemsize
            fed = r.device.cached_bandwidth(True) * 2 * products * tile.block_m * tile.block_n / step_bytes
            efficiency = min(EFFICIENCY * rate, fed / r.device.rate(r.dtype, r.precision))
        else:
            efficiency = measured[0] * rate
        return _Launch(tile, source, parts, blocks * parts, padding, efficiency)

    whole = launch(packaged, source, 1.0)
    if packaged.block_n // 2 < SMALLEST_HALF or measured is not None or source.startswith("user config"):
        return whole
    narrow = dataclasses.replace(packaged, block_n=packaged.block_n // 2)
    half = launch(narrow, f"{source}, half of its columns", HALF_TILE_RATE)
    if r.d * r.itemsize % 4:  # rows that are loaded number by number: the registers of addresses spill in larger tiles
        return half
    return min(whole, half, key=lambda one: one.cost(r.multiprocessors))


def _sum_bytes(r: Request, parts: int, rows: int, columns: int, steps: int) -> int:
    """Of the fp32 sums over `steps` chunks, one for each part; an fp32 result that is not split is its own sum."""
    return parts * rows * columns * 4 if parts > 1 or (steps > 1 and r.itemsize < 4) else 0


def _product(
    r: Request,
    kernel: str,
    how: _Launch,
    *,
    products: int,
    chunks: int,
    sums: int,
    workspace: int,
    traffic: _Traffic,
) -> Pass:
    """One kernel over all chunks, and the `sums` that are combined of its parts, a launch each."""
    flops = 2 * products * r.ndh
    predicted = kernel_ms(
        r,
        flops=flops * how.padding,
        efficiency=how.efficiency,
        memory_bytes=traffic.streamed,
        exposed_seconds=traffic.exposed_seconds,
        blocks=how.blocks,
        launches=chunks + sums,
        launch_seconds=LAUNCH_SECONDS if chunks == 1 else CHUNK_LAUNCH_SECONDS,
    )
    return Pass(kernel, how.tile, how.source, how.parts, flops, int(traffic.memory), workspace, predicted)


def _forward_passes(r: Request, keep: bool, rows: int, latents: int) -> _Passes:
    s, steps_n, steps_h = r.itemsize, math.ceil(r.n / rows), math.ceil(r.h / latents)
    chunks = steps_n * steps_h
    chunk_bytes = rows * latents * s
    how_encode = _launch(r, "chunk_encode", rows, latents)
    how_decode = _launch(r, "chunk_decode", rows, r.d, depth=latents)
    sums = _sum_bytes(r, how_decode.parts, rows, r.d, steps_h)
    tile = how_encode.tile
    stats = stats_bytes(r, rows, latents, math.ceil(latents / tile.block_n), math.ceil(rows / tile.block_m))
    workspace = sums + stats + (0 if keep else chunk_bytes)

    encode = _Traffic(r)
    encode.stream(r.n * r.d * s + r.h * r.d * s * steps_n)
    encode.stream(r.n * r.d * s * (steps_h - 1), rows * r.d * s)
    encode.expose(r.latent_bytes, r.latent_bytes if keep else chunk_bytes)
    encode.expose(2 * stats * chunks, stats)
    decode = _Traffic(r)
    decode.stream(r.n * r.d * s)
    decode.stream(r.h * r.d * s * steps_n, latents * r.d * s)
    decode.expose(r.latent_bytes, chunk_bytes)
    decode.expose(2 * sums * steps_n * steps_h, sums)
    return (
        _product(
            r, "chunk_encode", how_encode, products=1, chunks=chunks, sums=chunks * STATS_LAUNCHES * r.stats,
            workspace=workspace, traffic=encode,
        ),
        _product(
            r, "chunk_decode", how_decode, products=1, chunks=chunks, sums=steps_n * (how_decode.parts > 1),
            workspace=workspace, traffic=decode,
        ),
    )  # fmt: skip


def _backward_passes(r: Request, keep: bool, rows: int, latents: int) -> _Passes:
    """Joint, or with a sweep for x̄ alone where the sum of all of x̄ does not fit."""
    joint = _sweep(r, keep, rows, latents, grad_x=r.grad_x, grad_weight=True)
    if not r.grad_x or joint[0].workspace_bytes <= r.in_force.workspace_bytes:
        return joint
    alone = _sweep(r, keep, rows, latents, grad_x=True, grad_weight=False)
    return alone + _sweep(r, keep, rows, latents, grad_x=False, grad_weight=True)


def _sweep(r: Request, keep: bool, rows: int, latents: int, *, grad_x: bool, grad_weight: bool) -> _Passes:
    """Over all chunks once; latents are the outer loop where W̄ is made, rows where only x̄ is."""
    s, steps_n, steps_h = r.itemsize, math.ceil(r.n / rows), math.ceil(r.h / latents)
    chunks = steps_n * steps_h
    chunk_bytes = rows * latents * s
    buffers = 1 if keep or not grad_weight else 2  # ā, and h where it is recomputed and needed
    held = buffers * chunk_bytes
    how_latent = _launch(r, "chunk_latent", rows, latents, products=1 if keep else 2)
    how_x = _launch(r, "chunk_decode", rows, r.d, depth=latents)
    how_w = _launch(r, "chunk_weight_grad", latents, r.d, depth=rows)
    summed_rows = r.n if grad_weight else rows
    sum_x = _sum_bytes(r, how_x.parts, summed_rows, r.d, steps_h) if grad_x else 0
    sum_w = _sum_bytes(r, how_w.parts, latents, r.d, steps_n) if grad_weight else 0
    sum_bias = steps_n * math.ceil(rows / how_latent.tile.block_m) * latents * 4 if grad_weight else 0
    workspace = held + sum_x + sum_w + sum_bias

    latent = _Traffic(r)
    operands = 2 * r.n * r.d * s  # x and ō
    latent.stream(operands + r.h * r.d * s * (1 if grad_weight else steps_n))
    latent.stream(operands * (steps_h - 1), 2 * rows * r.d * s)
    latent.expose(buffers * r.latent_bytes, held)
    if keep:
        latent.expose(r.latent_bytes, r.latent_bytes)
    passes = [
        _product(
            r, "chunk_latent", how_latent, products=1 if keep else 2, chunks=chunks, sums=steps_h * grad_weight,
            workspace=workspace, traffic=latent,
        )
    ]  # fmt: skip
    if grad_weight:
        weight = _Traffic(r)
        weight.stream(r.h * r.d * s)
        weight.stream(operands * steps_h, 2 * rows * r.d * s)
        weight.expose(2 * r.latent_bytes, 2 * chunk_bytes)
        weight.expose(2 * sum_w * steps_h * steps_n, sum_w)
        passes.append(
            _product(
                r, "chunk_weight_grad", how_w, products=2, chunks=chunks, sums=steps_h * (how_w.parts > 1),
                workspace=workspace, traffic=weight,
            )
        )  # fmt: skip
    if grad_x:
        decode = _Traffic(r)
        decode.stream(r.n * r.d * s)
        decode.stream(r.h * r.d * s * steps_n, latents * r.d * s)
        decode.expose(r.latent_bytes, held)
        decode.expose(2 * sum_x * steps_h * (1 if grad_weight else steps_n), sum_x)
        passes.append(
            _product(
                r, "chunk_decode", how_x, products=1, chunks=chunks,
                sums=(1 if grad_weight else steps_n) * (how_x.parts > 1), workspace=workspace, traffic=decode,
            )
        )  # fmt: skip
    return tuple(passes)
