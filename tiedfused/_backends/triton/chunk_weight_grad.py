"""Rows of the weight's gradient from a chunk of the latent: ``W̄ = [ā; h]ᵀ [x; ō]``, both terms in one accumulator."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tiedfused._backends.triton.alignment import aligned, alignment
from tiedfused._backends.triton.grid import block_of, cdiv
from tiedfused._backends.triton.launch import Grid, Repeats, launch
from tiedfused.tiles import GemmTile


@triton.jit
def add_product(
    total, left_ptr, right_ptr, start, end, H, D, stride_left, stride_right, offs_h, offs_d,
    PRECISION: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``total + leftᵀ right`` of the rows from `start` to `end`, for latents `offs_h` and columns `offs_d`."""
    offs_n = tl.arange(0, BLOCK_N)
    rows = offs_n.to(tl.int64)[:, None]
    mask_h = (offs_h < H)[:, None]
    mask_d = (offs_d < D)[None, :]
    # loaded transposed: the transpose of a loaded tile as the left operand keeps mma kernels from pipelining it
    left_offs = rows.T * stride_left + offs_h[:, None]
    right_offs = rows * stride_right + offs_d[None, :]
    for n0 in tl.range(start, end, BLOCK_N):
        mask_n = tl.full([BLOCK_N, 1], True, tl.int1) if EVEN_N else (offs_n < end - n0)[:, None]
        left_tile = left_ptr + tl.cast(n0, tl.int64) * stride_left
        left = tl.load(left_tile + left_offs, mask=mask_h & mask_n.T, other=0.0)  # [BLOCK_H, BLOCK_N]
        right_tile = right_ptr + tl.cast(n0, tl.int64) * stride_right
        right = tl.load(right_tile + right_offs, mask=mask_n & mask_d, other=0.0)  # [BLOCK_N, BLOCK_D]
        total = tl.dot(left, right, total, input_precision=PRECISION)  # [BLOCK_H, BLOCK_D]
    return total


@triton.jit
def chunk_weight_grad_kernel(
    grad_a_ptr,
    h_ptr,
    x_ptr,
    grad_pre_ptr,
    sum_ptr,
    out_ptr,
    N,
    H,
    D,
    stride_grad_a,
    stride_h,
    stride_x,
    stride_grad_pre,
    stride_sum,
    stride_out,
    stride_part,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    LATENT_ALIGNMENT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    D = aligned(D, ALIGNMENT)
    stride_x, stride_grad_pre = aligned(stride_x, ALIGNMENT), aligned(stride_grad_pre, ALIGNMENT)
    H, stride_h = aligned(H, LATENT_ALIGNMENT), aligned(stride_h, LATENT_ALIGNMENT)
    stride_grad_a = aligned(stride_grad_a, LATENT_ALIGNMENT)
    part = tl.program_id(1)
    block_h, block_d = block_of(tl.program_id(0), tl.cdiv(H, BLOCK_H), tl.cdiv(D, BLOCK_D), GROUP)
    offs_h = block_h * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_h < H)[:, None] & (offs_d < D)[None, :]

    part_offset = tl.cast(part, tl.int64) * stride_part
    latents = offs_h.to(tl.int64)[:, None]
    if sum_ptr is not None:
        total = tl.load(sum_ptr + part_offset + latents * stride_sum + offs_d[None, :], mask=mask, other=0.0)
    else:
        total = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    part_size = tl.cdiv(tl.cdiv(N, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    start, end = part * part_size, tl.minimum((part + 1) * part_size, N)
    # one term after the other: both in one loop would wait for each product before the next adds to it
    total = add_product(
        total, grad_a_ptr, x_ptr, start, end, H, D, stride_grad_a, stride_x, offs_h, offs_d,
        PRECISION, EVEN_N, BLOCK_N,
    )  # fmt: skip
    total = add_product(
        total, h_ptr, grad_pre_ptr, start, end, H, D, stride_h, stride_grad_pre, offs_h, offs_d,
        PRECISION, EVEN_N, BLOCK_N,
    )  # fmt: skip

    out_ptrs = out_ptr + part_offset + latents * stride_out + offs_d[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


def chunk_weight_grad(
    grad_a: Tensor,
    h: Tensor,
    x: Tensor,
    grad_pre: Tensor,
    *,
    earlier: Tensor | None,
    out: Tensor,
    tile: GemmTile,
    split: int,
    precision: str,
    repeats: Repeats | None = None,
) -> None:
    """Write ``āᵀ x + hᵀ ō + earlier`` to `out`.

    Args:
        grad_a: ā [N, H] bf16, fp16 or fp32, unit stride along H.
        h: [N, H], dtype and layout as `grad_a`.
        x: [N, d], the same dtype, unit stride along d.
        grad_pre: ō [N, d], likewise.
        earlier: fp32, the sum over earlier rows, shape and strides as `out`, which it may be; or None.
        out: [H, d], or [split, H, d] fp32 if split > 1: each part's own sum; unit stride along d.
        tile: block_m latents, block_n of d, block_k rows a step.
        split: into how many parts N is divided.
        precision: "ieee" or "tf32", for fp32 inputs.
        repeats: of the call that launches this for one chunk after another; or None.
    """
    N, H = h.shape
    D = x.shape[1]
    assert earlier is None or earlier.stride() == out.stride() or split == 1

    def arguments() -> tuple[Grid, dict[str, Any]]:
        return (cdiv(H, tile.block_m) * cdiv(D, tile.block_n), split), {
            "N": N,
            "H": H,
            "D": D,
            "stride_grad_a": grad_a.stride(0),
            "stride_h": h.stride(0),
            "stride_x": x.stride(0),
            "stride_grad_pre": grad_pre.stride(0),
            "stride_sum": 0 if earlier is None else earlier.stride(-2),
            "stride_out": out.stride(-2),
            "stride_part": out.stride(0) if split > 1 else 0,
            "PRECISION": precision,
            "EVEN_N": N % tile.block_k == 0,
            "ALIGNMENT": alignment(x, grad_pre),
            "LATENT_ALIGNMENT": alignment(grad_a, h),
            "BLOCK_H": tile.block_m,
            "BLOCK_D": tile.block_n,
            "BLOCK_N": tile.block_k,
            "GROUP": 8,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    operands = (grad_a, h, x, grad_pre, earlier, out)
    launch(chunk_weight_grad_kernel, operands, arguments, repeats, (tile, split, precision))
