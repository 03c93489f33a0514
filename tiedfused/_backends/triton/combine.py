"""Sum of the fp32 partial results of a split launch, in a fixed order: ``out = g(Σₛ partial[s] + bias)``."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tiedfused._backends.triton.grid import cdiv
from tiedfused._backends.triton.launch import Grid, Repeats, launch
from tiedfused.activations import Activation


@triton.jit
def sum_parts(
    partial_ptr, offs, mask, size, split, PARTS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr = tl.float32
):
    """Σₛ partial[s, offs] ``[BLOCK]``; `PARTS` of them are read at once, so that the reads wait for memory together."""
    offs_part = tl.arange(0, PARTS).to(tl.int64)
    total = tl.zeros([PARTS, BLOCK], DTYPE)
    for first in tl.range(0, split, PARTS):
        part_ptrs = partial_ptr + (first + offs_part)[:, None] * size + offs[None, :]
        total += tl.load(part_ptrs, mask=(offs_part < split - first)[:, None] & mask[None, :], other=0).to(DTYPE)
    return tl.sum(total, 0)


def combine_blocks(split: int) -> tuple[int, int]:
    """How many parts and how many columns a program of four warps adds at once: 16 elements a thread."""
    parts = min(32, 1 << (split - 1).bit_length())
    return parts, 2048 // parts


@triton.jit
def combine_kernel(
    partial_ptr,
    bias_ptr,
    out_ptr,
    size,
    columns,
    split,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = sum_parts(partial_ptr, offs, mask, size, split, PARTS, BLOCK)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + offs % columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, ACTIVATION(total).to(out_ptr.dtype.element_ty), mask=mask)


def combine(
    partial: Tensor, out: Tensor, bias: Tensor | None, *, activation: Activation, repeats: Repeats | None = None
) -> None:
    """Add the parts in order, add the bias, apply g in fp32, and write the result to `out`.

    Args:
        partial: [split, *out.shape] fp32, contiguous.
        out: contiguous, bf16, fp16 or fp32; overwritten.
        bias: [out.shape[-1]], any floating dtype, or None.
        activation: g, an entry with a Triton pair.
        repeats: of the call that launches this for one chunk after another; or None.
    """
    g = activation.triton
    assert g is not None
    size, split = out.numel(), partial.shape[0]
    parts, block = combine_blocks(split)

    def arguments() -> tuple[Grid, dict[str, Any]]:
        return (cdiv(size, block), 1), {
            "size": size,
            "columns": out.shape[-1],
            "split": split,
            "ACTIVATION": g[0],
            "PARTS": parts,
            "BLOCK": block,
            "num_warps": 4,
        }

    launch(combine_kernel, (partial, bias, out), arguments, repeats, activation.name)
