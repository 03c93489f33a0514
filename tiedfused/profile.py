"""What a call costs in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(fn: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes of tensor memory alive at once while ``fn()`` runs, above what was alive before.

    On CUDA it reads the caching allocator's counters. On a CPU, where PyTorch keeps no such counter, it records every
    allocation and release of one run with `torch.profiler` and takes the highest point of their running sum. Memory
    that PyTorch does not allocate (BLAS scratch, Python objects) is in neither, nor, on a CPU, what threads that fn
    starts allocate. A tensor that existed before and is released during the call lowers the sum.

    Args:
        fn: called once, without arguments; its result is dropped. Run it once before, so that what is allocated only
            the first time (caches, compiled kernels) does not count.
        device: where fn's tensors live.

    Returns:
        Bytes, at least 0.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA device.

    Example:
        >>> import torch
        >>> def two_alive() -> None:
        ...     a, b = torch.empty(1000), torch.empty(1000)
        >>> peak_memory(two_alive)
        8000
        >>> def one_at_a_time() -> None:
        ...     for _ in range(2):
        ...         a = torch.empty(1000)
        ...         del a
        >>> peak_memory(one_at_a_time)
        4000
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(f"device: expected a cpu or cuda device, got {device}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start and stop on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fn()
    # The public event list leaves out what is allocated inside operators, hence the raw one. It is in order of time.
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = (event.nbytes() for event in results.events() if event.name() == "[memory]")
    return max(accumulate(changes, initial=0))
