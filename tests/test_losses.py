"""Losses and metrics against their definitions, written out with the latent at hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tiedfused
from tiedfused import losses, metrics, reference

X = torch.randn(30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def layer(activation: str = "relu", dtype: torch.dtype = torch.float64) -> tiedfused.TiedLinear:
    torch.manual_seed(1)
    return tiedfused.TiedLinear(8, 20, bias=True, activation=activation, dtype=dtype)


def gradients(loss: Tensor, model: tiedfused.TiedLinear) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [model.weight, model.bias_enc], materialize_grads=True, retain_graph=True))


def test_l1_and_weighted_l1_with_gradients() -> None:
    for activation in ("relu", "sigmoid", "softplus"):
        model = layer(activation)
        _, stats = model(X, return_stats=True)
        h, norms = model.encode(X).abs(), model.weight.norm(dim=1)
        weighted = losses.weighted_l1(stats, model.weight, activation=activation)
        for ours, expected in (
            (losses.l1(stats), h.sum(1).mean()),
            (weighted, (h * norms).sum(1).mean()),
        ):
            torch.testing.assert_close(ours, expected)
            torch.testing.assert_close(gradients(ours, model), gradients(expected, model))


def test_weighted_l1_refuses_negative_latents() -> None:
    model = layer("tanh")
    _, stats = model(X, return_stats=True)
    with pytest.raises(ValueError, match=r"activation: expected one that is never negative.*got 'tanh'") as caught:
        losses.weighted_l1(stats, model.weight, activation="tanh")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("activation", tiedfused.activation_names())
def test_non_negative_is_what_the_table_says(activation: str) -> None:
    f = tiedfused.activations.get_activation(activation)
    assert f.non_negative == bool((f.forward(torch.linspace(-30, 30, 10001)) >= 0).all())


def test_non_negative_of_a_registered_activation() -> None:
    tiedfused.register_activation("square", torch.square, lambda a: 2 * a, non_negative=True)
    try:
        model = layer("square")
        _, stats = model(X, return_stats=True)
        expected = (model.encode(X) * model.weight.norm(dim=1)).sum(1).mean()
        torch.testing.assert_close(losses.weighted_l1(stats, model.weight, activation="square"), expected)
    finally:
        del tiedfused.activations._TABLE["square"]


def test_kl_to_rate() -> None:
    model = layer("sigmoid")
    _, stats = model(X, return_stats=True)
    mean = model.encode(X).mean(0)
    rate = torch.full_like(mean, 0.05)
    bernoulli = torch.distributions.Bernoulli
    expected = torch.distributions.kl_divergence(bernoulli(rate), bernoulli(mean)).sum()
    ours = losses.kl_to_rate(stats.mean, 0.05)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(ours, model), gradients(expected, model))
    assert losses.kl_to_rate(rate, 0.05).abs() < 1e-12
    for rate_given in (0, 1, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"rate: expected a number between 0 and 1, got {rate_given}"):
            losses.kl_to_rate(stats.mean, rate_given)


@pytest.mark.parametrize("h, d", [(5, 12), (12, 5), (7, 7), (1, 9)])
def test_orthogonality(h: int, d: int) -> None:
    weight = torch.randn(h, d, dtype=torch.float64, requires_grad=True)
    expected = (weight @ weight.t() - torch.eye(h, dtype=torch.float64)).square().sum()
    ours = losses.orthogonality(weight)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, weight), torch.autograd.grad(expected, weight))
    assert torch.autograd.gradcheck(losses.orthogonality, weight)


def test_orthogonality_makes_no_latents_by_latents_matrix() -> None:
    weight = torch.randn(3000, 4, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        losses.orthogonality(weight)
    assert max(saved) == 3000 * 4
    assert losses.orthogonality(torch.linalg.qr(torch.randn(9, 4))[0].t()) < 1e-10


def test_reconstruction() -> None:
    y = X + 0.1 * torch.randn_like(X)
    torch.testing.assert_close(losses.mse(y, X), (y - X).square().mean())
    torch.testing.assert_close(losses.normalized_mse(X.mean(0).expand_as(X), X), torch.tensor(1.0).double())
    assert losses.normalized_mse(X, X) == 0
    expected = (y - X).square().mean() / X.var(0, correction=0).mean()
    torch.testing.assert_close(losses.normalized_mse(y, X), expected)
    torch.testing.assert_close(losses.normalized_mse(y.view(5, 6, 8), X.view(5, 6, 8)), expected)
    torch.testing.assert_close(metrics.explained_variance(y, X), 1 - expected)


@pytest.mark.parametrize("measure", [losses.mse, losses.normalized_mse, metrics.explained_variance])
def test_shapes_do_not_broadcast(measure) -> None:
    with pytest.raises(ValueError, match=r"target: expected shape \[5, 1, 8\], as y, got \[5, 8\]"):
        measure(torch.randn(5, 1, 8), torch.randn(5, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    target = (torch.randn(400, 100) * 30).to(dtype)  # its sum of squares overflows float16
    y = (target + 1).requires_grad_()
    weight = torch.randn(50, 8).to(dtype).requires_grad_()
    for found, exact in (
        (losses.mse(y, target), (y.double() - target.double()).square().mean()),
        (losses.normalized_mse(y, target), losses.normalized_mse(y.double(), target.double())),
        (losses.orthogonality(weight), losses.orthogonality(weight.double())),
    ):
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(exact.item(), rel=1e-4)
        found.backward()
    assert y.grad.dtype == weight.grad.dtype == dtype


@pytest.mark.parametrize("shape", [(20, 8), (8, 20)])
def test_autocast_rounds_no_loss(shape: tuple[int, int]) -> None:
    h, d = shape
    torch.manual_seed(0)
    model, x = tiedfused.TiedLinear(d, h, bias=True, activation="relu"), torch.randn(30, d)
    y, stats = model(x, return_stats=True)

    def all_losses() -> list[Tensor]:
        return [
            losses.mse(y, x),
            losses.normalized_mse(y, x),
            losses.l1(stats),
            losses.weighted_l1(stats, model.weight, activation="relu"),
            losses.kl_to_rate(stats.mean.sigmoid(), 0.1),
            losses.orthogonality(model.weight),
        ]

    expected = all_losses()
    with torch.autocast("cpu", torch.bfloat16):
        found = all_losses()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        [gradients(loss, model) for loss in found], [gradients(loss, model) for loss in expected]
    )


def test_metrics() -> None:
    model = layer()
    with torch.no_grad():
        model.bias_enc[:5] = -100
    y, stats = model(X, return_stats=True)
    active = model.encode(X) > 0
    torch.testing.assert_close(metrics.l0(stats), active.sum(1).double().mean())
    assert metrics.dead_fraction(stats.fired) == 5 / 20
    assert metrics.dead_fraction(torch.tensor([0, 1, 5, 1])) == 1 / 4
    torch.testing.assert_close(metrics.feature_density(stats.fired, 30), active.float().mean(0))
    first, second = (reference.latent_stats(model.encode(x)).fired for x in X.split(15))
    torch.testing.assert_close(metrics.feature_density(first + second, 30), active.float().mean(0))
    assert not metrics.explained_variance(y, X).requires_grad
    with pytest.raises(ValueError, match="rows: expected 1 or more, got 0"):
        metrics.feature_density(stats.fired, 0)


def test_losses_compile() -> None:
    torch._dynamo.reset()
    model = layer(dtype=torch.float32)

    def objective(x: Tensor) -> Tensor:
        y, stats = model(x, return_stats=True)
        penalty = losses.l1(stats) + losses.weighted_l1(stats, model.weight, activation="relu")
        return losses.normalized_mse(y, x) + 1e-2 * penalty + 1e-3 * losses.orthogonality(model.weight)

    x = X.float()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled(x), model), gradients(objective(x), model))


def test_penalties_do_what_they_are_for() -> None:
    x = torch.rand(256, 8, generator=torch.Generator().manual_seed(0))

    def train(activation: str, penalty) -> tiedfused.TiedLinear:
        model = layer(activation, torch.float32)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            y, stats = model(x, return_stats=True)
            (losses.mse(y, x) + penalty(model, stats)).backward()
            optimizer.step()
        return model

    def l0(model: tiedfused.TiedLinear) -> float:
        return float(metrics.l0(model(x, return_stats=True)[1]))

    assert l0(train("relu", lambda model, stats: 0.05 * losses.l1(stats))) < 0.7 * l0(train("relu", lambda *_: 0.0))
    rate = train("sigmoid", lambda model, stats: losses.kl_to_rate(stats.mean, 0.1))(x, return_stats=True)[1].mean
    assert (rate - 0.1).abs().max() < 0.03
    assert losses.orthogonality(train("identity", lambda model, _: losses.orthogonality(model.weight)).weight) < 12.1
