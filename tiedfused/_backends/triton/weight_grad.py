"""Gradients of the weight and the encoder bias, both terms in one accumulator: ``W̄ = āᵀ x + hᵀ ō``, ``b̄_enc = Σₙ ā``.

A program keeps a tile of W and streams x and ō past it. Their rows are interleaved (x₀, ō₀, x₁, ō₁, …) in one tile
[x; ō], so that each step is two products instead of four: ``W [x; ō]ᵀ`` holds a and h̄ side by side in the same thread,
and ``[ā h] [x; ō]`` is the sum of both terms of W̄. The warp-specialised form keeps x and ō apart and takes four
products: TMA has no interleaved copy, and Triton 3.6 does not specialise the split of a and h̄.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiedfused._backends.triton import rows
from tiedfused._backends.triton.alignment import aligned, alignment
from tiedfused._backends.triton.combine import combine
from tiedfused._backends.triton.compat import describable, make_descriptor, with_descriptor_memory
from tiedfused._backends.triton.grid import cdiv, part_of
from tiedfused._backends.triton.stats import times_sign
from tiedfused.activations import IDENTITY, Activation
from tiedfused.tiles import Tile, block_d


@triton.jit
def weight_grad_kernel(
    grad_pre_ptr,
    x_ptr,
    w_ptr,
    bias_enc_ptr,
    grad_l1_ptr,
    grad_total_ptr,
    grad_w_ptr,
    grad_bias_enc_ptr,
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
    EVEN_N: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    D, stride_w = aligned(D, ALIGNMENT), aligned(stride_w, ALIGNMENT)
    stride_x, stride_grad_pre = aligned(stride_x, ALIGNMENT), aligned(stride_grad_pre, ALIGNMENT)
    h0 = tl.program_id(0) * BLOCK_H
    part = tl.program_id(1)
    offs_n = tl.arange(0, BLOCK_N)
    offs_h = h0 + tl.arange(0, BLOCK_H)
    mask_h = tl.full([BLOCK_H], True, tl.int1) if EVEN_H else offs_h < H

    if WARP_SPECIALIZE:  # one warp group copies tiles of x and ō through TMA while two others multiply
        w_tiles = rows.describe(w_ptr, H, D, stride_w, BLOCK_H, BLOCK_D)
        x_tiles = rows.describe(x_ptr, N, D, stride_x, BLOCK_N, BLOCK_D)
        grad_pre_tiles = rows.describe(grad_pre_ptr, N, D, stride_grad_pre, BLOCK_N, BLOCK_D)
        w = rows.load_described(w_tiles, h0, BLOCK_D)  # [BLOCK_H, BLOCK_D]
        if bias_enc_ptr is not None:
            bias_enc = make_descriptor(bias_enc_ptr, (H,), (1,), (BLOCK_H,)).load([h0]).to(tl.float32)
    else:
        w_ptrs = w_ptr + rows.numbers(h0, H, BLOCK_H) * stride_w
        # x̄ adds up products with W: copies of the last latent, were that infinite, would make NaNs of its zeros
        mask_w = None if grad_x_ptr is None else mask_h
        w = rows.load(w_ptrs, mask_w, D, EVEN_D, BLOCK_D)
        if bias_enc_ptr is not None:
            bias_enc = tl.load(bias_enc_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    if grad_total_ptr is not None:
        grad_total = tl.load(grad_total_ptr + offs_h, mask=mask_h, other=0.0)[:, None]
    grad_w = rows.zeros(BLOCK_H, BLOCK_D)
    grad_bias_enc = tl.zeros([BLOCK_H], tl.float32)

    pair = tl.arange(0, 2 * BLOCK_N)
    pair_n = pair // 2
    is_x = pair % 2 == 0
    pair_ptr = tl.where(is_x, x_ptr, grad_pre_ptr)
    pair_stride = tl.where(is_x, stride_x, stride_grad_pre).to(tl.int64)
    start, end = part_of(part, tl.num_programs(1), N, BLOCK_N, WARP_SPECIALIZE)
    for n0 in tl.range(start, end, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        mask_n = tl.full([BLOCK_N], True, tl.int1) if EVEN_N else offs_n < N - n0
        mask_pair = tl.full([2 * BLOCK_N], True, tl.int1) if EVEN_N else pair_n < N - n0
        mask_hn = mask_h[:, None] & mask_n[None, :]
        if WARP_SPECIALIZE:
            x = rows.load_described(x_tiles, n0, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            grad_pre = rows.load_described(grad_pre_tiles, n0, BLOCK_D)
            a = rows.dot_transposed(w, x, PRECISION)  # [BLOCK_H, BLOCK_N]
            grad_h = rows.dot_transposed(w, grad_pre, PRECISION)
        else:
            x_grad_pre_ptrs = pair_ptr + (n0 + pair_n) * pair_stride
            x_grad_pre = rows.load(x_grad_pre_ptrs, mask_pair, D, EVEN_D, BLOCK_D)  # [2 * BLOCK_N, BLOCK_D]
            a_grad_h = rows.dot_transposed(w, x_grad_pre, PRECISION)  # [BLOCK_H, 2 * BLOCK_N]
            a, grad_h = tl.split(tl.reshape(a_grad_h, [BLOCK_H, BLOCK_N, 2]))  # [BLOCK_H, BLOCK_N] each
        if bias_enc_ptr is not None:
            a += bias_enc[:, None]
        h = ACTIVATION(a)
        if grad_l1_ptr is not None:
            grad_l1 = tl.load(grad_l1_ptr + n0 + offs_n, mask=mask_n, other=0.0)[None, :]
            grad_h += times_sign(grad_l1, h)
        if grad_total_ptr is not None:
            grad_h += grad_total
        grad_a = tl.where(mask_hn, grad_h * DERIVATIVE(a, h), 0.0)
        h = tl.where(mask_hn, h, 0.0)
        grad_bias_enc += tl.sum(grad_a, 1)
        if WARP_SPECIALIZE:
            grad_w = rows.dot_add(h.to(w_ptr.dtype.element_ty), grad_pre, grad_w, PRECISION)  # [BLOCK_H, BLOCK_D]
            grad_w = rows.dot_add(grad_a.to(w_ptr.dtype.element_ty), x, grad_w, PRECISION)
        else:
            grad_a_h = tl.reshape(tl.join(grad_a, h), [BLOCK_H, 2 * BLOCK_N]).to(w_ptr.dtype.element_ty)
            grad_w = rows.dot_add(grad_a_h, x_grad_pre, grad_w, PRECISION)  # [BLOCK_H, BLOCK_D]
        if grad_x_ptr is not None:
            grad_a_t = grad_a.to(w_ptr.dtype.element_ty).T
            grad_x_tile = grad_x_ptr + tl.cast(n0, tl.int64) * D
            # the bound changes with n0: offsets that do not would be kept in registers through the loop, and spill
            offs_row = tl.minimum(offs_n, N - 1 - n0)[:, None] * D
            for i in tl.static_range(len(BLOCK_D)):
                offs_d, mask_d = rows.columns(i, D, EVEN_D, BLOCK_D)
                grad_x = tl.dot(grad_a_t, w[i], input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
                mask_nd = mask_n[:, None] & mask_d[None, :]
                tl.atomic_add(grad_x_tile + offs_row + offs_d[None, :], grad_x, mask=mask_nd, sem="relaxed")

    grad_w_part = grad_w_ptr + (tl.cast(part, tl.int64) * H + h0) * D
    rows.store(grad_w_part, grad_w, H - h0, D, EVEN_D, BLOCK_H, BLOCK_D)
    tl.store(grad_bias_enc_ptr + tl.cast(part, tl.int64) * H + offs_h, grad_bias_enc, mask=mask_h)


def weight_grad(
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
    grad_x: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the loss with respect to `weight` and `bias_enc`.

    Args:
        grad_pre: ō [N, d], the gradient before the output activation; dtype and layout as `x`.
        x: [N, d] bf16, fp16 or fp32, unit stride along d, any row stride (0 included).
        weight: [H, d], the dtype of `x`, unit stride along d.
        bias_enc: [H], any floating dtype, or None.
        grad_l1: [N] fp32, contiguous, or None: times the latent's sign, added to h̄.
        grad_total: [H] fp32, contiguous, or None: added to h̄.
        activation: f, an entry with a Triton pair.
        tile: rows of W and of x a program holds at a time; warp-specialised only if TMA can read the operands.
        split: into how many parts N is divided, at most its tiles; their fp32 sums are added in a fixed order.
        precision: "ieee" or "tf32", for fp32 inputs.
        grad_x: [N, d] fp32, contiguous, zeroed: the same pass then adds x̄ to it with atomics, in no fixed order.

    Returns:
        W̄ [H, d], contiguous, in the dtype of `weight`, and b̄_enc [H] in fp32.
    """
    assert activation.triton is not None
    N, D = x.shape
    H = weight.shape[0]
    grad_w = torch.empty((H, D), dtype=weight.dtype, device=x.device)
    grad_bias_enc = torch.empty((H,), dtype=torch.float32, device=x.device)
    if split == 1:
        partial_w, partial_bias_enc = grad_w, grad_bias_enc
    else:
        partial_w = torch.empty((split, H, D), dtype=torch.float32, device=x.device)
        partial_bias_enc = torch.empty((split, H), dtype=torch.float32, device=x.device)
    assert split <= cdiv(N, tile.block_n)
    widths = block_d(D)
    if tile.warp_specialize and not describable(grad_pre, x, weight, bias_enc):
        tile = tile.plain()
    launch = weight_grad_kernel[(cdiv(H, tile.block_h), split)]
    if tile.warp_specialize:
        launch = with_descriptor_memory(launch)
    launch(
        grad_pre_ptr=grad_pre,
        x_ptr=x,
        w_ptr=weight,
        bias_enc_ptr=bias_enc,
        grad_l1_ptr=grad_l1,
        grad_total_ptr=grad_total,
        grad_w_ptr=partial_w,
        grad_bias_enc_ptr=partial_bias_enc,
        grad_x_ptr=grad_x,
        N=N,
        H=H,
        D=D,
        stride_grad_pre=grad_pre.stride(0),
        stride_x=x.stride(0),
        stride_w=weight.stride(0),
        ACTIVATION=activation.triton[0],
        DERIVATIVE=activation.triton[1],
        PRECISION=precision,
        EVEN_N=N % tile.block_n == 0,
        EVEN_H=H % tile.block_h == 0,
        EVEN_D=sum(widths) == D,
        ALIGNMENT=alignment(x, grad_pre, weight),
        BLOCK_N=tile.block_n,
        BLOCK_H=tile.block_h,
        BLOCK_D=widths,
        WARP_SPECIALIZE=tile.warp_specialize,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if split > 1:
        combine(partial_w, grad_w, None, activation=IDENTITY)
        combine(partial_bias_enc, grad_bias_enc, None, activation=IDENTITY)
    return grad_w, grad_bias_enc
