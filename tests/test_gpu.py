"""What only a GPU can show of the Triton kernels: streams, threads, graphs, views, offsets past 2³¹, and their memory.

Values over dtypes, activations and sizes are in test_numerics.py and test_stats.py.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from numerics import Problem, assert_layer_matches, outputs, problem
from test_stats import assert_matches

import tiedfused
from tiedfused import reference, settings
from tiedfused.functional import tied_encode_decode
from tiedfused.regimes import stream
from tiedfused.tiles import STREAM_KERNELS, Packaged, packaged

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]
BF16 = torch.bfloat16
# regime → (N, d, H): rows of a multiple of 8, more tiles than one, and none of them full
PROBLEMS = {
    "stream": (700, 72, 520),
    "few_rows": (40, 200, 3000),
    "bottleneck": (700, 264, 100),
    "chunked": (700, 200, 600),
}
# the same with many blocks on every multiprocessor, and with split sums
LARGE = {
    "stream": (5000, 128, 9000),
    "few_rows": (64, 1000, 30000),
    "bottleneck": (5000, 3000, 200),
    "chunked": (3000, 768, 5000),
}


@pytest.fixture(params=PROBLEMS)
def regime(request: pytest.FixtureRequest) -> Iterator[str]:
    with settings.override(regime=request.param, recompute=True):  # two of them keep no latent
        yield request.param


def made(
    regime: str, dtype: torch.dtype = BF16, sizes: dict[str, tuple[int, int, int]] = PROBLEMS, **options
) -> Problem:
    assert tiedfused.plan(*sizes[regime], dtype=dtype, device="cuda").forward.regime == regime
    return problem(*sizes[regime], dtype, "cuda", exact=True, **options)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
def test_bitwise_reproducible(regime: str, dtype: torch.dtype) -> None:
    """Also whether threads wait for each other where they have to: who does not is seldom late."""
    p = made(regime, dtype, LARGE)
    first = outputs(tied_encode_decode, p)
    for _ in range(10):
        assert_same(outputs(tied_encode_decode, p), first)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("offset", [1, 8])
def test_views(regime: str, offset: int, dtype: torch.dtype) -> None:
    """Rows that begin at no multiple of 16 bytes, and rows that do within wider ones."""

    def view(t: torch.Tensor) -> torch.Tensor:
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 2 * offset), float("nan"), dtype=dtype, device=t.device)
        inside = wide[..., offset:-offset]
        return inside.copy_(t.detach())

    p = made(regime, dtype)
    operands = (view(t).requires_grad_() for t in p.operands)  # type: ignore[arg-type]
    assert_layer_matches(tied_encode_decode, Problem(*operands, view(p.grad_y)))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_statistics(regime: str, dtype: torch.dtype) -> None:
    def layer(*operands):
        return tied_encode_decode(*operands, activation="tanh", return_stats=True)

    assert_matches(layer, made(regime, dtype), activation="tanh")


def test_another_stream(regime: str) -> None:
    p = made(regime)
    expected = outputs(tied_encode_decode, p)
    late = Problem(*(torch.zeros_like(t).requires_grad_() for t in p.operands), torch.zeros_like(p.grad_y))  # type: ignore[arg-type]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # what runs in another stream's order reads zeros
        with torch.no_grad():
            for t, value in zip((*late.operands, late.grad_y), (*p.operands, p.grad_y), strict=True):
                t.copy_(value)  # type: ignore[union-attr, arg-type]
        found = outputs(tied_encode_decode, late)
    torch.cuda.synchronize()
    assert_same(found, expected)


def test_threads(regime: str) -> None:
    """Each with a stream of its own, and all of them the first to compile these kernels."""
    problems = [made(regime, torch.float16, seed=seed) for seed in range(4)]
    torch.cuda.synchronize()

    def run(p: Problem) -> dict[str, torch.Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = outputs(tied_encode_decode, p)
            torch.cuda.current_stream().synchronize()
        return found

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, problems))
    for found, p in zip(together, problems, strict=True):
        assert_same(found, outputs(tied_encode_decode, p))


def test_cuda_graph(regime: str) -> None:
    """Forward and backward, captured once and run again on other rows."""
    p, other = made(regime), made(regime, seed=1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            outputs(tied_encode_decode, p)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = outputs(tied_encode_decode, p)
    with torch.no_grad():
        p.x.copy_(other.x)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(found, outputs(tied_encode_decode, p))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_step(mode: str) -> None:
    """Inductor's graphs, and with the second mode its CUDA graphs, around the op."""
    torch._dynamo.reset()
    layer = torch.compile(tied_encode_decode, fullgraph=True, mode=mode)
    p = problem(300, 64, 520, BF16, "cuda", exact=True)
    expected = outputs(tied_encode_decode, p)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = {name: t.clone() for name, t in outputs(layer, p).items()}
        for name, t in found.items():
            torch.testing.assert_close(t, expected[name], rtol=2e-2, atol=2e-2, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("tf32")
def test_tf32(regime: str) -> None:
    """Triton cuts fp32 operands off to tf32; of eager's it is not known. The bound is a guess, to be measured."""
    assert tiedfused.plan(8, 8, 8, device="cuda").precision == "tf32"
    p = made(regime, torch.float32)
    ours, eager, truth = (
        outputs(layer, q)
        for layer, q in (
            (tied_encode_decode, p),
            (reference.tied_encode_decode, p),
            (reference.tied_encode_decode, p.to(torch.float64)),
        )
    )
    for name in truth:
        found, theirs = (float((t[name] - truth[name]).norm() / truth[name].norm()) for t in (ours, eager))
        assert found <= 8 * theirs + 1e-4, f"{name}: error {found:.2g}, eager's {theirs:.2g}"


WARP_SPECIALIZED = [one for one in packaged() if one.kernel in STREAM_KERNELS and one.tile.warp_specialize]  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("one", WARP_SPECIALIZED, ids=lambda one: f"{one.kernel}-{one.capability}-{one.width}")
def test_warp_specialized(
    one: Packaged, odd: bool, dtype: torch.dtype, tmp_path: Path, fresh_plans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles that are packaged for tuning to try; the allocator of their descriptors serves autograd's threads too."""
    if torch.cuda.get_device_capability() != divmod(one.capability, 10):
        pytest.skip(f"its tile is for compute capability {one.capability / 10}")
    tiles = {one.kernel: {one.operands: {one.width: dataclasses.astuple(one.tile)}}}
    (tmp_path / f"sm{one.capability}.json").write_text(json.dumps({"status": "candidate", "tiles": tiles}))
    monkeypatch.setattr(stream, "split", lambda *_: 1)  # a split launch is not specialised
    n, d, h = (1001, int(one.width) - 8, 1777) if odd else (1024, int(one.width), 2048)
    with settings.override(regime="stream", config_dir=str(tmp_path)):
        made = tiedfused.plan(n, d, h, dtype=dtype, device="cuda", recompute=True)
        assert [each.tile for each in made.passes if each.kernel == one.kernel] == [one.tile]
        p = problem(n, d, h, dtype, "cuda", biases=not odd, exact=True)
        assert_layer_matches(lambda *operands: tied_encode_decode(*operands, recompute=True), p)


# ---- offsets past 2³¹ ------------------------------------------------------------------------------------------------


@pytest.fixture
def whole_gpu(gpu_alone: None) -> None:
    if torch.cuda.mem_get_info()[0] < 36 << 30:
        pytest.skip("needs 36 GiB of free memory")


def assert_near(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    assert error < 1e-2, f"{name}: {error:.2g}"


@pytest.mark.parametrize("name", ["stream", "bottleneck", "chunked"])
def test_rows_past_31_bits(name: str, whole_gpu: None) -> None:
    """Of x, y, ō and x̄; only the last rows have a gradient, and so all of W̄."""
    n, d, h, last = 2**31 // 64 + 100, 64, 16, slice(-100, None)
    x = torch.randn(n, d, dtype=BF16, device="cuda").requires_grad_()
    weight = (torch.randn(h, d, dtype=BF16, device="cuda") / 8).requires_grad_()
    biases = [torch.randn(size, dtype=BF16, device="cuda").requires_grad_() for size in (h, d)]
    grad_y = torch.zeros(n, d, dtype=BF16, device="cuda")
    grad_y[last].normal_()

    def layer(*operands):
        return tied_encode_decode(*operands, recompute=True)

    with settings.override(regime=name, workspace_bytes=1 << 36):
        assert tiedfused.plan(n, d, h, dtype=BF16, device="cuda", recompute=True).regime == name
        found = outputs(layer, Problem(x, weight, *biases, grad_y))
        few = x[last].detach().clone().requires_grad_()
        expected = outputs(layer, Problem(few, weight, *biases, grad_y[last].clone()))
    for key, t in found.items():
        assert_near(t[last] if key in ("y", "grad_x") else t, expected[key], key)


@pytest.mark.parametrize("name", ["stream", "few_rows", "chunked"])
def test_atoms_past_31_bits(name: str, whole_gpu: None) -> None:
    """Of W and W̄; only the last atoms are active."""
    n, d, h, last = 48, 512, 2**31 // 512 + 100, slice(-100, None)
    x = torch.randn(n, d, dtype=BF16, device="cuda").requires_grad_()
    weight = torch.randn(h, d, dtype=BF16, device="cuda").mul_(d**-0.5).requires_grad_()
    bias_enc = torch.full((h,), -1e4, dtype=BF16, device="cuda")
    bias_enc[last].normal_()
    bias_dec = torch.randn(d, dtype=BF16, device="cuda").requires_grad_()
    p = Problem(x, weight, bias_enc.requires_grad_(), bias_dec, torch.randn(n, d, dtype=BF16, device="cuda"))
    few = Problem(x, *(t.detach()[last].clone().requires_grad_() for t in (weight, bias_enc)), bias_dec, p.grad_y)

    def layer(*operands):
        return tied_encode_decode(*operands, recompute=True)

    with settings.override(regime=name):
        assert tiedfused.plan(n, d, h, dtype=BF16, device="cuda", recompute=True).forward.regime == name
        if name == "few_rows":  # it has a forward only
            with torch.no_grad():
                assert_near(layer(*p.operands), layer(*few.operands), "y")
            return
        found, expected = outputs(layer, p), outputs(layer, few)
    for key, t in found.items():
        assert_near(t[last] if key in ("grad_weight", "grad_bias_enc") else t, expected[key], key)
    assert not found["grad_weight"][:-100].any()


def test_kept_latent_past_31_bits(whole_gpu: None) -> None:
    n, d, h = 2**15 + 64, 16, 2**16 + 128
    p = problem(n, d, h, BF16, "cuda", exact=True)
    with settings.override(regime="chunked"):
        made = tiedfused.plan(n, d, h, dtype=BF16, device="cuda", recompute=False)
        assert (made.regime, made.save_latent) == ("chunked", True)
        found = outputs(lambda *operands: tied_encode_decode(*operands, recompute=False), p)
    with settings.override(regime="stream"):
        expected = outputs(lambda *operands: tied_encode_decode(*operands, recompute=True), p)
    for name in found:
        assert_near(found[name], expected[name], name)
        assert_near(found[name][-64:], expected[name][-64:], f"{name}, the last")


# ---- memory ----------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
sys.path[:0] = ["tests"]
import torch, tiedfused
from numerics import outputs, problem
from tiedfused.functional import tied_encode_decode

def with_penalties(*operands):
    y, stats = tied_encode_decode(*operands, return_stats=True)
    return y * (stats.l1.mean() + stats.mean.square().sum()).to(y.dtype)

for regime, (n, d, h) in {"stream": (37, 72, 200), "few_rows": (5, 72, 900), "bottleneck": (37, 264, 100),
                          "chunked": (137, 200, 200)}.items():
    for dtype in (torch.bfloat16, torch.float32):
        for d in (d, d - 5):
            with tiedfused.settings.override(regime=regime, recompute=True):
                assert tiedfused.plan(n, d, h, dtype=dtype, device="cuda").forward.regime == regime
                p = problem(n, d, h, dtype, "cuda", exact=True)
                outputs(tied_encode_decode, p)
                outputs(with_penalties, p)
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_under_compute_sanitizer(tool: str) -> None:
    """Every kernel, on rows that are whole vectors and on some that are not."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=_kernel"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    # without the caching allocator an operand has its own allocation, and what lies beyond is nobody's
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command += [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
