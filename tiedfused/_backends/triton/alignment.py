"""What rows are multiples of. Triton sees by itself whether that is 16; rows of 8 half-precision numbers are aligned
as well, for the widest loads and for asynchronous copies.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor


def alignment(*rows: Tensor | None) -> int:
    """The largest power of two up to 16 that divides the widths and strides, in elements, of all `rows` ``[R, D]``."""
    return math.gcd(16, *(size for t in rows if t is not None for size in (t.shape[1], t.stride(0))))


@triton.jit
def aligned(size, ALIGNMENT: tl.constexpr):
    """`size`, a multiple of `ALIGNMENT`, in a form that shows it."""
    return size // ALIGNMENT * ALIGNMENT
