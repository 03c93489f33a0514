"""Corruptions: rates, what is left alone, generators, errors."""

from __future__ import annotations

import pytest
import torch

from tiedfused import corruption

CALLS = {
    "mask": lambda x, **kw: corruption.mask(x, 0.3, **kw),
    "gaussian": lambda x, **kw: corruption.gaussian(x, 0.3, **kw),
    "salt_and_pepper": lambda x, **kw: corruption.salt_and_pepper(x, 0.3, low=-1.0, high=2.0, **kw),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_shape_and_generator(name: str, dtype: torch.dtype) -> None:
    x = torch.rand(40, 30).to(dtype)
    before = x.clone()
    one, same, other = (CALLS[name](x, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert (one.dtype, one.shape) == (dtype, x.shape)
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["mask", "salt_and_pepper"])
def test_small_rates_in_16_bits(name: str) -> None:
    x = torch.full((1000, 1000), 0.5, dtype=torch.bfloat16)
    y = getattr(corruption, name)(x, 1e-3, generator=torch.Generator().manual_seed(0))
    assert 0.9e-3 < (y != x).double().mean() < 1.1e-3


def test_mask() -> None:
    y = corruption.mask(torch.full((300, 300), 5.0), 0.3)
    assert set(y.unique().tolist()) == {0.0, 5.0}
    assert float((y == 0).double().mean()) == pytest.approx(0.3, abs=0.01)
    assert corruption.mask(torch.ones(50), 0.0).all() and not corruption.mask(torch.ones(50), 1.0).any()


def test_gaussian() -> None:
    noise = corruption.gaussian(torch.full((300, 300), 5.0), 0.5) - 5
    assert (float(noise.mean()), float(noise.std())) == pytest.approx((0, 0.5), abs=0.01)


def test_salt_and_pepper() -> None:
    y = corruption.salt_and_pepper(torch.full((300, 300), 5.0), 0.3, low=-1.0, high=2.0)
    rates = [float((y == v).double().mean()) for v in (-1, 2, 5)]
    assert rates == pytest.approx([0.15, 0.15, 0.7], abs=0.01)


def test_gradient_passes_where_the_input_does() -> None:
    x = torch.ones(100, requires_grad=True)
    y = corruption.mask(x, 0.5)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: corruption.mask(torch.ones(3), 1.5), ValueError, r"rate: expected 0 to 1, got 1.5"),
        (lambda: corruption.salt_and_pepper(torch.ones(3), -0.1), ValueError, r"rate: expected 0 to 1, got -0.1"),
        (lambda: corruption.gaussian(torch.ones(3), -1), ValueError, r"std: expected 0 or more, got -1"),
        (lambda: corruption.mask(torch.ones(3).long(), 0.5), TypeError, r"x: expected a floating.*got torch.int64"),
        (lambda: corruption.gaussian([1.0], 0.5), TypeError, r"x: expected a floating-point tensor, got list"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
