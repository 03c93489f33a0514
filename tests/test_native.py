"""The native op of csrc/: numerics of each of its builds, reproducibility, errors, and its shared object."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from numerics import Problem, assert_close, problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import tiedfused
from tiedfused import devices, extension, reference, settings
from tiedfused._backends.native import copyable
from tiedfused.cli import app
from tiedfused.extension import EXTENSION, MAX_ROWS
from tiedfused.functional import tied_encode_decode
from tiedfused.op import forward_with_stats
from tiedfused.profile import peak_memory
from tiedfused.regimes.native import CUDA_GROUP_BYTES, CUDA_SLOT_BYTES

ROOT = Path(__file__).parents[1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = ["portable", "avx2", "avx512", "avx512_bf16"]

native = pytest.mark.skipif(EXTENSION.why_not is not None, reason=str(EXTENSION.why_not))


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def few_rows(*operands: Tensor | None, f: str = "relu", g: str = "identity", isa: str | None = None) -> Tensor:
    try:
        return torch.ops.tiedfused.few_rows(*operands, f, g, isa)
    except RuntimeError as error:
        if isa is not None and "runs on this CPU" in str(error):
            pytest.skip(f"no {isa} on this CPU")
        raise


def assert_right(p: Problem, *, f: str = "relu", g: str = "identity", isa: str | None = None) -> None:
    operands = [None if t is None else t.detach() for t in p.operands]
    y = few_rows(*operands, f=f, g=g, isa=isa)
    eager, truth = (
        reference.tied_encode_decode(*t, activation=f, output_activation=g)  # type: ignore[arg-type]
        for t in (operands, [None if t is None else t.double() for t in operands])
    )
    assert y.dtype == p.x.dtype
    assert_close(y, eager, truth, p.x.dtype)


def test_rows_that_cuda_cannot_copy_are_moved() -> None:
    whole = torch.randn(9, 24, dtype=torch.bfloat16)
    for weight, good in (
        (whole, True),
        (whole[:, :8], True),
        (whole[:, 4:12], False),
        (whole.view(18, 12)[:, :8], False),
    ):
        found = copyable(weight)
        assert (found is weight) == good
        assert found.data_ptr() % 16 == 0 and found.stride(0) % 8 == 0
        assert torch.equal(found, weight)


@native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 31, 63, 64])
def test_rows(n: int, dtype: torch.dtype, isa: str) -> None:
    assert_right(problem(n, 200, 75, dtype), isa=isa)


@native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, h", [(1, 1), (3, 2), (63, 33), (64, 32), (65, 31), (127, 1), (1, 100), (2500, 40)])
def test_odd_sizes(d: int, h: int, dtype: torch.dtype, isa: str) -> None:
    assert_right(problem(5, d, h, dtype), isa=isa)


@native
@pytest.mark.parametrize("n", [1, 4])
def test_long_sums(n: int, one_thread: None) -> None:
    """What fp32 loses grows with the number of terms that are added up one after the other."""
    assert_right(problem(n, 16, 131072))


@native
def test_sums_of_equal_terms(one_thread: None) -> None:
    """Of which what is lost does not cancel."""
    p = problem(17, 500, 6000)
    assert_right(Problem(p.x.abs(), torch.full_like(p.weight, 0.03), p.bias_enc, p.bias_dec, p.grad_y))


@native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, h", [(1279, 3301), (1280, 3280), (2690, 1603), (2752, 1601), (500, 403)])
def test_one_row(d: int, h: int, dtype: torch.dtype, isa: str, one_thread: None) -> None:
    # W of 8 MiB and more, for the way that some kernels have for one row of x, by two and by four rows of W; the last
    # is small, for the way of blocks
    p = problem(1, d, h, dtype)
    assert_right(p, isa=isa)
    operands = [t.detach() for t in p.operands]
    first = few_rows(*operands, isa=isa)
    assert all(torch.equal(few_rows(*operands, isa=isa), first) for _ in range(5))
    wide = torch.full((h, d + 75), torch.nan, dtype=dtype)
    wide[:, 9 : 9 + d] = operands[1]
    assert torch.equal(few_rows(operands[0], wide[:, 9 : 9 + d], *operands[2:], isa=isa), first)


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", EXTENSION.activations)
def test_activations(activation: str, dtype: torch.dtype) -> None:
    assert_right(problem(9, 40, 70, dtype, activation=activation), f=activation)
    assert_right(problem(9, 40, 70, dtype, activation="silu"), f="silu", g=activation)


@native
@pytest.mark.parametrize("activation", EXTENSION.activations)
def test_extreme_values_are_as_pytorchs(activation: str) -> None:
    a = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-20, -1e-20, 30.0, -30.0, 1e30, -1e30])
    one = torch.ones(1, 1)  # h W with W = 1 is h
    y = few_rows(a[:, None].contiguous(), one, None, None, f=activation)[:, 0]
    # element by element: PyTorch's own vectorised gelu makes a NaN of infinity, its scalar one does not
    expected = [tiedfused.activations.get_activation(activation).forward(v) for v in a.split(1)]
    torch.testing.assert_close(y, torch.cat(expected), equal_nan=True)


@native
def test_every_built_in_activation_is_there() -> None:
    # names that others registered in this process are not the op's
    built_in = [a for a in tiedfused.activation_names() if tiedfused.activations.get_activation(a).triton is not None]
    assert set(EXTENSION.activations) >= set(built_in)


@native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_reach_only_their_row(dtype: torch.dtype, isa: str) -> None:
    x, weight, bias_enc, bias_dec = (t.detach() for t in problem(6, 70, 41, dtype).operands)
    clean = few_rows(x, weight, bias_enc, bias_dec, isa=isa)
    x = x.clone()
    x[2, 69], x[4, 3] = float("nan"), float("inf")
    y = few_rows(x, weight, bias_enc, bias_dec, isa=isa)
    assert y[2].isnan().all()
    assert not y[4].isfinite().any()
    rest = [0, 1, 3, 5]
    assert torch.equal(y[rest], clean[rest])


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_missing_biases(dtype: torch.dtype) -> None:
    p = problem(6, 50, 30, dtype)
    wide_x, wide_weight = torch.full((6, 90), torch.nan, dtype=dtype), torch.full((60, 77), torch.nan, dtype=dtype)
    x, weight = wide_x[:, 7:57], wide_weight[::2, 9:59]
    x.copy_(p.x.detach())
    weight.copy_(p.weight.detach())
    bias_enc, bias_dec = p.bias_enc.detach(), p.bias_dec.detach()  # type: ignore[union-attr]
    for biases in ((bias_enc, bias_dec), (None, bias_dec), (bias_enc, None), (None, None)):
        assert_right(Problem(x, weight, *biases, p.grad_y))


@native
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_right(problem(7, 300, 2, dtype))  # fewer latents than threads, too
        for p in (problem(17, 300, 333, dtype), problem(1, 2304, 2048, dtype)):  # a part a thread, and several
            assert_right(p)
            operands = [t.detach() for t in p.operands]
            first = few_rows(*operands)
            assert all(torch.equal(few_rows(*operands), first) for _ in range(30))
    finally:
        torch.set_num_threads(before)


@native
def test_fresh_memory_is_not_trusted() -> None:
    # with this setting PyTorch fills what it allocates with NaN: y and the workspace
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert_right(problem(3, 70, 41))
    finally:
        torch.use_deterministic_algorithms(False)


X, W, B, C = torch.randn(3, 8), torch.randn(16, 8), torch.randn(16), torch.randn(8)
KNOWN = ", ".join(EXTENSION.activations)


@native
@pytest.mark.parametrize(
    ("operands", "options", "message"),
    [
        ((torch.randn(65, 8), W, None, None), {}, "x: expected 1 to 64 rows, got 65"),
        ((X[:0], W, None, None), {}, "x: expected 1 to 64 rows, got 0"),
        ((X[:, :7], W, None, None), {}, "x: expected shape [N, 8], as weight is [16, 8], got [3, 7]"),
        ((X[0], W, None, None), {}, "x: expected shape [N, 8], as weight is [16, 8], got [8]"),
        ((X.double(), W.double(), None, None), {}, "x: expected float32, bfloat16 or float16, got float64"),
        ((X.int(), W, None, None), {}, "x: expected float32, bfloat16 or float16, got Int"),
        ((X, W.half(), None, None), {}, "weight: expected float32, as x, got float16"),
        ((X, W[0], None, None), {}, "weight: expected shape [H, d], both at least 1, got [8]"),
        ((X, W[:0], None, None), {}, "weight: expected shape [H, d], both at least 1, got [0, 8]"),
        ((torch.randn(8, 3).t(), W, None, None), {}, "x: expected a last stride of 1, got 3"),
        ((X, torch.randn(8, 16).t(), None, None), {}, "weight: expected a last stride of 1, got 16"),
        ((X, W, C, None), {}, "bias_enc: expected shape [16], as weight is [16, 8], got [8]"),
        ((X, W, B, B), {}, "bias_dec: expected shape [8], as weight is [16, 8], got [16]"),
        ((X, W, torch.tensor(0.0), None), {}, "bias_enc: expected shape [16], as weight is [16, 8], got []"),
        ((X, W, torch.randn(32)[::2], None), {}, "bias_enc: expected a last stride of 1, got 2"),
        ((X, W, B.double(), None), {}, "bias_enc: expected float32, as x, got float64"),
        ((X, W, B, C.bfloat16()), {}, "bias_dec: expected float32, as x, got bfloat16"),
        ((X, W, None, None), {"f": "sine"}, f"activation: expected one of {KNOWN}, got 'sine'"),
        ((X, W, None, None), {"g": "sine"}, f"output_activation: expected one of {KNOWN}, got 'sine'"),
        ((X, W, None, None), {"isa": "sve"}, "isa: no kernel 'sve' runs on this CPU"),
    ],
)
def test_errors(operands, options, message) -> None:
    with pytest.raises(RuntimeError) as error:
        torch.ops.tiedfused.few_rows(*operands, options.get("f", "relu"), options.get("g", "relu"), options.get("isa"))
    assert str(error.value) == message
    few_rows(X, W, B, C)


@native
@pytest.mark.parametrize("operands", [(X, W.to("meta")), (X.to("meta"), W), (X, W, B.to("meta"))])
def test_operands_on_different_devices(operands) -> None:
    with pytest.raises(RuntimeError, match=r"expected on (cpu|meta), as x, got"):
        few_rows(*operands, *[None] * (4 - len(operands)))


@native
def test_sparse_weight_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="few_rows"):
        few_rows(X, W.to_sparse(), None, None)


@native
def test_gradient_is_an_error() -> None:
    y = few_rows(X.clone().requires_grad_(), W, None, None)
    with pytest.raises(RuntimeError, match="the native ops have no backward"):
        y.sum().backward()


@native
@pytest.mark.parametrize("biases", [(None, None), (B, C)], ids=["no biases", "biases"])
def test_op_as_pytorch_sees_it(biases) -> None:
    for op in (torch.ops.tiedfused.few_rows, torch.ops.tiedfused.few_rows_stats):
        torch.library.opcheck(op.default, (X, W, *biases, "relu", "tanh"))


@native
def test_compiled() -> None:
    compiled = torch.compile(few_rows, fullgraph=True)
    assert torch.equal(compiled(X, W, B, C), few_rows(X, W, B, C))


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3), ()], ids=str)
def test_layer_takes_it_in_inference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias_enc, bias_dec = (t.detach() for t in problem(5, 40, 70, dtype).operands)
    x = torch.randn(*shape, 40).to(dtype)
    if devices.interpreting():
        pytest.skip("Triton's interpreter stands in for a GPU")
    with settings.override(regime="native"):
        found = tied_encode_decode(x, weight, bias_enc, bias_dec, output_activation="tanh")
    expected = few_rows(x.reshape(-1, 40), weight, bias_enc, bias_dec, g="tanh").view(x.shape)
    assert torch.equal(found, expected)


@native
def test_layer_takes_operands_of_any_strides() -> None:
    x, weight = torch.randn(40, 5).t(), torch.randn(40, 70).t()
    bias_enc, bias_dec = torch.randn(140)[::2], torch.randn(80)[::2]
    with torch.no_grad(), settings.override(regime="native"):
        found = tied_encode_decode(x, weight, bias_enc, bias_dec)
    assert torch.equal(found, few_rows(*(t.contiguous() for t in (x, weight, bias_enc, bias_dec))))


@native
def test_plan_takes_it_where_it_wins() -> None:
    def regime(n: int, d: int, h: int, dtype: torch.dtype = torch.float32, **options: bool) -> str:
        return tiedfused.plan(n, d, h, dtype=dtype, **{"grad": False, **options}).regime

    for dtype in DTYPES:
        for n, d, h in (
            (1, 1, 1),
            (4, 8, 16),
            (1, 512, 256),
            (8, 64, 256),
            (64, 256, 256),
            (8, 768, 24576),
            (16, 2304, 16384),
        ):
            if EXTENSION.cpu != "portable" or n <= 8 or dtype == torch.float16:
                assert regime(n, d, h, dtype) == "native", (n, d, h, dtype)
    assert regime(65, 256, 256) == regime(0, 256, 256) == "tiled"
    assert regime(4, 256, 256, torch.float64) == "tiled"
    assert regime(4, 256, 256, grad=True) == "tiled"
    assert regime(4, 256, 256, stats=True) == "native"
    assert regime(64, 1024, 1024) == regime(16, 16384, 4096) == "tiled"  # measured to be slower there
    assert regime(64, 1024, 1024, torch.float16) == "native"
    with settings.override(regime="native"):
        assert regime(64, 1024, 1024) == "native"
        assert regime(4, 256, 256, grad=True) == "tiled"
    with settings.override(regime="tiled"):
        assert regime(4, 256, 256) == "tiled"


@pytest.mark.parametrize(
    ("n", "d", "capability", "why"),
    [
        (8, 4096, 80, None),
        (8, 4096, 90, None),
        (64, 512, 120, None),
        (8, 2560, 120, None),
        (8, 4096, 120, "do not keep 16 rows of W of 4096 in this GPU's shared memory"),
        (9, 4096, 90, "do not keep 9 rows of 4096 in registers"),
        (8, 4100, 90, "do not keep 8 rows of 4100 in registers"),
        (8, 4096, 100, "were built for 80, 90a, 120a, not for compute capability 10.0"),
    ],
)
def test_plan_takes_the_cuda_op_where_it_can(n: int, d: int, capability: int, why: str | None, monkeypatch) -> None:
    built = dataclasses.replace(EXTENSION, why_not=None, cuda=("80", "90a", "120a"), activations=("relu", "identity"))
    monkeypatch.setattr("tiedfused.regimes.native.EXTENSION", built)
    for stats in (False, True):
        request = {"dtype": torch.bfloat16, "device": "cuda", "capability": capability, "grad": False, "stats": stats}
        with settings.override(regime="native"):
            p = tiedfused.plan(n, d, 3000, **request)
        assert (p.regime == "native") == (why is None)
        assert why is None or why in dict(p.alternatives)["native"]


@native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "d", "h", "f"),
    [
        *((1, 1, 1, "relu"), (5, 70, 333, "relu"), (64, 33, 41, "gelu"), (3, 40, 77, "sigmoid")),
        *((1, 1279, 2101, "sigmoid"), (1, 2690, 1003, "relu"), (1, 500, 403, "relu")),
    ],
)
def test_statistics(n: int, d: int, h: int, f: str, dtype: torch.dtype, isa: str, one_thread: None) -> None:
    assert_right_statistics(problem(n, d, h, dtype, activation=f), f=f, isa=isa)


def assert_right_statistics(p: Problem, *, f: str = "relu", isa: str | None = None) -> None:
    operands = [None if t is None else t.detach() for t in p.operands]
    dtype = p.x.dtype
    y = few_rows(*operands, f=f, isa=isa)
    again, l1, l0, total, fired = torch.ops.tiedfused.few_rows_stats(*operands, f, "identity", isa)
    assert torch.equal(again, y)
    eager, truth = (
        reference.latent_stats(reference.encode(*t[:3], activation=f))  # type: ignore[arg-type]
        for t in (operands, [None if t is None else t.double() for t in operands])
    )
    assert_close(l1, eager.l1, truth.l1, dtype, "l1")
    assert_close(total / len(p.x), eager.mean, truth.mean, dtype, "mean")
    assert torch.equal(l0, truth.l0)
    assert torch.equal(fired, truth.fired)


@native
@pytest.mark.parametrize("threads", [1, 3])
def test_statistics_of_the_layer(threads: int) -> None:
    x, weight, bias_enc, bias_dec = (t.detach() for t in problem(6, 40, 70, torch.bfloat16).operands)
    x[1, 3] = float("nan")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            with settings.override(regime="native"):
                y, stats = tied_encode_decode(x.view(2, 3, 40), weight, bias_enc, bias_dec, return_stats=True)
            with settings.override(regime="tiled"):
                expected = tied_encode_decode(x.view(2, 3, 40), weight, bias_enc, bias_dec, return_stats=True)
        torch.testing.assert_close((y, stats), expected, equal_nan=True)
        assert stats.l0[0, 1] == 70  # a NaN counts as active
    finally:
        torch.set_num_threads(before)


@native
def test_statistics_are_what_the_op_made() -> None:
    """Neither filled beforehand nor copied afterwards: both took as long as the op at small d."""
    x, weight = torch.randn(2, 24), torch.randn(48, 24)
    with settings.override(regime="native"):
        plan = tiedfused.plan(2, 24, 48, grad=False, stats=True)
    assert plan.forward.backend == "native"
    with Called() as called:  # it does not see the native op, which goes past the dispatcher
        forward_with_stats(x, weight, None, None, plan)
    assert called.names == ["aten.div_.Tensor"]


@native
@pytest.mark.parametrize(("stats", "op"), [(False, "few_rows"), (True, "few_rows_stats")])
def test_profiler_sees_the_op(stats: bool, op: str) -> None:
    x, weight = torch.randn(2, 24), torch.randn(48, 24)
    with torch.no_grad(), settings.override(regime="native"):
        expected = tied_encode_decode(x, weight, return_stats=stats)
        with torch.profiler.profile() as profile:
            found = tied_encode_decode(x, weight, return_stats=stats)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert f"tiedfused::{op}" in {event.name for event in profile.events()}


class Called(TorchDispatchMode):
    """The names of the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@native
@pytest.mark.parametrize("n, d, columns", [(1, 1, 96), (4, 64, 96), (16, 100, 160), (3, 2304, 2336)])
def test_plan_counts_the_workspace(n: int, d: int, columns: int) -> None:
    """A copy of x, a row of zeros and each thread's part of y, in rows of a multiple of 64 columns and half of that."""
    with settings.override(regime="native"):
        plain, stats = (tiedfused.plan(n, d, 30000, device="cpu", grad=False, stats=wanted) for wanted in (False, True))
    (one,) = plain.passes
    assert one.workspace_bytes == 4 * columns * (1 + n + one.split * n)
    assert stats.passes[0].workspace_bytes == one.workspace_bytes + 12 * n * one.split


@native
@pytest.mark.parametrize("n, d, h", [(4, 64, 256), (4, 64, 30000), (2, 8, 1 << 18)])
def test_plan_counts_the_workspace_that_is_allocated(n: int, d: int, h: int) -> None:
    """Small products are done in one part; where H is large, a thread takes several."""
    with settings.override(regime="native"):
        (one,) = tiedfused.plan(n, d, h, device="cpu", grad=False).passes
    x, weight = torch.randn(n, d), torch.randn(h, d)
    # y beside it; allocations are counted in multiples of 64 bytes
    assert abs(peak_memory(lambda: few_rows(x, weight, None, None)) - one.workspace_bytes - x.nbytes) < 128


@native
def test_info_and_explain_show_it() -> None:
    run = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert f"CPU kernel for {EXTENSION.cpu}, with" in run.invoke(app, ["info"]).output
    explained = run.invoke(app, ["explain", "4", "768", "24576", "--inference", "--device", "cpu"]).output
    assert "native (native)" in explained
    assert f"build {EXTENSION.cpu}" in explained


@native
def test_row_limit_is_the_same_on_both_sides() -> None:
    few_rows(torch.randn(MAX_ROWS, 8), W, None, None)
    with pytest.raises(RuntimeError, match=f"1 to {MAX_ROWS} rows"):
        few_rows(torch.randn(MAX_ROWS + 1, 8), W, None, None)


@native
def test_shared_object_of_another_source_is_a_reason(monkeypatch) -> None:
    monkeypatch.setattr(extension, "OPS", (*extension.OPS, "an_op_of_later"))
    assert "an_op_of_later" in str(extension.load(Path(tiedfused.__file__).parent).why_not)


def test_missing_or_broken_shared_object_is_a_reason(tmp_path: Path) -> None:
    assert str(extension.load(tmp_path).why_not).startswith("the native ops were not built: pip install")
    (tmp_path / extension.BUILD_NOTE).write_text("nothing built (no compiler)\n")
    assert extension.load(tmp_path).why_not == "the native ops were not built: nothing built (no compiler)"
    (tmp_path / "_C.so").write_bytes(b"no shared object")
    assert str(extension.load(tmp_path).why_not).startswith("_C.so does not load: ")


@native
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_shared_object_keeps_to_the_stable_abi() -> None:
    """It needs nothing of PyTorch but functions of C, and shows nothing that another library could take for its own."""
    (library,) = Path(extension.__file__).parent.glob("_C*.so")

    def symbols(*options: str) -> list[str]:
        done = subprocess.run(["nm", "-D", *options, library], capture_output=True, text=True, check=True)
        return [line.split()[-1].split("@")[0] for line in done.stdout.splitlines()]

    needed = symbols("--undefined-only")
    assert any(name.startswith("aoti_torch_") for name in needed)
    cxx = [name for name in needed if name.startswith("_Z")]
    assert [name for name in cxx if re.search(r"c10|2at|5torch|6caffe2", name)] == []
    assert [name for name in needed if re.match("_?Py", name)] == []
    assert [name for name in symbols("--defined-only") if "tiedfused" in name] == []


CUDA_PROBLEMS = [(1, 8, 1), (3, 72, 40), (5, 520, 1000), (8, 4096, 333), (16, 2048, 500), (64, 512, 777)]


@pytest.mark.gpu
@pytest.mark.skipif(not EXTENSION.cuda, reason="the native CUDA op was not built")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("n, d, h", CUDA_PROBLEMS)
def test_cuda_op(n: int, d: int, h: int, dtype: torch.dtype) -> None:
    p = problem(n, d, h, dtype, "cuda")
    assert_right(p)
    operands = [t.detach() for t in p.operands if t is not None]
    first = few_rows(*operands)
    assert all(torch.equal(few_rows(*operands), first) for _ in range(30))
    assert_right_statistics(p)


@pytest.mark.gpu
@pytest.mark.skipif(not EXTENSION.cuda, reason="the native CUDA op was not built")
def test_cuda_errors() -> None:
    x, w = (t.to("cuda", torch.bfloat16) for t in (X, W))
    for operands, isa, message in (
        ((x, w.cpu()), None, "weight: expected on cuda:0, as x, got cpu"),
        ((x.float(), w.float()), None, "x: on CUDA expected bfloat16 or float16, got float32"),
        ((x, w), "avx2", "isa: on CUDA expected none, got 'avx2'"),
        ((x[:, :7], w[:, :7]), None, "x and weight: expected a d that is a multiple of 8, got x [3, 7]"),
        ((x.new_ones(9, 4096), w.new_ones(1, 4096)), None, "x: expected up to 8 rows for d to 4096"),
    ):
        with pytest.raises(RuntimeError) as error:
            few_rows(*operands, None, None, isa=isa)
        assert str(error.value).startswith(message)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not EXTENSION.cuda, reason="the native CUDA op was not built")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_cuda_op_under_compute_sanitizer(tool: str) -> None:
    program = (
        "import torch, tiedfused\n"
        "for n, d, h in ((3, 72, 40), (9, 520, 1000), (8, 4096, 333)):\n"
        "    x, w = (torch.randn(rows, d, device='cuda', dtype=torch.bfloat16) for rows in (n, h))\n"
        "    torch.ops.tiedfused.few_rows_stats(x, w, None, None, 'relu', 'identity')[0].sum().item()\n"
    )
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


def compiled_with_sanitizers(folder: Path, *sources: Path) -> Path:
    """The program of `sources`, with the address and undefined-behaviour sanitizers."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = ["-std=c++20", "-O1", "-g1", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    empty, program = folder / "empty.cpp", folder / "program"
    empty.write_text("int main() {}")
    if subprocess.run([compiler, *flags, empty, "-o", program], capture_output=True, check=False).returncode:
        pytest.skip("the compiler has no sanitizers")
    built = subprocess.run([compiler, *flags, *sources, "-o", program], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    return program


def output_of(program: Path, *arguments: int) -> str:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_cpu_kernel_under_sanitizers(tmp_path: Path) -> None:
    """Every build over odd shapes; see tests/csrc/few_rows_cpu.cpp."""
    sources = [ROOT / "tests/csrc/few_rows_cpu.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    assert output_of(compiled_with_sanitizers(tmp_path, *sources)).strip().endswith("kernels: good")


# bytes of shared memory that a block can have, of compute capability 8.0 and 9.0
SHARED_BYTES = (163 << 10, 227 << 10)


@pytest.mark.slow
def test_cuda_kernel_on_the_host(tmp_path: Path) -> None:
    """The algorithm, its barriers and both ways of copying, on the CPU; and that shared memory holds the ring."""
    program = compiled_with_sanitizers(tmp_path, ROOT / "tests/csrc/few_rows_cuda.cpp")
    *instances, verdict = output_of(program, *SHARED_BYTES).splitlines()
    assert verdict == "good"
    assert len(instances) == 10
    for chunks, groups, *slots in (map(int, line.split()) for line in instances):
        # what the plan reckons with
        assert slots == [(limit - groups * CUDA_GROUP_BYTES) // CUDA_SLOT_BYTES for limit in SHARED_BYTES]
        # a tile, and what is on its way meanwhile: 16 KiB a slot
        assert slots[0] >= chunks + 1, (chunks, groups)
        assert slots[1] >= chunks + 5, (chunks, groups)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["80", "90a", "100a", "120a"])
def test_cuda_kernel_compiles_without_spills(architecture: str, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
    command += ["--keep", "--keep-dir", str(tmp_path)]  # the PTX
    source = ROOT / "csrc/cuda/few_rows.cu"
    done = subprocess.run([*command, source, "-o", tmp_path / "cubin"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = done.stdout + done.stderr
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == 2 * (10 + 1)  # two dtypes, ten instances and the sum of their parts
    assert max(registers) <= 255
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == len(registers)
    assert {int(size) for sizes in spills for size in sizes} == {0}
    # the ring of copies is dynamic shared memory: see the test on the host; no kernel has any that is static
    assert not re.search(r"[1-9]\d* bytes smem", report)

    ptx = (tmp_path / "few_rows.ptx").read_text()
    kernels = [body for body in ptx.split(".entry ")[1:] if "few_rows_part" in body.splitlines()[0]]
    assert len(kernels) == 20
    for body in kernels:
        assert ("cp.async.bulk.shared" in body) == (architecture != "80")
        assert ("cp.async.cg.shared" in body) == (architecture == "80")


@pytest.mark.skipif(shutil.which("clang-format") is None, reason="needs clang-format")
def test_sources_are_formatted() -> None:
    sources = [p for folder in ("csrc", "tests/csrc") for p in (ROOT / folder).rglob("*.*") if p.suffix != ".md"]
    done = subprocess.run(
        ["clang-format", "--dry-run", "-Werror", *sources], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[:2000]


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """What setup.py needs, without what was built."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(
        ROOT / "tiedfused", tmp_path / "tiedfused", ignore=shutil.ignore_patterns("_C*", "_native*", "*.pyc")
    )
    return tmp_path


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(
        command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_build_modes(source_tree: Path) -> None:
    pytest.importorskip("setuptools")
    folder = source_tree / "tiedfused"
    wrong = build(source_tree, TIEDFUSED_BUILD_EXT="yes")
    assert wrong.returncode != 0
    assert "TIEDFUSED_BUILD_EXT: got 'yes'; expected auto, cpu, cuda or 0" in wrong.stderr

    assert build(source_tree, TIEDFUSED_BUILD_EXT="0").returncode == 0
    assert str(extension.load(folder).why_not).startswith("the native ops were not built: pip install")

    without_compiler = {"CC": "/bin/false", "CXX": "/bin/false"}
    (folder / "_C.so").write_bytes(b"left over from another source")
    auto = build(source_tree, TIEDFUSED_BUILD_EXT="auto", **without_compiler)
    assert auto.returncode == 0, auto.stderr[-2000:]
    assert str(extension.load(folder).why_not).startswith("the native ops were not built: nothing built (CPU: ")
    assert build(source_tree, TIEDFUSED_BUILD_EXT="cpu", **without_compiler).returncode != 0
    if torch.version.cuda is None:
        cuda = build(source_tree, TIEDFUSED_BUILD_EXT="cuda")
        assert cuda.returncode != 0
        assert "TIEDFUSED_BUILD_EXT=cuda: this PyTorch is not a CUDA build" in cuda.stderr
