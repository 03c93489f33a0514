"""The native op of csrc/: numerics of each of its builds, reproducibility, errors, and its shared object."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from numerics import Problem, assert_close, problem
from torch import Tensor

import tiedfused
from tiedfused import extension, reference
from tiedfused.extension import EXTENSION, MAX_ROWS

ROOT = Path(__file__).parents[1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = ["portable", "avx2", "avx512", "avx512_bf16"]

native = pytest.mark.skipif(EXTENSION.why_not is not None, reason=str(EXTENSION.why_not))


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
        p = problem(17, 300, 333, dtype)
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


@native
@pytest.mark.parametrize(
    ("operands", "options", "message"),
    [
        ((torch.randn(65, 8), W, None, None), {}, "x: expected 1 to 64 rows, got 65"),
        ((X[:0], W, None, None), {}, "x: expected 1 to 64 rows, got 0"),
        ((X[:, :7], W, None, None), {}, r"x: expected shape \[N, 8\], as weight has 8 columns"),
        ((X[0], W, None, None), {}, r"x: expected shape \[N, 8\]"),
        ((X.double(), W.double(), None, None), {}, "x: expected float32, bfloat16 or float16"),
        ((X, W.half(), None, None), {}, "weight: expected the dtype of x"),
        ((X, W[0], None, None), {}, r"weight: expected shape \[H, d\]"),
        ((torch.randn(8, 3).t(), W, None, None), {}, "x: expected a last stride of 1, got 3"),
        ((X, torch.randn(8, 16).t(), None, None), {}, "weight: expected a last stride of 1, got 16"),
        ((X, W, C, None), {}, r"bias_enc: expected shape \[16\]"),
        ((X, W, B, B), {}, r"bias_dec: expected shape \[8\]"),
        ((X, W, B.double(), None), {}, "bias_enc: expected the dtype of x"),
        ((X, W, None, None), {"f": "sine"}, "activation: 'sine' is not one that the native op has"),
        ((X, W, None, None), {"g": "sine"}, "output_activation: 'sine' is not one that the native op has"),
    ],
)
def test_errors(operands, options, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        few_rows(*operands, **options)
    few_rows(X, W, B, C)


@native
def test_row_limit_is_the_same_on_both_sides() -> None:
    few_rows(torch.randn(MAX_ROWS, 8), W, None, None)
    with pytest.raises(RuntimeError, match=f"1 to {MAX_ROWS} rows"):
        few_rows(torch.randn(MAX_ROWS + 1, 8), W, None, None)


def test_missing_or_broken_shared_object_is_a_reason(tmp_path: Path) -> None:
    assert extension.load(tmp_path).why_not == "the native ops were not built"
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


@pytest.mark.slow
def test_cpu_kernel_under_sanitizers(tmp_path: Path) -> None:
    """Every build over odd shapes with the address and undefined-behaviour sanitizers; see csrc/few_rows_cpu.cpp."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}")
    if subprocess.run([compiler, *flags, empty, "-o", tmp_path / "empty"], capture_output=True, check=False).returncode:
        pytest.skip("the compiler has no sanitizers")
    sources = [ROOT / "tests/csrc/few_rows_cpu.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    program = tmp_path / "few_rows"
    built = subprocess.run([compiler, *flags, *sources, "-o", program], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.strip().endswith("kernels: good")
