"""Every backend against the reference: y and each gradient, over dtypes, activations, sizes and layouts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from numerics import NAMES, Problem, assert_close, assert_layer_matches, outputs, problem
from torch.utils._python_dispatch import TorchDispatchMode

import tiedfused
from tiedfused import reference, settings
from tiedfused._backends import tiled
from tiedfused.functional import tied_encode_decode

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BUILT_IN = tiedfused.activation_names()
# (N, d, H): one of everything, odd sizes, more tiles than one in each direction
SIZES = [(1, 1, 1), (1, 33, 1), (3, 1, 50), (17, 7, 17), (40, 33, 100), (65, 20, 48)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def layer(**options):
    return lambda *operands: tied_encode_decode(*operands, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("n, d, h", SIZES)
def test_tiles(small_tiles: str, n: int, d: int, h: int, recompute: bool, dtype: torch.dtype) -> None:
    assert_layer_matches(layer(recompute=recompute), problem(n, d, h, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [True, False])
def test_input_gradient_apart(small_tiles: str, recompute: bool, dtype: torch.dtype) -> None:
    with settings.override(workspace_bytes=0):  # no room for the sum of x̄
        p = tiedfused.plan(70, 33, 100, dtype=dtype, recompute=recompute)
        assert len(p.backward.passes) == (2 if dtype.itemsize == 2 else 1)
        assert_layer_matches(layer(recompute=recompute), problem(70, 33, 100, dtype))


@pytest.mark.parametrize("recompute", [True, False])
def test_host_work_grows_with_the_rows_and_no_faster(
    small_tiles: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, views = tiled._rows, []
    monkeypatch.setattr(tiled, "_rows", lambda t, size: views.extend(parts := cut(t, size)) or parts)

    def made(n: int) -> int:
        p = problem(n, 12, 40)
        y = tied_encode_decode(*p.operands, recompute=recompute)
        views.clear()
        y.sum().backward()
        return len(views)

    assert 4 * made(160) >= made(640) > made(160) > 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("activation", BUILT_IN)
def test_activations(small_tiles: str, activation: str, recompute: bool, dtype: torch.dtype) -> None:
    p = problem(40, 12, 37, dtype, activation=activation)
    assert_layer_matches(layer(activation=activation, recompute=recompute), p, activation=activation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output_activation", BUILT_IN)
def test_output_activations(output_activation: str, dtype: torch.dtype, device: str) -> None:
    p = problem(20, 12, 30, dtype, device)
    options = {"activation": "silu", "output_activation": output_activation}
    assert_layer_matches(layer(**options), p, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output_activation", BUILT_IN)
def test_inference(small_tiles: str, output_activation: str, dtype: torch.dtype, device: str) -> None:
    p = problem(40, 12, 30, dtype, device)
    options = {"activation": "silu", "output_activation": output_activation}
    with torch.no_grad():
        y, eager = (call(*p.operands, **options) for call in (tied_encode_decode, reference.tied_encode_decode))
        truth = reference.tied_encode_decode(*p.to(torch.float64).operands, **options)
    assert_close(y, eager, truth, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [None, True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_biases(biases: bool, recompute: bool | None, device: str) -> None:
    assert_layer_matches(
        layer(activation="tanh", recompute=recompute),
        problem(30, 24, 40, device=device, biases=biases),
        activation="tanh",
    )


@pytest.fixture(params=settings.REGIME_NAMES)
def regime(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each regime in turn, wherever it applies."""
    with settings.override(regime=request.param):
        yield request.param


def serves(regime: str, n: int, d: int, h: int, dtype: torch.dtype, **options: bool) -> None:
    p = tiedfused.plan(n, d, h, dtype=dtype, device="cuda", **options)
    if regime not in p.regime:
        pytest.skip(dict(p.alternatives)[regime])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [32, 200, 3000])
def test_large_problems_have_no_kinks(d: int, dtype: torch.dtype) -> None:
    x, weight, bias, _ = problem(700, d, 1100, dtype, exact=True).operands
    a = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    assert torch.equal(a.double(), torch.nn.functional.linear(x.double(), weight.double(), bias.double()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [32, 64, 96, 128, 200, 256, 384, 512, 768])
@pytest.mark.parametrize("recompute", [True, False])
def test_large(regime: str, recompute: bool, d: int, dtype: torch.dtype) -> None:
    serves(regime, 3000, d, 5000, dtype, recompute=recompute)
    assert_layer_matches(layer(recompute=recompute), problem(3000, d, 5000, dtype, "cuda", exact=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "d", "h"), [(5, 300, 7000), (64, 512, 9000), (3000, 784, 64), (2000, 3000, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_shapes_with_a_regime_of_their_own(regime: str, grad: bool, dtype: torch.dtype, n: int, d: int, h: int) -> None:
    serves(regime, n, d, h, dtype, grad=grad)
    p = problem(n, d, h, dtype, "cuda", exact=True)
    if grad:
        assert_layer_matches(layer(), p)
        return
    with torch.no_grad():
        y, eager = layer()(*p.operands), reference.tied_encode_decode(*p.operands)
        truth = reference.tied_encode_decode(*p.to(torch.float64).operands)
    assert_close(y, eager, truth, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", BUILT_IN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activations_on_gpu(regime: str, activation: str, dtype: torch.dtype) -> None:
    serves(regime, 300, 100, 517, dtype)
    p = problem(300, 100, 517, dtype, "cuda", activation=activation)
    assert_layer_matches(layer(activation=activation), p, activation=activation)


@pytest.mark.gpu
def test_offsets_past_31_bits(gpu_alone: None) -> None:
    n, d, h = 2**31 // 64 + 100, 64, 16
    x = torch.randn(n, d, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(h, d, dtype=torch.bfloat16, device="cuda") / 8
    last = x[-100:]
    torch.testing.assert_close(tied_encode_decode(x, weight)[-100:], tied_encode_decode(last, weight))


def _strided(p: Problem, layout: str) -> Problem:
    def spread(t: torch.Tensor) -> torch.Tensor:
        if layout == "transposed":
            return t.detach().t().contiguous().t().requires_grad_()
        if layout == "overlapping":
            return t.detach().flatten()[: sum(t.shape) - 1].unfold(0, t.shape[1], 1).requires_grad_()
        wide = torch.full((t.shape[0], 2 * t.shape[1] + 3), float("nan"), dtype=t.dtype, device=t.device)
        step = {"row stride": 1, "column stride": 2}[layout]
        view = wide[:, : step * t.shape[1] : step]
        return view.copy_(t.detach()).requires_grad_()

    def strided(bias: torch.Tensor | None) -> torch.Tensor:
        assert bias is not None
        return torch.stack([bias.detach(), torch.full_like(bias, float("nan"))], 1)[:, 0].requires_grad_()

    biases = strided(p.bias_enc), strided(p.bias_dec)
    return Problem(spread(p.x), spread(p.weight), *biases, spread(p.grad_y).detach())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["row stride", "column stride", "transposed", "overlapping"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(small_tiles: str, layout: str, dtype: torch.dtype, device: str) -> None:
    assert_layer_matches(layer(), _strided(problem(40, 33, 50, dtype, device), layout))


class _SecondOperands(TorchDispatchMode):
    """Fails where oneDNN would take its reference path, hundreds of times slower."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.mkldnn._linear_pointwise.default:
            assert args[1].is_contiguous() or args[1].t().is_contiguous(), (args[1].shape, args[1].stride())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("d", "h"), [(33, 50), (40, 16)])
def test_onednn_reads_second_operands_without_gaps(small_tiles: str, d: int, h: int, recompute: bool) -> None:
    p = _strided(problem(40, d, h), "row stride")
    x, weight, bias_enc = p.x.detach(), p.weight.detach(), p.bias_enc.detach().contiguous()
    plan = tiedfused.plan(40, d, h, recompute=recompute)
    with _SecondOperands():
        _, latent, _ = tiled.forward(x, weight, bias_enc, None, plan)
        tiled.backward(p.grad_y, x, weight, bias_enc, latent, plan, (True, True, True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [True, False])
def test_expanded_gradients(small_tiles: str, recompute: bool, device: str) -> None:
    p = problem(40, 33, 50, device=device)
    scalar = torch.tensor(0.7, device=device)
    for grad_y in (scalar.expand(40, 33), p.grad_y[:1].expand(40, 33), p.grad_y[:, :1].expand(40, 33)):
        p.grad_y = grad_y
        assert_layer_matches(layer(recompute=recompute), p)


@pytest.mark.parametrize("device", DEVICES)
def test_expanded_rows(device: str) -> None:
    p = problem(1, 24, 40, device=device)
    x = p.x.detach().expand(9, 24)
    torch.testing.assert_close(tied_encode_decode(x, p.weight), tied_encode_decode(p.x, p.weight).expand(9, 24))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", BUILT_IN)
@pytest.mark.parametrize("where", ["x", "bias_enc"])
def test_nan_goes_where_it_goes_in_eager(small_tiles: str, where: str, activation: str, device: str) -> None:
    p = problem(20, 16, 30, device=device)
    with torch.no_grad():
        getattr(p, where).view(-1)[3] = float("nan")
    ours = outputs(layer(activation=activation, recompute=True), p)
    # on the CPU: there elu's gradient is NaN where its input is, on CUDA devices it takes NaN for a positive number
    eager = outputs(lambda *t: reference.tied_encode_decode(*t, activation=activation), p.to("cpu"))
    for name in ours:
        assert torch.equal(ours[name].isnan().cpu(), eager[name].isnan()), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
@pytest.mark.parametrize("recompute", [None, True, False])
def test_no_rows(shape: tuple[int, ...], recompute: bool | None, device: str) -> None:
    p = problem(0, 8, 12, device=device)
    x = torch.empty(shape, device=device, requires_grad=True)
    y = tied_encode_decode(x, *p.operands[1:], output_activation="sigmoid", recompute=recompute)
    assert y.shape == shape
    grads = torch.autograd.grad(y.sum(), (x, *p.operands[1:]))
    assert grads[0].shape == shape
    for grad, operand in zip(grads[1:], p.operands[1:], strict=True):
        assert operand is not None
        assert torch.equal(grad, torch.zeros_like(operand))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(8,), (2, 3, 8), (2, 1, 3, 8)])
def test_leading_dimensions(shape: tuple[int, ...], device: str) -> None:
    p = problem(1, 8, 12, device=device)
    x = torch.randn(shape, device=device, requires_grad=True)
    y = tied_encode_decode(x, *p.operands[1:])
    expected = reference.tied_encode_decode(x, *p.operands[1:])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("term", ["encoder", "decoder"])
def test_terms_of_the_weight_gradient(small_tiles: str, term: str, recompute: bool, device: str) -> None:
    # W̄ = āᵀx + hᵀō: with a linear f, encoding with W and decoding with a copy tells which term is which
    p = problem(40, 20, 50, torch.float64, device, activation="none")
    encoder, decoder = p.weight.detach().clone(), p.weight.detach().clone()
    (encoder if term == "encoder" else decoder).requires_grad_()
    h = torch.tanh(torch.nn.functional.linear(p.x.detach(), encoder, p.bias_enc))
    (expected,) = torch.autograd.grad(h @ decoder, encoder if term == "encoder" else decoder, p.grad_y)

    # x = 0 leaves hᵀō; ō Wᵀ = 0 leaves hᵀō too, so āᵀx is had as the difference to it
    full = outputs(layer(activation="tanh", recompute=recompute), p)["grad_weight"]
    h = reference.encode(p.x, p.weight, p.bias_enc, activation="tanh")
    encoder_term = torch.autograd.grad(h, p.weight, p.grad_y @ decoder.detach().t(), retain_graph=True)[0]
    actual = full - (encoder_term if term == "decoder" else h.t() @ p.grad_y)
    assert_close(actual, expected, expected, torch.float64, term)

    silent = Problem(torch.zeros_like(p.x).requires_grad_(), p.weight, p.bias_enc, p.bias_dec, p.grad_y)
    alone = outputs(layer(activation="tanh", recompute=recompute), silent)["grad_weight"]
    expected = reference.encode(silent.x, p.weight, p.bias_enc, activation="tanh").t() @ p.grad_y
    assert_close(alone, expected, expected, torch.float64, "decoder term alone")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("needed", range(1, 16))
def test_only_the_gradients_that_are_needed(small_tiles: str, needed: int, recompute: bool, device: str) -> None:
    p = problem(20, 12, 30, device=device)
    for bit, t in enumerate(p.operands):
        assert t is not None
        t.requires_grad_(bool(needed >> bit & 1))
    tied_encode_decode(*p.operands, output_activation="sigmoid", recompute=recompute).backward(p.grad_y)
    grads = [t.grad for t in p.operands if t is not None]
    expected = reference.gradients(p.grad_y, *p.operands, output_activation="sigmoid")
    for bit, (name, grad) in enumerate(zip(NAMES[1:], grads, strict=True)):
        assert (grad is not None) == bool(needed >> bit & 1), name
        if grad is not None:
            torch.testing.assert_close(grad, expected[bit], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_reproducible(small_tiles: str, recompute: bool, dtype: torch.dtype, device: str) -> None:
    p = problem(100, 33, 70, dtype, device)
    first = outputs(layer(recompute=recompute), p)
    for _ in range(30):
        again = outputs(layer(recompute=recompute), p)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("recompute", [True, False])
def test_every_output_element_is_written(small_tiles: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(make):
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(float("nan"))

    p = problem(40, 33, 50)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    assert all(torch.isfinite(t).all() for t in outputs(layer(recompute=recompute), p).values())
