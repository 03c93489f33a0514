"""The latent's statistics: values and gradients against the definition, and everything else that the op promises."""

from __future__ import annotations

import pytest
import torch
from numerics import FLOOR, NAMES, Problem, assert_close, problem
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tiedfused
from tiedfused import LatentStats, reference, settings
from tiedfused.devices import onednn_missing
from tiedfused.functional import tied_encode_decode

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BUILT_IN = tiedfused.activation_names()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# which outputs a loss reads, alone and together
LOSSES = [("y",), ("l1",), ("mean",), ("y", "l1"), ("y", "mean"), ("l1", "mean"), ("y", "l1", "mean")]


def layer(**options):
    return lambda *operands: tied_encode_decode(*operands, return_stats=True, **options)


def definition(**options):
    return lambda *operands: reference.tied_encode_decode(*operands, return_stats=True, **options)


def weights(t: Tensor, seed: int) -> Tensor:
    """A gradient for `t`, exact in every dtype."""
    return ((torch.arange(t.numel()) * (2 * seed + 1) % 17 - 8) / 8).view(t.shape).to(t)


def loss(y: Tensor, stats: LatentStats, reads: tuple[str, ...]) -> Tensor:
    """A scalar of the outputs in `reads`, whose gradients on h̄ are of similar size."""
    h = stats.mean.shape[0]
    terms = {
        "y": (weights(y, 1) * y).sum(),
        "l1": (weights(stats.l1, 2) * stats.l1).sum(),
        "mean": (weights(stats.mean, 3) * stats.mean).sum() * (y.numel() * 1.0) / max(h, 1),
    }
    return sum(terms[name].to(stats.l1.dtype) for name in reads)  # type: ignore[return-value]


def results(call, p: Problem, reads: tuple[str, ...] = ("y", "l1", "mean")) -> dict[str, Tensor]:
    """Every output of `call` on `p`, and every gradient of `loss` on them; None of what the loss does not depend on."""
    y, stats = call(*p.operands)
    leaves = [t for t in p.operands if t is not None]
    grads = iter(torch.autograd.grad(loss(y, stats, reads), leaves, allow_unused=True))
    found = {"y": y.detach(), **{name: t.detach() for name, t in stats._asdict().items()}}
    for name, t in zip(NAMES[1:], p.operands, strict=True):
        if t is not None and (grad := next(grads)) is not None:
            found[name] = grad
    return found


def assert_matches(call, p: Problem, reads: tuple[str, ...] = ("y", "l1", "mean"), **options) -> None:
    """Counts are those of the same dtype's latent, everything else at most twice as far from float64 as eager is."""
    dtype = p.x.dtype
    ours, eager = results(call, p, reads), results(definition(**options), p, reads)
    truth = results(definition(**options), p.to(torch.float64), reads)
    # what depends on b_dec through a zero gradient only may be None or zero
    assert ours.keys() - {"grad_bias_dec"} == truth.keys() - {"grad_bias_dec"}
    for name in truth.keys() & ours.keys():
        if name in ("l0", "fired"):
            assert torch.equal(ours[name], truth[name]), name
            continue
        assert_close(ours[name], eager[name], truth[name], dtype, name)
        wide = torch.promote_types(dtype, torch.float32)
        assert ours[name].dtype == (wide if name in ("l1", "mean") else dtype), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("n, d, h", [(1, 1, 1), (3, 1, 50), (17, 7, 17), (40, 33, 100), (65, 20, 48)])
def test_tiles(small_tiles: str, n: int, d: int, h: int, recompute: bool, dtype: torch.dtype) -> None:
    assert_matches(layer(recompute=recompute), problem(n, d, h, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("activation", BUILT_IN)
def test_activations(small_tiles: str, activation: str, recompute: bool, dtype: torch.dtype) -> None:
    p = problem(40, 12, 37, dtype, activation=activation)
    assert_matches(layer(activation=activation, recompute=recompute), p, activation=activation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "identity"])
@pytest.mark.parametrize("reads", LOSSES, ids="+".join)
def test_each_gradient_apart(small_tiles: str, reads: tuple[str, ...], activation: str, recompute: bool, device: str):
    p = problem(40, 12, 37, torch.float64, device, activation=activation)
    assert_matches(layer(activation=activation, recompute=recompute), p, reads, activation=activation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n, d, h", [(3000, 64, 5000), (40000, 32, 700), (3000, 768, 2000)])
def test_large(n: int, d: int, h: int, dtype: torch.dtype) -> None:
    assert_matches(layer(activation="tanh"), problem(n, d, h, dtype, "cuda", activation="none"), activation="tanh")


def test_closed_form() -> None:
    p = problem(20, 8, 30, torch.float64, activation="tanh")
    y, stats = tied_encode_decode(*p.operands, activation="tanh", return_stats=True)
    grad_l1, grad_mean = torch.randn(20, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    found = torch.autograd.grad((y, stats.l1, stats.mean), p.operands, (p.grad_y, grad_l1, grad_mean))
    expected = reference.gradients(p.grad_y, *p.operands, activation="tanh", grad_l1=grad_l1, grad_mean=grad_mean)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("recompute", [True, False])
def test_relu_at_exact_zeros(small_tiles: str, recompute: bool) -> None:
    # half of the pre-activations are exactly 0: not active, and no gradient passes, as in eager
    p = problem(20, 8, 40, torch.float64)
    with torch.no_grad():
        p.weight[::2] = 0
        p.bias_enc[::2] = 0
    found, expected = results(layer(recompute=recompute), p), results(definition(), p)
    torch.testing.assert_close(found, expected)
    assert found["fired"][::2].eq(0).all() and found["fired"][1::2].any()


def test_nan_goes_where_it_goes_in_eager(small_tiles: str) -> None:
    p = problem(20, 16, 30)
    with torch.no_grad():
        p.x.view(-1)[3] = float("nan")
    ours, eager = results(layer(recompute=True), p), results(definition(), p)
    for name in ours:
        assert torch.equal(ours[name].isnan(), eager[name].isnan()), name
    assert torch.equal(ours["l0"], eager["l0"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("output_activation", ["identity", "sigmoid", "gelu"])
@pytest.mark.parametrize("grad", [True, False])
def test_y_does_not_change_by_a_bit(small_tiles: str, grad: bool, output_activation: str, dtype, device: str) -> None:
    p = problem(50, 12, 40, dtype, device)
    options = {"output_activation": output_activation}
    # on a GPU the plan might take another regime, whose last bits are others
    with torch.set_grad_enabled(grad), settings.override(regime="stream"):
        y, stats = tied_encode_decode(*p.operands, return_stats=True, **options)
        assert torch.equal(y, tied_encode_decode(*p.operands, **options))
    assert y.requires_grad == stats.l1.requires_grad == stats.mean.requires_grad == grad
    assert not stats.l0.requires_grad and not stats.fired.requires_grad


@pytest.mark.parametrize("shape", [(8,), (2, 3, 8), (2, 1, 3, 8), (0, 8), (3, 0, 8)])
@pytest.mark.parametrize("device", DEVICES)
def test_leading_dimensions(shape: tuple[int, ...], device: str) -> None:
    p = problem(1, 8, 12, device=device)
    x = torch.randn(shape, device=device, requires_grad=True)
    found, expected = (call(x, *p.operands[1:]) for call in (layer(), definition()))
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[1].l1.shape == found[1].l0.shape == shape[:-1]
    leaves = (x, *p.operands[1:3])
    grads = (torch.autograd.grad(s.l1.sum() + s.mean.sum(), leaves) for _, s in (found, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("layout", ["row stride", "transposed"])
def test_strides(small_tiles: str, layout: str) -> None:
    p = problem(40, 33, 50)
    other = p.to(p.x.dtype)
    if layout == "transposed":
        other.x, other.weight = (t.detach().t().contiguous().t().requires_grad_() for t in (p.x, p.weight))
    else:
        other.x = torch.cat([p.x.detach()] * 2, 1)[:, :33].requires_grad_()
        other.bias_enc = torch.stack([p.bias_enc.detach()] * 2, 1)[:, 0].requires_grad_()
    torch.testing.assert_close(results(layer(), other), results(layer(), p))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("needed", range(1, 16))
def test_only_the_gradients_that_are_needed(small_tiles: str, needed: int, recompute: bool) -> None:
    p = problem(20, 12, 30)
    other = p.to(p.x.dtype)
    for bit, (t, o) in enumerate(zip(p.operands, other.operands, strict=True)):
        t.requires_grad_(bool(needed >> bit & 1))
        o.requires_grad_(bool(needed >> bit & 1))
    for call, operands in ((layer(recompute=recompute), p.operands), (definition(), other.operands)):
        loss(*call(*operands), ("y", "l1", "mean")).backward()
    for name, t, o in zip(NAMES[1:], p.operands, other.operands, strict=True):
        assert (t.grad is None) == (o.grad is None), name
        if t.grad is not None:
            torch.testing.assert_close(t.grad, o.grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_reproducible(small_tiles: str, recompute: bool, dtype: torch.dtype, device: str) -> None:
    p = problem(100, 33, 70, dtype, device)
    first = results(layer(recompute=recompute), p)
    for _ in range(10):
        again = results(layer(recompute=recompute), p)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("recompute", [True, False])
def test_every_element_is_written(small_tiles: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(make):
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(77)

    p = problem(40, 33, 50)
    expected = results(layer(recompute=recompute), p)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    torch.testing.assert_close(results(layer(recompute=recompute), p), expected, rtol=0, atol=0)


# ---- what a PyTorch operator is expected to do ----------------------------------------------------------------------


def small(n: int = 5, dtype: torch.dtype = torch.float64, **options) -> Problem:
    return problem(n, 8, 16, dtype, **options)


def differentiable(call):
    """The outputs that have a gradient, as `gradcheck` wants them."""

    def outputs(*operands):
        y, stats = call(*operands)
        return y, stats.l1, stats.mean

    return outputs


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_gradcheck_and_gradgradcheck(activation: str, recompute: bool) -> None:
    p = problem(3, 4, 6, torch.float64, activation=activation)
    call = differentiable(layer(activation=activation, output_activation="sigmoid", recompute=recompute))
    assert gradcheck(call, p.operands)
    assert gradgradcheck(call, p.operands)
    assert gradcheck(call, p.operands, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("save_latent", [True, False])
def test_opcheck(save_latent: bool) -> None:
    p = small(dtype=torch.float32)
    torch.library.opcheck(torch.ops.tiedfused.forward_stats, (*p.operands, "relu", save_latent))
    x, weight, bias_enc, bias_dec = (t.detach() for t in p.operands)
    _, latent, *_ = torch.ops.tiedfused.forward_stats(x, weight, bias_enc, bias_dec, "relu", save_latent)
    torch.library.opcheck(
        torch.ops.tiedfused.backward,
        (p.grad_y, x, weight, bias_enc, latent, "relu", save_latent, [True] * 3, True, torch.randn(5), torch.randn(16)),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("reads", LOSSES, ids="+".join)
def test_registered_op_differentiated_twice(reads: tuple[str, ...]) -> None:
    p = small()

    def penalty(call) -> tuple[Tensor, ...]:
        y, stats = call(*p.operands)
        squares = loss(y.square(), stats._replace(l1=stats.l1.square(), mean=stats.mean.square()), reads)
        grads = torch.autograd.grad(squares, p.operands[:3], create_graph=True)
        return grads, torch.autograd.grad(sum(g.square().sum() for g in grads), p.operands[:3])

    def op(*operands):
        z, _, *stats = torch.ops.tiedfused.forward_stats(*operands, "relu", False)
        return z, LatentStats(*stats)

    torch.testing.assert_close(penalty(op), penalty(definition()))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("recompute", [True, False])
def test_compile(recompute: bool, dynamic: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer(recompute=recompute), fullgraph=True, dynamic=dynamic, backend=counter)
    for n in (5, 7, 11) if dynamic else (5,):
        for reads in (("y", "l1", "mean"), ("l1",)):
            found, expected = results(compiled, small(n), reads), results(definition(), small(n), reads)
            for name in expected.keys() & found.keys():
                torch.testing.assert_close(found[name], expected[name])
    assert counter.frame_count == 1


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    p = small(dtype=torch.float32)
    found = results(torch.compile(layer(), fullgraph=True), p)
    torch.testing.assert_close(found, results(definition(), p))


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = tiedfused.TiedLinear(8, 16, bias=True, activation="relu")

        def forward(self, x: Tensor) -> tuple[Tensor, LatentStats]:
            return self.layer(x, return_stats=True)

    model = Model()
    dynamic = ({0: torch.export.Dim("n", min=2, max=10**6)},)
    exported = torch.export.export(model, (torch.randn(5, 8),), strict=strict, dynamic_shapes=dynamic)
    assert "tiedfused.forward_stats.default" in [str(node.target) for node in exported.graph.nodes]
    x = torch.randn(9, 8)
    torch.testing.assert_close(exported.module()(x), model(x))


def test_torch_func() -> None:
    x, *rest = (t.detach() for t in small().operands)

    def of(call):
        return lambda t: loss(*call(t, *rest), ("y", "l1", "mean"))

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(transform(of(layer()))(x), transform(of(definition()))(x))
    each = torch.vmap(lambda row: layer()(row, *rest)[1].l1)(x)
    torch.testing.assert_close(each, definition()(x, *rest)[1].l1)


@pytest.mark.parametrize("reads", [("y", "l1", "mean"), ("mean",)], ids="+".join)
def test_batched_gradients(reads: tuple[str, ...]) -> None:
    p = small()
    grads = []
    for call in (layer(), definition()):
        y, stats = call(*p.operands)
        outputs = [{"y": y, **stats._asdict()}[name] for name in reads]
        batch = [torch.stack([weights(t, seed) for seed in range(3)]) for t in outputs]
        grads.append(torch.autograd.grad(outputs, p.operands[:3], batch, is_grads_batched=True))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    p, other = small(), small()

    def flat(*operands):  # re-entrant checkpointing does not look into nested tuples
        y, stats = layer()(*operands)
        return y, *stats

    for reads in (("y", "l1", "mean"), ("l1",)):
        y, *stats = checkpoint(flat, *p.operands, use_reentrant=reentrant)
        loss(y, LatentStats(*stats), reads).backward()
        loss(*definition()(*other.operands), reads).backward()
    torch.testing.assert_close([t.grad for t in p.operands], [t.grad for t in other.operands])


def test_inference_mode() -> None:
    operands = [t.detach() for t in small().operands]
    with torch.inference_mode():
        found = layer()(*operands)
    torch.testing.assert_close(found, definition()(*operands))


def test_autocast() -> None:
    p = small(40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = results(layer(), p), results(definition(), p)
    assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in expected.items()}
    assert found["y"].dtype == torch.bfloat16 and found["l1"].dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=5e-2)


@pytest.mark.parametrize("door", ["eager", "registered"])
def test_backward_under_autocast_keeps_the_precision_of_forward(door: str) -> None:
    p = problem(40, 33, 60)
    if door == "eager":
        y, stats = layer()(*p.operands)
    else:
        y, _, *stats = torch.ops.tiedfused.forward_stats(*p.operands, "relu", False)
        stats = LatentStats(*stats)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad((y, stats.l1), p.operands[:3], (p.grad_y, torch.ones(40)))
    expected = reference.gradients(p.grad_y, *p.operands, grad_l1=torch.ones(40))
    torch.testing.assert_close(grads, expected[:3], rtol=1e-4, atol=1e-4)


def test_flop_counter() -> None:
    p = small(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        loss(*layer()(*p.operands), ("y", "l1", "mean")).backward()
    assert counter.get_total_flops() == 12 * 5 * 8 * 16


def test_meta_fake_and_subclass() -> None:
    x, weight = torch.empty(2, 5, 8, device="meta"), torch.empty(16, 8, device="meta", requires_grad=True)
    y, stats = layer()(x, weight)
    assert [t.shape for t in stats] == [(2, 5), (2, 5), (16,), (16,)]
    assert [t.dtype for t in stats] == [torch.float32, torch.int64] * 2
    (y.sum() + stats.l1.sum()).backward()
    assert weight.grad.shape == (16, 8)
    with torch._subclasses.FakeTensorMode():
        assert layer()(torch.empty(5, 8), torch.empty(16, 8))[1].fired.shape == (16,)
    p, other = small(), problem(5, 8, 16, torch.float64, seed=1)
    y, stats = layer()(*(TwoTensor(a, b) for a, b in zip(p.operands, other.operands, strict=True)))
    torch.testing.assert_close(stats.l1.b, definition()(*other.operands)[1].l1)


@pytest.mark.parametrize("recompute", [True, False])
def test_saved_tensors(recompute: bool) -> None:
    n, d, h = 6, 5, 40
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        layer(recompute=recompute)(*problem(n, d, h).operands)
    assert sum(size == n * h for size in saved) == (not recompute)
    assert max(saved) == (h * d if recompute else n * h)


@pytest.mark.parametrize("bias_mode", ["none", "independent", "pre", "latent"])
def test_module(bias_mode: str) -> None:
    model = tiedfused.TiedLinear(8, 16, bias_mode=bias_mode, activation="relu", dtype=torch.float64)
    for bias in (model.bias_enc, model.bias_dec):
        if bias is not None:
            nn.init.normal_(bias)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    y, stats = model(x, return_stats=True)
    torch.testing.assert_close(y, model(x), rtol=0, atol=0)
    torch.testing.assert_close(stats, reference.latent_stats(model.encode(x)))
    stats.l1.mean().backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize(
    "device, regime, shape",
    [
        ("cpu", "tiled", (65536, 64, 4096)),
        ("cuda", "stream", (65536, 64, 4096)),
        ("cuda", "chunked", (8192, 4096, 32768)),
        ("cuda", "bottleneck", (65536, 784, 64)),
        ("cuda", "few_rows", (4, 768, 24576)),
    ],
)
def test_plan_says_it_and_counts_it(device: str, regime: str, shape: tuple[int, int, int]) -> None:
    options = {"dtype": torch.bfloat16, "device": device, "recompute": True}
    with settings.override(regime=regime):
        without, with_stats = (tiedfused.plan(*shape, stats=s, **options) for s in (False, True))
    assert with_stats.forward.regime == without.forward.regime == regime
    assert with_stats.predicted_ms > without.predicted_ms
    assert with_stats.stats and "statistics" in str(with_stats) and "statistics" not in str(without)
    assert [p.tile for p in with_stats.passes] == [p.tile for p in without.passes]
    assert [p.split for p in with_stats.passes] == [p.split for p in without.passes]
    more = with_stats.forward.workspace_bytes - without.forward.workspace_bytes
    assert 0 < more < 16 * settings.MIB


def test_sums_over_rows_share_the_workspace() -> None:
    few, many = (tiedfused.plan(n, 64, 32768, dtype=torch.bfloat16, device="cuda", stats=True) for n in (2**16, 2**18))
    assert few.regime == many.regime == "stream"
    assert few.workspace_bytes == many.workspace_bytes
    assert many.forward.chunk[0] < 2**18
    with settings.override(workspace_bytes=100_000, regime="stream"):
        refused = tiedfused.plan(2**16, 64, 32768, dtype=torch.bfloat16, device="cuda", stats=True)
    assert "do not fit the workspace" in dict(refused.alternatives)["stream"]
    assert refused.forward.regime == "tiled"


def test_large_products_go_to_the_same_library() -> None:
    if onednn_missing() is not None:
        pytest.skip(onednn_missing())
    p = problem(1500, 8, 1100, activation="none")
    with settings.override(recompute=True):
        y, stats = layer()(*p.operands)
        assert torch.equal(y, tied_encode_decode(*p.operands))
    truth = definition()(*p.to(torch.float64).operands)[1]
    assert float((stats.l1 - truth.l1).detach().norm() / truth.l1.detach().norm()) < FLOOR[torch.float32]
    assert int((stats.fired - truth.fired).abs().sum()) <= 4  # rounding across the kink
