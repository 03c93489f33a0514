"""The order in which programs take the blocks of a matrix product."""

from __future__ import annotations

import triton
import triton.language as tl


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
