"""Forward: ``y = g(f(x Wᵀ + b_enc) W + b_dec)``, with the latent in registers and one fetch of W for both products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiedfused._backends.triton.combine import combine
from tiedfused.activations import IDENTITY, Activation
from tiedfused.tiles import Tile, block_d


@triton.jit
def forward_kernel(
    x_ptr,
    w_ptr,
    bias_enc_ptr,
    bias_dec_ptr,
    y_ptr,
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
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    part = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    mask_d = tl.full([BLOCK_D], True, tl.int1) if EVEN_D else offs_d < D
    mask_nd = mask_n[:, None] & mask_d[None, :]
    rows = offs_n.to(tl.int64)[:, None]

    x = tl.load(x_ptr + rows * stride_x + offs_d[None, :], mask=mask_nd, other=0.0)  # [BLOCK_N, BLOCK_D]
    y = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    part_size = tl.cdiv(tl.cdiv(H, BLOCK_H), tl.num_programs(1)) * BLOCK_H
    for h0 in tl.range(part * part_size, tl.minimum((part + 1) * part_size, H), BLOCK_H):
        mask_h = tl.full([BLOCK_H], True, tl.int1) if EVEN_H else offs_h < H - h0
        w_ptrs = w_ptr + (h0 + offs_h).to(tl.int64)[:, None] * stride_w + offs_d[None, :]
        w = tl.load(w_ptrs, mask=mask_h[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_H, BLOCK_D]
        a = tl.dot(x, w.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_H]
        if bias_enc_ptr is not None:
            a += tl.load(bias_enc_ptr + h0 + offs_h, mask=mask_h, other=0.0).to(tl.float32)[None, :]
        h = tl.where(mask_h[None, :], ACTIVATION(a), 0.0)
        y = tl.dot(h.to(w.dtype), w, y, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]

    if bias_dec_ptr is not None:
        y += tl.load(bias_dec_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + (tl.cast(part, tl.int64) * N + rows) * D + offs_d[None, :]
    tl.store(y_ptrs, OUTPUT_ACTIVATION(y).to(y_ptr.dtype.element_ty), mask=mask_nd)


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
) -> Tensor:
    """The reconstruction of `x`.

    Args:
        x: [N, d] bf16, fp16 or fp32, unit stride along d, any row stride (0 included).
        weight: [H, d], the dtype of `x`, unit stride along d.
        bias_enc: [H], any floating dtype, or None.
        bias_dec: [d], any floating dtype, or None.
        activation: f, an entry with a Triton pair.
        output_activation: g, an entry with a Triton pair; applied in fp32.
        tile: rows of x and of W a program holds at a time.
        split: into how many parts H is divided; their fp32 sums are added in a fixed order.
        precision: "ieee" or "tf32", for fp32 inputs.

    Returns:
        y [N, d], contiguous, in the dtype of `x`.
    """
    epilogue = output_activation if split == 1 else IDENTITY
    assert activation.triton is not None
    assert epilogue.triton is not None
    N, D = x.shape
    H = weight.shape[0]
    y = torch.empty((N, D), dtype=x.dtype, device=x.device)
    partial = y if split == 1 else torch.empty((split, N, D), dtype=torch.float32, device=x.device)
    padded_d = block_d(D)
    forward_kernel[(triton.cdiv(N, tile.block_n), split)](
        x_ptr=x,
        w_ptr=weight,
        bias_enc_ptr=bias_enc,
        bias_dec_ptr=bias_dec if split == 1 else None,
        y_ptr=partial,
        N=N,
        H=H,
        D=D,
        stride_x=x.stride(0),
        stride_w=weight.stride(0),
        ACTIVATION=activation.triton[0],
        OUTPUT_ACTIVATION=epilogue.triton[0],
        PRECISION=precision,
        EVEN_H=H % tile.block_h == 0,
        EVEN_D=padded_d == D,
        BLOCK_N=tile.block_n,
        BLOCK_H=tile.block_h,
        BLOCK_D=padded_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if split > 1:
        combine(partial, y, bias_dec, activation=output_activation)
    return y
