"""Rows of the weight's gradient from a chunk of the latent: ``W̄ = [ā; h]ᵀ [x; ō]``, both terms in one accumulator."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tiedfused._backends.triton.alignment import aligned, alignment
from tiedfused._backends.triton.grid import block_of
from tiedfused.tiles import GemmTile


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
    offs_n = tl.arange(0, BLOCK_N)
    mask = (offs_h < H)[:, None] & (offs_d < D)[None, :]
    mask_h = (offs_h < H)[:, None]
    mask_d = (offs_d < D)[None, :]

    part_offset = tl.cast(part, tl.int64) * stride_part
    latents = offs_h.to(tl.int64)[:, None]
    if sum_ptr is not None:
        total = tl.load(sum_ptr + part_offset + latents * stride_sum + offs_d[None, :], mask=mask, other=0.0)
    else:
        total = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    part_size = tl.cdiv(tl.cdiv(N, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    for n0 in tl.range(part * part_size, tl.minimum((part + 1) * part_size, N), BLOCK_N):
        mask_n = tl.full([BLOCK_N, 1], True, tl.int1) if EVEN_N else (offs_n < N - n0)[:, None]
        rows = (n0 + offs_n).to(tl.int64)[:, None]
        # loaded transposed: the transpose of a loaded tile as the left operand keeps mma kernels from pipelining it
        grad_a_ptrs = grad_a_ptr + rows.T * stride_grad_a + offs_h[:, None]
        grad_a_t = tl.load(grad_a_ptrs, mask=mask_h & mask_n.T, other=0.0)  # [BLOCK_H, BLOCK_N]
        x = tl.load(x_ptr + rows * stride_x + offs_d[None, :], mask=mask_n & mask_d, other=0.0)  # [BLOCK_N, BLOCK_D]
        total = tl.dot(grad_a_t, x, total, input_precision=PRECISION)  # [BLOCK_H, BLOCK_D]
        h_ptrs = h_ptr + rows.T * stride_h + offs_h[:, None]
        h_t = tl.load(h_ptrs, mask=mask_h & mask_n.T, other=0.0)  # [BLOCK_H, BLOCK_N]
        grad_pre = tl.load(grad_pre_ptr + rows * stride_grad_pre + offs_d[None, :], mask=mask_n & mask_d, other=0.0)
        total = tl.dot(h_t, grad_pre, total, input_precision=PRECISION)

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
    """
    N, H = h.shape
    D = x.shape[1]
    assert earlier is None or earlier.stride() == out.stride() or split == 1
    chunk_weight_grad_kernel[(triton.cdiv(H, tile.block_m) * triton.cdiv(D, tile.block_n), split)](
        grad_a_ptr=grad_a,
        h_ptr=h,
        x_ptr=x,
        grad_pre_ptr=grad_pre,
        sum_ptr=earlier,
        out_ptr=out,
        N=N,
        H=H,
        D=D,
        stride_grad_a=grad_a.stride(0),
        stride_h=h.stride(0),
        stride_x=x.stride(0),
        stride_grad_pre=grad_pre.stride(0),
        stride_sum=0 if earlier is None else earlier.stride(-2),
        stride_out=out.stride(-2),
        stride_part=out.stride(0) if split > 1 else 0,
        PRECISION=precision,
        EVEN_N=N % tile.block_k == 0,
        ALIGNMENT=alignment(x, grad_pre),
        LATENT_ALIGNMENT=alignment(grad_a, h),
        BLOCK_H=tile.block_m,
        BLOCK_D=tile.block_n,
        BLOCK_N=tile.block_k,
        GROUP=8,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
