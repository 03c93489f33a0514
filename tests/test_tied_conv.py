"""`TiedConv1d` and `TiedConv2d` against convolution and the transpose of that convolution as a linear map."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tiedfused.nn import TiedConv1d, TiedConv2d, tied_conv

F64 = torch.float64
OPTIONS = [
    {},
    {"stride": 2},
    {"stride": 3, "padding": 1},
    {"stride": 4, "padding": 2, "dilation": 2},
    {"groups": 2, "stride": 2, "padding": 1},
    {"dilation": 3},
]


def make(kind: type, *args, **options):
    layer = kind(*args, bias=True, activation="tanh", output_activation="sigmoid", dtype=F64, **options)
    for p in layer.parameters():
        nn.init.normal_(p, 0, 0.5)
    return layer


def convolution(layer, x: torch.Tensor) -> torch.Tensor:
    conv = F.conv1d if layer.dimensions == 1 else F.conv2d
    return conv(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def plain(layer, x: torch.Tensor) -> torch.Tensor:
    """The definition: the decoder is the matrix of the convolution, transposed."""
    channel = (-1, *(1,) * layer.dimensions)
    matrix = torch.func.jacrev(lambda x: convolution(layer, x))(torch.zeros_like(x[0]))  # [*latent, *x]
    h = torch.tanh(convolution(layer, x) + layer.bias_enc.view(channel))
    z = torch.tensordot(h, matrix, dims=layer.dimensions + 1)
    return torch.sigmoid(z + layer.bias_dec.view(channel))


def assert_same(layer, x: torch.Tensor) -> None:
    y = plain(layer, x)
    torch.testing.assert_close(layer(x), y)
    leaves = [x, *layer.parameters()]
    found, expected = (torch.autograd.grad(out.square().sum(), leaves) for out in (layer(x), y))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("length", [11, 12, 13])
def test_1d(options: dict[str, int], length: int) -> None:
    layer = make(TiedConv1d, 4, 6, 3, **options)
    assert_same(layer, torch.randn(2, 4, length, dtype=F64, requires_grad=True))


@pytest.mark.parametrize("options", [*OPTIONS, {"stride": (2, 1), "padding": (0, 1)}], ids=str)
def test_2d(options: dict[str, int]) -> None:
    layer = make(TiedConv2d, 2, 4, (3, 2), **options)
    assert_same(layer, torch.randn(2, 2, 9, 8, dtype=F64, requires_grad=True))


@pytest.mark.parametrize(
    ("kind", "kernel", "size"), [(TiedConv1d, 3, (12,)), (TiedConv2d, (2, 3), (6, 9)), (TiedConv2d, 1, (5, 4))]
)
def test_patches_are_fused(kind: type, kernel, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(kind, 3, 5, kernel, stride=kernel)
    x = torch.randn(2, 3, *size, dtype=F64, requires_grad=True)
    assert_same(layer, x)
    torch.testing.assert_close(layer(x), layer.decode(layer.encode(x), size))
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    calls = []
    monkeypatch.setattr(tied_conv, "tied_encode_decode", lambda x, *args, **kw: calls.append(x.shape) or x)
    layer(x)
    assert len(calls) == 1
    layer(torch.randn(2, 3, *(n + 1 for n in size), dtype=F64)) if kernel != 1 else None
    make(kind, 3, 5, kernel, stride=kernel, padding=1)(x)
    make(kind, 3, 5, kernel, stride=kernel, dilation=2)(x)
    make(kind, 3, 6, kernel, stride=kernel, groups=3)(x)
    assert len(calls) == 1


@pytest.mark.parametrize("kernel", [2, 3])  # fused, and not
def test_finite_differences(kernel: int) -> None:
    layer = make(TiedConv2d, 2, 3, kernel, stride=2)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(1, 2, 4, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


def test_output_size() -> None:
    layer = TiedConv2d(2, 4, 3, stride=3, padding=1)
    h = layer.encode(torch.randn(2, 2, 10, 12))
    assert h.shape[2:] == (4, 4)
    for size in (10, 11, 12, (10, 12)):
        y = layer.decode(h, size)
        assert y.shape[2:] == ((size, size) if isinstance(size, int) else size)
        assert layer.encode(y).shape == h.shape
    assert layer.decode(h).shape[2:] == (10, 10)
    for size in (9, 13):
        with pytest.raises(
            ValueError, match=r"^TiedConv2d\(2, 4.*output_size: expected \[10…12, 10…12\], .* \[4, 4\], got"
        ):
            layer.decode(h, size)


@pytest.mark.filterwarnings("ignore")  # of torch.jit's deprecation, and of the checks of sizes
@pytest.mark.parametrize("options", [{"kernel_size": 2, "stride": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}])
def test_traced_with_open_sizes(options: dict[str, int]) -> None:
    layer = TiedConv2d(2, 4, bias=True, activation="relu", **options)
    x, other = torch.randn(2, 2, 8, 6), torch.randn(3, 2, 10, 12)
    auto = torch.export.Dim.AUTO
    for strict in (False, True):
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},), strict=strict)
        torch.testing.assert_close(exported.module()(other), layer(other))
    torch.testing.assert_close(torch.jit.trace(layer, x)(other), layer(other))


def test_half_precision_and_no_rows() -> None:
    layer = TiedConv1d(2, 3, 4, 4, bias=True, activation="relu", dtype=torch.bfloat16)
    assert layer(torch.randn(5, 2, 8).bfloat16()).dtype == torch.bfloat16
    assert layer(torch.randn(0, 2, 8).bfloat16()).shape == (0, 2, 8)


def test_state_dict_copy_and_parameters() -> None:
    layer = TiedConv2d(3, 8, 5, bias=True)
    assert list(layer.state_dict()) == ["weight", "bias_enc", "bias_dec"]
    assert sum(p.numel() for p in layer.parameters()) == 8 * 3 * 25 + 8 + 3
    assert list(TiedConv2d(3, 8, 5).state_dict()) == ["weight"]
    other, x = copy.deepcopy(layer), torch.randn(2, 3, 9, 9)
    nn.init.zeros_(other.weight)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x))
    assert repr(TiedConv2d(4, 8, 3, 2, groups=2, activation="relu")) == (
        "TiedConv2d(4, 8, kernel_size=(3, 3), stride=(2, 2), groups=2, bias=False, activation='relu')"
    )


@pytest.mark.parametrize("options", [{"kernel_size": 7, "stride": 7}, {"kernel_size": 3, "padding": 1}], ids=str)
def test_starts_near_the_input(options: dict[str, int]) -> None:
    layer, x = TiedConv2d(1, 64, **options), torch.randn(20, 1, 28, 28)
    with torch.no_grad():
        gain = float((x * layer(x)).sum() / x.square().sum())
    assert 0.4 < gain < 2.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels: expected an integer of at least 1, got 0"),
        ({"kernel_size": (3,)}, r"kernel_size: expected an integer or 2 of them, got \(3,\)"),
        ({"kernel_size": 3.0}, "kernel_size: expected an integer of at least 1, got 3.0"),
        ({"stride": 0}, "stride: expected an integer of at least 1, got 0"),
        ({"padding": -1}, "padding: expected an integer of at least 0, got -1"),
        ({"groups": 0}, "groups: expected an integer of at least 1, got 0"),
        ({"groups": 3}, "in_channels: expected a multiple of groups, 3, got 2"),
        ({"activation": "no"}, "activation: unknown activation 'no'"),
    ],
)
def test_constructor_errors(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        TiedConv2d(**{"in_channels": 2, "out_channels": 4, "kernel_size": 3, **options})


def test_shape_errors() -> None:
    layer = TiedConv2d(2, 4, 3)
    for shape in ((5, 3, 8, 8), (8, 8), (1, 1, 2, 8, 8)):
        with pytest.raises(
            ValueError, match=r"^TiedConv2d\(2, 4.*x: expected shape \[N, 2, height, width\] or \[2, he.*got"
        ):
            layer(torch.randn(shape))
    with pytest.raises(
        ValueError, match=r"^TiedConv2d\(.*x: expected a spatial size of at least \[3, 3\], got \[2, 8\]"
    ):
        layer(torch.randn(1, 2, 2, 8))
    with pytest.raises(
        ValueError, match=r"^TiedConv1d\(.*h: expected shape \[N, 4, length\] or \[4, length\], got \[5, 2, 8\]"
    ):
        TiedConv1d(2, 4, 3).decode(torch.randn(5, 2, 8))
    with pytest.raises(TypeError, match=r"^TiedConv2d\(.*x: expected a tensor, got list"):
        layer([1.0])
