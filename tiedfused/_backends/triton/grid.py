"""How many blocks there are, and the order in which programs take those of a matrix product."""

from __future__ import annotations

import triton
import triton.language as tl


def cdiv(size: int, block: int) -> int:
    """How many blocks hold `size`. `triton.cdiv` takes the host 1.6 µs, and some launches count five times."""
    return -(-size // block)


@triton.jit
def block_of(program, rows, columns, GROUP: tl.constexpr):
    """Row and column of the block that `program` makes, of a grid of rows × columns blocks.

    Programs that run at the same time share GROUP rows of blocks, so that both operands are read again from the L2
    cache, and not from memory.
    """
    group = program // (GROUP * columns)
    first = group * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = program % (GROUP * columns)
    return first + within % height, within // height


@triton.jit
def part_of(part, parts, size, BLOCK: tl.constexpr, SPECIALIZED: tl.constexpr):
    """Where part `part` of `parts` begins and ends: some of the blocks of `size`, of which there is one for every part.

    No part is empty, and the compiler is told: else it would copy the sums of a loop that never ran to the registers of
    those of one that did, and ptxas wait for every wgmma instruction before the next. Not for SPECIALIZED warps: their
    wgmma is not serialised, and Triton 3.6 fails to specialise an assumption.
    """
    blocks = tl.cdiv(size, BLOCK)
    # in 64 bits: parts · blocks may pass 2³¹
    start = (tl.cast(part, tl.int64) * blocks // parts).to(tl.int32) * BLOCK
    end = tl.minimum((tl.cast(part + 1, tl.int64) * blocks // parts).to(tl.int32) * BLOCK, size)
    if not SPECIALIZED:
        tl.assume(end > start)
    return start, end
