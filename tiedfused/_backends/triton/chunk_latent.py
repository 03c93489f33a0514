"""A chunk of the latent: ``h = f(x Wᵀ + b_enc)`` and, for the backward pass, ``ā = (ō Wᵀ) ⊙ f′``; W is fetched once for
both products. Where the forward kept h, it is read, and only the second product is made.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tiedfused._backends.triton.alignment import aligned, alignment
from tiedfused._backends.triton.grid import block_of, cdiv
from tiedfused._backends.triton.launch import Grid, Repeats, launch
from tiedfused._backends.triton.rows import numbers
from tiedfused._backends.triton.stats import add_penalties, store_stats
from tiedfused.activations import Activation
from tiedfused.reference import LatentStats
from tiedfused.tiles import GemmTile


@triton.jit
def chunk_latent_kernel(
    x_ptr,
    grad_pre_ptr,
    w_ptr,
    bias_enc_ptr,
    grad_l1_ptr,
    grad_total_ptr,
    h_ptr,
    grad_a_ptr,
    grad_bias_enc_ptr,
    l1_ptr,
    l0_ptr,
    total_ptr,
    fired_ptr,
    N,
    H,
    D,
    stride_x,
    stride_grad_pre,
    stride_w,
    stride_h,
    stride_grad_a,
    stride_grad_bias_enc,
    ACTIVATION: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    KEPT: tl.constexpr,
    EVEN_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    LATENT_ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    D, stride_w = aligned(D, ALIGNMENT), aligned(stride_w, ALIGNMENT)
    stride_x, stride_grad_pre = aligned(stride_x, ALIGNMENT), aligned(stride_grad_pre, ALIGNMENT)
    H, stride_h = aligned(H, LATENT_ALIGNMENT), aligned(stride_h, LATENT_ALIGNMENT)
    stride_grad_a = aligned(stride_grad_a, LATENT_ALIGNMENT)
    block_n, block_h = block_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(H, BLOCK_H), GROUP)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = block_h * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    mask_h = offs_h < H
    # rows outside are read as the last one, and never written: no mask for them in the loop
    rows = numbers(block_n * BLOCK_N, N, BLOCK_N)[:, None]
    latents = numbers(block_h * BLOCK_H, H, BLOCK_H)[:, None]

    a = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    grad_h = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    # see grid.part_of
    tl.assume(D > 0)
    for d0 in tl.range(0, D, BLOCK_D):
        mask_d = tl.full([1, BLOCK_D], True, tl.int1) if EVEN_D else (offs_d < D - d0)[None, :]
        columns = d0 + offs_d[None, :]
        w = tl.load(w_ptr + latents * stride_w + columns, mask=mask_d, other=0.0)  # [BLOCK_H, BLOCK_D]
        if not KEPT:
            x = tl.load(x_ptr + rows * stride_x + columns, mask=mask_d, other=0.0)  # [BLOCK_N, BLOCK_D]
            a = tl.dot(x, w.T, a, input_precision=PRECISION)  # [BLOCK_N, BLOCK_H]
        if grad_pre_ptr is not None:
            grad_pre = tl.load(grad_pre_ptr + rows * stride_grad_pre + columns, mask=mask_d, other=0.0)
            grad_h = tl.dot(grad_pre, w.T, grad_h, input_precision=PRECISION)  # [BLOCK_N, BLOCK_H]

    mask = mask_n[:, None] & mask_h[None, :]
    if h_ptr is not None:
        h_ptrs = h_ptr + offs_n.to(tl.int64)[:, None] * stride_h + offs_h[None, :]
    if KEPT:
        h = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        a = h  # f′ is read off h here: `Activation.from_output`
    else:
        if bias_enc_ptr is not None:
            a += tl.load(bias_enc_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)[None, :]
        h = ACTIVATION(a)
        if h_ptr is not None:
            tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask)
    if l1_ptr is not None:
        decoded = h.to(h_ptr.dtype.element_ty)
        store_stats(decoded, l1_ptr, l0_ptr, total_ptr, fired_ptr, block_n, block_h, offs_n, offs_h, N, H)
    if grad_pre_ptr is not None:
        at = (offs_n[:, None], offs_h[None, :], mask_n[:, None], mask_h[None, :])
        grad_h = add_penalties(grad_h, h, grad_l1_ptr, grad_total_ptr, *at)
        grad_a = tl.where(mask, grad_h * DERIVATIVE(a, h), 0.0)
        grad_a_ptrs = grad_a_ptr + offs_n.to(tl.int64)[:, None] * stride_grad_a + offs_h[None, :]
        tl.store(grad_a_ptrs, grad_a.to(grad_a_ptr.dtype.element_ty), mask=mask)
        if grad_bias_enc_ptr is not None:
            grad_bias_ptrs = grad_bias_enc_ptr + tl.cast(block_n, tl.int64) * stride_grad_bias_enc + offs_h
            tl.store(grad_bias_ptrs, tl.sum(grad_a, 0), mask=mask_h)


def chunk_latent(
    x: Tensor,
    grad_pre: Tensor | None,
    weight: Tensor,
    bias_enc: Tensor | None,
    grad_l1: Tensor | None = None,
    grad_total: Tensor | None = None,
    *,
    h: Tensor | None,
    kept: bool = False,
    grad_a: Tensor | None = None,
    grad_bias_enc: Tensor | None = None,
    stats: LatentStats | None = None,
    activation: Activation,
    tile: GemmTile,
    precision: str,
    repeats: Repeats | None = None,
) -> None:
    """Write a chunk of h, of ā, or of both.

    Args:
        x: [N, d] bf16, fp16 or fp32, unit stride along d, any row stride (0 included).
        grad_pre: ō [N, d], the gradient before the output activation, dtype and layout as `x`; None makes h alone.
        weight: [H, d], the chunk's rows, the dtype of `x`, unit stride along d.
        bias_enc: [H], any floating dtype, or None.
        grad_l1: [N] fp32, contiguous, or None: times the latent's sign, added to h̄.
        grad_total: [H] fp32, contiguous, or None: added to h̄.
        h: [N, H], the dtype of `x`, unit stride along H: written, or read if `kept`; None where it is not asked for.
        kept: `h` holds the latent already.
        grad_a: ā [N, H], likewise; written if `grad_pre` is given.
        grad_bias_enc: [ceil(N / tile.block_m), H] fp32, unit stride along H: written, each row the sum of ā over that
            many rows; or None.
        stats: partial statistics of h, a row a block of latents and a latent a block of rows: written; or None.
        activation: f, an entry with a Triton pair; with `kept` one whose gradient is read off its output.
        tile: block_m rows, block_n latents, block_k of d a step.
        precision: "ieee" or "tf32", for fp32 inputs.
        repeats: of the call that launches this for one chunk after another; or None.
    """
    f = activation.triton
    assert f is not None
    N, D = x.shape
    H = weight.shape[0]
    sums = (None,) * 4 if stats is None else (stats.l1, stats.l0, stats.mean, stats.fired)

    def arguments() -> tuple[Grid, dict[str, Any]]:
        return (cdiv(N, tile.block_m) * cdiv(H, tile.block_n), 1), {
            "N": N,
            "H": H,
            "D": D,
            "stride_x": x.stride(0),
            "stride_grad_pre": 0 if grad_pre is None else grad_pre.stride(0),
            "stride_w": weight.stride(0),
            "stride_h": 0 if h is None else h.stride(0),
            "stride_grad_a": 0 if grad_a is None else grad_a.stride(0),
            "stride_grad_bias_enc": 0 if grad_bias_enc is None else grad_bias_enc.stride(0),
            "ACTIVATION": f[0],
            "DERIVATIVE": f[1],
            "PRECISION": precision,
            "KEPT": kept,
            "EVEN_D": D % tile.block_k == 0,
            "ALIGNMENT": alignment(x, grad_pre, weight),
            "LATENT_ALIGNMENT": alignment(h, grad_a),
            "BLOCK_N": tile.block_m,
            "BLOCK_H": tile.block_n,
            "BLOCK_D": tile.block_k,
            "GROUP": 8,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    operands = (x, grad_pre, weight, bias_enc, grad_l1, grad_total, h, grad_a, grad_bias_enc, *sums)
    launch(chunk_latent_kernel, operands, arguments, repeats, (activation.name, kept, tile, precision))
