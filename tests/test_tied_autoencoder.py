"""`TiedAutoencoder`: the stack against its definition in plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tiedfused.nn import TiedAutoencoder

F64 = torch.float64


def stack(**options) -> TiedAutoencoder:
    model = TiedAutoencoder(
        [6, 9, 4, 3], True, activation=["tanh", "sigmoid", "identity"], output_activation="softplus", **options
    )
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.5)
    return model


def plain(model: TiedAutoencoder, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstruction and code, written out."""
    (w0, b0, c0), (w1, b1, c1), (w2, b2, c2) = ((m.weight, m.bias_enc, m.bias_dec) for m in model.layers)
    code = (torch.tanh(x @ w0.T + b0) @ w1.T + b1).sigmoid() @ w2.T + b2
    r1 = torch.tanh((code @ w2 + c2).sigmoid() @ w1 + c1)
    return nn.functional.softplus(r1 @ w0 + c0), code


def test_definition_and_gradients() -> None:
    model, x = stack(dtype=F64), torch.randn(2, 5, 6, dtype=F64, requires_grad=True)
    y, code = plain(model, x)
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(model.encode(x), code)
    torch.testing.assert_close(model.decode(code), y)
    leaves = [x, *model.parameters()]
    assert len(leaves) == 10
    found, expected = (torch.autograd.grad(out.square().sum(), leaves) for out in (model(x), y))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_finite_differences() -> None:
    model, x = stack(dtype=F64), torch.randn(3, 6, dtype=F64, requires_grad=True)
    names = [name for name, _ in model.named_parameters()]

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *model.parameters()))


def test_one_parameter_a_pair_and_clear_keys() -> None:
    model = stack()
    assert sum(p.numel() for p in model.parameters() if p.dim() == 2) == 6 * 9 + 9 * 4 + 4 * 3
    assert list(model.state_dict())[:4] == [
        "layers.0.weight",
        "layers.0.bias_enc",
        "layers.0.bias_dec",
        "layers.1.weight",
    ]
    other, x = stack(), torch.randn(5, 6)
    assert not torch.allclose(other(x), model(x))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def test_default_activations_mirror() -> None:
    model = TiedAutoencoder([8, 6, 4, 2], activation=["relu", "tanh", "identity"], output_activation="sigmoid")
    assert [m.activation for m in model.layers] == ["relu", "tanh", "identity"]
    assert [m.output_activation for m in model.layers] == ["sigmoid", "relu", "tanh"]
    assert not any("bias" in key for key in model.state_dict())


def test_a_stack_of_one_and_a_layer_by_itself() -> None:
    model, x = TiedAutoencoder([6, 3], bias_mode="pre", normalize_atoms=True), torch.randn(5, 6)
    torch.testing.assert_close(model(x), model.layers[0](x))
    torch.testing.assert_close(model(x), model.decode(model.encode(x)))


def test_compiles_whole() -> None:
    model, x = stack(), torch.randn(5, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    found, expected = (torch.autograd.grad(m(x).sum(), list(model.parameters())) for m in (compiled, model))
    torch.testing.assert_close(found, expected)


def test_starts_near_a_projection() -> None:
    model, x = TiedAutoencoder([512, 256, 64], activation="identity"), torch.randn(500, 512)
    with torch.no_grad():
        gain = float((x * model(x)).sum() / x.square().sum())
    assert 64 / 512 / 3 < gain < 3 * 64 / 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([8],), r"sizes: expected at least two integers, input first, got \[8\]"),
        ((8,), r"sizes: expected at least two integers.*got 8"),
        (([8, 0],), r"sizes\[1\]: expected an integer of at least 1, got 0"),
    ],
)
def test_sizes(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        TiedAutoencoder(*arguments)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"activation: expected one name, or 1, one a layer, got None"):
        TiedAutoencoder([8, 4], activation=None)
    with pytest.raises(ValueError, match=r"activation: expected one name, or 2, one a layer, got \['relu'\]"):
        TiedAutoencoder([8, 4, 2], activation=["relu"])
    with pytest.raises(ValueError, match=r"output_activation: expected one name, or 2"):
        TiedAutoencoder([8, 4, 2], output_activation=["relu"] * 3)
    model = TiedAutoencoder([8, 4, 2])
    for method in (model, model.encode):
        with pytest.raises(ValueError, match=r"^TiedAutoencoder\(8-4-2\): x: expected shape \[..., 8\], got \[3, 4\]"):
            method(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"^TiedAutoencoder\(8-4-2\): h: expected shape \[..., 2\], got \[3, 4\]"):
        model.decode(torch.randn(3, 4))
