"""Gradient of the input: ``x̄ = ā W``, with ``ā = h̄ ⊙ f′(x Wᵀ + b_enc)`` recomputed; one fetch of W serves all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiedfused._backends.triton import rows
from tiedfused._backends.triton.alignment import aligned, alignment
from tiedfused._backends.triton.combine import combine
from tiedfused._backends.triton.grid import cdiv, part_of
from tiedfused._backends.triton.stats import times_sign
from tiedfused.activations import IDENTITY, Activation
from tiedfused.tiles import Tile, block_d


@triton.jit
def input_grad_kernel(
    grad_pre_ptr,
    x_ptr,
    w_ptr,
    bias_enc_ptr,
    grad_l1_ptr,
    grad_total_ptr,
    grad_x_ptr,
    N,
    H,
    D,
    stride_grad_pre,
    stride_x,
    stride_w,
    ACTIVATION: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    D, stride_w = aligned(D, ALIGNMENT), aligned(stride_w, ALIGNMENT)
    stride_x, stride_grad_pre = aligned(stride_x, ALIGNMENT), aligned(stride_grad_pre, ALIGNMENT)
    part = tl.program_id(1)
    n0 = tl.program_id(0) * BLOCK_N
    offs_h = tl.arange(0, BLOCK_H)
    row = rows.numbers(n0, N, BLOCK_N)

    x = rows.load(x_ptr + row * stride_x, None, D, EVEN_D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    grad_pre = rows.load(grad_pre_ptr + row * stride_grad_pre, None, D, EVEN_D, BLOCK_D)
    if grad_l1_ptr is not None:
        grad_l1 = tl.load(grad_l1_ptr + row)[:, None]
    grad_x = rows.zeros(BLOCK_N, BLOCK_D)
    offs_w = offs_h.to(tl.int64) * stride_w

    start, end = part_of(part, tl.num_programs(1), H, BLOCK_H, SPECIALIZED=False)
    for h0 in tl.range(start, end, BLOCK_H):
        mask_h = tl.full([BLOCK_H], True, tl.int1) if EVEN_H else offs_h < H - h0
        w_ptrs = w_ptr + tl.cast(h0, tl.int64) * stride_w + offs_w
        w = rows.load(w_ptrs, mask_h, D, EVEN_D, BLOCK_D)  # [BLOCK_H, BLOCK_D]
        a = rows.dot_transposed(x, w, PRECISION)  # [BLOCK_N, BLOCK_H]
        if bias_enc_ptr is not None:
            bias_enc = tl.load(bias_enc_ptr + h0 + offs_h, mask=mask_h, other=0.0)
            a = rows.add_bias(a, bias_enc[None, :])
        grad_h = rows.dot_transposed(grad_pre, w, PRECISION)  # [BLOCK_N, BLOCK_H]
        h = ACTIVATION(a)
        slope = DERIVATIVE(a, h)
        # penalties after the product with f′: before it, sm_100 takes one more buffer of W, which does not fit at d 512
        grad_a = grad_h * slope
        if grad_l1_ptr is not None:
            grad_a += times_sign(grad_l1, h) * slope
        if grad_total_ptr is not None:
            grad_a += tl.load(grad_total_ptr + h0 + offs_h, mask=mask_h, other=0.0)[None, :] * slope
        grad_a = tl.where(mask_h[None, :], grad_a, 0.0)
        grad_x = rows.dot_add(grad_a.to(w_ptr.dtype.element_ty), w, grad_x, PRECISION)  # [BLOCK_N, BLOCK_D]

    grad_x_part = grad_x_ptr + (tl.cast(part, tl.int64) * N + n0) * D
    rows.store(grad_x_part, grad_x, N - n0, D, EVEN_D, BLOCK_N, BLOCK_D)


def input_grad(
    grad_pre: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    grad_l1: Tensor | None = None,
    grad_total: Tensor | None = None,
    *,
    activation: Activation,
    tile: Tile,
    split: int,
    precision: str,
) -> Tensor:
    """The gradient of the loss with respect to `x`.

    Args:
        grad_pre: ō [N, d], the gradient before the output activation; dtype and layout as `x`.
        x: [N, d] bf16, fp16 or fp32, unit stride along d, any row stride (0 included).
        weight: [H, d], the dtype of `x`, unit stride along d.
        bias_enc: [H], any floating dtype, or None.
        grad_l1: [N] fp32, contiguous, or None: times the latent's sign, added to h̄.
        grad_total: [H] fp32, contiguous, or None: added to h̄.
        activation: f, an entry with a Triton pair.
        tile: rows of x and of W a program holds at a time.
        split: into how many parts H is divided, at most its tiles; their fp32 sums are added in a fixed order.
        precision: "ieee" or "tf32", for fp32 inputs.

    Returns:
        x̄ [N, d], contiguous, in the dtype of `x`.
    """
    assert activation.triton is not None
    N, D = x.shape
    H = weight.shape[0]
    grad_x = torch.empty((N, D), dtype=x.dtype, device=x.device)
    partial = grad_x if split == 1 else torch.empty((split, N, D), dtype=torch.float32, device=x.device)
    assert split <= cdiv(H, tile.block_h)
    widths = block_d(D)
    input_grad_kernel[(cdiv(N, tile.block_n), split)](
        grad_pre_ptr=grad_pre,
        x_ptr=x,
        w_ptr=weight,
        bias_enc_ptr=bias_enc,
        grad_l1_ptr=grad_l1,
        grad_total_ptr=grad_total,
        grad_x_ptr=partial,
        N=N,
        H=H,
        D=D,
        stride_grad_pre=grad_pre.stride(0),
        stride_x=x.stride(0),
        stride_w=weight.stride(0),
        ACTIVATION=activation.triton[0],
        DERIVATIVE=activation.triton[1],
        PRECISION=precision,
        EVEN_H=H % tile.block_h == 0,
        EVEN_D=sum(widths) == D,
        ALIGNMENT=alignment(x, grad_pre, weight),
        BLOCK_N=tile.block_n,
        BLOCK_H=tile.block_h,
        BLOCK_D=widths,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if split > 1:
        combine(partial, grad_x, None, activation=IDENTITY)
    return grad_x
