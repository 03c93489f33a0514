"""`TiedLinear`: the drop-in module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, prune

import tiedfused
from tiedfused import TiedLinear, activations, reference
from tiedfused.functional import tied_encode_decode

X = torch.randn(6, 8)


def test_positional_arguments_and_names() -> None:
    layer = TiedLinear(8, 16, True)
    assert list(layer.state_dict()) == ["weight", "bias_enc", "bias_dec"]
    assert (layer.weight.shape, layer.bias_enc.shape, layer.bias_dec.shape) == ((16, 8), (16,), (8,))
    assert list(TiedLinear(8, 16).state_dict()) == ["weight"]
    assert TiedLinear(8, 16).bias_enc is None
    torch.testing.assert_close(layer.forward_enc(X), X @ layer.weight.T + layer.bias_enc)
    h = layer.forward_enc(X)
    torch.testing.assert_close(layer.forward_dec(h), h @ layer.weight + layer.bias_dec)
    torch.testing.assert_close(layer(X), layer.forward_dec(layer.forward_enc(X)))


@pytest.mark.parametrize("bias_mode", ["none", "independent", "pre", "latent"])
def test_bias_modes(bias_mode: str) -> None:
    layer = TiedLinear(8, 16, activation="relu", output_activation="tanh", bias_mode=bias_mode, dtype=torch.float64)
    for bias in (layer.bias_enc, layer.bias_dec):
        if bias is not None:
            nn.init.normal_(bias)
    x, w = X.double(), layer.weight
    b = layer.bias_enc if layer.bias_enc is not None else torch.zeros(16)
    c = layer.bias_dec if layer.bias_dec is not None else torch.zeros(8)
    expected = {
        "none": lambda: torch.relu(x @ w.T) @ w,
        "independent": lambda: torch.relu(x @ w.T + b) @ w + c,
        "pre": lambda: torch.relu((x - c) @ w.T + b) @ w + c,
        "latent": lambda: (torch.relu(x @ w.T + b) - b) @ w,
    }[bias_mode]().tanh()
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.decode(layer.encode(x)), expected)
    grads = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), list(layer.parameters())))
    encoder, decoder = layer.to_linear_pair()
    torch.testing.assert_close(decoder(encoder(x).relu()).tanh(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pre_mode_far_from_the_origin(dtype: torch.dtype) -> None:
    layer = TiedLinear(64, 256, bias_mode="pre", activation="tanh")
    nn.init.constant_(layer.bias_dec, 30.0)
    x = (layer.bias_dec + torch.randn(100, 64)).detach().to(dtype)
    truth = torch.tanh((x.double() - 30) @ layer.weight.to(dtype).double().T) @ layer.weight.to(dtype).double() + 30
    layer.to(dtype)
    eager = F.linear(torch.tanh(F.linear(x - layer.bias_dec, layer.weight)), layer.weight.T, layer.bias_dec)
    for y in (layer(x), layer.decode(layer.encode(x))):
        assert_close(y, eager, truth, dtype)


@pytest.mark.parametrize("bias_mode", ["independent", "pre"])
def test_from_linear_is_the_same_function(bias_mode: str) -> None:
    encoder, decoder = nn.Linear(8, 16), nn.Linear(16, 8)
    with torch.no_grad():
        decoder.weight.copy_(encoder.weight.T)
    layer = TiedLinear.from_linear(encoder, decoder, activation="relu", bias_mode=bias_mode)
    torch.testing.assert_close(layer(X), decoder(torch.relu(encoder(X))))


@pytest.mark.parametrize(("bias_mode", "missing"), [("latent", "bias_dec"), ("none", "bias_enc")])
def test_from_linear_refuses_to_drop_a_bias(bias_mode: str, missing: str) -> None:
    encoder, decoder = nn.Linear(8, 16), nn.Linear(16, 8)
    with torch.no_grad():
        decoder.weight.copy_(encoder.weight.T)
    with pytest.raises(ValueError, match=f"bias_mode: '{bias_mode}' has no {missing}"):
        TiedLinear.from_linear(encoder, decoder, bias_mode=bias_mode)


def test_deferred_initialisation() -> None:
    with torch.device("meta"):
        assert TiedLinear(8, 16, activation="gelu").weight.is_meta
    with FakeTensorMode():
        assert TiedLinear(8, 16, activation="gelu").weight.shape == (16, 8)


def test_linear_bias_cancels_in_latent_mode() -> None:
    layer = TiedLinear(8, 16, bias_mode="latent")
    nn.init.normal_(layer.bias_enc)
    torch.testing.assert_close(layer(X), X @ layer.weight.T @ layer.weight)


@pytest.mark.parametrize("shape", [(512, 64), (64, 512), (256, 256)])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "tanh"])
def test_default_initialisation_starts_near_the_input_or_a_projection(shape: tuple[int, int], activation: str) -> None:
    d, h = shape
    layer = TiedLinear(d, h, activation=activation)
    x = torch.randn(2000, d)
    with torch.no_grad():
        y = layer(x)
    # the component of y along x: 1 if all of x comes back, h / d if only h of d dimensions can
    gain = (x * y).sum() / x.square().sum()
    expected = min(1.0, h / d)
    assert expected / 2 < gain < 2 * expected


def test_small_initialisation() -> None:
    layer = TiedLinear(300, 400, bias=True)
    nn.init.ones_(layer.bias_enc)
    layer.reset_parameters("small")
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not layer.bias_enc.any()
    with pytest.raises(ValueError, match="init: expected isometric or small, got 'seed'"):
        layer.reset_parameters("seed")


def test_repr_is_one_line_of_what_matters() -> None:
    assert repr(TiedLinear(8, 16)) == "TiedLinear(in_features=8, out_features=16, bias_mode='none')"
    assert repr(TiedLinear(8, 16, True, activation="relu", output_activation="sigmoid")) == (
        "TiedLinear(in_features=8, out_features=16, bias_mode='independent', activation='relu', "
        "output_activation='sigmoid')"
    )


def test_from_linear_pair_and_back() -> None:
    encoder, decoder = nn.Linear(8, 16), nn.Linear(16, 8)
    with pytest.raises(ValueError, match=r"decoder: expected the transpose .* \[16, 8\]"):
        TiedLinear.from_linear(encoder, decoder)
    with torch.no_grad():
        decoder.weight.copy_(encoder.weight.T)
    layer = TiedLinear.from_linear(encoder, decoder, activation="relu")
    torch.testing.assert_close(layer(X), decoder(torch.relu(encoder(X))))
    assert layer.weight.data_ptr() != encoder.weight.data_ptr()
    for found, expected in zip(layer.to_linear_pair(), (encoder, decoder), strict=True):
        torch.testing.assert_close(found.weight, expected.weight)
        torch.testing.assert_close(found.bias, expected.bias)


def test_from_linear_without_biases_or_decoder() -> None:
    encoder = nn.Linear(8, 16, bias=False, dtype=torch.float64)
    layer = TiedLinear.from_linear(encoder)
    assert (layer.bias_mode, layer.weight.dtype) == ("none", torch.float64)
    assert layer.to_linear_pair()[1].bias is None
    with_bias = TiedLinear.from_linear(nn.Linear(8, 16))
    assert not with_bias.bias_dec.any()


def test_device_and_dtype() -> None:
    layer = TiedLinear(8, 16, True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


def test_state_dict_of_one_loads_into_another() -> None:
    one, other = TiedLinear(8, 16, True), TiedLinear(8, 16, True)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(X), other(X))


def test_derivative_in_another_dtype() -> None:
    """A mask made with ``.float()`` does not widen a bf16 gradient."""
    tiedfused.register_activation("float_mask", torch.relu, lambda a: (a > 0).float())
    try:
        grads = []
        for activation in ("float_mask", "relu"):
            torch.manual_seed(0)
            layer = TiedLinear(8, 16, activation=activation, dtype=torch.bfloat16)
            layer(torch.randn(4, 8, dtype=torch.bfloat16)).sum().backward()
            grads.append(layer.weight.grad)
        torch.testing.assert_close(*grads)
    finally:
        del activations._TABLE["float_mask"]


def test_registered_activation_serves(custom_activation: str) -> None:
    layer = TiedLinear(
        8, 16, True, activation=custom_activation, output_activation=custom_activation, dtype=torch.float64
    )
    x = X.double().requires_grad_()
    expected = reference.tied_encode_decode(
        x,
        layer.weight,
        layer.bias_enc,
        layer.bias_dec,
        activation=custom_activation,
        output_activation=custom_activation,
    )
    torch.testing.assert_close(layer(x), expected)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
    assert custom_activation in tiedfused.activation_names()


@pytest.mark.parametrize("recompute", [True, False])
def test_registered_derivative_may_read_the_output(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    monkeypatch.setattr(activations, "_TABLE", dict(activations._TABLE))
    tiedfused.register_activation("exp", torch.exp, lambda h: h, from_output=True)
    x, weight = X.double().requires_grad_(), (torch.randn(16, 8, dtype=torch.float64) / 8).requires_grad_()

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return tied_encode_decode(x, weight, activation="exp", recompute=recompute)

    assert torch.autograd.gradcheck(layer, (x, weight))
    assert torch.autograd.gradgradcheck(layer, (x, weight))


@pytest.mark.parametrize("bias_mode", ["independent", "pre", "latent"])
def test_normalized_atoms(bias_mode: str) -> None:
    layer = TiedLinear(5, 7, activation="tanh", bias_mode=bias_mode, normalize_atoms=True, dtype=torch.float64)
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(4, 5, dtype=torch.float64)

    def plain(weight: torch.Tensor) -> torch.Tensor:
        w = weight / weight.square().sum(1, keepdim=True).sqrt()
        b = layer.bias_enc
        c = -b @ w if bias_mode == "latent" else layer.bias_dec
        return torch.tanh((x - c if bias_mode == "pre" else x) @ w.T + b) @ w + c

    expected = plain(layer.weight)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.decode(layer.encode(x)), expected)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), layer.weight)[0])
    torch.testing.assert_close((grad * layer.weight).sum(1), torch.zeros(7, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(layer, {"weight": w}, x), layer.weight)
    torch.testing.assert_close(layer.atoms().norm(dim=1), torch.ones(7, dtype=torch.float64))
    encoder, decoder = layer.to_linear_pair()
    torch.testing.assert_close(decoder(encoder(x).tanh()), expected)
    assert "normalize_atoms=True" in repr(layer)
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()]


def test_normalized_atoms_of_a_weight_that_every_look_changes() -> None:
    layer = parametrizations.spectral_norm(TiedLinear(5, 7, normalize_atoms=True))  # a power iteration a look
    nn.init.normal_(layer.parametrizations.weight[0]._u)  # far from converged
    torch.testing.assert_close(layer.atoms().norm(dim=1), torch.ones(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_row_of_zeros_stays_finite(dtype: torch.dtype) -> None:
    layer = TiedLinear(5, 7, normalize_atoms=True, dtype=dtype)
    with torch.no_grad():
        layer.weight[3] = 0
    layer(torch.randn(4, 5).to(dtype)).sum().backward()
    assert layer.weight.grad.isfinite().all()
    layer.project_atoms_()
    assert not layer.weight[3].any() and layer.weight.isfinite().all()


def test_projections() -> None:
    layer = TiedLinear(5, 7, activation="relu")
    with pytest.raises(RuntimeError, match=r"TiedLinear\(in_features=5.*\): weight has no gradient"):
        layer.project_gradient_()
    layer(torch.randn(4, 5)).square().sum().backward()
    before, weight = layer.weight.grad.clone(), layer.weight.detach().clone()
    assert ((before * weight).sum(1).abs() > 1e-3).any()
    layer.project_gradient_()
    unit = weight / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close((layer.weight.grad * weight).sum(1), torch.zeros(7), atol=1e-5, rtol=0)
    removed = before - layer.weight.grad
    torch.testing.assert_close(removed, (removed * unit).sum(1, keepdim=True) * unit)
    layer.project_atoms_()
    torch.testing.assert_close(layer.weight, unit)
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad


@pytest.mark.parametrize("how", ["parametrization", "pruning"])
def test_projections_refuse_a_weight_that_is_computed(how: str) -> None:
    layer = TiedLinear(5, 7)
    if how == "pruning":
        prune.l1_unstructured(layer, "weight", 0.5)
    else:
        parametrizations.weight_norm(layer)
    layer(torch.randn(4, 5)).sum().backward()
    for project in (layer.project_atoms_, layer.project_gradient_):
        with pytest.raises(RuntimeError, match=r"TiedLinear\(.*\): weight: expected a parameter, got a tensor"):
            project()


def test_from_linear_refuses_to_change_norms() -> None:
    encoder = nn.Linear(8, 16)
    with pytest.raises(ValueError, match=r"normalize_atoms: expected rows of norm 1, got norms from 0\."):
        TiedLinear.from_linear(encoder, normalize_atoms=True)
    with torch.no_grad():
        encoder.weight.div_(encoder.weight.norm(dim=1, keepdim=True))
    layer = TiedLinear.from_linear(encoder, normalize_atoms=True)
    torch.testing.assert_close(layer(X), encoder(X) @ encoder.weight)
