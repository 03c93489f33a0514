"""The native op of csrc/ for few rows of x: each row of the weight is read from memory once, for both products."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled

from tiedfused.planning import Plan
from tiedfused.reference import LatentStats


@functools.cache
def _kernel(op: str, device: str) -> Any:
    """The op's kernel for a device, past the dispatcher's search for what else has a hand in the call.

    There is nothing: no gradient is asked for, and `functional` has looked for the rest. The search takes 2 of 6 µs,
    and 70 of 150 from cold caches, with what Python does for it.
    """
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))
    return functools.partial(getattr(torch.ops.tiedfused, op).default._handle.redispatch_boxed, key)


def copyable(weight: Tensor) -> Tensor:
    """W with rows that the CUDA kernels can copy, 16 bytes at a time: each of them starts at a multiple of that."""
    aligned = weight.data_ptr() % 16 == 0 and weight.stride(0) * weight.element_size() % 16 == 0
    return weight if aligned else weight.clone(memory_format=torch.contiguous_format)


def forward(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    bias_dec: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, None, LatentStats | None]:
    """y ``[N, d]`` and, if the plan has them, the latent's statistics; the latent is never kept."""
    f, g = plan.activation.name, plan.output_activation.name
    if weight.is_cuda:
        weight = copyable(weight)
    op = "few_rows_stats" if plan.stats else "few_rows"
    if _profiler_enabled():  # it sees what is dispatched
        with torch._C._AutoDispatchBelowAutograd():
            found = getattr(torch.ops.tiedfused, op).default(x, weight, bias_enc, bias_dec, f, g)
    else:
        found = _kernel(op, plan.device)(x, weight, bias_enc, bias_dec, f, g)
    if not plan.stats:
        return found, None, None
    y, *stats = found
    return y, None, LatentStats(*stats)
