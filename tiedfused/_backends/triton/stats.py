"""The latent's statistics and their gradients: what the kernels share, and the sum of their parts in a fixed order.

A program sees one tile of the latent. What it sums over the tile's latents belongs to its rows, and what it sums over
the tile's rows to its latents; each is written to a row of its own, so that no atomics are needed, and the rows are
added up after the launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiedfused._backends.triton.combine import combine_blocks, sum_parts
from tiedfused._backends.triton.grid import cdiv
from tiedfused._backends.triton.launch import Grid, Repeats, launch
from tiedfused.reference import LatentStats, stats_dtype


@triton.jit
def store_stats(h, l1_ptr, l0_ptr, total_ptr, fired_ptr, block_n, block_h, offs_n, offs_h, N, H):
    """Write the sums and counts of the tile [BLOCK_N, BLOCK_H] of the latent, `h` in the dtype in which it is decoded:
    those of its rows are part `block_h` of each row's, those of its latents part `block_n` of each latent's.
    """
    mask_n, mask_h = offs_n < N, offs_h < H
    to_row = tl.cast(block_h, tl.int64) * N + offs_n
    to_latent = tl.cast(block_n, tl.int64) * H + offs_h
    seen = tl.where(mask_n[:, None] & mask_h[None, :], h.to(tl.float32), 0.0)
    # Each is stored at once, and counts come first: of 64 × 512 latents in 256 threads a thread holds 128. All four
    # before the first store spill 80 bytes on sm_90 and 512 on sm_100, counts last 16 and 48, this 0 and 24.
    active = (seen != 0.0).to(tl.int32)
    tl.store(fired_ptr + to_latent, tl.sum(active, 0).to(fired_ptr.dtype.element_ty), mask=mask_h)
    tl.store(l0_ptr + to_row, tl.sum(active, 1), mask=mask_n)
    tl.store(total_ptr + to_latent, tl.sum(seen, 0), mask=mask_h)
    tl.store(l1_ptr + to_row, tl.sum(tl.abs(seen), 1), mask=mask_n)


@triton.jit
def times_sign(grad_l1, h):
    """L̄1 · sign(h)."""
    return tl.where(h > 0.0, grad_l1, tl.where(h < 0.0, -grad_l1, 0.0))


@triton.jit
def add_penalties(grad_h, h, grad_l1_ptr, grad_total_ptr, offs_n, offs_h, mask_n, mask_h):
    """h̄ with the terms of both gradients, either of which may be None; rows and latents in shapes that broadcast."""
    if grad_l1_ptr is not None:
        grad_h += times_sign(tl.load(grad_l1_ptr + offs_n, mask=mask_n, other=0.0), h)
    if grad_total_ptr is not None:
        grad_h += tl.load(grad_total_ptr + offs_h, mask=mask_h, other=0.0)
    return grad_h


def partial_stats(n: int, h: int, row_parts: int, latent_parts: int, device: torch.device) -> LatentStats:
    """Room for what a launch on ``[n, h]`` of the latent writes: `row_parts` sums of each row, `latent_parts` of each
    latent. A count over the rows of a tile fits 16 bits."""
    return LatentStats(
        l1=torch.empty((row_parts, n), dtype=torch.float32, device=device),
        l0=torch.empty((row_parts, n), dtype=torch.int32, device=device),
        mean=torch.empty((latent_parts, h), dtype=torch.float32, device=device),
        fired=torch.empty((latent_parts, h), dtype=torch.int16, device=device),
    )


@triton.jit
def add_parts_kernel(sums_ptr, counts_ptr, total_ptr, count_ptr, size, split, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = sum_parts(sums_ptr, offs, mask, size, split, PARTS, BLOCK)
    count = sum_parts(counts_ptr, offs, mask, size, split, PARTS, BLOCK, tl.int32)
    tl.store(total_ptr + offs, tl.load(total_ptr + offs, mask=mask) + total, mask=mask)
    tl.store(count_ptr + offs, tl.load(count_ptr + offs, mask=mask) + count, mask=mask)


def add_partial_stats(
    parts: LatentStats, stats: LatentStats, rows: slice, latents: slice, repeats: Repeats | None = None
) -> None:
    """Add up the parts, and add them to the statistics of `rows` and `latents`.

    `repeats` is of the call that launches this for one chunk after another; or None.
    """
    _add_parts(parts.l1, parts.l0, stats.l1[rows], stats.l0[rows], repeats)
    _add_parts(parts.mean, parts.fired, stats.mean[latents], stats.fired[latents], repeats)


def _add_parts(sums: Tensor, counts: Tensor, total: Tensor, count: Tensor, repeats: Repeats | None) -> None:
    """total += Σₛ sums[s] and count += Σₛ counts[s], in order."""
    split, size = sums.shape
    at_once, block = combine_blocks(split)

    def arguments() -> tuple[Grid, dict[str, Any]]:
        return (cdiv(size, block), 1), {"size": size, "split": split, "PARTS": at_once, "BLOCK": block, "num_warps": 4}

    launch(add_parts_kernel, (sums, counts, total, count), arguments, repeats)


def stats_of(h: Tensor) -> LatentStats:
    """Those of a latent ``[N, H]`` that is in memory."""
    active, wide = h != 0, stats_dtype(h.dtype)
    return LatentStats(
        l1=torch.linalg.vector_norm(h, 1, 1, dtype=wide),
        l0=active.sum(1),
        mean=h.sum(0, dtype=wide),
        fired=active.sum(0),
    )
