"""The reference against autograd and finite differences, in float64."""

from __future__ import annotations

import pytest
import torch
from numerics import problem

import tiedfused
from tiedfused import reference
from tiedfused.activations import get_activation

BUILT_IN = tiedfused.activation_names()


@pytest.mark.parametrize("output_activation", ["identity", "sigmoid", "gelu"])
@pytest.mark.parametrize("activation", BUILT_IN)
def test_closed_form_gradients_against_autograd(activation: str, output_activation: str) -> None:
    p = problem(7, 5, 11, torch.float64, activation=activation)
    options = {"activation": activation, "output_activation": output_activation}
    y = reference.tied_encode_decode(*p.operands, **options)
    expected = torch.autograd.grad(y, [t for t in p.operands if t is not None], p.grad_y)
    torch.testing.assert_close(reference.gradients(p.grad_y, *p.operands, **options), expected)


@pytest.mark.parametrize("activation", BUILT_IN)
def test_against_finite_differences(activation: str) -> None:
    p = problem(3, 4, 6, torch.float64, activation=activation)
    assert torch.autograd.gradcheck(
        lambda *t: reference.tied_encode_decode(*t, activation=activation, output_activation="sigmoid"), p.operands
    )


def test_it_is_the_written_formula() -> None:
    p = problem(7, 5, 11, torch.float64)
    assert p.bias_enc is not None
    assert p.bias_dec is not None
    expected = torch.sigmoid(torch.relu(p.x @ p.weight.T + p.bias_enc) @ p.weight + p.bias_dec)
    torch.testing.assert_close(reference.tied_encode_decode(*p.operands, output_activation="sigmoid"), expected)
    torch.testing.assert_close(
        reference.decode(
            reference.encode(p.x, p.weight, p.bias_enc), p.weight, p.bias_dec, output_activation="sigmoid"
        ),
        expected,
    )


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_activation_gradient_against_autograd(name: str, dtype: torch.dtype) -> None:
    entry = get_activation(name)
    a = torch.cat([torch.linspace(-30, 30, 200), torch.linspace(-0.01, 0.01, 20)]).to(dtype).requires_grad_()
    h = entry.forward(a)
    grad = torch.randn(a.shape).to(dtype)
    (expected,) = torch.autograd.grad(h, a, grad, retain_graph=True)
    with torch.no_grad():
        torch.testing.assert_close(entry.backward(grad, h if entry.from_output else a), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BUILT_IN)
def test_activation_gradient_is_itself_differentiable(name: str) -> None:
    entry = get_activation(name)
    a = (torch.linspace(-3, 3, 12, dtype=torch.float64) + 0.05).requires_grad_()
    grad = torch.randn_like(a, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda grad, a: entry.backward(grad, entry.forward(a) if entry.from_output else a), (grad, a)
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_onednn_epilogue_is_the_same_function(name: str) -> None:
    entry = get_activation(name)
    if entry.onednn is None or (why := tiedfused.devices.onednn_missing()) is not None:
        pytest.skip(f"no oneDNN epilogue: {'none in the table' if entry.onednn is None else why}")
    a = torch.linspace(-20, 20, 401)[:, None]
    one, zero = torch.ones(1, 1), torch.zeros(1)
    function, scalars, algorithm = entry.onednn
    actual = torch.ops.mkldnn._linear_pointwise(a, one, zero, function, list(scalars), algorithm)
    torch.testing.assert_close(actual, entry.forward(a), rtol=1e-5, atol=2e-6)
