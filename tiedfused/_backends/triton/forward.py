"""Forward: ``y = g(f(x Wᵀ + b_enc) W + b_dec)``, with the latent in registers and one fetch of W for both products."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiedfused._backends.triton import rows
from tiedfused._backends.triton.alignment import aligned, alignment
from tiedfused._backends.triton.combine import combine
from tiedfused._backends.triton.compat import describable, make_descriptor, with_descriptor_memory
from tiedfused._backends.triton.grid import cdiv, part_of
from tiedfused._backends.triton.stats import add_partial_stats, partial_stats
from tiedfused.activations import IDENTITY, Activation
from tiedfused.reference import LatentStats
from tiedfused.tiles import Tile, block_d


@triton.jit
def forward_kernel(
    x_ptr,
    w_ptr,
    bias_enc_ptr,
    bias_dec_ptr,
    y_ptr,
    l1_ptr,
    l0_ptr,
    total_ptr,
    fired_ptr,
    N,
    H,
    D,
    stride_x,
    stride_w,
    ACTIVATION: tl.constexpr,
    OUTPUT_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    D, stride_x, stride_w = aligned(D, ALIGNMENT), aligned(stride_x, ALIGNMENT), aligned(stride_w, ALIGNMENT)
    part = tl.program_id(1)
    n0 = tl.program_id(0) * BLOCK_N
    offs_n = n0 + tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    mask_n = offs_n < N

    if WARP_SPECIALIZE:  # one warp group copies tiles of W through TMA while two others multiply
        w_tiles = rows.describe(w_ptr, H, D, stride_w, BLOCK_H, BLOCK_D)
        x_tiles = rows.describe(x_ptr, N, D, stride_x, BLOCK_N, BLOCK_D)
        x = rows.load_described(x_tiles, n0, BLOCK_D)
        if bias_enc_ptr is not None:
            bias_enc_tiles = make_descriptor(bias_enc_ptr, (H,), (1,), (BLOCK_H,))
    else:
        x_ptrs = x_ptr + rows.numbers(n0, N, BLOCK_N) * stride_x
        x = rows.load(x_ptrs, None, D, EVEN_D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        offs_w = offs_h.to(tl.int64) * stride_w
    y = rows.zeros(BLOCK_N, BLOCK_D)
    if l1_ptr is not None:
        l1 = tl.zeros([BLOCK_N], tl.float32)
        l0 = tl.zeros([BLOCK_N], tl.int32)
        row_tile = tl.program_id(0).to(tl.int64)

    start, end = part_of(part, tl.num_programs(1), H, BLOCK_H, WARP_SPECIALIZE)
    for h0 in tl.range(start, end, BLOCK_H, warp_specialize=WARP_SPECIALIZE):
        mask_h = tl.full([BLOCK_H], True, tl.int1) if EVEN_H else offs_h < H - h0
        if WARP_SPECIALIZE:
            w = rows.load_described(w_tiles, h0, BLOCK_D)
        else:
            w_ptrs = w_ptr + tl.cast(h0, tl.int64) * stride_w + offs_w
            w = rows.load(w_ptrs, mask_h, D, EVEN_D, BLOCK_D)  # [BLOCK_H, BLOCK_D]
        a = rows.dot_transposed(x, w, PRECISION)  # [BLOCK_N, BLOCK_H]
        if bias_enc_ptr is not None:
            if WARP_SPECIALIZE:
                a += bias_enc_tiles.load([h0]).to(tl.float32)[None, :]
            else:
                bias_enc = tl.load(bias_enc_ptr + h0 + offs_h, mask=mask_h, other=0.0)
                a = rows.add_bias(a, bias_enc[None, :])
        h = tl.where(mask_h[None, :], ACTIVATION(a), 0.0).to(w_ptr.dtype.element_ty)
        if l1_ptr is not None:
            seen = tl.where(mask_n[:, None], h.to(tl.float32), 0.0)
            active = (seen != 0.0).to(tl.int32)
            l1 += tl.sum(tl.abs(seen), 1)
            l0 += tl.sum(active, 1)
            latents = row_tile * H + h0 + offs_h
            tl.store(total_ptr + latents, tl.sum(seen, 0), mask=mask_h)
            tl.store(fired_ptr + latents, tl.sum(active, 0).to(fired_ptr.dtype.element_ty), mask=mask_h)
        y = rows.dot_add(h, w, y, PRECISION)  # [BLOCK_N, BLOCK_D]

    y = rows.finish(y, bias_dec_ptr, OUTPUT_ACTIVATION, D, EVEN_D, BLOCK_D)
    rows.store(y_ptr + (tl.cast(part, tl.int64) * N + n0) * D, y, N - n0, D, EVEN_D, BLOCK_N, BLOCK_D)
    if l1_ptr is not None:
        tl.store(l1_ptr + tl.cast(part, tl.int64) * N + offs_n, l1, mask=mask_n)
        tl.store(l0_ptr + tl.cast(part, tl.int64) * N + offs_n, l0, mask=mask_n)


def forward(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    bias_dec: Tensor | None,
    *,
    activation: Activation,
    output_activation: Activation,
    tile: Tile,
    split: int,
    precision: str,
    stats: LatentStats | None = None,
    rows_at_once: int = 0,
) -> Tensor:
    """The reconstruction of `x`, and the statistics of its latent.

    Args:
        x: [N, d] bf16, fp16 or fp32, unit stride along d, any row stride (0 included).
        weight: [H, d], the dtype of `x`, unit stride along d.
        bias_enc: [H], any floating dtype, or None.
        bias_dec: [d], any floating dtype, or None.
        activation: f, an entry with a Triton pair.
        output_activation: g, an entry with a Triton pair; applied in fp32.
        tile: rows of x and of W a program holds at a time; warp-specialised only if TMA can read the operands.
        split: into how many parts H is divided, at most its tiles; their fp32 sums are added in a fixed order.
        precision: "ieee" or "tf32", for fp32 inputs.
        stats: the statistics of the latent as it is decoded, rounded to the dtype of `x`, are added to it (see
            `tiedfused._backends`); or None.
        rows_at_once: how many a launch takes where there are statistics; a multiple of tile.block_n, or all.

    Returns:
        y [N, d], contiguous, in the dtype of `x`.
    """
    N, D = x.shape
    H = weight.shape[0]
    y = torch.empty((N, D), dtype=x.dtype, device=x.device)
    options: dict[str, Any] = {
        "activation": activation,
        "output_activation": output_activation,
        "tile": tile,
        "split": split,
        "precision": precision,
    }
    if stats is None:
        _launch(x, weight, bias_enc, bias_dec, y, None, **options)
        return y
    for start in range(0, N, rows_at_once):
        taken = slice(start, min(start + rows_at_once, N))
        n = taken.stop - taken.start
        parts = partial_stats(n, H, split, cdiv(n, tile.block_n), x.device)
        _launch(x[taken], weight, bias_enc, bias_dec, y[taken], parts, **options)
        add_partial_stats(parts, stats, taken, slice(0, H))
    return y


def _launch(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    bias_dec: Tensor | None,
    y: Tensor,
    stats: LatentStats | None,
    *,
    activation: Activation,
    output_activation: Activation,
    tile: Tile,
    split: int,
    precision: str,
) -> None:
    """One launch on all rows of `x`; `stats` are its parts, of every split and of every row tile."""
    epilogue = output_activation if split == 1 else IDENTITY
    assert activation.triton is not None
    assert epilogue.triton is not None
    N, D = x.shape
    H = weight.shape[0]
    partial = y if split == 1 else torch.empty((split, N, D), dtype=torch.float32, device=x.device)
    assert split <= cdiv(H, tile.block_h)
    widths = block_d(D)
    if tile.warp_specialize and not describable(x, weight, bias_enc):
        tile = tile.plain()
    # All programs stream the same W at the same time: L2 serves it, whatever their order. A persistent grid could hide
    # no more than the loads of x and the stores of y, 2 · BLOCK_N / H of the bytes a program moves.
    launch = forward_kernel[(cdiv(N, tile.block_n), split)]
    if tile.warp_specialize:
        launch = with_descriptor_memory(launch)
    launch(
        x_ptr=x,
        w_ptr=weight,
        bias_enc_ptr=bias_enc,
        bias_dec_ptr=bias_dec if split == 1 else None,
        y_ptr=partial,
        l1_ptr=None if stats is None else stats.l1,
        l0_ptr=None if stats is None else stats.l0,
        total_ptr=None if stats is None else stats.mean,
        fired_ptr=None if stats is None else stats.fired,
        N=N,
        H=H,
        D=D,
        stride_x=x.stride(0),
        stride_w=weight.stride(0),
        ACTIVATION=activation.triton[0],
        OUTPUT_ACTIVATION=epilogue.triton[0],
        PRECISION=precision,
        EVEN_H=H % tile.block_h == 0,
        EVEN_D=sum(widths) == D,
        ALIGNMENT=alignment(x, weight),
        BLOCK_N=tile.block_n,
        BLOCK_H=tile.block_h,
        BLOCK_D=widths,
        WARP_SPECIALIZE=tile.warp_specialize,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if split > 1:
        combine(partial, y, bias_dec, activation=output_activation)
