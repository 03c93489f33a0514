"""Rows of D elements on chip: tiles side by side, a tuple of them, whose widths BLOCK_D are powers of two."""

from __future__ import annotations

import triton
import triton.language as tl

from tiedfused._backends.triton.compat import make_descriptor


@triton.constexpr_function
def first_column(i, BLOCK_D):
    """The column at which tile `i` begins."""
    return sum(BLOCK_D[:i])


@triton.constexpr_function
def width(i, BLOCK_D):
    """The number of columns of tile `i`."""
    return BLOCK_D[i]


@triton.jit
def columns(i: tl.constexpr, D, EVEN_D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns of tile `i`, and which of them exist: only in the last tile may some not."""
    offs = first_column(i, BLOCK_D) + tl.arange(0, width(i, BLOCK_D))
    if EVEN_D or i + 1 < len(BLOCK_D):
        return offs, tl.full([width(i, BLOCK_D)], True, tl.int1)
    return offs, offs < D


@triton.jit
def numbers(first, R, BLOCK_R: tl.constexpr):
    """BLOCK_R row numbers from `first` on, 64 bits; beyond the last row of R the last one again, which can be read."""
    return tl.minimum(first + tl.arange(0, BLOCK_R), R - 1).to(tl.int64)


@triton.jit
def load(ptrs, mask, D, EVEN_D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows that begin at `ptrs` [R], zeros where `mask` [R], if there is one, or the column says so."""
    tiles = ()
    for i in tl.static_range(len(BLOCK_D)):
        offs_d, mask_d = columns(i, D, EVEN_D, BLOCK_D)
        mask_rd = mask_d[None, :] if mask is None else mask[:, None] & mask_d[None, :]
        tile = tl.load(ptrs[:, None] + offs_d[None, :], mask=mask_rd, other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def describe(ptr, R, D, stride, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Descriptors of the tiles of BLOCK_R rows of the matrix [R, D] at `ptr`."""
    descriptors = ()
    for i in tl.static_range(len(BLOCK_D)):
        descriptors = descriptors + (make_descriptor(ptr, (R, D), (stride, 1), (BLOCK_R, width(i, BLOCK_D))),)
    return descriptors


@triton.jit
def load_described(descriptors, row, BLOCK_D: tl.constexpr):
    """The rows from `row` on, zeros beyond the last one."""
    tiles = ()
    for i in tl.static_range(len(BLOCK_D)):
        tiles = tiles + (descriptors[i].load([row, first_column(i, BLOCK_D)]),)
    return tiles


@triton.jit
def store(ptr, tiles, count, D, EVEN_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the first `count` of BLOCK_R rows to `ptr`, one after the other, in the dtype that is there.

    Addressed from `ptr` on in 32 bits, and bounded by `count`, so that nothing of it is made before a loop, and shared
    with the loads there: a thread would keep 64-bit row numbers and the mask, 32 to 64 registers, all through the loop.
    """
    row = tl.arange(0, BLOCK_R)
    offs = tl.minimum(row, count - 1) * D
    for i in tl.static_range(len(BLOCK_D)):
        offs_d, mask_d = columns(i, D, EVEN_D, BLOCK_D)
        tile = tiles[i].to(ptr.dtype.element_ty)
        tl.store(ptr + offs[:, None] + offs_d[None, :], tile, mask=(row < count)[:, None] & mask_d[None, :])


@triton.jit
def zeros(R: tl.constexpr, BLOCK_D: tl.constexpr):
    """R rows of fp32 zeros."""
    tiles = ()
    for i in tl.static_range(len(BLOCK_D)):
        tiles = tiles + (tl.zeros([R, width(i, BLOCK_D)], tl.float32),)
    return tiles


@triton.jit
def dot_transposed(left, right, PRECISION: tl.constexpr):
    """``left rightᵀ`` of two sets of rows."""
    product = tl.dot(left[0], right[0].T, input_precision=PRECISION)
    for i in tl.static_range(1, len(left)):
        product = tl.dot(left[i], right[i].T, product, input_precision=PRECISION)
    return product


@triton.jit
def dot_add(left, right, total, PRECISION: tl.constexpr):
    """``total + left right`` of a matrix and rows."""
    tiles = ()
    for i in tl.static_range(len(right)):
        tiles = tiles + (tl.dot(left, right[i], total[i], input_precision=PRECISION),)
    return tiles


@triton.jit
def add_bias(product, bias):
    """``product + bias``, never as the accumulator that the product starts from.

    Triton would fold a plain addition into the product, and ptxas then waits for each of its wgmma instructions before
    the next, since ordinary instructions write their accumulator. Not so in specialised warps: it saves them registers.
    """
    return tl.fma(product, 1.0, bias.to(tl.float32))


@triton.jit
def finish(sums, bias_ptr, ACTIVATION: tl.constexpr, D, EVEN_D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The activation of rows of `sums` plus the bias [D], or None."""
    tiles = ()
    for i in tl.static_range(len(BLOCK_D)):
        tile = sums[i]
        if bias_ptr is not None:
            offs_d, mask_d = columns(i, D, EVEN_D, BLOCK_D)
            tile += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        tiles = tiles + (ACTIVATION(tile),)
    return tiles
