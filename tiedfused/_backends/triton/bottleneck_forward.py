"""Forward where a row of the latent fits on chip: ``y = g(f(x Wᵀ + b_enc) W + b_dec)``, with d streaming past twice.

A program encodes its rows and then decodes them: x is read once, y written once, and the latent never leaves the chip.
The first product is transposed, so that W's rows are the rows of the tensor-core instructions and few rows of x waste
nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiedfused._backends.triton.alignment import aligned, alignment
from tiedfused._backends.triton.grid import cdiv
from tiedfused._backends.triton.stats import add_partial_stats, partial_stats, store_stats
from tiedfused.activations import Activation
from tiedfused.reference import LatentStats
from tiedfused.tiles import LatentTile


@triton.jit
def bottleneck_forward_kernel(
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
):
    D, stride_x, stride_w = aligned(D, ALIGNMENT), aligned(stride_x, ALIGNMENT), aligned(stride_w, ALIGNMENT)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    mask_h = tl.full([BLOCK_H], True, tl.int1) if EVEN_H else offs_h < H
    rows = offs_n.to(tl.int64)[:, None]
    w_ptrs = w_ptr + offs_h.to(tl.int64)[:, None] * stride_w + offs_d[None, :]

    a_t = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    for d0 in tl.range(0, D, BLOCK_D):
        mask_d = tl.full([BLOCK_D], True, tl.int1) if EVEN_D else offs_d < D - d0
        x_ptrs = x_ptr + rows * stride_x + (d0 + offs_d)[None, :]
        x = tl.load(x_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        w = tl.load(w_ptrs + d0, mask=mask_h[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_H, BLOCK_D]
        a_t = tl.dot(w, x.T, a_t, input_precision=PRECISION)  # [BLOCK_H, BLOCK_N]
    if bias_enc_ptr is not None:
        a_t += tl.load(bias_enc_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)[:, None]
    h = tl.where(mask_h[:, None], ACTIVATION(a_t), 0.0).to(w_ptr.dtype.element_ty).T  # [BLOCK_N, BLOCK_H]
    if l1_ptr is not None:
        store_stats(h, l1_ptr, l0_ptr, total_ptr, fired_ptr, tl.program_id(0), 0, offs_n, offs_h, N, H)

    for d0 in tl.range(0, D, BLOCK_D):
        mask_d = tl.full([BLOCK_D], True, tl.int1) if EVEN_D else offs_d < D - d0
        w = tl.load(w_ptrs + d0, mask=mask_h[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_H, BLOCK_D]
        y = tl.dot(h, w, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
        if bias_dec_ptr is not None:
            y += tl.load(bias_dec_ptr + d0 + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        y_ptrs = y_ptr + rows * D + (d0 + offs_d)[None, :]
        tl.store(y_ptrs, OUTPUT_ACTIVATION(y).to(y_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_d[None, :])


def bottleneck_forward(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    bias_dec: Tensor | None,
    *,
    activation: Activation,
    output_activation: Activation,
    tile: LatentTile,
    precision: str,
    stats: LatentStats | None = None,
) -> Tensor:
    """The reconstruction of `x`, and the statistics of its latent.

    Args:
        x: [N, d] bf16, fp16 or fp32, unit stride along d, any row stride (0 included).
        weight: [H, d], the dtype of `x`, unit stride along d.
        bias_enc: [H], any floating dtype, or None.
        bias_dec: [d], any floating dtype, or None.
        activation: f, an entry with a Triton pair.
        output_activation: g, an entry with a Triton pair; applied in fp32.
        tile: rows of x and columns of W that a program holds at a time; block_h is at least H.
        precision: "ieee" or "tf32", for fp32 inputs.
        stats: the statistics of the latent as it is decoded, rounded to the dtype of `x`, are added to it (see
            `tiedfused._backends`); or None.

    Returns:
        y [N, d], contiguous, in the dtype of `x`.
    """
    assert activation.triton is not None
    assert output_activation.triton is not None
    N, D = x.shape
    H = weight.shape[0]
    assert tile.block_h >= H
    y = torch.empty((N, D), dtype=x.dtype, device=x.device)
    blocks = cdiv(N, tile.block_n)
    parts = None if stats is None else partial_stats(N, H, 1, blocks, x.device)
    bottleneck_forward_kernel[(blocks,)](
        x_ptr=x,
        w_ptr=weight,
        bias_enc_ptr=bias_enc,
        bias_dec_ptr=bias_dec,
        y_ptr=y,
        l1_ptr=None if parts is None else parts.l1,
        l0_ptr=None if parts is None else parts.l0,
        total_ptr=None if parts is None else parts.mean,
        fired_ptr=None if parts is None else parts.fired,
        N=N,
        H=H,
        D=D,
        stride_x=x.stride(0),
        stride_w=weight.stride(0),
        ACTIVATION=activation.triton[0],
        OUTPUT_ACTIVATION=output_activation.triton[0],
        PRECISION=precision,
        EVEN_H=H == tile.block_h,
        EVEN_D=D % tile.block_d == 0,
        ALIGNMENT=alignment(x, weight),
        BLOCK_N=tile.block_n,
        BLOCK_H=tile.block_h,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if stats is not None and parts is not None:
        add_partial_stats(parts, stats, slice(0, N), slice(0, H))
    return y
