"""The chunked regime on Triton's interpreter: its kernels and its loop over chunks, against float64."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 set before triton is imported", allow_module_level=True)

import dataclasses
from collections.abc import Iterator

from numerics import assert_layer_matches, outputs, problem
from test_stats import assert_matches
from test_stats import layer as with_stats

import tiedfused
from tiedfused import functional, planning, settings, tiles
from tiedfused.functional import tied_encode_decode
from tiedfused.regimes import chunked
from tiedfused.regimes.common import Part, Request
from tiedfused.tiles import GemmTile

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = GemmTile(32, 16, 16, 4, 2)


@pytest.fixture(params=["one chunk", "chunks", "split", "x apart"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fresh_plans: None) -> Iterator[str]:
    """Small tiles, and a plan that works in one chunk, in many, with split sums, or with x̄ in a sweep of its own."""
    monkeypatch.setattr(chunked, "lookup", lambda r, kernel: (SMALL, "test"))
    parts = 3 if request.param == "split" else 1
    monkeypatch.setattr(chunked, "_parts", lambda r, blocks, steps: parts)

    def best(r: Request, keep: bool, passes_of) -> Part | str:
        if (refusal := chunked.why_not(r, keep)) is not None:
            return refusal
        if request.param == "x apart":
            r = dataclasses.replace(r, in_force=dataclasses.replace(r.in_force, workspace_bytes=0))
        chunk = (r.n, r.h) if request.param == "one chunk" else (min(32, r.n), min(48, r.h))
        return Part("chunked", "triton", passes_of(r, keep, *chunk), "test", chunk)

    monkeypatch.setattr(chunked, "_best", best)
    with settings.override(regime="chunked"):
        yield request.param


def layer(**options):
    return lambda *operands: tied_encode_decode(*operands, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [True, False])
def test_every_gradient(way: str, dtype: torch.dtype, recompute: bool) -> None:
    assert tiedfused.plan(40, 24, 70, dtype=dtype, recompute=recompute).regime == "chunked"
    assert_layer_matches(layer(recompute=recompute), problem(40, 24, 70, dtype))


@pytest.mark.parametrize(("n", "d", "h"), [(1, 1, 1), (17, 130, 7), (3, 20, 70)])
def test_sizes(way: str, n: int, d: int, h: int) -> None:
    assert_layer_matches(layer(recompute=True), problem(n, d, h))


def test_tiles_of_more_rows_than_a_chunk(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tuning may choose them: the sums of b̄_enc over a chunk's blocks must not share rows with the next chunk's."""
    tile = dataclasses.replace(SMALL, block_m=64)
    monkeypatch.setattr(chunked, "lookup", lambda r, kernel: (tile, "test"))
    assert_layer_matches(layer(recompute=True), problem(100, 24, 70))


@pytest.mark.parametrize("activation", ["gelu", "tanh", "leaky_relu"])
def test_activations_without_biases(way: str, activation: str) -> None:
    p = problem(40, 20, 70, activation=activation, biases=activation == "leaky_relu")
    assert_layer_matches(layer(activation=activation), p, activation=activation)


def test_inference_applies_g_and_the_bias_once(way: str) -> None:
    p = problem(40, 24, 70)
    with torch.no_grad():
        y = tied_encode_decode(*p.operands, output_activation="sigmoid")
        expected = tiedfused.reference.tied_encode_decode(*p.operands, output_activation="sigmoid")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_some_gradients_only(way: str) -> None:
    p = problem(40, 24, 70)
    whole = outputs(layer(recompute=True), p)
    names = ("grad_x", "grad_weight", "grad_bias_enc")
    for wanted in ([0], [2], [0, 1]):
        operands = [
            None if t is None else t.detach().requires_grad_(i in wanted or i == 3) for i, t in enumerate(p.operands)
        ]
        tied_encode_decode(*operands, recompute=True).backward(p.grad_y)  # type: ignore[arg-type]
        for i in wanted:
            torch.testing.assert_close(operands[i].grad, whole[names[i]], rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("activation", "recompute"), [("relu", True), ("relu", False), ("tanh", False), ("gelu", True)]
)
def test_statistics_and_penalties(way: str, activation: str, recompute: bool, dtype: torch.dtype) -> None:
    options = {"activation": activation, "recompute": recompute}
    assert tiedfused.plan(70, 24, 70, dtype=dtype, stats=True, **options).regime == "chunked"
    p = problem(70, 24, 70, dtype, activation=activation)
    assert_matches(with_stats(**options), p, activation=activation)
    assert torch.equal(with_stats(**options)(*p.operands)[0], layer(**options)(*p.operands))


def test_a_latent_that_rounds_to_zero_is_not_active(way: str) -> None:
    """sigmoid(−30) is 9e-14, and 0 in float16."""
    x, weight = torch.zeros(37, 67, dtype=torch.float16), torch.ones(33, 67, dtype=torch.float16)
    _, stats = with_stats(activation="sigmoid")(x, weight, torch.full((33,), -30.0, dtype=torch.float16))
    assert all((t == 0).all() for t in stats)


def test_strided_rows_and_expanded_gradient(way: str) -> None:
    p = problem(40, 24, 70)
    x = torch.randn(40, 60)[:, 3:27].detach().requires_grad_()
    ours = tied_encode_decode(x, p.weight, p.bias_enc, p.bias_dec, recompute=True)
    theirs = tiedfused.reference.tied_encode_decode(x, p.weight, p.bias_enc, p.bias_dec)
    grad = torch.randn(24).expand(40, 24)
    for a, b in zip(*(torch.autograd.grad(y, (x, p.weight), grad) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_sums_beyond_the_range_of_float16_are_finite_where_their_totals_are(way: str) -> None:
    # every chunk's part of y and of W̄ is about ±90 000, beyond float16, and they cancel
    n, d, h = 64, 16, 96
    x = torch.full((n, d), 4.0)
    weight = torch.full((h, d), 8.0)
    weight[1::2] *= -1
    grad = torch.full((n, d), 4.0)
    grad[1::2] *= -1
    p = [t.half().requires_grad_() for t in (x, weight)]
    y = tied_encode_decode(*p, activation="identity", recompute=True)
    truth = tiedfused.reference.tied_encode_decode(*(t.double() for t in p), activation="identity")
    eager = tiedfused.reference.tied_encode_decode(*p, activation="identity")
    assert torch.isfinite(y).sum() >= torch.isfinite(eager).sum()
    finite = torch.isfinite(truth.half())
    torch.testing.assert_close(y[finite].double(), truth[finite], rtol=1e-2, atol=1e-2)


def test_bitwise_reproducible(way: str) -> None:
    p = problem(40, 24, 70)
    first, second = (outputs(layer(recompute=True), p) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_the_plans_own_chunks(fresh_plans: None) -> None:
    """Nothing replaced: the packaged tiles, the chunk and the split that the cost model picks."""
    with settings.override(regime="chunked"):
        p = planning.plan(150, 70, 260, recompute=True)
        assert p.regime == "chunked"
        assert_layer_matches(layer(recompute=True), problem(150, 70, 260))
    functional._plans.clear()
    assert isinstance(p.passes[0].tile, tiles.GemmTile)
