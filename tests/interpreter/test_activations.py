"""The Triton pair of every activation by itself, number by number, on Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 set before triton is imported", allow_module_level=True)

import triton
import triton.language as tl

from tiedfused.activations import activation_names, get_activation

pytestmark = pytest.mark.interpreter
EPS = torch.finfo(torch.float32).eps


@triton.jit
def pair_kernel(a_ptr, h_ptr, slope_ptr, ACTIVATION: tl.constexpr, DERIVATIVE: tl.constexpr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    a = tl.load(a_ptr + offs)
    h = ACTIVATION(a)
    tl.store(h_ptr + offs, h)
    tl.store(slope_ptr + offs, DERIVATIVE(a, h))


def pair(activation: str, a: Tensor) -> tuple[Tensor, Tensor]:
    h, slope = torch.empty_like(a), torch.empty_like(a)
    f = get_activation(activation).triton
    assert f is not None
    pair_kernel[(1,)](a, h, slope, ACTIVATION=f[0], DERIVATIVE=f[1], SIZE=a.numel())
    return h, slope


def definition(activation: str, a: Tensor) -> tuple[Tensor, Tensor]:
    a = a.detach().requires_grad_()
    h = get_activation(activation).forward(a)
    (slope,) = torch.autograd.grad(h.sum(), a)
    return h.detach(), slope


@pytest.mark.parametrize("activation", activation_names())
def test_number_by_number(activation: str) -> None:
    """Near 0 and in the tails f is accurate relative to itself: a sum that cancels there would lose all of it.

    An exponential of a², or of a, multiplies the rounding of its argument by it. Further out float64 loses gelu's tail.
    """
    small = torch.logspace(-8, 0, 2048)
    a = torch.cat([small, -small, torch.linspace(-5, 5, 4096)])
    h, slope = pair(activation, a)
    truth, true_slope = definition(activation, a.double())
    error = ((h - truth).abs() / (EPS * (1 + a.double() ** 2) * truth.abs())).nan_to_num(0.0)
    assert error.max() <= 4, f"f({float(a[error.argmax()])}) is {float(error.max()):.1f} units of rounding off"
    error = (slope - true_slope).abs() / (EPS * (1 + a.abs().double()))
    assert error.max() <= 4, f"f′({float(a[error.argmax()])}) is {float(error.max()):.1f} units of rounding off"


@pytest.mark.parametrize("activation", activation_names())
def test_saturated_and_nan(activation: str) -> None:
    a = torch.tensor([-1e30, -1e4, -200.0, -100.0, 100.0, 200.0, 1e4, 1e30, float("nan")])
    a = torch.cat([a, torch.zeros(16 - a.numel())])
    (h, slope), (expected, expected_slope) = pair(activation, a), definition(activation, a)
    torch.testing.assert_close(h, expected, rtol=4 * EPS, atol=1e-37, equal_nan=True)
    assert h[8].isnan()
    torch.testing.assert_close(slope[1:7], expected_slope[1:7], rtol=4 * EPS, atol=1e-37)
