"""Peak memory of a training step: bounded, and independent of N·H, in low-memory mode."""

from __future__ import annotations

import pytest
import torch

import tiedfused
from tiedfused import settings
from tiedfused.functional import tied_encode_decode
from tiedfused.profile import peak_memory
from tiedfused.settings import MIB


def step_memory(n: int, d: int, h: int, dtype: torch.dtype, recompute: bool | None) -> int:
    """Bytes above inputs, output and gradients."""
    operands = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((n, d), (h, d), (h,), (d,))]
    grad_y = torch.randn(n, d).to(dtype)

    def step() -> None:
        torch.autograd.grad(tied_encode_decode(*operands, recompute=recompute), operands, grad_y)

    results = sum(t.nbytes for t in operands) + grad_y.nbytes
    return peak_memory(step) - results


@pytest.fixture(scope="module", autouse=True)
def _first_step_of_the_process() -> None:
    """It allocates what no later one does, 16 MiB among it, and whichever test comes first would measure that."""
    step_memory(1024, 16, 2048, torch.float32, recompute=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8192, 64, 4096), (8192, 128, 8192), (4096, 256, 8192), (4096, 768, 6144)], ids=str)
def test_low_memory_mode(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert step_memory(*shape, dtype, recompute=True) <= 64 * MIB


def test_memory_does_not_grow_with_the_latent() -> None:
    one, other = (step_memory(2048, 16, h, torch.float32, recompute=True) for h in (2048, 16384))
    assert abs(other - one) <= MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nor_where_the_latent_is_narrower_than_x(dtype: torch.dtype) -> None:
    one, other = (step_memory(n, 784, 500, dtype, recompute=True) for n in (4096, 16384))
    # x̄'s sum in fp32 is of x's size
    assert other - one <= (16384 - 4096) * 784 * 4 * (dtype.itemsize < 4) + MIB
    assert one <= 4 * MIB + 4096 * 784 * 4


def penalised_step_memory(n: int, d: int, h: int, dtype: torch.dtype) -> int:
    """Bytes above x, the weight and its gradient, of a step with an L1 penalty and a penalty on the means."""
    x, weight = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((n, d), (h, d)))

    def step() -> None:
        y, stats = tied_encode_decode(x.detach(), weight, recompute=True, return_stats=True)
        loss = (y - x.detach()).float().square().mean() + stats.l1.mean() + stats.mean.square().sum()
        torch.autograd.grad(loss, weight)

    return peak_memory(step) - weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_penalties_does_not_grow_with_the_latent(dtype: torch.dtype) -> None:
    one, other = (penalised_step_memory(2048, 16, h, dtype) for h in (2048, 16384))
    # what is left are the statistics and gradients of single latents, and b̄_enc: a few numbers a latent
    assert abs(other - one) <= (16384 - 2048) * 40
    assert other < 16 * MIB < 2048 * 16384 * dtype.itemsize / 2


def test_kept_latent_is_what_the_plan_says() -> None:
    kept, recomputed = (step_memory(2048, 16, 8192, torch.float32, recompute=r) for r in (False, True))
    assert kept - recomputed == pytest.approx(2048 * 8192 * 4, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("regime", ["auto", *settings.REGIME_NAMES])
def test_low_memory_on_gpu(regime: str) -> None:
    operands = [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in ((16384, 128), (32768, 128))]

    def step() -> None:
        tied_encode_decode(*operands, recompute=True).sum().backward()

    with settings.override(regime=regime):
        planned = tiedfused.plan(16384, 128, 32768, dtype=torch.bfloat16, device="cuda", recompute=True).workspace_bytes
        step()
        # y, its gradient, x̄ and W̄ are results; the latent alone would be 1 GiB
        assert peak_memory(step, "cuda") <= planned + 32 * MIB
