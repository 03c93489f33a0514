"""Sum of the fp32 partial results of a split launch, in a fixed order: ``out = g(Σₛ partial[s] + bias)``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tiedfused.activations import Activation


@triton.jit
def combine_kernel(
    partial_ptr,
    bias_ptr,
    out_ptr,
    size,
    columns,
    split,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < size - start
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.range(0, split):
        total += tl.load(partial_ptr + tl.cast(part, tl.int64) * size + start + offs, mask=mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + (start + offs) % columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + offs, ACTIVATION(total).to(out_ptr.dtype.element_ty), mask=mask)


def combine(partial: Tensor, out: Tensor, bias: Tensor | None, *, activation: Activation) -> None:
    """Add the parts in order, add the bias, apply g in fp32, and write the result to `out`.

    Args:
        partial: [split, *out.shape] fp32, contiguous.
        out: contiguous, bf16, fp16 or fp32; overwritten.
        bias: [out.shape[-1]], any floating dtype, or None.
        activation: g, an entry with a Triton pair.
    """
    assert activation.triton is not None
    size = out.numel()
    block = 1024
    combine_kernel[(triton.cdiv(size, block),)](
        partial_ptr=partial,
        bias_ptr=bias,
        out_ptr=out,
        size=size,
        columns=out.shape[-1],
        split=partial.shape[0],
        ACTIVATION=activation.triton[0],
        BLOCK=block,
        num_warps=4,
    )
