"""Each Triton launcher against the definition in float64, on Triton's interpreter."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 set before triton is imported", allow_module_level=True)

import triton
from triton.runtime import _allocation

from tiedfused import LatentStats, reference
from tiedfused._backends.triton.compat import describable, with_descriptor_memory
from tiedfused._backends.triton.forward import forward
from tiedfused._backends.triton.input_grad import input_grad
from tiedfused._backends.triton.weight_grad import weight_grad
from tiedfused.activations import activation_names, get_activation
from tiedfused.reference import zero_stats
from tiedfused.tiles import Tile, block_d

pytestmark = pytest.mark.interpreter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINKED = ("relu", "leaky_relu", "selu")
TILE = Tile(block_n=16, block_h=32, num_warps=4, num_stages=2)


@dataclasses.dataclass
class Case:
    """Inputs of one layer and of its gradient: x, grad_pre [N, d], weight [H, d], biases [H] and [d] or None."""

    grad_pre: Tensor
    x: Tensor
    weight: Tensor
    bias_enc: Tensor | None
    bias_dec: Tensor | None
    activation: str = "gelu"
    output_activation: str = "identity"
    grad_l1: Tensor | None = None
    grad_total: Tensor | None = None


def make_case(
    rows: int,
    d: int,
    latents: int,
    dtype: torch.dtype,
    *,
    activation: str = "gelu",
    output_activation: str = "identity",
    bias_enc: bool = True,
    bias_dec: bool = True,
    grad_l1: bool = False,
    grad_total: bool = False,
) -> Case:
    generator = torch.Generator().manual_seed(rows * 7919 + d * 104729 + latents)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def grid(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).float()

    if activation in KINKED:
        # pre-activations are odd multiples of 1/8, exact in every dtype: none lies near the kink
        x, weight, bias = grid(-3, 3, rows, d) / 2, grid(-2, 2, latents, d) / 2, grid(-2, 2, latents) / 4 + 0.125
    else:
        x, weight, bias = normal(rows, d), normal(latents, d) / d**0.5, normal(latents)
    return Case(
        grad_pre=normal(rows, d).to(dtype),
        x=x.to(dtype),
        weight=weight.to(dtype),
        bias_enc=bias.to(dtype) if bias_enc else None,
        bias_dec=normal(d).to(dtype) if bias_dec else None,
        activation=activation,
        output_activation=output_activation,
        grad_l1=normal(rows) if grad_l1 else None,
        grad_total=normal(latents) if grad_total else None,
    )


def definition(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every result of the layer, by the formulas, in `dtype`."""

    def cast(tensor: Tensor | None) -> Tensor:
        return torch.zeros((), dtype=dtype) if tensor is None else tensor.to(dtype)

    x, weight, grad_pre = cast(case.x), cast(case.weight), cast(case.grad_pre)
    a = (x @ weight.T + cast(case.bias_enc)).requires_grad_()
    h = get_activation(case.activation).forward(a)
    y = get_activation(case.output_activation).forward(h @ weight + cast(case.bias_dec))
    grad_h = grad_pre @ weight.T + cast(case.grad_l1)[..., None] * h.detach().sign() + cast(case.grad_total)
    (grad_a,) = torch.autograd.grad(h, a, grad_h)
    results = {
        "y": y,
        "grad_weight": grad_a.T @ x + h.T @ grad_pre,
        "grad_bias_enc": grad_a.sum(0),
        "grad_x": grad_a @ weight,
    }
    return {name: result.detach() for name, result in results.items()}


def launch(case: Case, *, tile: Tile = TILE, split: int = 1, precision: str = "ieee") -> dict[str, Tensor]:
    """The same results from the kernels, in `split` parts if there are tiles enough; `_atomic`: the one-pass form."""
    common: dict[str, Any] = {"activation": get_activation(case.activation), "tile": tile, "precision": precision}
    options = {**common, "split": min(split, -(-case.weight.shape[0] // tile.block_h))}
    weight_options = {**common, "split": min(split, -(-case.x.shape[0] // tile.block_n))}
    gradient_inputs = (case.grad_pre, case.x, case.weight, case.bias_enc, case.grad_l1, case.grad_total)
    y = forward(
        case.x,
        case.weight,
        case.bias_enc,
        case.bias_dec,
        output_activation=get_activation(case.output_activation),
        **options,
    )
    grad_weight, grad_bias_enc = weight_grad(*gradient_inputs, **weight_options)
    grad_x = input_grad(*gradient_inputs, **options)
    grad_x_atomic = torch.zeros(case.x.shape)
    grad_weight_atomic, grad_bias_enc_atomic = weight_grad(*gradient_inputs, grad_x=grad_x_atomic, **weight_options)
    return {
        "y": y,
        "grad_weight": grad_weight,
        "grad_bias_enc": grad_bias_enc,
        "grad_x": grad_x,
        "grad_weight_atomic": grad_weight_atomic,
        "grad_bias_enc_atomic": grad_bias_enc_atomic,
        "grad_x_atomic": grad_x_atomic,
    }


def aligned(d: int) -> int:
    """`d`, or the next width whose 16-bit rows TMA can read."""
    return d + -d % 8


def launch_warp_specialized(case: Case) -> dict[str, Tensor]:
    """The results of the kernels that have a warp-specialised form, from that form."""
    options: dict[str, Any] = {"activation": get_activation(case.activation), "split": 1, "precision": "ieee"}
    y = forward(
        case.x,
        case.weight,
        case.bias_enc,
        case.bias_dec,
        output_activation=get_activation(case.output_activation),
        tile=Tile(128, 32, 4, 2, warp_specialize=True),
        **options,
    )
    grad_weight, grad_bias_enc = weight_grad(
        case.grad_pre, case.x, case.weight, case.bias_enc, tile=Tile(32, 128, 4, 2, warp_specialize=True), **options
    )
    return {"y": y, "grad_weight": grad_weight, "grad_bias_enc": grad_bias_enc}


def assert_close(case: Case, results: dict[str, Tensor]) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus one unit of rounding."""
    truth = definition(case, torch.float64)
    eager = definition(case, case.x.dtype)
    for name, result in results.items():
        of = name.removesuffix("_atomic").removesuffix("_specialized")
        assert_tensor_close(name, result, truth[of], eager[of], case.x.dtype)


def assert_tensor_close(name: str, result: Tensor, truth: Tensor, eager: Tensor, dtype: torch.dtype) -> None:
    assert result.shape == truth.shape, name
    assert torch.isfinite(result).all(), name
    for order in (2.0, float("inf")):
        scale = torch.linalg.vector_norm(truth, order)
        error = torch.linalg.vector_norm(result - truth, order)
        allowed = 2 * torch.linalg.vector_norm(eager - truth, order) + torch.finfo(dtype).eps * scale
        assert error <= allowed, f"{name}: norm {order}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "d", "latents"),
    [(1, 1, 1), (33, 17, 100), (1, 100, 33), (100, 33, 1), (17, 100, 65), (48, 64, 96), (31, 130, 33), (17, 384, 40)],
)
def test_results(rows: int, d: int, latents: int, dtype: torch.dtype) -> None:
    case = make_case(rows, d, latents, dtype)
    results = launch(case)
    assert results["y"].dtype == results["grad_weight"].dtype == results["grad_x"].dtype == dtype
    assert results["grad_bias_enc"].dtype == torch.float32
    assert_close(case, results)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("d", [40, 96, 200, 320, 384])
def test_rows_in_two_tiles(d: int, split: int) -> None:
    """Rows as wide as two tiles side by side, and narrower; 200 fits one tile better."""
    case = make_case(18, d, 36, torch.bfloat16)
    assert len(block_d(d)) == (1 if d == 200 else 2)
    assert_close(case, launch(case, split=split))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "d", "latents"), [(150, 64, 40), (33, 100, 150), (17, 384, 33), (1, 16, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_warp_specialized(rows: int, d: int, latents: int, bias: bool, dtype: torch.dtype) -> None:
    case = make_case(rows, aligned(d), latents, dtype, bias_enc=bias, bias_dec=bias, output_activation="sigmoid")
    assert describable(case.x, case.weight, case.grad_pre, case.bias_enc)
    assert_close(case, launch_warp_specialized(case))


def test_warp_specialized_repeats_bitwise() -> None:
    case = make_case(70, 64, 150, torch.bfloat16)
    first, again = launch_warp_specialized(case), launch_warp_specialized(case)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("what", ["x", "weight", "grad_pre", "bias_enc", "expanded"])
def test_what_tma_cannot_read_is_not_warp_specialized(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(33, 64, 40, torch.bfloat16)
    if what == "expanded":
        case.grad_pre = case.grad_pre[:1].expand(33, 64)
    else:
        operand = getattr(case, what)
        buffer = torch.zeros(operand.shape[0] + 1, *operand.shape[1:], dtype=operand.dtype).flatten()
        moved = buffer[1 : 1 + operand.numel()].view(operand.shape)  # begins 2 bytes after a multiple of 16
        setattr(case, what, moved.copy_(operand))
    specialized = []
    for name in ("forward", "weight_grad"):
        module = sys.modules[f"tiedfused._backends.triton.{name}"]
        monkeypatch.setattr(
            module, "with_descriptor_memory", lambda launch, name=name: specialized.append(name) or launch
        )
    assert_close(case, launch_warp_specialized(case))
    assert specialized == (["forward"] if what in ("grad_pre", "expanded") else [])


def test_memory_of_descriptors_leaves_the_callers_allocator_alone() -> None:
    seen = []

    def launch(**arguments: int) -> None:
        seen.append((arguments, _allocation._allocator.get()))

    def mine(size: int, alignment: int, stream: int | None) -> Tensor:
        raise AssertionError("not called")

    triton.set_allocator(mine)
    try:
        with_descriptor_memory(launch)(a=1)
        assert _allocation._allocator.get() is mine
    finally:
        triton.set_allocator(_allocation._NULL_ALLOCATOR)
    ((arguments, allocator),) = seen
    assert arguments == {"a": 1}
    assert allocator not in (mine, _allocation._NULL_ALLOCATOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", activation_names())
def test_activation(activation: str, dtype: torch.dtype) -> None:
    case = make_case(33, 20, 50, dtype, activation=activation)
    assert_close(case, launch(case))


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("output_activation", activation_names())
def test_output_activation(output_activation: str, split: int) -> None:
    case = make_case(17, 20, 70, torch.float32, output_activation=output_activation)
    assert_close(case, launch(case, split=split))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [2, 3, 5])
def test_split(split: int, dtype: torch.dtype) -> None:
    """Parts of unequal size, and of a tile each."""
    case = make_case(70, 33, 150, dtype, output_activation="sigmoid")
    assert_close(case, launch(case, split=split))


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(("bias_enc", "bias_dec"), [(False, False), (True, False), (False, True)])
def test_without_bias(bias_enc: bool, bias_dec: bool, split: int) -> None:
    case = make_case(33, 17, 40, torch.bfloat16, bias_enc=bias_enc, bias_dec=bias_dec)
    assert_close(case, launch(case, split=split))


def test_fp32_bias_with_bf16_weight() -> None:
    case = make_case(33, 17, 40, torch.bfloat16)
    assert case.bias_enc is not None
    assert case.bias_dec is not None
    case.bias_enc, case.bias_dec = case.bias_enc.float() + 1e-3, case.bias_dec.float() + 1e-3
    assert_close(case, launch(case))


@pytest.mark.parametrize(
    "tile",
    [Tile(16, 16, 4, 1), Tile(32, 16, 4, 2), Tile(64, 32, 8, 3), Tile(16, 64, 8, 2)],
    ids=lambda tile: f"{tile.block_n}x{tile.block_h}",
)
def test_tile(tile: Tile) -> None:
    case = make_case(50, 40, 90, torch.float16, activation="sigmoid")
    assert_close(case, launch(case, tile=tile))


@pytest.mark.parametrize("split", [1, 2])
def test_fp16_totals_whose_parts_overflow(split: int) -> None:
    """Parts of every sum over d, H and N pass 65504, the largest fp16; their totals do not."""
    rows, d, latents = 20, 32, 40
    case = make_case(rows, d, latents, torch.float16, activation="relu")

    def half_negative(size: int) -> Tensor:
        return torch.ones(size).index_fill(0, torch.arange(size // 2, size), -1.0)

    over_d, over_h, over_n = half_negative(d), half_negative(latents), half_negative(rows)
    noise = make_case(rows, d, latents, torch.float32)
    case.x = (220 * over_d + noise.x / 8).half()
    case.weight = (20 * over_h[:, None] + noise.weight / 2).half()
    case.grad_pre = (30 * over_n[:, None] * over_d + noise.grad_pre / 10).half()
    case.bias_enc = torch.full((latents,), 1e4, dtype=torch.float16)
    x, weight, grad_pre = case.x.double(), case.weight.double(), case.grad_pre.double()
    h = torch.relu(x @ weight.T + 1e4)
    for left, right in ((x, weight.T), (h, weight), (h.T, grad_pre)):
        half = left.shape[1] // 2
        assert (left[:, :half] @ right[:half]).abs().min() > 65504
        assert (left @ right).abs().max() < 65504
    results = launch(case, split=split) | {f"{k}_specialized": v for k, v in launch_warp_specialized(case).items()}
    assert_close(case, results)


def test_fp16_latent_overflows_where_eagers_does() -> None:
    case = make_case(5, 16, 40, torch.float16, activation="relu")
    case.x[2] = 200 * case.weight[7].sign() / case.weight[7].abs().max()
    case.weight[7] *= 65504 / (case.x[2] * case.weight[7]).sum() * 1.5
    eager = definition(case, torch.float16)
    finite = {name: torch.isfinite(result) for name, result in eager.items()}
    assert finite["y"][[0, 1, 3, 4]].all() and not finite["y"][2].any()
    for name, result in (launch(case) | {"y_specialized": launch_warp_specialized(case)["y"]}).items():
        plain = finite[name.removesuffix("_atomic").removesuffix("_specialized")]
        assert torch.isfinite(result)[plain].all(), name
    assert not torch.isfinite(launch(case)["y"][2]).any()


@pytest.mark.parametrize("d", [17, 24])
@pytest.mark.parametrize("unaligned", ["x", "grad_pre", "weight"])
def test_row_stride(unaligned: str, d: int) -> None:
    """The alignment that a kernel relies on is that of all operands."""
    case = make_case(33, d, 40, torch.float32)
    for name in ("x", "grad_pre", "weight"):
        rows = getattr(case, name)
        wide = torch.full((len(rows), d + (9 if name == unaligned else 8)), 7.0)
        wide[:, 3 : 3 + d] = rows
        setattr(case, name, wide[:, 3 : 3 + d])
    assert_close(case, launch(case))


def test_expanded_rows() -> None:
    """The gradient of ``y.sum(0) @ v`` is one row for all rows of the batch."""
    case = make_case(33, 17, 40, torch.float32)
    case.grad_pre = case.grad_pre[:1].expand(33, 17)
    assert case.grad_pre.stride(0) == 0
    assert_close(case, launch(case))


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    rows, d, stride = 140, 16, 2**24 - 16
    assert (rows - 1) * stride > 2**31
    case = make_case(rows, d, 20, torch.float16)
    size = (rows - 1) * stride + d
    sparse_file = torch.from_file(str(tmp_path / "x"), shared=True, size=size, dtype=torch.float16)
    far_apart = sparse_file.as_strided((rows, d), (stride, 1))
    far_apart.copy_(case.x)
    case.x = far_apart
    assert_close(case, launch(case))


@pytest.mark.parametrize("activation", ["sigmoid", "softplus"])
@pytest.mark.parametrize(("rows", "latents"), [(1, 1), (17, 33), (15, 31)])
def test_masked_lanes_of_activations_not_zero_at_zero(rows: int, latents: int, activation: str) -> None:
    case = make_case(rows, 17, latents, torch.float32, activation=activation)
    assert_close(case, launch(case))


def test_masked_latents_do_not_leak_nan() -> None:
    """An infinite input times the zero rows beyond the last latent is NaN; every true latent here is 0."""
    case = make_case(1, 1, 17, torch.float32, activation="relu", bias_dec=False)
    case.x, case.weight = torch.full((1, 1), float("inf")), -torch.ones(17, 1)
    results = launch(case)
    for name in ("y", "grad_bias_enc", "grad_x", "grad_x_atomic"):
        assert (results[name] == 0).all(), name


def test_masked_latents_do_not_leak_nan_into_grad_x() -> None:
    """An infinite ō times the zero rows beyond the last latent is NaN; every true term of x̄ here is +inf."""
    case = make_case(1, 1, 17, torch.float32, activation="identity")
    case.grad_pre, case.weight = torch.full((1, 1), float("inf")), -torch.ones(17, 1)
    results = launch(case)
    assert (results["grad_x"] == float("inf")).all()
    assert (results["grad_x_atomic"] == float("inf")).all()


def test_masked_latents_do_not_repeat_an_infinite_one() -> None:
    """Latents beyond the last one are zeros, and zero times a copy of its infinite atom is NaN."""
    case = make_case(1, 1, 17, torch.float32, activation="identity", bias_dec=False)
    case.x, case.grad_pre, case.weight = torch.ones(1, 1), torch.ones(1, 1), torch.ones(17, 1)
    case.weight[-1] = float("inf")
    results = launch(case)
    assert (results["grad_x"] == float("inf")).all()
    assert (results["grad_x_atomic"] == float("inf")).all()


def test_masked_rows_do_not_leak_nan() -> None:
    """An infinite bias meets the zero rows beyond the last one: f there is inf, and inf times 0 is NaN."""
    case = make_case(3, 16, 8, torch.float32, activation="relu")
    case.grad_pre = case.grad_pre.abs()
    assert case.bias_enc is not None
    case.bias_enc = torch.full_like(case.bias_enc, float("inf"))
    assert (launch(case)["grad_weight"] == float("inf")).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize(("grad_l1", "grad_total"), [(True, False), (False, True), (True, True)])
def test_penalties(grad_l1: bool, grad_total: bool, activation: str, dtype: torch.dtype) -> None:
    case = make_case(33, 40, 70, dtype, activation=activation, grad_l1=grad_l1, grad_total=grad_total)
    assert_close(case, launch(case, split=1 if grad_l1 and grad_total else 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["tanh", "relu", "softplus"])
@pytest.mark.parametrize(("rows", "latents", "split"), [(1, 1, 1), (33, 100, 1), (70, 150, 3), (100, 33, 2)])
def test_statistics(rows: int, latents: int, split: int, activation: str, dtype: torch.dtype) -> None:
    """softplus and the bias make rows and latents beyond the last one active, were they counted."""
    case = make_case(rows, 40, latents, dtype, activation=activation)
    options: dict[str, Any] = {
        "activation": get_activation(activation),
        "output_activation": get_activation("identity"),
        "tile": TILE,
        "split": split,
        "precision": "ieee",
    }
    operands = (case.x, case.weight, case.bias_enc, case.bias_dec)
    stats = zero_stats(case.x, case.weight)
    y = forward(*operands, stats=stats, rows_at_once=2 * TILE.block_n, **options)
    assert torch.equal(y, forward(*operands, **options))

    def expected(to: torch.dtype) -> LatentStats:
        moved = (None if t is None else t.to(to) for t in operands)
        return reference.tied_encode_decode(*moved, activation=activation, return_stats=True)[1]  # type: ignore[arg-type]

    stats = stats._replace(mean=stats.mean / rows)
    truth, eager = expected(torch.float64), expected(dtype)
    assert torch.equal(stats.l0, truth.l0) and torch.equal(stats.fired, truth.fired)
    for name in ("l1", "mean"):
        assert_tensor_close(name, getattr(stats, name), getattr(truth, name), getattr(eager, name), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_grad_decoder_term(dtype: torch.dtype) -> None:
    """With x = 0 only hᵀ ō is left of the weight's gradient."""
    case = make_case(33, 17, 40, dtype, activation="sigmoid")
    case.x = torch.zeros_like(case.x)
    results = launch(case)
    assert_close(case, results)
    assert results["grad_weight"].abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_grad_encoder_term(dtype: torch.dtype) -> None:
    """With one row for all of x and b_enc = −W x the latent is exactly 0: only āᵀ x is left."""
    case = make_case(33, 17, 40, dtype, activation="selu")
    case.activation = "identity"
    case.x = case.x[:1].expand(33, 17)
    case.bias_enc = -(case.weight.float() @ case.x[0].float())
    assert (definition(case, torch.float64)["y"] == definition(case, torch.float64)["y"][0]).all()
    results = launch(case)
    assert_close(case, results)
    grad_a = case.grad_pre.double() @ case.weight.double().T
    encoder_term = grad_a.T @ case.x.double()
    torch.testing.assert_close(definition(case, torch.float64)["grad_weight"], encoder_term)


def test_repeats_bitwise() -> None:
    case = make_case(70, 33, 150, torch.float32)
    first = launch(case, split=3)
    again = launch(case, split=3)
    assert all(torch.equal(first[name], again[name]) for name in first)
