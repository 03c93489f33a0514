"""chunked: matrix products with fused epilogues over chunks of the latent, [rows, latents], that stay in the L2 cache.

Executed, in products of 2NdH FLOPs: forward 2 (encode, decode); backward 4 for W̄ (a and h̄ in one kernel that fetches
W once for both; ``[ā; h]ᵀ [x; ō]`` in one accumulator) and 1 for x̄; the latent is recomputed, which is 1 of those, or
read where it was kept. Products run at the rate of plain ones, and memory sees the latent only where it is kept.

Where the fp32 sum of all of x̄ would exceed the workspace, x̄ gets a sweep of its own, in which only a chunk's rows of it
are summed up, and 2 more products: a and h̄ are then computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from tiedfused import tiles
from tiedfused.regimes.common import (
    L2_SHARE,
    STATS_LAUNCHES,
    Part,
    Pass,
    Request,
    efficiency,
    kernel_ms,
    split,
    stats_bytes,
    why_not_triton,
)
from tiedfused.tiles import GemmTile

# The fraction of the peak that the products are expected to reach: below the 0.66 of cuBLAS in bf16 on an H100. Not
# measured here.
EFFICIENCY = 0.60
SMALLEST_CHUNK = 128
# Each part of a split sum is written and read in fp32.
MOST_PARTS = 16

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


def _gemm_tile(kernel: str, dtype: str, capability: int) -> tuple[GemmTile, str]:
    tile, source = tiles.lookup(kernel, 1, dtype, capability)
    assert isinstance(tile, GemmTile)
    return tile, source


def _parts(r: Request, kernel: str, rows: int, columns: int, depth: int) -> int:
    """Into how many parts a launch that makes ``[rows, columns]`` splits its sum over `depth`."""
    tile, _ = _gemm_tile(kernel, r.dtype_name, r.gpu)
    return min(MOST_PARTS, split(_blocks(tile, rows, columns), math.ceil(depth / tile.block_k), r.multiprocessors))


def _blocks(tile: GemmTile, rows: int, columns: int) -> int:
    return math.ceil(rows / tile.block_m) * math.ceil(columns / tile.block_n)


def _sum_bytes(r: Request, parts: int, rows: int, columns: int, steps: int) -> int:
    """Of the fp32 sums over `steps` chunks, one for each part; an fp32 result that is not split is its own sum."""
    return parts * rows * columns * 4 if parts > 1 or (steps > 1 and r.itemsize < 4) else 0


def _product(
    r: Request,
    kernel: str,
    *,
    products: int,
    rows: int,
    columns: int,
    launches: int,
    workspace: int,
    traffic: _Traffic,
    parts: int = 1,
) -> Pass:
    """One kernel over all chunks; each launch makes ``[rows, columns]`` in `parts` parts."""
    tile, source = _gemm_tile(kernel, r.dtype_name, r.gpu)
    flops = 2 * products * r.ndh
    predicted = kernel_ms(
        r,
        flops=flops,
        efficiency=efficiency(r, kernel, EFFICIENCY),
        memory_bytes=traffic.streamed,
        exposed_seconds=traffic.exposed_seconds,
        blocks=_blocks(tile, rows, columns) * parts,
        launches=launches,
    )
    return Pass(kernel, tile, source, parts, flops, int(traffic.memory), workspace, predicted)


def _forward_passes(r: Request, keep: bool, rows: int, latents: int) -> _Passes:
    s, steps_n, steps_h = r.itemsize, math.ceil(r.n / rows), math.ceil(r.h / latents)
    launches = steps_n * steps_h
    chunk_bytes = rows * latents * s
    parts = _parts(r, "chunk_decode", rows, r.d, latents)
    sums = _sum_bytes(r, parts, rows, r.d, steps_h)
    tile, _ = _gemm_tile("chunk_encode", r.dtype_name, r.gpu)
    stats = stats_bytes(r, rows, latents, math.ceil(latents / tile.block_n), math.ceil(rows / tile.block_m))
    workspace = sums + stats + (0 if keep else chunk_bytes)

    encode = _Traffic(r)
    encode.stream(r.n * r.d * s + r.h * r.d * s * steps_n)
    encode.stream(r.n * r.d * s * (steps_h - 1), rows * r.d * s)
    encode.expose(r.latent_bytes, r.latent_bytes if keep else chunk_bytes)
    encode.expose(2 * stats * launches, stats)
    decode = _Traffic(r)
    decode.stream(r.n * r.d * s)
    decode.stream(r.h * r.d * s * steps_n, latents * r.d * s)
    decode.expose(r.latent_bytes, chunk_bytes)
    decode.expose(2 * sums * steps_n * steps_h, sums)
    return (
        _product(
            r, "chunk_encode", products=1, rows=rows, columns=latents,
            launches=launches * (1 + STATS_LAUNCHES * r.stats), workspace=workspace, traffic=encode,
        ),
        _product(
            r, "chunk_decode", products=1, rows=rows, columns=r.d, launches=launches, workspace=workspace,
            traffic=decode, parts=parts,
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
    launches = steps_n * steps_h
    chunk_bytes = rows * latents * s
    buffers = 1 if keep or not grad_weight else 2  # ā, and h where it is recomputed and needed
    held = buffers * chunk_bytes
    parts_x = _parts(r, "chunk_decode", rows, r.d, latents)
    parts_w = _parts(r, "chunk_weight_grad", latents, r.d, rows)
    summed_rows = r.n if grad_weight else rows
    sum_x = _sum_bytes(r, parts_x, summed_rows, r.d, steps_h) if grad_x else 0
    sum_w = _sum_bytes(r, parts_w, latents, r.d, steps_n) if grad_weight else 0
    block_rows = _gemm_tile("chunk_latent", r.dtype_name, r.gpu)[0].block_m
    sum_bias = steps_n * math.ceil(rows / block_rows) * latents * 4 if grad_weight else 0
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
            r, "chunk_latent", products=1 if keep else 2, rows=rows, columns=latents, launches=launches,
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
                r, "chunk_weight_grad", products=2, rows=latents, columns=r.d, launches=launches,
                workspace=workspace, traffic=weight, parts=parts_w,
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
                r, "chunk_decode", products=1, rows=rows, columns=r.d, launches=launches,
                workspace=workspace, traffic=decode, parts=parts_x,
            )
        )  # fmt: skip
    return tuple(passes)
