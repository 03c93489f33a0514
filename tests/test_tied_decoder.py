"""`TiedDecoder`: mirrors of PyTorch's layers, and that they stay tied."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tiedfused.nn import TiedDecoder

F64 = torch.float64
ENCODERS = {
    "linear": (lambda: nn.Linear(6, 9, dtype=F64), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(2, 6, 3, stride=2, groups=2, dtype=F64), (3, 2, 11)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1, dilation=2, dtype=F64), (3, 2, 8, 9)),
    "same": (lambda: nn.Conv2d(2, 3, (3, 5), padding="same", dtype=F64), (3, 2, 8, 9)),
    "valid": (lambda: nn.Conv1d(2, 3, 4, padding="valid", dtype=F64), (3, 2, 8)),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_mirror_and_gradients(kind: str) -> None:
    make, shape = ENCODERS[kind]
    encoder = make()
    decoder = TiedDecoder(encoder)
    nn.init.normal_(decoder.bias)
    x = torch.randn(shape, dtype=F64, requires_grad=True)

    def plain(x: torch.Tensor) -> torch.Tensor:
        """The Jacobian of the encoder, transposed."""
        h = encoder(x).tanh()
        lead = 1 if kind != "linear" else x.dim() - 1
        (z,) = torch.autograd.grad(encoder(x), x, h, create_graph=True)  # hᵀ ∂encoder/∂x
        return z + decoder.bias.view(-1, *(1,) * (x.dim() - lead - 1))

    y = decoder(encoder(x).tanh())
    torch.testing.assert_close(y, plain(x))
    leaves = [x, encoder.weight, encoder.bias, decoder.bias]
    found, expected = (torch.autograd.grad(out.square().sum(), leaves) for out in (y, plain(x)))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(lambda h: decoder(h), encoder(x).detach().requires_grad_())


def model() -> nn.Sequential:
    first, second = nn.Linear(8, 6), nn.Linear(6, 4)
    encoder = nn.Sequential(first, nn.LayerNorm(6), nn.GELU(), nn.Dropout(0.5), second)
    return nn.Sequential(encoder, nn.Sequential(TiedDecoder(second), nn.GELU(), TiedDecoder(first, bias=False)))


def test_one_parameter_one_key() -> None:
    found = model()
    assert [k for k in found.state_dict() if k.endswith("weight")] == ["0.0.weight", "0.1.weight", "0.4.weight"]
    assert [k for k in found.state_dict() if k.startswith("1.")] == ["1.0.bias"]
    assert sum(p.numel() for p in found.parameters() if p.dim() == 2) == 8 * 6 + 6 * 4
    assert len(list(found.modules())) == 11
    assert repr(found[1][0]) == ("TiedDecoder(mirror of Linear(in_features=6, out_features=4, bias=True), bias=True)")


@pytest.mark.parametrize("how", ["copy", "load", "assign", "to", "replace", "pickle"])
def test_stays_tied(how: str, tmp_path) -> None:
    original = model().eval()
    if how == "copy":
        found = copy.deepcopy(original)
    elif how == "pickle":
        torch.save(original, tmp_path / "model.pt")
        found = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        found = model().eval()
        found.load_state_dict(copy.deepcopy(original.state_dict()), assign=how == "assign")
        if how == "to":
            found.to(torch.bfloat16).to(torch.float32)
        if how == "replace":
            found[0][0].weight = nn.Parameter(found[0][0].weight.detach().clone())
    with torch.no_grad():
        for p in found.parameters():
            p.copy_(torch.randn_like(p))
    h = torch.randn(3, 4)
    expected = nn.functional.gelu(h @ found[0][4].weight + found[1][0].bias) @ found[0][0].weight
    torch.testing.assert_close(found[1](h), expected)
    assert not torch.allclose(original[1](h), expected)


def test_compiles_and_trains() -> None:
    found, x = model().eval(), torch.randn(5, 8)
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    grads, expected = (torch.autograd.grad(m(x).square().sum(), list(found.parameters())) for m in (compiled, found))
    torch.testing.assert_close(grads, expected)


def test_deferred_initialisation() -> None:
    with torch.device("meta"):
        decoder = TiedDecoder(nn.Linear(8, 4))
    decoder.to_empty(device="cpu")
    with torch.no_grad():
        decoder.bias.fill_(float("nan"))  # what happened to be in memory
    decoder.reset_parameters()
    assert torch.equal(decoder.bias, torch.zeros(8))


def test_output_size() -> None:
    encoder = nn.Conv2d(1, 4, 3, stride=2)
    h = encoder(torch.randn(2, 1, 28, 27))
    assert TiedDecoder(encoder)(h).shape == (2, 1, 27, 27)
    assert TiedDecoder(encoder)(h, (28, 27)).shape == (2, 1, 28, 27)
    assert TiedDecoder(encoder, output_size=28)(h).shape == (2, 1, 28, 28)
    with pytest.raises(
        ValueError, match=r"^TiedDecoder\(mirror of Conv2d.*output_size: expected \[27…28, 27…28\].*got \[29, 29\]"
    ):
        TiedDecoder(encoder, output_size=29)(h)


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"encoder: expected nn.Linear, nn.Conv1d or nn.Conv2d, got ReLU"):
        TiedDecoder(nn.ReLU())
    with pytest.raises(ValueError, match="encoder: expected a layer with a weight, got LazyLinear, which has none"):
        TiedDecoder(nn.LazyLinear(8))
    with pytest.raises(ValueError, match="encoder: expected padding_mode 'zeros', got 'circular'"):
        TiedDecoder(nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular"))
    with pytest.raises(ValueError, match=r"encoder: padding 'same' of an even kernel \(4,\)"):
        TiedDecoder(nn.Conv1d(1, 2, 4, padding="same"))
    with pytest.raises(ValueError, match=r"output_size: expected None, as the encoder is an nn.Linear, got 3"):
        TiedDecoder(nn.Linear(3, 4), output_size=3)
    with pytest.raises(ValueError, match=r"^TiedDecoder\(mirror of Linear.*h: expected shape \[..., 4\], got \[2, 3\]"):
        TiedDecoder(nn.Linear(3, 4))(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"^TiedDecoder\(.*h: expected shape \[N, 2, length\].*got \[2, 3, 5\]"):
        TiedDecoder(nn.Conv1d(3, 2, 3))(torch.randn(2, 3, 5))
