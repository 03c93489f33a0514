"""Partial statistics of the latent, as kernels write them, and their sum in a fixed order.

A program sees one tile of the latent. What it sums over the tile's latents belongs to its rows, and what it sums over
the tile's rows to its latents; each is written to a row of its own, so that no atomics are needed, and the rows are
added up after the launch.
"""

from __future__ import annotations

import torch

from tiedfused.reference import LatentStats


def partial_stats(n: int, h: int, row_parts: int, latent_parts: int, device: torch.device) -> LatentStats:
    """Room for what a launch on ``[n, h]`` of the latent writes: `row_parts` sums of each row, `latent_parts` of each
    latent. A count over the rows of a tile fits 16 bits."""
    return LatentStats(
        l1=torch.empty((row_parts, n), dtype=torch.float32, device=device),
        l0=torch.empty((row_parts, n), dtype=torch.int32, device=device),
        mean=torch.empty((latent_parts, h), dtype=torch.float32, device=device),
        fired=torch.empty((latent_parts, h), dtype=torch.int16, device=device),
    )


def add_partial_stats(parts: LatentStats, stats: LatentStats, rows: slice, latents: slice) -> None:
    """Add up the parts, and add them to the statistics of `rows` and `latents`."""
    stats.l1[rows].add_(parts.l1.sum(0))
    stats.l0[rows].add_(parts.l0.sum(0))
    stats.mean[latents].add_(parts.mean.sum(0))
    stats.fired[latents].add_(parts.fired.sum(0))
