"""The bottleneck regime's kernels, and the sum of many parts that a few rows need, on Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 set before triton is imported", allow_module_level=True)

from numerics import Problem, assert_layer_matches, problem
from test_kernels import DTYPES, Case, assert_close, make_case
from test_stats import LOSSES, assert_matches, definition, results
from test_stats import layer as with_stats

import tiedfused
from tiedfused import settings
from tiedfused._backends.triton.bottleneck_forward import bottleneck_forward
from tiedfused._backends.triton.bottleneck_latent import bottleneck_latent
from tiedfused._backends.triton.combine import combine
from tiedfused._backends.triton.forward import forward
from tiedfused.activations import activation_names, get_activation
from tiedfused.functional import tied_encode_decode
from tiedfused.regimes import bottleneck
from tiedfused.regimes.common import Part, Pass, Request
from tiedfused.tiles import LatentTile, Tile, block_h

pytestmark = pytest.mark.interpreter


def launch(
    case: Case, *, split: int = 1, block_n: int = 16, block_d: int = 32, precision: str = "ieee"
) -> dict[str, Tensor]:
    """y by one launch; h and ā; h by itself."""
    N, H = case.x.shape[0], case.weight.shape[0]
    f, g = get_activation(case.activation), get_activation(case.output_activation)
    whole = LatentTile(block_n, block_h(H), block_d, 4, 2)
    pieces = LatentTile(block_n, 32, block_d, 4, 2)
    options: dict[str, Any] = {"activation": f, "precision": precision}
    operands = (case.weight, case.bias_enc)
    y = bottleneck_forward(case.x, *operands, case.bias_dec, output_activation=g, tile=whole, **options)
    penalties = (case.grad_l1, case.grad_total)
    h, grad_a = bottleneck_latent(case.x, case.grad_pre, *operands, *penalties, tile=pieces, split=split, **options)
    alone, nothing = bottleneck_latent(case.x, None, *operands, tile=pieces, split=split, **options)
    assert nothing is None
    assert grad_a is not None
    assert h.shape == grad_a.shape == (N, H)
    assert h.dtype == grad_a.dtype == case.x.dtype
    return {"y": y, "h": h, "grad_a": grad_a, "h_alone": alone}


def assert_latent_close(case: Case, results: dict[str, Tensor]) -> None:
    """y as in `test_kernels`; h and ā to twice plain PyTorch's error in the same dtype, plus one unit of rounding."""
    assert_close(case, {"y": results["y"]})
    truth, plain = (latents(case, dtype) for dtype in (torch.float64, case.x.dtype))
    for name in ("h", "grad_a", "h_alone"):
        assert torch.isfinite(results[name]).all(), name
        expected = truth[name.removesuffix("_alone")]
        error = torch.linalg.vector_norm(results[name] - expected)
        allowed = 2 * torch.linalg.vector_norm(plain[name.removesuffix("_alone")] - expected)
        allowed += torch.finfo(case.x.dtype).eps * torch.linalg.vector_norm(expected)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def latents(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """h and ā by the formulas, in `dtype`."""
    x, weight, grad_pre = case.x.to(dtype), case.weight.to(dtype), case.grad_pre.to(dtype)
    bias = 0 if case.bias_enc is None else case.bias_enc.to(dtype)
    a = (x @ weight.T + bias).requires_grad_()
    h = get_activation(case.activation).forward(a)
    grad_h = grad_pre @ weight.T
    if case.grad_l1 is not None:
        grad_h = grad_h + case.grad_l1.to(dtype)[:, None] * h.detach().sign()
    if case.grad_total is not None:
        grad_h = grad_h + case.grad_total.to(dtype)
    (grad_a,) = torch.autograd.grad(h, a, grad_h)
    return {"h": h.detach(), "grad_a": grad_a}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "d", "latents"), [(1, 1, 1), (33, 17, 100), (1, 100, 33), (100, 33, 1), (17, 130, 65), (48, 64, 96)]
)
def test_results(rows: int, d: int, latents: int, dtype: torch.dtype) -> None:
    case = make_case(rows, d, latents, dtype, output_activation="sigmoid")
    assert_latent_close(case, launch(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", activation_names())
def test_activation(activation: str, dtype: torch.dtype) -> None:
    case = make_case(20, 40, 50, dtype, activation=activation)
    assert_latent_close(case, launch(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [2, 5, 9])
def test_split(split: int, dtype: torch.dtype) -> None:
    """Parts of unequal size, and more parts than there are tiles of d."""
    case = make_case(20, 210, 40, dtype, activation="silu")
    assert_latent_close(case, launch(case, split=split))


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(("bias_enc", "bias_dec"), [(False, False), (True, False), (False, True)])
def test_without_bias(bias_enc: bool, bias_dec: bool, split: int) -> None:
    case = make_case(33, 70, 40, torch.bfloat16, bias_enc=bias_enc, bias_dec=bias_dec)
    assert_latent_close(case, launch(case, split=split))


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("activation", ["identity", "relu", "sigmoid", "gelu"])
@pytest.mark.parametrize(("grad_l1", "grad_total"), [(True, False), (False, True), (True, True)])
def test_penalties(grad_l1: bool, grad_total: bool, activation: str, split: int) -> None:
    """More rows and latents than one block of them, none of them a whole number of blocks."""
    case = make_case(35, 130, 45, torch.bfloat16, activation=activation, grad_l1=grad_l1, grad_total=grad_total)
    assert_latent_close(case, launch(case, split=split))


def test_strides() -> None:
    """Rows with others between them, and one row of ō for all, as the gradient of ``y.sum(0) @ v`` has."""
    case = make_case(33, 17, 40, torch.float32)
    wide_x, wide_weight = torch.full((33, 40), 7.0), torch.full((40, 19), 7.0)
    wide_x[:, 5:22], wide_weight[:, 1:18] = case.x, case.weight
    case.x, case.weight, case.grad_pre = wide_x[:, 5:22], wide_weight[:, 1:18], case.grad_pre[:1].expand(33, 17)
    assert_latent_close(case, launch(case))


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    rows, d, stride = 140, 16, 2**24 - 16
    assert (rows - 1) * stride > 2**31
    case = make_case(rows, d, 20, torch.float16)
    far_apart = torch.from_file(str(tmp_path / "x"), shared=True, size=(rows - 1) * stride + d, dtype=torch.float16)
    far_apart = far_apart.as_strided((rows, d), (stride, 1))
    far_apart.copy_(case.x)
    case.x = far_apart
    assert_latent_close(case, launch(case))


@pytest.mark.parametrize("activation", ["sigmoid", "softplus"])
def test_masked_latents_of_activations_not_zero_at_zero(activation: str) -> None:
    case = make_case(5, 17, 33, torch.float32, activation=activation)
    assert_latent_close(case, launch(case))


def test_masked_latents_do_not_leak_nan() -> None:
    """An infinite input times the zero rows beyond the last latent is NaN; every true latent here is 0."""
    case = make_case(1, 1, 17, torch.float32, activation="relu", bias_dec=False)
    case.x, case.weight = torch.full((1, 1), float("inf")), -torch.ones(17, 1)
    results = launch(case)
    for name in ("y", "h", "grad_a"):
        assert (results[name] == 0).all(), name


@pytest.mark.parametrize("split", [2, 31, 32, 33, 70])
@pytest.mark.parametrize("size", [1, 100, 3000])
def test_combine_many_parts(split: int, size: int) -> None:
    partial = torch.randn(split, size)
    out, bias = torch.empty(size), torch.randn(size)
    combine(partial, out, bias, activation=get_activation("silu"))
    expected = torch.nn.functional.silu(partial.double().sum(0) + bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "d"), [(1, 130), (17, 600)])
def test_few_rows_in_many_parts(rows: int, d: int, dtype: torch.dtype) -> None:
    case = make_case(rows, d, 700, dtype, output_activation="sigmoid")
    y = forward(
        case.x,
        case.weight,
        case.bias_enc,
        case.bias_dec,
        activation=get_activation(case.activation),
        output_activation=get_activation("sigmoid"),
        tile=Tile(16, 16, 8, 4),
        split=40,
        precision="ieee",
    )
    assert_close(case, {"y": y})


# ---- through the public function ---------------------------------------------------------------------------------


def layer(**options: Any) -> Any:
    return lambda *operands: tied_encode_decode(*operands, recompute=True, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "h"), [(1, 1, 1), (33, 200, 70), (5, 1000, 20)])
def test_layer(n: int, d: int, h: int, dtype: torch.dtype) -> None:
    with settings.override(regime="bottleneck"):
        assert tiedfused.plan(n, d, h, dtype=dtype, recompute=True).regime == "bottleneck"
        assert_layer_matches(layer(), problem(n, d, h, dtype))


@pytest.mark.parametrize("needed", [0b0001, 0b0010, 0b0100, 0b0110])
def test_only_the_gradients_that_are_needed(needed: int) -> None:
    p = problem(12, 80, 20)
    for bit, t in enumerate(p.operands):
        assert t is not None
        t.requires_grad_(bool(needed >> bit & 1))
    with settings.override(regime="bottleneck"):
        layer()(*p.operands).backward(p.grad_y)
    expected = tiedfused.reference.gradients(p.grad_y, *p.operands)
    for bit, t in enumerate(p.operands):
        assert t is not None
        assert (t.grad is not None) == bool(needed >> bit & 1)
        if t.grad is not None:
            torch.testing.assert_close(t.grad, expected[bit], rtol=1e-4, atol=1e-5)


def test_latent_pass_alone() -> None:
    """A batch too small for one kernel: encoded over parts of d, decoded over tiles of d."""
    p = problem(3, 5000, 40, torch.float32)
    with settings.override(regime="bottleneck"), torch.no_grad():
        plan = tiedfused.plan(3, 5000, 40, grad=False)
        assert [one.kernel for one in plan.passes] == ["bottleneck_latent", "bottleneck_decode"]
        assert plan.passes[0].split > 1
        y = tied_encode_decode(*p.operands, output_activation="sigmoid")
        expected = tiedfused.reference.tied_encode_decode(*p.operands, output_activation="sigmoid")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 20), (20, 600), (64, 130)])
def test_few_rows(n: int, d: int, dtype: torch.dtype) -> None:
    """Forward alone is few_rows; the gradients are another regime's."""
    with settings.override(regime="few_rows"):
        assert tiedfused.plan(n, d, 500, dtype=dtype, recompute=True).forward.regime == "few_rows"
        assert_layer_matches(layer(), problem(n, d, 500, dtype))


def test_bitwise_reproducible() -> None:
    for regime in ("bottleneck", "few_rows"):
        p = problem(20, 300, 60, torch.bfloat16)
        with settings.override(regime=regime):
            first, again = (layer()(*p.operands) for _ in range(2))
            grads = [torch.autograd.grad(y, p.x, p.grad_y)[0] for y in (first, again)]
        assert torch.equal(first, again)
        assert torch.equal(*grads)


def test_nothing_of_the_size_of_the_latent_is_saved() -> None:
    saved: list[int] = []
    p: Problem = problem(30, 70, 50)
    with (
        settings.override(regime="bottleneck"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        layer()(*p.operands)
    assert max(saved) == 50 * 70
    assert 30 * 50 not in saved


# ---- the latent's statistics and their gradients -----------------------------------------------------------------

WAYS = {
    "one kernel": ["bottleneck_forward"],
    "latent and decode": ["bottleneck_latent", "bottleneck_decode"],
    "parts of d": ["bottleneck_latent", "bottleneck_decode"],
    "few rows": ["few_rows_64"],
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fresh_plans: None) -> Iterator[str]:
    """Each way that the forward pass of the two regimes can run; backward of few rows is another regime's."""

    def fastest(r: Request, ways: tuple[tuple[Pass, ...], ...]) -> Part:
        return Part("bottleneck", "triton", ways[0 if request.param == "one kernel" else -1], "test")

    monkeypatch.setattr(bottleneck, "_fastest", fastest)
    monkeypatch.setattr(bottleneck, "split", lambda *sizes: 3 if request.param == "parts of d" else 1)
    with settings.override(regime="few_rows" if request.param == "few rows" else "bottleneck"):
        plan = tiedfused.plan(37, 67, 33, recompute=True, stats=True)
        assert [one.kernel for one in plan.forward.passes] == WAYS[request.param]
        assert plan.passes[0].split == 3 or request.param != "parts of d"
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "softplus", "gelu"])
def test_statistics(way: str, activation: str, dtype: torch.dtype) -> None:
    """f(0) of softplus is not 0: rows and latents beyond the last one would count."""
    p = problem(37, 67, 33, dtype, activation=activation)
    options: dict[str, Any] = {"activation": activation, "recompute": True}
    assert_matches(with_stats(**options), p, activation=activation)
    assert torch.equal(with_stats(**options)(*p.operands)[0], tied_encode_decode(*p.operands, **options))


@pytest.mark.parametrize(("n", "d", "h"), [(1, 1, 1), (35, 17, 129), (5, 130, 20)])
@pytest.mark.parametrize("biases", [True, False])
def test_statistics_of_sizes(way: str, biases: bool, n: int, d: int, h: int) -> None:
    p = problem(n, d, h, activation="sigmoid", biases=biases)
    assert_matches(with_stats(activation="sigmoid", recompute=True), p, activation="sigmoid")


@pytest.mark.parametrize("reads", LOSSES[1:], ids="+".join)
def test_gradients_of_each_statistic_apart(way: str, reads: tuple[str, ...]) -> None:
    p = problem(37, 67, 33, activation="gelu")
    assert_matches(with_stats(activation="gelu", recompute=True), p, reads, activation="gelu")


def test_statistics_in_inference(way: str) -> None:
    p = problem(37, 67, 33)
    with torch.no_grad():
        found = with_stats(output_activation="sigmoid")(*p.operands)
        expected = definition(output_activation="sigmoid")(*p.operands)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_statistics_repeat_bitwise(way: str) -> None:
    p = problem(37, 67, 33, torch.bfloat16)
    first, again = (results(with_stats(recompute=True), p) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], again[name]), name


def test_a_latent_that_rounds_to_zero_is_not_active(way: str) -> None:
    """sigmoid(−30) is 9e-14, and 0 in float16."""
    x, weight = torch.zeros(37, 67, dtype=torch.float16), torch.ones(33, 67, dtype=torch.float16)
    _, stats = with_stats(activation="sigmoid")(x, weight, torch.full((33,), -30.0, dtype=torch.float16))
    assert all((t == 0).all() for t in stats)


def test_nan_counts_as_active(way: str) -> None:
    p = problem(37, 67, 33)
    with torch.no_grad():
        p.x[3, 5] = float("nan")
    ours, eager = (results(call, p) for call in (with_stats(recompute=True), definition()))
    for name in ours:
        assert torch.equal(ours[name].isnan(), eager[name].isnan()), name
    assert torch.equal(ours["l0"], eager["l0"]) and torch.equal(ours["fired"], eager["fired"])
