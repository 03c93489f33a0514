"""`tiedfused.analysis`: each number against another way to get it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import tiedfused
from tiedfused import TiedLinear, analysis, losses
from tiedfused.nn import TiedAutoencoder, TiedConv2d, TiedDecoder

F64 = torch.float64

# ---- transpose or inverse


@pytest.mark.parametrize("shape", [(3, 7), (7, 7), (9, 4)])
def test_decoders_undo_what_can_be_undone(shape: tuple[int, int]) -> None:
    w, x = torch.randn(shape, dtype=F64), torch.randn(5, shape[1], dtype=F64)
    h, d = shape
    pinv = analysis.decoder_matrix(w, "pseudo-inverse")
    projected = x if h >= d else x @ torch.linalg.lstsq(w.T, torch.eye(d, dtype=F64)).solution.T @ w
    torch.testing.assert_close(x @ w.T @ pinv, projected)
    torch.testing.assert_close(analysis.decoder_matrix(w, "transpose"), w)
    if h == d:
        torch.testing.assert_close(analysis.decoder_matrix(w, "inverse"), pinv)


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((3, 7), "inverse", r"no inverse exists for H 3 < d 7: x Wᵀ drops 4 of x's 7 dimensions"),
        ((7, 3), "inverse", r"many matrices undo Wᵀ for H 7 > d 3"),
        ((3, 3), "left", r"kind: expected one of transpose, inverse, pseudo-inverse, got 'left'"),
        ((3,), "transpose", r"weight: expected a matrix, got shape \[3\]"),
    ],
)
def test_decoder_errors(shape, kind, message) -> None:
    with pytest.raises(ValueError, match=message):
        analysis.decoder_matrix(torch.randn(shape), kind)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_orthogonality_and_condition(shape: tuple[int, int]) -> None:
    w = torch.randn(shape)
    assert analysis.orthogonality(w) == pytest.approx(float((w @ w.T - torch.eye(shape[0])).norm()), rel=1e-5)
    assert analysis.condition_number(w) == pytest.approx(float(torch.linalg.cond(w)), rel=1e-4)


def test_noise_gain_is_measured_noise() -> None:
    matrix = torch.randn(20, 30, dtype=F64)
    noise = torch.randn(20_000, 20, dtype=F64)
    measured = float((noise @ matrix).square().sum(1).mean().sqrt() / noise.square().sum(1).mean().sqrt())
    assert analysis.noise_gain(matrix) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("degrees", [0.0, 1e-5, 0.1, 30.0, 80.0, 90.0])
def test_subspace_angle(degrees: float) -> None:
    x = torch.randn(200, 4, dtype=F64) @ torch.diag(torch.tensor([100.0, 50.0, 1.0, 0.5], dtype=F64))
    directions = torch.linalg.svd(x).Vh
    a = math.radians(degrees)
    w = torch.stack([directions[0] * 3, math.cos(a) * directions[1] + math.sin(a) * directions[2]])
    assert analysis.subspace_angle(w, x) == pytest.approx(degrees, rel=1e-6, abs=1e-7)


def test_subspace_angle_errors() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[N, 3\], as weight is \[2, 3\], got \[9, 4\]"):
        analysis.subspace_angle(torch.randn(2, 3), torch.randn(9, 4))
    with pytest.raises(ValueError, match=r"weight: expected H ≤ d, got \[4, 3\]"):
        analysis.subspace_angle(torch.randn(4, 3), torch.randn(9, 3))


def test_pca_error_is_the_truncated_svd() -> None:
    x = torch.randn(30, 8, dtype=F64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    truncated = u[:, :3] * s[:3] @ v[:3]
    assert analysis.pca_error(x, 3) == pytest.approx(float((x - truncated).square().mean()))
    assert analysis.pca_error(x, 9) == 0


def test_compare_decoders() -> None:
    layer = TiedLinear(6, 6, True, output_activation="sigmoid", dtype=F64)
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.rand(50, 6, dtype=F64)
    result = analysis.compare_decoders(layer, x, noise=0.5, generator=torch.Generator().manual_seed(0))
    (kind, error, noisy, gain), inverse, pinv = result.rows
    assert (kind, inverse[0], pinv[0]) == ("transpose", "inverse", "pseudo-inverse")
    assert error == pytest.approx(float((layer(x) - x).square().mean().detach()))
    assert noisy != error and gain == pytest.approx(analysis.noise_gain(layer.weight))
    assert pinv[1:] == pytest.approx(inverse[1:])
    assert "50% noise" in str(result)


# ---- gradients


@pytest.mark.parametrize("bias_mode", ["none", "independent", "pre", "latent"])
def test_shares_of_a_layer_are_the_two_terms(bias_mode: str) -> None:
    layer = TiedLinear(5, 8, activation="tanh", bias_mode=bias_mode, dtype=F64)
    x = torch.randn(9, 5, dtype=F64)
    with analysis.gradient_report(layer) as report:
        layer(x).square().sum().backward()
    if bias_mode == "none":
        h = layer.encode(x).detach()
        z_bar = 2 * layer(x).detach()
        encoder = ((z_bar @ layer.weight.T) * (1 - h * h)).T @ x
        decoder = h.T @ z_bar
        (pair,) = report.pairs
        assert pair.encoder == pytest.approx(float(encoder.norm()))
        assert pair.decoder == pytest.approx(float(decoder.norm()))
        assert pair.cosine == pytest.approx(float(torch.cosine_similarity(encoder.flatten(), decoder.flatten(), 0)))
        assert pair.share == pytest.approx(pair.encoder / (pair.encoder + pair.decoder))
    total = layer.weight.grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()  # and outside the block nothing is left behind
    torch.testing.assert_close(total, layer.weight.grad)
    assert report.pairs[0].total == pytest.approx(float(total.norm()))
    assert not [name for name in ("forward", "forward_enc", "forward_dec") if name in vars(layer)]
    assert isinstance(layer._parameters["weight"], nn.Parameter)


def test_penalties_without_the_latent_are_part_of_the_report() -> None:
    layer, x = TiedLinear(5, 8, True, activation="relu", dtype=F64), torch.randn(9, 5, dtype=F64)

    def loss() -> torch.Tensor:
        y, stats = layer(x, return_stats=True)
        return (y - x).square().mean() + losses.l1(stats)

    with analysis.gradient_report(layer) as report:
        loss().backward()
    (expected,) = torch.autograd.grad(loss(), layer.weight)
    torch.testing.assert_close(layer.weight.grad, expected)
    assert report.pairs[0].total == pytest.approx(float(expected.norm()))


def test_two_backwards_in_a_report_add_up() -> None:
    layer, x = TiedLinear(5, 8, activation="tanh", dtype=F64), torch.randn(10, 5, dtype=F64)
    terms = []
    for batches in ([x], x.split(5)):
        with analysis.gradient_report(layer) as report:
            for batch in batches:
                layer(batch).square().sum().backward()
        terms.append((report.pairs[0].encoder, report.pairs[0].decoder))
    assert terms[0] == pytest.approx(terms[1])


def test_report_of_a_mixed_model() -> None:
    first, conv = nn.Linear(16, 12), TiedConv2d(1, 3, 2, 2, bias=True, activation="relu")
    stack = TiedAutoencoder([12, 6, 3], True, activation="tanh")
    model = nn.Sequential(conv, nn.Flatten(), first, stack, nn.Dropout(0.0), TiedDecoder(first))
    x = torch.randn(7, 1, 4, 4)
    with analysis.gradient_report(model) as report:
        (model(x) - x.flatten(1)).square().mean().backward()
    assert [p.name for p in report.pairs] == ["0", "3.layers.0", "3.layers.1", "2"]
    assert [s.name for s in report.stages] == [
        "0.encode",
        "0.decode",
        "2",
        "3.layers.0.encode",
        "3.layers.1.encode",
        "3.layers.1.decode",
        "3.layers.0.decode",
        "5",
    ]
    weights = [conv.weight, stack.layers[0].weight, stack.layers[1].weight, first.weight]
    for pair, weight in zip(report.pairs, weights, strict=True):
        assert pair.total == pytest.approx(float(weight.grad.norm()), rel=1e-5)
        assert pair.encoder > 0 and pair.decoder > 0
    assert all(math.isfinite(s.gradient) and s.value > 0 for s in report.stages)
    assert not report.warnings
    assert "3.layers.1" in str(report) and "encoder's share" in str(report)


def report_of(model: nn.Module, x: torch.Tensor) -> analysis.GradientReport:
    with analysis.gradient_report(model) as report:
        model(x).square().mean().backward()
    return report


def test_warnings() -> None:
    x = torch.randn(9, 8)
    model = TiedAutoencoder([8, 8, 8, 8], activation="identity")
    for scale, word in ((1e-2, "vanishing"), (1e2, "exploding")):
        for layer in model.layers:
            nn.init.eye_(layer.weight)
            with torch.no_grad():
                layer.weight.mul_(scale)
        assert word in " ".join(report_of(model, x).warnings)
    dead = TiedLinear(8, 8, True, activation="relu")
    nn.init.constant_(dead.bias_enc, -100.0)
    nn.init.ones_(dead.bias_dec)
    assert "no gradient reached" in " ".join(report_of(dead, x).warnings)
    layer = TiedLinear(8, 4)
    nn.init.constant_(layer.weight, float("nan"))
    assert "not finite" in " ".join(report_of(layer, x).warnings)
    assert "backward() inside the block" in " ".join(report_of(nn.Linear(8, 8), x).warnings)
    with analysis.gradient_report(layer) as report:
        pass
    assert "backward() inside the block" in report.warnings[0]


def test_one_half_alone_is_reported() -> None:
    layer, x = TiedLinear(8, 4), torch.randn(9, 8)
    with analysis.gradient_report(layer) as report:
        layer.decode(layer.encode(x).detach()).square().mean().backward()
    assert report.pairs[0].share == 0
    assert "more than 99% of the gradient comes from the decoder" in report.warnings[0]


def test_an_exception_leaves_the_model_as_it_was() -> None:
    layer = TiedLinear(8, 4)
    with pytest.raises(ValueError, match="TiedLinear"), analysis.gradient_report(layer):
        layer(torch.randn(3, 5))
    assert "forward" not in vars(layer)
    assert isinstance(layer._parameters["weight"], nn.Parameter)


# ---- weights that are computed from others


def mirrored(encoder: nn.Linear) -> nn.Module:
    return nn.Sequential(encoder, nn.Tanh(), TiedDecoder(encoder))


@pytest.fixture(params=["TiedLinear", "TiedConv2d", "TiedAutoencoder", "TiedDecoder"])
def twins(request: pytest.FixtureRequest, computed: Callable[[nn.Module], object]):
    """A model whose weight is computed, the same with that weight as a parameter, and a batch."""
    made, x = {
        "TiedLinear": (lambda: TiedLinear(8, 6, True, activation="tanh", dtype=F64), torch.randn(9, 8)),
        "TiedConv2d": (lambda: TiedConv2d(2, 6, 2, 2, bias=True, dtype=F64), torch.randn(3, 2, 4, 4)),
        "TiedAutoencoder": (lambda: TiedAutoencoder([8, 6], True, dtype=F64), torch.randn(9, 8)),
        "TiedDecoder": (lambda: mirrored(nn.Linear(8, 6, dtype=F64)), torch.randn(9, 8)),
    }[request.param]
    model, plain = made(), made()

    def owner(model: nn.Module) -> nn.Module:
        return next(m for m in model.modules() if hasattr(m, "weight"))

    with torch.no_grad():
        for t, other in zip(plain.parameters(), model.parameters(), strict=True):
            t.copy_(other)
        computed(owner(model))
        owner(plain).weight.copy_(owner(model).weight)
    return model, plain, x.double()


@pytest.fixture(params=["weight_norm", "orthogonal", "pruning"])
def computed(request: pytest.FixtureRequest) -> Callable[[nn.Module], object]:
    if request.param == "pruning":
        return lambda owner: prune.l1_unstructured(owner, "weight", 0.5)
    return getattr(parametrizations, request.param)


def test_report_of_a_computed_weight(twins: tuple[nn.Module, nn.Module, torch.Tensor]) -> None:
    model, plain, x = twins
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found, expected = report_of(model, x), report_of(plain, x)
    assert found.warnings == expected.warnings
    for ours, theirs in ((found.pairs, expected.pairs), (found.stages, expected.stages)):
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other))
    torch.testing.assert_close(model.state_dict(), before)
    y = model(x)  # and outside the block nothing is left behind
    torch.testing.assert_close(y, plain(x))
    with torch.no_grad():
        for t in model.parameters():
            t.add_(torch.randn_like(t))
    assert not torch.allclose(model(x), y)


def test_summary_of_a_computed_weight(twins: tuple[nn.Module, nn.Module, torch.Tensor]) -> None:
    model, plain, x = twins
    found, expected = analysis.summary(model, x), analysis.summary(plain, x)
    assert found.untied_parameters - found.parameters == expected.untied_parameters - expected.parameters
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.flops >= expected.flops > 0
    assert found.step_bytes is not None and found.unfused_step_bytes is not None


def test_trace_and_decoders_of_a_computed_weight() -> None:
    layer = parametrizations.orthogonal(TiedLinear(8, 4, dtype=F64))
    assert analysis.trace(layer, torch.randn(5, 8, dtype=F64)).error is None
    result = analysis.compare_decoders(layer, torch.randn(50, 8, dtype=F64))
    (_, transpose, *_), (_, pinv, *_) = result.rows
    assert transpose == pytest.approx(pinv)
    assert analysis.orthogonality(layer.weight) < 1e-10


# ---- counting


def test_summary_counts_and_measures() -> None:
    first = nn.Linear(64, 32)
    model = nn.Sequential(first, TiedAutoencoder([32, 2048, 16], True), TiedDecoder(first, bias=False))
    result = analysis.summary(model, torch.randn(256, 64))
    weights = 64 * 32 + 32 * 2048 + 2048 * 16
    assert result.parameters == weights + 32 + 2048 + 16 + 32 + 2048
    assert result.untied_parameters == result.parameters + weights
    assert (result.parameter_bytes, result.untied_parameter_bytes) == (
        4 * result.parameters,
        4 * result.untied_parameters,
    )
    assert result.flops == 2 * 256 * weights * 2 * 3 - 2 * 256 * 64 * 32  # the batch needs no gradient
    assert str(result).count("\n") == 7


def test_fusing_saves_the_latent() -> None:
    n, h = 512, 4096
    with tiedfused.settings.override(recompute=True):
        result = analysis.summary(TiedLinear(16, h, activation="relu"), torch.randn(n, 16))
    assert result.step_bytes is not None and result.unfused_step_bytes is not None
    assert result.unfused_step_bytes >= 2 * n * h * 4
    assert result.unfused_step_bytes - result.step_bytes >= n * h * 4


def test_summary_leaves_gradients_alone() -> None:
    layer = TiedLinear(8, 4)
    analysis.summary(layer, torch.randn(3, 8))
    assert layer.weight.grad is None
    with pytest.raises(ValueError, match="module: expected a parameter that requires a gradient, got none"):
        analysis.summary(layer.requires_grad_(False), torch.randn(3, 8))


# ---- shapes


def test_trace_of_a_mixed_model() -> None:
    conv = nn.Conv2d(2, 3, 3)
    model = nn.Sequential(TiedConv2d(1, 4, 2, 2), TiedConv2d(1, 4, 2), nn.Conv2d(1, 2, 1), conv, TiedDecoder(conv))
    result = analysis.trace(model, torch.randn(5, 1, 8, 8))
    assert result.error is None
    assert result.rows[0] == ("0", "TiedConv2d", "[5, 1, 8, 8]", "[5, 1, 8, 8]", "latent [5, 4, 4, 4], fused")
    assert [row[0] for row in result.rows] == ["0", "1.encode", "1.decode", "1", "2", "3", "4", "(model)"]
    assert result.rows[1][3] == "[5, 4, 7, 7]"
    assert result.rows[3][4] == "latent [5, 4, 7, 7]"
    assert result.rows[6] == ("4", "TiedDecoder", "[5, 3, 6, 6]", "[5, 2, 8, 8]", "")
    assert "latent [5, 4, 4, 4], fused" in str(result)


def test_trace_shows_where_a_shape_is_wrong() -> None:
    model = nn.Sequential(nn.Linear(8, 6), TiedLinear(7, 3))
    result = analysis.trace(model, torch.randn(2, 8))
    assert [row[0] for row in result.rows] == ["0"]
    assert result.error.startswith("TiedLinear(in_features=7")
    assert "stopped: TiedLinear(in_features=7" in str(result)
    assert not model[0]._forward_hooks


def test_trace_of_an_error_without_a_message() -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError

    assert analysis.trace(Failing(), torch.randn(2, 8)).error == "ValueError"
