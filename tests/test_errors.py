"""Bad input gets one clear line that names the argument, before anything runs."""

from __future__ import annotations

import pytest
import torch

import tiedfused
from tiedfused import nn, settings
from tiedfused.functional import tied_encode_decode

X, W, B, C = torch.randn(3, 8), torch.randn(16, 8), torch.randn(16), torch.randn(8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.randn(3, 7), W), {}, ValueError, r"x: expected shape \[..., 8\], as weight is \[16, 8\], got \[3, 7\]"),
        ((torch.tensor(1.0), W), {}, ValueError, r"x: expected shape \[..., 8\], .*got \[\]"),
        ((X, torch.randn(2, 16, 8)), {}, ValueError, r"weight: expected shape \[H, d\].*got \[2, 16, 8\]"),
        ((X, torch.randn(8)), {}, ValueError, r"weight: expected shape \[H, d\].*got \[8\]"),
        ((X, torch.randn(0, 8)), {}, ValueError, r"weight: .*at least 1, got \[0, 8\]"),
        ((torch.randn(3, 0), torch.randn(16, 0)), {}, ValueError, r"weight: .*at least 1, got \[16, 0\]"),
        ((X, W, C), {}, ValueError, r"bias_enc: expected shape \[16\], as weight is \[16, 8\], got \[8\]"),
        ((X, W, B, B), {}, ValueError, r"bias_dec: expected shape \[8\], as weight is \[16, 8\], got \[16\]"),
        ((X, W, B[:, None]), {}, ValueError, r"bias_enc: expected shape \[16\].*got \[16, 1\]"),
        ((X, W.double()), {}, TypeError, r"weight: expected float32, as x, got float64"),
        ((X, W, B.half()), {}, TypeError, r"bias_enc: expected float32, as x, got float16"),
        ((X, W, B, C.bfloat16()), {}, TypeError, r"bias_dec: expected float32, as x, got bfloat16"),
        ((X.long(), W), {}, TypeError, r"x: expected a floating-point tensor .*got int64"),
        ((X, W.to(torch.complex64)), {}, TypeError, r"weight: expected a floating-point tensor .*got complex64"),
        (
            (X, W.to(torch.float8_e4m3fn)),
            {},
            TypeError,
            r"weight: expected a floating-point tensor .*got float8_e4m3fn",
        ),
        ((X, W.to_sparse(), B, C), {}, TypeError, r"weight: expected a dense tensor, got sparse_coo; weight.to_dense"),
        ((X, W, B.to_sparse(), C), {}, TypeError, r"bias_enc: expected a dense tensor, got sparse_coo"),
        ((X, W, B, C.to_sparse()), {}, TypeError, r"bias_dec: expected a dense tensor, got sparse_coo"),
        (
            (X[None].to_sparse(), W),
            {},
            ValueError,
            r"x: expected shape \[N, 8\] with 2 sparse dimensions .*, got \[1, 3, 8\] with 3; x.to_dense",
        ),
        ((X.to_sparse(1), W), {}, ValueError, r"x: .* 2 sparse dimensions where it is sparse, got \[3, 8\] with 1;"),
        (([1.0], W), {}, TypeError, r"x: expected a tensor, got list"),
        ((X, None), {}, TypeError, r"weight: expected a tensor, got NoneType"),
        ((X, W, 1.0), {}, TypeError, r"bias_enc: expected a tensor, got float"),
        ((X.to("meta"), W), {}, ValueError, r"weight: expected on meta, as x, got cpu"),
        ((X, W.to("meta")), {}, ValueError, r"weight: expected on cpu, as x, got meta"),
        ((X, W, B.to("meta")), {}, ValueError, r"bias_enc: expected on cpu, as x, got meta"),
        ((X, W), {"activation": "rleu"}, ValueError, r"activation: unknown activation 'rleu'; .*identity, relu, leaky"),
        ((X, W), {"output_activation": "x"}, ValueError, r"output_activation: unknown activation 'x'; expected one of"),
        ((X, W), {"activation": torch.relu}, TypeError, r"activation: expected the name of an activation, got builtin"),
        ((X, W), {"activation": ["relu"]}, TypeError, r"activation: expected the name of an activation, got list"),
        ((X, W), {"return_stats": 2}, TypeError, r"return_stats: expected True or False, got 2"),
        ((X, W), {"recompute": "yes"}, TypeError, r"recompute: expected None, True or False, got 'yes'"),
    ],
)
def test_call(arguments, options, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        tied_encode_decode(*arguments, **options)
    assert "\n" not in str(caught.value)
    tied_encode_decode(X, W, B, C)  # nothing is left behind


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_features": 0}, ValueError, r"in_features: expected an integer of at least 1, got 0"),
        ({"out_features": -1}, ValueError, r"out_features: .*got -1"),
        ({"out_features": 2.5}, ValueError, r"out_features: .*got 2.5"),
        ({"activation": "no"}, ValueError, r"activation: unknown activation 'no'"),
        ({"output_activation": "no"}, ValueError, r"output_activation: unknown activation 'no'"),
        ({"bias_mode": "both"}, ValueError, r"bias_mode: expected one of none, independent, pre, latent, got 'both'"),
        (
            {"bias_mode": "negative"},
            ValueError,
            r"b_dec = −b_enc is none .* b_enc has 16 entries and b_dec has 8: 'latent'",
        ),
        ({"bias": True, "bias_mode": "none"}, ValueError, r"bias_mode: expected independent.*got 'none'"),
        ({"dtype": torch.int8}, TypeError, r"dtype: expected one of torch.float32.*got torch.int8"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, r"dtype: expected one of .*got torch.float8_e4m3fn"),
        ({"dtype": "float32"}, TypeError, r"dtype: expected one of .*got 'float32'"),
        ({"dtype": torch.complex64}, TypeError, r"dtype: expected one of .*got torch.complex64"),
    ],
)
def test_module(options, error, message) -> None:
    with pytest.raises(error, match=message):
        tiedfused.TiedLinear(**{"in_features": 8, "out_features": 16, **options})


def test_module_shape_error_names_what_was_expected() -> None:
    for bias_mode in ("none", "pre"):
        layer = tiedfused.TiedLinear(8, 16, bias_mode=bias_mode)
        for method in (layer, layer.encode):
            with pytest.raises(
                ValueError, match=r"^TiedLinear\(in_features=8, out_features=16, .*\): x: expected .*8\]"
            ):
                method(torch.randn(3, 16))
        with pytest.raises(ValueError, match=r"^TiedLinear\(.*\): h: expected shape \[..., 16\], got \[3, 8\]"):
            layer.decode(X)
        with pytest.raises(TypeError, match=r"^TiedLinear\(.*\): x: expected a tensor, got list"):
            layer([1.0])


def test_mixed_dtypes_are_refused_outside_autocast_only() -> None:
    with pytest.raises(TypeError):
        tied_encode_decode(X.bfloat16(), W)
    with torch.autocast("cpu", torch.bfloat16):
        assert tied_encode_decode(X.bfloat16(), W).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TIEDFUSED_REGIME", "cuda", "got 'cuda'; expected auto, stream, few_rows, bottleneck, chunked, native, tiled"),
        ("TIEDFUSED_RECOMPUTE", "maybe", "got 'maybe'; expected auto, 0, 1"),
        ("TIEDFUSED_WORKSPACE_MIB", "lots", "got 'lots'; expected a number of MiB"),
        ("TIEDFUSED_WORKSPACE_MIB", "-1", "got -1; expected 0 or more"),
        ("TIEDFUSED_WORKSPACE_MIB", "inf", "got 'inf'; expected a number of MiB"),
        ("TIEDFUSED_ATOMICS", "2", "got '2'; expected 0, 1"),
    ],
)
def test_environment(variable: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{variable}: {message}"):
        settings.Settings.from_environment({variable: value})


def test_environment_is_read() -> None:
    found = settings.Settings.from_environment(
        {
            "TIEDFUSED_REGIME": "Tiled",
            "TIEDFUSED_RECOMPUTE": "1",
            "TIEDFUSED_WORKSPACE_MIB": "1.5",
            "TIEDFUSED_CONFIG_DIR": "/tiles",
        }
    )
    assert found == settings.Settings("tiled", True, 3 * settings.MIB // 2, False, "/tiles")
    assert settings.Settings.from_environment({"TIEDFUSED_CONFIG_DIR": ""}) == settings.Settings()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((-1, 8, 8), "n: got -1; expected"), ((1, 0, 8), "d: got 0; expected"), ((1, 8, 0.5), "h: got 0.5; expected")],
)
def test_plan(sizes, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiedfused.plan(*sizes)


@pytest.mark.parametrize("capability", [9, -5, 9.0])
def test_plan_refuses_a_capability_that_is_none(capability: float) -> None:
    with pytest.raises(ValueError, match=f"capability: got {capability}; expected an integer such as 90, for 9.0"):
        tiedfused.plan(8, 8, 8, device="cuda", capability=capability)


def test_plan_refuses_what_the_op_refuses() -> None:
    with pytest.raises(ValueError, match=r"dtype: got torch.int32; expected torch.float32"):
        tiedfused.plan(8, 8, 8, dtype=torch.int32)
    with pytest.raises(TypeError, match="recompute: expected None, True or False, got 1"):
        tiedfused.plan(8, 8, 8, recompute=1)


def test_registering_a_taken_name_or_no_function() -> None:
    with pytest.raises(ValueError, match="'relu' is already registered"):
        tiedfused.register_activation("relu", torch.relu, torch.sign)
    with pytest.raises(TypeError, match="derivative: expected a function of a tensor, got int"):
        tiedfused.register_activation("half_relu", torch.relu, 1)
    assert "half_relu" not in tiedfused.activation_names()


@pytest.mark.parametrize(
    ("forward", "derivative", "message"),
    [
        (lambda a: a.clamp_(-1, 1), lambda a: a.abs() < 1, "forward: expected a new tensor, got one made by changing"),
        (torch.sin, lambda a: a.cos_(), "derivative: expected a new tensor, got one made by changing"),
        (
            lambda a: a.sum(-1),
            torch.cos,
            r"forward: expected an elementwise function, got shape \[2\] for shape \[2, 3\]",
        ),
        (torch.sin, lambda a: a.cos()[0], r"derivative: expected an elementwise function, got shape \[3\]"),
    ],
)
def test_registering_what_is_not_elementwise_or_in_place(forward, derivative, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiedfused.register_activation("not_so", forward, derivative)
    assert "not_so" not in tiedfused.activation_names()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "layer",
    [nn.TiedLinear(8, 4), nn.TiedConv1d(2, 3, 2), nn.TiedDecoder(torch.nn.Linear(8, 4)), nn.TiedAutoencoder([8, 4])],
    ids=lambda layer: layer._get_name(),
)
def test_torch_script(layer: torch.nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"^Tied\w+\(.*: torch.jit.script cannot compile it; torch.compile and"):
        torch.jit.script(torch.nn.Sequential(layer))


def test_sizes_of_numpy() -> None:
    np = pytest.importorskip("numpy")
    size = np.int64(8)
    layers = (nn.TiedLinear(size, size), nn.TiedAutoencoder([size, size]), nn.TiedConv1d(size, size, np.int64(3)))
    for layer in layers:
        assert "8" in layer.extra_repr()
        assert "int64" not in layer.extra_repr()
    assert tiedfused.plan(size, size, size) == tiedfused.plan(8, 8, 8)
