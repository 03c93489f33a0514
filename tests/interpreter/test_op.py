"""The public function served by the Triton backend, as on a GPU: plan, launchers and autograd together."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 set before triton is imported", allow_module_level=True)

import torch
import triton
import triton.language as tl
from numerics import Problem, assert_layer_matches, outputs, problem
from test_stats import assert_matches
from test_stats import layer as with_stats
from torch.utils.checkpoint import checkpoint

import tiedfused
from tiedfused import activations, reference, settings
from tiedfused.functional import tied_encode_decode

pytestmark = pytest.mark.interpreter


def layer(**options):
    return lambda *operands: tied_encode_decode(*operands, **options)


@pytest.fixture(autouse=True)
def _triton_serves() -> None:
    assert tiedfused.plan(5, 8, 16).backend == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "d", "h"), [(1, 1, 1), (33, 20, 70), (5, 64, 2000)])
def test_sizes(n: int, d: int, h: int, dtype: torch.dtype) -> None:
    assert_layer_matches(layer(), problem(n, d, h, dtype))


@pytest.mark.parametrize(("activation", "output_activation"), [("silu", "sigmoid"), ("tanh", "gelu"), ("relu", "relu")])
@pytest.mark.parametrize("biases", [True, False])
def test_activations(activation: str, output_activation: str, biases: bool) -> None:
    options = {"activation": activation, "output_activation": output_activation}
    assert_layer_matches(layer(**options), problem(20, 17, 40, biases=biases, activation=activation), **options)


@pytest.mark.parametrize("which", range(4), ids=["x", "weight", "bias_enc", "bias_dec"])
def test_operand_that_is_a_negated_view(which: int) -> None:
    """Such as the imaginary part of a conjugate: what is in memory has the other sign."""
    operands = [t.detach() for t in problem(20, 17, 40).operands]
    negated = [torch._neg_view(t) if i == which else t for i, t in enumerate(operands)]
    expected = tied_encode_decode(*(t.resolve_neg() for t in negated))
    assert torch.equal(tied_encode_decode(*negated), expected)


@pytest.mark.parametrize("output_activation", ["sigmoid", "gelu"])
def test_inference_applies_g_inside(output_activation: str) -> None:
    p = problem(20, 17, 40)
    assert (
        tiedfused.plan(20, 17, 40, output_activation=output_activation, grad=False).output_activation.name != "identity"
    )
    with torch.no_grad():
        y = tied_encode_decode(*p.operands, output_activation=output_activation)
        expected = reference.tied_encode_decode(*p.operands, output_activation=output_activation)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@triton.jit
def _squared_relu(a):
    return tl.where(a > 0.0, a * a, 0.0)


@triton.jit
def _squared_relu_derivative(a, h):
    return tl.where(a > 0.0, 2.0 * a, 0.0)


def test_activation_of_a_user() -> None:
    tiedfused.register_activation(
        "squared_relu",
        lambda a: a.relu().square(),
        lambda a: 2 * a.relu(),
        triton=(_squared_relu, _squared_relu_derivative),
    )
    try:
        assert tiedfused.plan(20, 17, 40, activation="squared_relu").backend == "triton"
        assert_layer_matches(layer(activation="squared_relu"), problem(20, 17, 40), activation="squared_relu")
    finally:
        del activations._TABLE["squared_relu"]


def test_strided_biases() -> None:
    p = problem(20, 17, 40)
    biases = (torch.stack([b.detach(), b.detach() + 9], 1)[:, 0].requires_grad_() for b in p.operands[2:])
    assert_layer_matches(layer(), Problem(p.x, p.weight, *biases, p.grad_y))


@pytest.mark.parametrize("activation", ["relu", "elu", "selu", "softplus"])
def test_nan_goes_where_it_goes_in_eager(activation: str) -> None:
    p = problem(20, 17, 40)
    with torch.no_grad():
        p.bias_enc[3] = float("nan")
    ours, eager = (
        outputs(lambda *t, call=call: call(*t, activation=activation), p)
        for call in (tied_encode_decode, reference.tied_encode_decode)
    )
    for name in ours:
        assert torch.equal(ours[name].isnan(), eager[name].isnan()), name


def test_strides_and_expanded_gradients() -> None:
    p = problem(20, 17, 40)
    wide = torch.full((20, 50), float("nan"))
    wide[:, 3:20] = p.x.detach()
    assert_layer_matches(
        layer(), Problem(wide[:, 3:20].requires_grad_(), *p.operands[1:], torch.tensor(0.3).expand(20, 17))
    )


def test_no_rows() -> None:
    p = problem(0, 8, 16)
    assert outputs(layer(), p)["grad_weight"].eq(0).all()


@pytest.mark.parametrize("needed", [0b0001, 0b0010, 0b0100, 0b1000, 0b0110])
def test_only_the_gradients_that_are_needed(needed: int) -> None:
    p = problem(12, 8, 20)
    for bit, t in enumerate(p.operands):
        t.requires_grad_(bool(needed >> bit & 1))
    tied_encode_decode(*p.operands).backward(p.grad_y)
    expected = reference.gradients(p.grad_y, *p.operands)
    for bit, t in enumerate(p.operands):
        assert (t.grad is not None) == bool(needed >> bit & 1)
        if t.grad is not None:
            torch.testing.assert_close(t.grad, expected[bit], rtol=1e-4, atol=1e-5)


def test_atomics() -> None:
    with settings.override(atomics=True):
        assert not tiedfused.plan(12, 8, 20).deterministic
        assert_layer_matches(layer(), problem(12, 8, 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_statistics(activation: str, dtype: torch.dtype) -> None:
    assert tiedfused.plan(40, 17, 70, stats=True).backend == "triton"
    p = problem(40, 17, 70, dtype, activation=activation)
    assert_matches(with_stats(activation=activation), p, activation=activation)
    with settings.override(regime="stream"):  # some regimes give no statistics, and other last bits
        y, _ = with_stats(activation=activation)(*p.operands)
        assert torch.equal(y, tied_encode_decode(*p.operands, activation=activation))


def test_statistics_with_atomics_and_one_penalty() -> None:
    with settings.override(atomics=True):
        assert_matches(with_stats(), problem(12, 8, 20), ("mean",))


def test_nothing_of_the_size_of_the_latent_is_saved() -> None:
    saved: list[int] = []
    p = problem(30, 4, 50)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        tied_encode_decode(*p.operands)
    assert max(saved) == 50 * 4


@pytest.mark.parametrize(("activation", "backend"), [("relu", "triton"), ("gelu", "tiled")])
def test_keeping_the_latent(activation: str, backend: str) -> None:
    assert tiedfused.plan(12, 8, 20, recompute=False, activation=activation).backend == backend
    assert_layer_matches(layer(recompute=False, activation=activation), problem(12, 8, 20), activation=activation)


def config_that_says(folder: Path, chunked: float) -> dict[str, str]:
    """Settings under which the chunked regime's kernels were measured to reach a fraction of the peak."""
    folder.mkdir()
    kernels = ("chunk_encode", "chunk_latent", "chunk_weight_grad", "chunk_decode")
    efficiency = {kernel: {"2": {"any": chunked}, "4": {"any": chunked}} for kernel in kernels}
    (folder / "sm90.json").write_text(json.dumps({"status": "measured", "tiles": {}, "efficiency": efficiency}))
    return {"config_dir": str(folder)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["eager", "compiled", "checkpoint"])
@pytest.mark.parametrize("forward", ["tiled", "chunked"])
def test_kept_latent_is_read_by_another_regime(forward: str, way: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """As where a new config arrives between the forward and the backward pass."""
    torch._dynamo.reset()
    regimes = {
        "tiled": config_that_says(tmp_path / "slow", 1e-6) | {"workspace_bytes": 1 << 15},  # in two tiles
        "chunked": config_that_says(tmp_path / "fast", 1.0),
    }
    sizes = 20, 16, 100
    for regime, changes in regimes.items():
        with settings.override(**changes):
            assert tiedfused.plan(*sizes, dtype=dtype, recompute=False).regime == regime
    called = layer(recompute=False)
    if way == "compiled":
        called = torch.compile(called, fullgraph=True, backend="aot_eager")
    elif way == "checkpoint":
        called = functools.partial(checkpoint, called, use_reentrant=False)

    def under_its_settings(*operands):
        with settings.override(**regimes[forward]):
            return called(*operands)

    (backward,) = regimes.keys() - {forward}
    with settings.override(**regimes[backward]):
        assert_layer_matches(under_its_settings, problem(*sizes, dtype))


def test_registered_op_and_compile() -> None:
    torch._dynamo.reset()
    p = problem(12, 8, 20)
    compiled = torch.compile(tied_encode_decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled, p), outputs(layer(), p))
    torch.library.opcheck(torch.ops.tiedfused.forward, (*p.operands, "relu", False))


def test_bitwise_reproducible() -> None:
    p = problem(40, 16, 60, torch.bfloat16)
    first, again = outputs(layer(), p), outputs(layer(), p)
    assert all(torch.equal(first[name], again[name]) for name in first)
