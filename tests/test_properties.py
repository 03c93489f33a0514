"""Properties that hold for any problem: agreement with the reference, linearity, indifference to the atoms' order."""

from __future__ import annotations

import pytest
import torch
from numerics import Problem, assert_layer_matches, outputs, problem
from test_plan import assert_fits

import tiedfused
from tiedfused import reference
from tiedfused.functional import tied_encode_decode

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given  # noqa: E402
from hypothesis import settings as hypothesis_settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

BUILT_IN = tiedfused.activation_names()
KINKED = ("relu", "leaky_relu", "selu")


def layer(**options):
    return lambda *operands, **more: tied_encode_decode(*operands, **options, **more)


HOW = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
ON_CPU = hypothesis_settings(max_examples=60, **HOW)
ON_GPU = hypothesis_settings(max_examples=12, **HOW)  # each compiles three kernels and more

ANY_PROBLEM = {
    "n": st.integers(0, 40),
    "d": st.integers(1, 40),
    "h": st.integers(1, 60),
    "activation": st.sampled_from(BUILT_IN),
    "output_activation": st.sampled_from(BUILT_IN),
    "recompute": st.sampled_from([None, True, False]),
}
WITH_GRADIENTS = {**ANY_PROBLEM, "dtype": st.sampled_from([torch.float32, torch.float64]), "biases": st.booleans()}
WITH_STATISTICS = {
    **ANY_PROBLEM,
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    "grad": st.booleans(),
}


@ON_CPU
@given(**WITH_GRADIENTS)
def test_any_problem(small_tiles: str, **drawn) -> None:
    check_any_problem("cpu", **drawn)


@pytest.mark.gpu
@ON_GPU
@given(**WITH_GRADIENTS)
def test_any_problem_on_gpu(**drawn) -> None:
    check_any_problem("cuda", **drawn)


def check_any_problem(
    device: str,
    n: int,
    d: int,
    h: int,
    activation: str,
    output_activation: str,
    dtype: torch.dtype,
    recompute: bool | None,
    biases: bool,
) -> None:
    hypothesis.assume(biases or activation not in KINKED)  # only biases can keep off the kink
    p = problem(n, d, h, dtype, device, biases=biases, activation=activation)
    options = {"activation": activation, "output_activation": output_activation}
    if output_activation in KINKED and n:
        hypothesis.assume(reference.tied_encode_decode(*p.operands, activation=activation).abs().min() > 1e-4)
    assert_layer_matches(layer(recompute=recompute, **options), p, **options)


@ON_CPU
@given(**WITH_STATISTICS)
def test_statistics_do_not_change_y(small_tiles: str, **drawn) -> None:
    check_statistics("cpu", **drawn)


@pytest.mark.gpu
@ON_GPU
@given(**WITH_STATISTICS)
def test_statistics_do_not_change_y_on_gpu(**drawn) -> None:
    check_statistics("cuda", **drawn)


def check_statistics(
    device: str,
    n: int,
    d: int,
    h: int,
    activation: str,
    output_activation: str,
    dtype: torch.dtype,
    recompute: bool | None,
    grad: bool,
) -> None:
    p = problem(n, d, h, dtype, device, activation="none")
    call = layer(activation=activation, output_activation=output_activation, recompute=recompute)
    # on a GPU the plan might take another regime, whose last bits are others
    with torch.set_grad_enabled(grad), tiedfused.settings.override(regime="stream"):
        y, stats = call(*p.operands, return_stats=True)
        assert torch.equal(y, call(*p.operands))
    assert stats.l0.sum() == stats.fired.sum()
    # of the same sums, once by rows and once by latents
    by_rows, by_latents = stats.l1.double().sum(), stats.mean.double().abs().sum() * n
    assert n == 0 or by_rows >= by_latents * (1 - 1e-5)


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), scale=st.floats(-4, 4))
def test_linear_layer_is_linear(small_tiles: str, seed: int, scale: float) -> None:
    p = problem(20, 9, 25, torch.float64, biases=False, seed=seed)
    linear = layer(activation="identity")
    x1, x2 = p.x, p.x.flip(0)
    left = linear(x1 + scale * x2, *p.operands[1:])
    torch.testing.assert_close(left, linear(x1, *p.operands[1:]) + scale * linear(x2, *p.operands[1:]))


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000))
def test_order_of_atoms_does_not_matter(small_tiles: str, seed: int) -> None:
    p = problem(20, 9, 50, torch.float64, seed=seed)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
    assert p.bias_enc is not None
    shuffled = Problem(p.x, p.weight.detach()[order].requires_grad_(), p.bias_enc.detach()[order].requires_grad_(),
                       p.bias_dec, p.grad_y)  # fmt: skip
    one, other = outputs(layer(), p), outputs(layer(), shuffled)
    torch.testing.assert_close(one["y"], other["y"])
    torch.testing.assert_close(one["grad_weight"][order], other["grad_weight"])
    torch.testing.assert_close(one["grad_x"], other["grad_x"])


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    n=st.integers(0, 1 << 17),
    d=st.integers(1, 1 << 17),
    h=st.integers(1, 1 << 17),
    dtype=st.sampled_from(tiedfused.planning.DTYPES),
    capability=st.sampled_from([None, *tiedfused.tiles.ARCHITECTURES]),
    grad=st.booleans(),
    grad_x=st.booleans(),
    stats=st.booleans(),
    regime=st.sampled_from(["auto", *tiedfused.settings.REGIME_NAMES]),
)
def test_every_problem_has_a_plan_that_fits(n, d, h, dtype, capability, grad, grad_x, stats, regime) -> None:
    options = {"dtype": dtype, "device": "cpu" if capability is None else "cuda", "capability": capability}
    with tiedfused.settings.override(regime=regime):
        assert_fits(tiedfused.plan(n, d, h, grad=grad, grad_x=grad_x, stats=stats, **options))
