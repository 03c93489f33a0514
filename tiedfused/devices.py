"""What a plan knows of devices: peak rates, caches, and what is and is not there."""

from __future__ import annotations

import dataclasses
import functools
import os

import torch

from tiedfused.settings import MIB

DEFAULT_CAPABILITY = 90  # what "cuda" means where no GPU is present


@dataclasses.dataclass(frozen=True)
class Device:
    """What the roofline knows of a device.

    Args:
        half: dense peak of bf16 and fp16 products with fp32 accumulation, in FLOP/s.
        tf32: the same for tf32.
        fp32: the same for fp32 without tensor cores.
        bandwidth: of the memory, in bytes/s.
        l2_bytes: size of the L2 cache.
        multiprocessors: how many there are.
    """

    half: float
    tf32: float
    fp32: float
    bandwidth: float
    l2_bytes: int
    multiprocessors: int

    def cached_bandwidth(self, in_cache: bool) -> float:
        """In bytes/s, of data that the L2 cache holds or does not hold.

        Vendors do not publish the cache's; microbenchmarks report 1.7 to 2.5 times that of the memory.
        """
        return self.bandwidth * (2 if in_cache else 1)

    def rate(self, dtype: torch.dtype, precision: str) -> float:
        """Peak FLOP/s of products of `dtype`, fp32 ones in `precision` ("ieee" or "tf32")."""
        if dtype.itemsize == 2:
            return self.half
        return self.tf32 if precision == "tf32" else self.fp32


# Vendor data sheets, dense: A100 SXM 80 GB, RTX 3090, RTX 4090, H100 SXM, B200, RTX 5090.
GPUS = {
    80: Device(312e12, 156e12, 19.5e12, 2.04e12, 40 * MIB, 108),
    86: Device(71e12, 35.6e12, 35.6e12, 0.936e12, 6 * MIB, 82),
    89: Device(165e12, 82.6e12, 82.6e12, 1.008e12, 72 * MIB, 128),
    90: Device(989e12, 494e12, 67e12, 3.35e12, 50 * MIB, 132),
    100: Device(2250e12, 1100e12, 80e12, 8.0e12, 126 * MIB, 148),
    120: Device(209e12, 105e12, 105e12, 1.79e12, 96 * MIB, 170),
}
# Nominal, not measured: FLOP a cycle and core in fp32 (two FMA units) at 3 GHz; a core has 20 GB/s and 1 MiB of L2.
CPU_FLOP_PER_CYCLE = {"AVX512": 64, "AVX2": 32}


def known_capability(capability: int | None) -> int:
    """The compute capability of `GPUS` whose figures stand for `capability`: the largest that is not above it."""
    return max((c for c in GPUS if c <= (capability or DEFAULT_CAPABILITY)), default=min(GPUS))


def cpu(threads: int) -> Device:
    """This machine's CPU, with `threads` threads, by nominal figures."""
    fp32 = CPU_FLOP_PER_CYCLE.get(torch.backends.cpu.get_cpu_capability(), 16) * 3e9 * threads
    return Device(2 * fp32, fp32, fp32, 20e9 * threads, threads * MIB, threads)


@functools.cache
def multiprocessors(index: int | None) -> int | None:
    """Of a CUDA device that is present; None without one."""
    return torch.cuda.get_device_properties(index).multi_processor_count if torch.cuda.is_available() else None


def cuda_capability(index: int | None) -> int:
    """Compute capability as one integer (90 for 9.0) of a CUDA device; where there is none, `DEFAULT_CAPABILITY`."""
    if not torch.cuda.is_available():
        return DEFAULT_CAPABILITY
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def fp32_precision(device_type: str) -> str:
    """``"tf32"`` where PyTorch may round fp32 products on that device to it, else ``"ieee"``.

    Read from the backend's own setting: `torch.get_float32_matmul_precision` raises once a user has set that one.
    """
    return "tf32" if device_type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def launcher_missing() -> str | None:
    """Why Triton cannot launch kernels on the GPU that is here, or None if it can.

    It builds what launches them with a C compiler, against Python's headers and the driver's library: images made for
    running programs have a GPU, but often no compiler.
    """
    from triton.runtime import driver

    try:
        driver.active.utils  # noqa: B018 - made when it is first asked for, as a launch does
    except Exception as error:  # of the compiler, of the linker, of the search for them
        return f"Triton cannot launch kernels here: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


@functools.cache
def onednn_missing() -> str | None:
    """Why the products on the CPU do not go to oneDNN, or None if they do.

    On AVX-512 CPUs the fp32 products of oneDNN reach twice the rate of the BLAS that PyTorch calls by default where
    that BLAS does not use AVX-512 (an EPYC with MKL: 450 against 210 GFLOP/s on 2 cores); elsewhere it is not measured.
    """
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch does not expose oneDNN's linear"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the CPU has no AVX-512"
    return None
