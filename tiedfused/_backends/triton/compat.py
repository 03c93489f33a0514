"""What the kernels use of Triton that its versions do differently: tensor descriptors made on the device.

A descriptor lets the TMA unit of compute capability 9.0 and later copy tiles; it lives in global memory, which the
launch has to provide.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def make_descriptor(ptr, shape, strides, BLOCK: tl.constexpr):
    """Tiles of shape `BLOCK` of the vector or matrix at `ptr`; what lies outside of it reads as zeros."""
    return tl.make_tensor_descriptor(ptr, shape=shape, strides=strides, block_shape=BLOCK)


def describable(*operands: Tensor | None) -> bool:
    """Whether TMA can read every matrix [R, C] and vector: from 16 bytes to 16 bytes on, rows one after the other."""
    return all(
        t.data_ptr() % 16 == 0
        and all(
            stride >= width and stride * t.element_size() % 16 == 0
            for stride, width in zip(t.stride()[:-1], t.shape[1:], strict=True)
        )
        for t in operands
        if t is not None
    )


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    # the caching allocator aligns to 512 bytes, and reuses the memory only in the order of the stream launched on
    return torch.empty(size, dtype=torch.int8, device="cuda")


def with_descriptor_memory(launch: Callable[..., object]) -> Callable[..., object]:
    """`launch` for a kernel that makes descriptors, whose memory is on the current device and in its stream's order.

    Triton keeps the allocator in a context variable, so each thread has its own, autograd's included. It is set in a
    copy of the context: a caller's own allocator stays what it was.
    """

    def launch_with_memory(**arguments: object) -> None:
        triton.set_allocator(_allocate)
        launch(**arguments)

    return lambda **arguments: contextvars.copy_context().run(launch_with_memory, **arguments)
