"""What a PyTorch operator is expected to do besides computing: one test a feature."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import io
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from numerics import Problem, assert_layer_matches, outputs, problem
from test_stats import assert_matches
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import CheckpointError, checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tiedfused
from tiedfused import functional, planning, reference, settings
from tiedfused.functional import tied_encode_decode

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BUILT_IN = tiedfused.activation_names()


def small(dtype: torch.dtype = torch.float64, device: str = "cpu", n: int = 5) -> Problem:
    return problem(n, 8, 16, dtype, device)


def detached(p: Problem) -> list[torch.Tensor]:
    return [t.detach() for t in p.operands if t is not None]


def assert_same(layer, p: Problem) -> None:
    torch.testing.assert_close(outputs(layer, p), outputs(reference.tied_encode_decode, p))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("activation", BUILT_IN)
def test_gradcheck_and_gradgradcheck(activation: str, recompute: bool) -> None:
    p = problem(3, 4, 6, torch.float64, activation=activation)

    def layer(*t):
        return tied_encode_decode(*t, activation=activation, output_activation="sigmoid", recompute=recompute)

    assert gradcheck(layer, p.operands)
    assert gradgradcheck(layer, p.operands)


def test_double_backward_through_a_shared_graph() -> None:
    # x depends on the weight: a double backward that differentiates past x would count that path twice
    p = small()

    def penalty(layer):
        x = p.x @ p.weight[:8, :8]
        y = layer(x, *p.operands[1:])
        (g,) = torch.autograd.grad(y.square().sum(), p.weight, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (p.x, p.weight))

    torch.testing.assert_close(penalty(tied_encode_decode), penalty(reference.tied_encode_decode))


@pytest.mark.parametrize("needs", [[True, True, True], [False, True, True], [False, False, True]])
@pytest.mark.parametrize("save_latent", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(save_latent: bool, needs: list[bool], device: str) -> None:
    p = small(torch.float32, device)
    torch.library.opcheck(torch.ops.tiedfused.forward, (*p.operands, "relu", save_latent))
    x, weight, bias_enc, bias_dec = detached(p)
    y, latent = torch.ops.tiedfused.forward(x, weight, bias_enc, bias_dec, "relu", save_latent)
    torch.library.opcheck(
        torch.ops.tiedfused.backward,
        (torch.randn_like(y), x, weight, bias_enc, latent, "relu", save_latent, needs),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_registered_backward_refuses_a_second_derivative() -> None:
    p = small()
    latent = p.x.new_empty(0)
    grads = torch.ops.tiedfused.backward(
        p.grad_y.requires_grad_(), *p.operands[:3], latent, "relu", False, [True, True, True]
    )
    with pytest.raises(RuntimeError, match="create_graph"):
        grads[1].sum().backward()


@pytest.mark.parametrize("output_activation", ["identity", "sigmoid", "gelu"])
@pytest.mark.parametrize("recompute", [None, True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, recompute: bool | None, output_activation: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    options = {"output_activation": output_activation}

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=counter)
    def layer(*t):
        return tied_encode_decode(*t, recompute=recompute, **options)

    for n in (5, 7, 11) if dynamic else (5,):
        p = small(n=n)
        torch.testing.assert_close(
            outputs(layer, p), outputs(lambda *t: reference.tied_encode_decode(*t, **options), p)
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", DEVICES)
def test_compile_with_inductor(device: str) -> None:
    torch._dynamo.reset()
    assert_same(torch.compile(tied_encode_decode, fullgraph=True), small(torch.float32, device))


def test_compiled_graphs_call_the_op_forward_and_backward() -> None:
    torch._dynamo.reset()
    graphs: list[list[str]] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    p = small()
    torch.compile(tied_encode_decode, fullgraph=True, backend=backend)(*p.operands).backward(p.grad_y)
    assert "tiedfused.forward.default" in graphs[0]
    assert "tiedfused.backward.default" in graphs[1]


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_compiled_torch_func(transform: str) -> None:
    torch._dynamo.reset()
    x, *rest = detached(small())

    def run(layer):
        def function(x):
            if transform == "grad":
                return torch.func.grad(lambda x: layer(x, *rest).square().sum())(x)
            if transform == "vmap":
                return torch.vmap(lambda x: layer(x[None], *rest))(x)
            return torch.func.jvp(lambda x: layer(x, *rest), (x,), (torch.ones_like(x),))[1]

        return function

    compiled = torch.compile(run(tied_encode_decode), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(reference.tied_encode_decode)(x))


@pytest.mark.parametrize(("d", "h"), [(64, 4096), (768, 1024)])
def test_export_binds_no_batch_size(d: int, h: int) -> None:
    layer, x = tiedfused.TiedLinear(d, h), torch.randn(5, d)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=10**6)},))
    (bounds,) = exported.range_constraints.values()
    assert bounds.upper == 10**6


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("grad_x", [True, False])
@pytest.mark.parametrize(
    ("n", "d", "h", "keeps"),
    [
        (1024, 512, 512, (False, False)),
        (4096, 384, 1024, (True, True)),
        (1024, 256, 8192, (False, True)),
        ((32, 32), 256, 8192, (False, True)),
    ],
)
def test_traced_and_called_keep_the_latent_alike(
    n: int | tuple[int, int], d: int, h: int, keeps: tuple[bool, bool], grad_x: bool, strict: bool, monkeypatch
) -> None:
    """On a GPU the plan's cost model decides; the rule of thumb for symbolic sizes says otherwise at these."""
    rows = n if isinstance(n, tuple) else (n,)
    gpu = {"dtype": torch.bfloat16, "device": "cuda"}
    assert tiedfused.plan(math.prod(rows), d, h, grad_x=grad_x, **gpu).save_latent is keeps[grad_x]
    request = planning.request
    monkeypatch.setattr(planning, "request", lambda *p, **o: dataclasses.replace(request(*p, **o), device_type="cuda"))
    layer = tiedfused.TiedLinear(d, h, activation="relu", dtype=torch.bfloat16)
    x = torch.empty(*rows, d, dtype=torch.bfloat16, requires_grad=grad_x)
    exported = torch.export.export(layer, (x,), strict=strict)
    (call,) = (node for node in exported.graph.nodes if "tiedfused.forward" in str(node.target))
    assert call.args[-1] is keeps[grad_x]


def test_other_settings_trace_anew_and_the_same_do_not() -> None:
    torch._dynamo.reset()
    layer, x = tiedfused.TiedLinear(768, 1024), torch.randn(5, 768)
    backend = EagerAndRecordGraphs()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for workspace_bytes in (1 << 28, 0, 1 << 28, 0, 1 << 27):
        with settings.override(workspace_bytes=workspace_bytes):
            compiled(x)
    keeps = [node.args[-1] for g in backend.graphs for node in g.graph.nodes if "tiedfused.forward" in str(node.target)]
    assert keeps == [True, False, True]


ONE_TILE, TILES_OF_32, TILES_OF_16 = ({"workspace_bytes": n} for n in (1 << 28, 1 << 14, 1))


@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("way", ["eager", "compiled", "checkpoint", "checkpoint of compiled", "compiled checkpoint"])
@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (ONE_TILE, TILES_OF_16),
        (TILES_OF_16, ONE_TILE),
        (TILES_OF_16, TILES_OF_32),
        (TILES_OF_32, TILES_OF_16 | {"regime": "tiled"}),
    ],
)
def test_kept_latent_is_read_whatever_the_settings(forward: dict, backward: dict, way: str, return_stats: bool) -> None:
    torch._dynamo.reset()

    def layer(*operands):
        return tied_encode_decode(*operands, recompute=False, return_stats=return_stats)

    def checkpointed(f):
        return lambda *operands: checkpoint(f, *operands, use_reentrant=False)

    compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    called = {
        "eager": layer,
        "compiled": compiled(layer),
        "checkpoint": checkpointed(layer),
        "checkpoint of compiled": checkpointed(compiled(layer)),
        "compiled checkpoint": compiled(checkpointed(layer)),
    }[way]

    def under_its_settings(*operands):
        with settings.override(**forward):
            return called(*operands)

    with settings.override(**backward):
        (assert_matches if return_stats else assert_layer_matches)(under_its_settings, problem(40, 8, 50))


@pytest.mark.parametrize("recompute", [True, False])
def test_checkpoint_that_keeps_the_latent_once_only_is_an_error(recompute: bool) -> None:
    """Were nothing saved in the place of a latent that is not kept, one of y's shape would be taken for y."""
    p = small(n=5)
    with settings.override(recompute=recompute):
        options = {"output_activation": "sigmoid", "use_reentrant": False}
        y = checkpoint(tied_encode_decode, p.x, p.weight[:8], **options)
    with settings.override(recompute=not recompute), pytest.raises(CheckpointError, match="different metadata"):
        y.sum().backward()


def test_frozen_weights_keep_no_latent_when_compiled() -> None:
    torch._dynamo.reset()
    layer = tiedfused.TiedLinear(768, 1024).requires_grad_(False)
    backend = EagerAndRecordGraphs()
    torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(5, 768))
    (call,) = (n for n in backend.graphs[0].graph.nodes if "tiedfused.forward" in str(n.target))
    assert call.args[-1] is False


@pytest.mark.parametrize("recompute", [True, False])
def test_batched_gradients(recompute: bool) -> None:
    p = problem(700, 8, 1100, torch.float64)
    y = tied_encode_decode(*p.operands, recompute=recompute)
    expected = reference.tied_encode_decode(*p.operands)
    grads = torch.randn(3, *y.shape, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(y, p.weight, grads, is_grads_batched=True),
        torch.autograd.grad(expected, p.weight, grads, is_grads_batched=True),
    )


def test_lazily_negated_tensor() -> None:
    p = small()
    x = torch._neg_view(p.x.detach())
    torch.testing.assert_close(tied_encode_decode(x, p.weight), reference.tied_encode_decode(-p.x, p.weight))


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    layer = tiedfused.TiedLinear(8, 16, bias=True, activation="relu", dtype=torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64)
    dynamic = ({0: torch.export.Dim("n", min=2, max=64)},)
    exported = torch.export.export(layer, (x,), strict=strict, dynamic_shapes=dynamic)
    assert "tiedfused.forward.default" in [str(node.target) for node in exported.graph.nodes]
    for rows in (5, 9):
        x = torch.randn(rows, 8, dtype=torch.float64)
        torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_exported_module_runs_under_the_settings_in_force(recompute: bool, strict: bool, monkeypatch) -> None:
    layer, x = tiedfused.TiedLinear(8, 16), torch.randn(5, 8)
    with settings.override(recompute=recompute):
        module = torch.export.export(layer, (x,), strict=strict).module()
    asked: list[str] = []
    make_plan = planning.make_plan
    monkeypatch.setattr(planning, "make_plan", lambda r: asked.append(r.in_force.regime) or make_plan(r))
    with settings.override(regime="tiled"):
        module(x).sum().backward()
    assert asked == ["tiled"] * 2


def test_exported_module_trains() -> None:
    layer = tiedfused.TiedLinear(8, 16, bias=True, activation="relu", dtype=torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64)
    module = torch.export.export(layer, (x,)).module()
    module(x).square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(module.weight.grad, layer.weight.grad)


@pytest.mark.parametrize("argument", range(4))
def test_torch_func(argument: int) -> None:
    operands = detached(small())

    def of(layer):
        def function(t):
            return layer(*(t if i == argument else other for i, other in enumerate(operands))).square().sum()

        return function

    ours, expected, t = of(tied_encode_decode), of(reference.tied_encode_decode), operands[argument]
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(transform(ours)(t), transform(expected)(t))


def test_vmap_and_per_sample_gradients() -> None:
    x, *rest = detached(small())
    torch.testing.assert_close(
        torch.vmap(lambda x: tied_encode_decode(x[None], *rest)[0])(x), reference.tied_encode_decode(x, *rest)
    )

    def of(layer):
        return torch.vmap(torch.func.grad(lambda w, x: layer(x[None], w, *rest[1:]).sum()), in_dims=(None, 0))

    torch.testing.assert_close(of(tied_encode_decode)(rest[0], x), of(reference.tied_encode_decode)(rest[0], x))


def test_forward_mode() -> None:
    assert gradcheck(tied_encode_decode, small().operands, check_forward_ad=True, check_backward_ad=False)


def test_tensor_that_outlived_its_transform() -> None:
    leaked = []
    x, *rest = detached(small())

    def function(x):
        leaked.append(x)
        return x.sum()

    torch.func.grad(function)(x)
    weight = rest[0].clone().requires_grad_()
    tied_encode_decode(leaked[0], weight).sum().backward()
    (expected,) = torch.autograd.grad(reference.tied_encode_decode(x, weight).sum(), weight)
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    p, expected = small(), small()
    checkpoint(tied_encode_decode, *p.operands, use_reentrant=reentrant).backward(p.grad_y)
    reference.tied_encode_decode(*expected.operands).backward(expected.grad_y)
    for t, other in zip(p.operands, expected.operands, strict=True):
        torch.testing.assert_close(t.grad, other.grad)


def test_inference_mode() -> None:
    operands = detached(small())
    with torch.inference_mode():
        y = tied_encode_decode(*operands)
    torch.testing.assert_close(y, reference.tied_encode_decode(*operands))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    p = small(torch.float32, device)
    p.bias_dec = p.bias_dec.detach().to(dtype).requires_grad_()  # autocast takes mixed dtypes
    p.grad_y = p.grad_y.to(dtype)
    with torch.autocast(device, dtype):
        found, expected = outputs(tied_encode_decode, p), outputs(reference.tied_encode_decode, p)
    assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in expected.items()}
    assert found["y"].dtype == dtype
    assert found["grad_weight"].dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_float64_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert tied_encode_decode(*small().operands).dtype == torch.float64


def test_backward_under_autocast_keeps_the_precision_of_forward() -> None:
    p = problem(40, 33, 60)
    y = tied_encode_decode(*p.operands)
    with torch.autocast("cpu", torch.bfloat16):
        (grad,) = torch.autograd.grad(y, p.weight, p.grad_y)
    torch.testing.assert_close(grad, reference.gradients(p.grad_y, *p.operands)[1])


def test_flop_counter() -> None:
    p = small(torch.float32)
    with FlopCounterMode(display=False) as counter:
        tied_encode_decode(*p.operands).backward(p.grad_y)
    assert counter.get_total_flops() == 12 * 5 * 8 * 16
    weight = p.weight.detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        tied_encode_decode(p.x.detach(), weight).sum().backward()
    assert counter.get_total_flops() == 10 * 5 * 8 * 16


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_saved_tensors(activation: str, recompute: bool, compiled: bool) -> None:
    n, d, h = 6, 5, 40
    p = problem(n, d, h)
    saved: list[int] = []

    def layer(*t):
        return tied_encode_decode(*t, activation=activation, output_activation="sigmoid", recompute=recompute)

    if compiled:
        torch._dynamo.reset()
        layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = layer(*p.operands)
    del y
    # x, weight, bias_enc and, for the sigmoid, y; and the latent, once, where it is kept
    assert sum(size == n * h for size in saved) == (not recompute)
    assert max(saved) == (h * d if recompute else n * h)


def test_meta_and_fake_tensors() -> None:
    x, weight = torch.empty(5, 8, device="meta"), torch.empty(16, 8, device="meta", requires_grad=True)
    y = tied_encode_decode(x, weight)
    assert y.shape == (5, 8)
    assert y.device.type == "meta"
    y.sum().backward()
    assert weight.grad.shape == (16, 8)
    with torch._subclasses.FakeTensorMode():
        assert tied_encode_decode(torch.empty(5, 8), torch.empty(16, 8)).shape == (5, 8)


@pytest.mark.filterwarnings("ignore")  # of the sparse CSR beta, and the prototype of nested tensors
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "jagged"])
@pytest.mark.parametrize("bias_mode", ["independent", "pre"])
def test_other_layouts_of_x(layout: str, bias_mode: str) -> None:
    model = tiedfused.TiedLinear(8, 16, bias_mode=bias_mode, activation="relu")
    x = torch.randn(5, 8).relu()
    expected = model(x)
    if layout == "jagged":
        y = model(torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)).values()
    else:
        y = model(x.to_sparse(layout=getattr(torch, layout)))
    torch.testing.assert_close(y, expected)
    grads = (torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in (y, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore")  # of the deprecation, and of the checks of sizes
@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace_takes_any_number_of_rows(grad: bool) -> None:
    model = tiedfused.TiedLinear(8, 1500, bias=True, activation="relu").requires_grad_(grad)
    for traced_rows, rows in ((5, 1000), (1000, 5)):
        traced, x = torch.jit.trace(model, torch.randn(traced_rows, 8)), torch.randn(rows, 8)
        torch.testing.assert_close(traced(x), model(x))


def test_tensor_subclass() -> None:
    p, other = small(), problem(5, 8, 16, torch.float64, seed=1)
    y = tied_encode_decode(*(TwoTensor(a, b) for a, b in zip(p.operands, other.operands, strict=True)))
    assert isinstance(y, TwoTensor)
    torch.testing.assert_close(y.a, reference.tied_encode_decode(*p.operands))
    torch.testing.assert_close(y.b, reference.tied_encode_decode(*other.operands))


def test_in_place_change_of_a_saved_tensor_is_noticed() -> None:
    p = small()
    y = tied_encode_decode(*p.operands)
    with torch.no_grad():
        p.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_is_kept_alive() -> None:
    p = small()
    y = tied_encode_decode(*p.operands)
    y.sum().backward()
    gone = weakref.ref(y)
    del y, p
    gc.collect()
    assert gone() is None


def test_unused_gradients_of_no_tensor() -> None:
    assert not tied_encode_decode(*detached(small())).requires_grad


def test_settings_apply_to_the_next_call() -> None:
    p = small()
    sizes: list[int] = []
    for recompute in (True, False, True):
        sizes.clear()
        with (
            settings.override(recompute=recompute),
            torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t),
        ):
            tied_encode_decode(*p.operands)
        assert (5 * 16 in sizes) == (not recompute)


def test_a_call_is_planned_for_the_state_it_finds(fresh_plans: None) -> None:
    p = small(torch.float32)
    before = torch.get_num_threads()
    try:
        with settings.override(atomics=True):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for deterministic in (False, True):
                    torch.use_deterministic_algorithms(deterministic)
                    tied_encode_decode(*p.operands)
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    found = {(plan.request.threads, plan.request.atomics) for plan in functional._plans.values()}
    assert found == {(1, True), (1, False), (2, True), (2, False)}


def test_calls_of_many_sizes_do_not_fill_the_memory_with_plans(fresh_plans: None, monkeypatch) -> None:
    monkeypatch.setattr(functional, "_PLANS_KEPT", 4)
    for n in range(1, 20):
        tied_encode_decode(*small(n=n).operands)
        assert 1 <= len(functional._plans) <= 4


def test_deepcopy_and_save(tmp_path) -> None:
    layer = tiedfused.TiedLinear(8, 16, bias=True, activation="relu")
    x = torch.randn(5, 8)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(twin(x), layer(x))


def test_optimiser_sees_one_parameter_and_learns() -> None:
    layer = tiedfused.TiedLinear(8, 4, bias=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.randn(64, 8)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (layer(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
