"""The latent of a small H as a tensor of its own: ``h = f(x Wᵀ + b_enc)``, and beside it ``ā = (ō Wᵀ) ⊙ f′``.

Forward needs this where so few rows would leave the GPU idle: d is then split over programs, whose sums are combined
in a fixed order. Backward needs it for W̄ and x̄. The products are transposed, so that W's rows are the rows of the
tensor-core instructions and few rows of x waste nothing; and the rows of x and ō are interleaved (x₀, ō₀, x₁, ō₁, …),
so that one product holds a and h̄ side by side in the same thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiedfused._backends.triton.alignment import aligned, alignment
from tiedfused._backends.triton.combine import combine_blocks, sum_parts
from tiedfused._backends.triton.grid import cdiv
from tiedfused._backends.triton.stats import add_penalties
from tiedfused.activations import Activation
from tiedfused.tiles import LatentTile


@triton.jit
def bottleneck_latent_kernel(
    grad_pre_ptr,
    x_ptr,
    w_ptr,
    bias_enc_ptr,
    grad_l1_ptr,
    grad_total_ptr,
    h_ptr,
    grad_a_ptr,
    N,
    H,
    D,
    stride_grad_pre,
    stride_x,
    stride_w,
    ACTIVATION: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`WHOLE`: this program sees all of d and finishes the latent; else it leaves fp32 sums of a and h̄."""
    D, stride_w = aligned(D, ALIGNMENT), aligned(stride_w, ALIGNMENT)
    stride_x, stride_grad_pre = aligned(stride_x, ALIGNMENT), aligned(stride_grad_pre, ALIGNMENT)
    part = tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    mask_h = tl.full([BLOCK_H], True, tl.int1) if EVEN_H else offs_h < H
    w_ptrs = w_ptr + offs_h.to(tl.int64)[:, None] * stride_w + offs_d[None, :]

    STREAMS: tl.constexpr = 1 if grad_pre_ptr is None else 2
    if grad_pre_ptr is None:
        stream_n = offs_n
        stream_ptrs = x_ptr + stream_n.to(tl.int64)[:, None] * stride_x + offs_d[None, :]
    else:
        pair = tl.arange(0, 2 * BLOCK_N)
        stream_n = tl.program_id(0) * BLOCK_N + pair // 2
        stride = tl.where(pair % 2 == 0, stride_x, stride_grad_pre).to(tl.int64)
        stream_ptrs = (tl.where(pair % 2 == 0, x_ptr, grad_pre_ptr) + stream_n * stride)[:, None] + offs_d[None, :]
    mask_stream = stream_n < N

    sums = tl.zeros([BLOCK_H, STREAMS * BLOCK_N], tl.float32)
    part_size = tl.cdiv(tl.cdiv(D, BLOCK_D), tl.num_programs(2)) * BLOCK_D
    for d0 in tl.range(part * part_size, tl.minimum((part + 1) * part_size, D), BLOCK_D):
        mask_d = tl.full([BLOCK_D], True, tl.int1) if EVEN_D else offs_d < D - d0
        stream = tl.load(stream_ptrs + d0, mask=mask_stream[:, None] & mask_d[None, :], other=0.0)
        w = tl.load(w_ptrs + d0, mask=mask_h[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_H, BLOCK_D]
        sums = tl.dot(w, stream.T, sums, input_precision=PRECISION)

    if grad_pre_ptr is None:
        a_t = sums
    else:
        a_t, grad_h_t = tl.split(tl.reshape(sums, [BLOCK_H, BLOCK_N, 2]))  # [BLOCK_H, BLOCK_N] each
    if WHOLE:
        if bias_enc_ptr is not None:
            a_t += tl.load(bias_enc_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)[:, None]
        h_t = ACTIVATION(a_t)
        if grad_pre_ptr is not None:
            at = (offs_n[None, :], offs_h[:, None], mask_n[None, :], mask_h[:, None])
            grad_h_t = add_penalties(grad_h_t, h_t, grad_l1_ptr, grad_total_ptr, *at) * DERIVATIVE(a_t, h_t)
        a_t = h_t
    out = (tl.cast(part, tl.int64) * N + offs_n)[:, None] * H + offs_h[None, :]
    mask = mask_n[:, None] & mask_h[None, :]
    tl.store(h_ptr + out, a_t.T.to(h_ptr.dtype.element_ty), mask=mask)
    if grad_pre_ptr is not None:
        tl.store(grad_a_ptr + out, grad_h_t.T.to(grad_a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def combine_latent_kernel(
    a_ptr,
    grad_h_ptr,
    bias_enc_ptr,
    grad_l1_ptr,
    grad_total_ptr,
    h_ptr,
    grad_a_ptr,
    size,
    columns,
    split,
    ACTIVATION: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    a = sum_parts(a_ptr, offs, mask, size, split, PARTS, BLOCK)
    if bias_enc_ptr is not None:
        a += tl.load(bias_enc_ptr + offs % columns, mask=mask, other=0.0).to(tl.float32)
    h = ACTIVATION(a)
    tl.store(h_ptr + offs, h.to(h_ptr.dtype.element_ty), mask=mask)
    if grad_a_ptr is not None:
        grad_h = sum_parts(grad_h_ptr, offs, mask, size, split, PARTS, BLOCK)
        at = (offs // columns, offs % columns, mask, mask)
        grad_a = add_penalties(grad_h, h, grad_l1_ptr, grad_total_ptr, *at) * DERIVATIVE(a, h)
        tl.store(grad_a_ptr + offs, grad_a.to(grad_a_ptr.dtype.element_ty), mask=mask)


def bottleneck_latent(
    x: Tensor,
    grad_pre: Tensor | None,
    weight: Tensor,
    bias_enc: Tensor | None,
    grad_l1: Tensor | None = None,
    grad_total: Tensor | None = None,
    *,
    activation: Activation,
    tile: LatentTile,
    split: int,
    precision: str,
) -> tuple[Tensor, Tensor | None]:
    """The latent of `x` and, given ō, the gradient of the loss with respect to the pre-activation.

    Args:
        x: [N, d] bf16, fp16 or fp32, unit stride along d, any row stride (0 included).
        grad_pre: ō [N, d], the gradient before the output activation, dtype and layout as `x`; None makes h alone.
        weight: [H, d], the dtype of `x`, unit stride along d.
        bias_enc: [H], any floating dtype, or None.
        grad_l1: [N] fp32, contiguous, or None: times the latent's sign, added to h̄.
        grad_total: [H] fp32, contiguous, or None: added to h̄.
        activation: f, an entry with a Triton pair.
        tile: rows of x, rows of W and columns of both that a program holds at a time; block_h may be less than H.
        split: into how many parts d is divided; their fp32 sums are added in a fixed order.
        precision: "ieee" or "tf32", for fp32 inputs.

    Returns:
        h and ā (None without `grad_pre`), both [N, H], contiguous, in the dtype of `x`.
    """
    assert activation.triton is not None
    N, D = x.shape
    H = weight.shape[0]
    h = torch.empty((N, H), dtype=x.dtype, device=x.device)
    grad_a = None if grad_pre is None else torch.empty_like(h)
    a, grad_h = h, grad_a
    if split > 1:
        a = torch.empty((split, N, H), dtype=torch.float32, device=x.device)
        grad_h = None if grad_pre is None else torch.empty_like(a)
    bottleneck_latent_kernel[(cdiv(N, tile.block_n), cdiv(H, tile.block_h), split)](
        grad_pre_ptr=grad_pre,
        x_ptr=x,
        w_ptr=weight,
        bias_enc_ptr=bias_enc,
        grad_l1_ptr=grad_l1,
        grad_total_ptr=grad_total,
        h_ptr=a,
        grad_a_ptr=grad_h,
        N=N,
        H=H,
        D=D,
        stride_grad_pre=0 if grad_pre is None else grad_pre.stride(0),
        stride_x=x.stride(0),
        stride_w=weight.stride(0),
        ACTIVATION=activation.triton[0],
        DERIVATIVE=activation.triton[1],
        PRECISION=precision,
        WHOLE=split == 1,
        EVEN_H=H % tile.block_h == 0,
        EVEN_D=D % tile.block_d == 0,
        ALIGNMENT=alignment(x, grad_pre, weight),
        BLOCK_N=tile.block_n,
        BLOCK_H=tile.block_h,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if split > 1:
        parts, block = combine_blocks(split)
        combine_latent_kernel[(cdiv(h.numel(), block),)](
            a_ptr=a,
            grad_h_ptr=grad_h,
            bias_enc_ptr=bias_enc,
            grad_l1_ptr=grad_l1,
            grad_total_ptr=grad_total,
            h_ptr=h,
            grad_a_ptr=grad_a,
            size=h.numel(),
            columns=H,
            split=split,
            ACTIVATION=activation.triton[0],
            DERIVATIVE=activation.triton[1],
            PARTS=parts,
            BLOCK=block,
            num_warps=4,
        )
    return h, grad_a
