"""A chunk of the latent times its rows of W, added to what earlier chunks gave: y from h, x̄ from ā."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tiedfused._backends.triton.alignment import aligned, alignment
from tiedfused._backends.triton.grid import block_of, cdiv
from tiedfused._backends.triton.launch import Grid, Repeats, launch
from tiedfused._backends.triton.rows import numbers
from tiedfused.activations import IDENTITY, Activation
from tiedfused.tiles import GemmTile


@triton.jit
def chunk_decode_kernel(
    latent_ptr,
    w_ptr,
    bias_dec_ptr,
    sum_ptr,
    out_ptr,
    N,
    H,
    D,
    stride_latent,
    stride_w,
    stride_sum,
    stride_out,
    stride_part,
    OUTPUT_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_H: tl.constexpr,
    NO_PART_EMPTY: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    LATENT_ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    D, stride_w = aligned(D, ALIGNMENT), aligned(stride_w, ALIGNMENT)
    H, stride_latent = aligned(H, LATENT_ALIGNMENT), aligned(stride_latent, LATENT_ALIGNMENT)
    part = tl.program_id(1)
    block_n, block_d = block_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(D, BLOCK_D), GROUP)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_h = tl.arange(0, BLOCK_H)
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    mask_d = (offs_d < D)[None, :]
    # rows outside are read as the last one, and never written: no mask for them in the loop
    rows = numbers(block_n * BLOCK_N, N, BLOCK_N)[:, None]

    part_offset = tl.cast(part, tl.int64) * stride_part
    if sum_ptr is not None:
        sum_ptrs = sum_ptr + part_offset + offs_n.to(tl.int64)[:, None] * stride_sum + offs_d[None, :]
        total = tl.load(sum_ptrs, mask=mask, other=0.0)
    else:
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    latent_offs = rows * stride_latent + offs_h[None, :]
    w_offs = offs_h.to(tl.int64)[:, None] * stride_w + offs_d[None, :]
    part_size = tl.cdiv(tl.cdiv(H, BLOCK_H), tl.num_programs(1)) * BLOCK_H
    start, end = part * part_size, tl.minimum((part + 1) * part_size, H)
    # see grid.part_of; the last, smaller chunk may have fewer steps than parts; sums that were read need no copy
    if NO_PART_EMPTY and sum_ptr is None:
        tl.assume(end > start)
    for h0 in tl.range(start, end, BLOCK_H):
        mask_h = tl.full([BLOCK_H], True, tl.int1) if EVEN_H else offs_h < H - h0
        latent = tl.load(latent_ptr + h0 + latent_offs, mask=mask_h[None, :], other=0.0)  # [BLOCK_N, BLOCK_H]
        w_tile = w_ptr + tl.cast(h0, tl.int64) * stride_w
        w = tl.load(w_tile + w_offs, mask=mask_h[:, None] & mask_d, other=0.0)  # [BLOCK_H, BLOCK_D]
        total = tl.dot(latent, w, total, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]

    if bias_dec_ptr is not None:
        total += tl.load(bias_dec_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + part_offset + offs_n.to(tl.int64)[:, None] * stride_out + offs_d[None, :]
    tl.store(out_ptrs, OUTPUT_ACTIVATION(total).to(out_ptr.dtype.element_ty), mask=mask)


def chunk_decode(
    latent: Tensor,
    weight: Tensor,
    bias_dec: Tensor | None,
    *,
    earlier: Tensor | None,
    out: Tensor,
    output_activation: Activation = IDENTITY,
    tile: GemmTile,
    split: int,
    precision: str,
    repeats: Repeats | None = None,
) -> None:
    """Write ``g(latent W + earlier + b_dec)`` to `out`, for a chunk of the latent and its rows of W.

    Args:
        latent: [N, H] bf16, fp16 or fp32, unit stride along H.
        weight: [H, d], the dtype of `latent`, unit stride along d.
        bias_dec: [d], any floating dtype, or None.
        earlier: fp32, the sum over earlier chunks, shape and strides as `out`, which it may be; or None.
        out: [N, d], or [split, N, d] fp32 if split > 1: each part's own sum; unit stride along d.
        output_activation: g, an entry with a Triton pair; applied in fp32.
        tile: block_m rows, block_n of d, block_k latents a step.
        split: into how many parts H is divided.
        precision: "ieee" or "tf32", for fp32 inputs.
        repeats: of the call that launches this for one chunk after another; or None.
    """
    g = output_activation.triton
    assert g is not None
    N, H = latent.shape
    D = weight.shape[1]
    assert earlier is None or earlier.stride() == out.stride() or split == 1

    def arguments() -> tuple[Grid, dict[str, Any]]:
        return (cdiv(N, tile.block_m) * cdiv(D, tile.block_n), split), {
            "N": N,
            "H": H,
            "D": D,
            "stride_latent": latent.stride(0),
            "stride_w": weight.stride(0),
            "stride_sum": 0 if earlier is None else earlier.stride(-2),
            "stride_out": out.stride(-2),
            "stride_part": out.stride(0) if split > 1 else 0,
            "OUTPUT_ACTIVATION": g[0],
            "PRECISION": precision,
            "EVEN_H": H % tile.block_k == 0,
            # parts of whole steps: 5 steps in 4 parts are 2, 2, 1 and none
            "NO_PART_EMPTY": (split - 1) * cdiv(cdiv(H, tile.block_k), split) < cdiv(H, tile.block_k),
            "ALIGNMENT": alignment(weight),
            "LATENT_ALIGNMENT": alignment(latent),
            "BLOCK_N": tile.block_m,
            "BLOCK_D": tile.block_n,
            "BLOCK_H": tile.block_k,
            "GROUP": 8,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    operands = (latent, weight, bias_dec, earlier, out)
    launch(chunk_decode_kernel, operands, arguments, repeats, (output_activation.name, tile, split, precision))
