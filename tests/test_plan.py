"""The plan: what it chooses, why, and that it always fits."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiedfused
from tiedfused import devices, settings
from tiedfused.planning import Plan, make_plan, plan
from tiedfused.regimes import REGIMES, chunked, stream
from tiedfused.regimes.common import Pass, TorchTile, why_not_triton
from tiedfused.settings import MIB
from tiedfused.tiles import ARCHITECTURES, AnyTile, Tile, block_d, check_tile

BF16 = torch.bfloat16


def test_cpu_is_served_by_tiles() -> None:
    p = plan(8192, 128, 8192)
    assert (p.backend, p.regime, p.save_latent, p.deterministic) == ("tiled", "tiled", False, True)
    assert [one.kernel for one in p.passes] == ["forward", "backward"]
    assert ("stream", "its kernels need a CUDA device, the tensors are on cpu") in p.alternatives


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [1, 16, 32, 64, 96, 100, 128, 200, 256, 384, 512])
def test_cuda_streams_the_weight(d: int, dtype: torch.dtype, capability: int) -> None:
    with settings.override(regime="stream"):
        p = plan(16384, d, 16384, dtype=dtype, device="cuda", capability=capability, recompute=True)
    if dtype == torch.float32 and d > 256 and ARCHITECTURES[capability].shared_bytes < 120_000:
        assert "tiled" in p.backend
        assert "bytes of shared memory" in dict(p.alternatives)["stream"]
        return
    assert (p.backend, p.regime, p.save_latent, p.deterministic) == ("triton", "stream", False, True)
    assert [one.kernel for one in p.passes] == ["forward", "weight_grad", "input_grad"]
    assert_fits(p)


def assert_fits(p: Plan) -> None:
    """Every tile fits its GPU, and what is allocated the workspace."""
    assert p.saved_bytes <= settings.current().workspace_bytes
    for part in p.parts:
        assert part.workspace_bytes <= settings.current().workspace_bytes, (p, part)
    for one in p.passes:
        if isinstance(one.tile, AnyTile):
            check_tile(one.kernel, one.tile, block_d(p.d), p.dtype.itemsize, p.request.gpu)


def ndh(p: Plan) -> int:
    return p.n * p.d * p.h


@pytest.mark.parametrize(
    ("regime", "sizes"),
    [("stream", (5000, 128, 9000)), ("bottleneck", (2000, 3000, 200)), ("few_rows", (64, 512, 9000))],
)
def test_regime_that_was_asked_for_is_taken_with_the_latent_kept_or_not(regime: str, sizes: tuple[int, ...]) -> None:
    """These keep no latent; in fp32 tiles that keep it are predicted to be faster."""
    with settings.override(regime=regime):
        p = plan(*sizes, device="cuda")
    assert p.forward.regime == regime
    assert not p.save_latent


@pytest.mark.parametrize("regime", [name for name in settings.REGIME_NAMES if name not in ("native", "tiled")])
@pytest.mark.parametrize("position", range(3))
def test_sizes_past_31_bits_are_left_to_tiles(position: int, regime: str) -> None:
    sizes = [8, 8, 8]
    sizes[position] = 2**31 - 5
    with settings.override(regime=regime):
        p = plan(*sizes, dtype=BF16, device="cuda", grad=False)
    assert p.regime == "tiled"
    assert "count" in dict(p.alternatives)[regime]


@pytest.mark.parametrize("regime", ["stream", "chunked", "tiled"])
def test_x_without_gradient_is_not_given_one(regime: str) -> None:
    arguments = dict(n=4096, d=64, h=4096, dtype=BF16, device="cuda", recompute=True)
    with settings.override(regime=regime):
        with_x, without = plan(**arguments), plan(**arguments, grad_x=False)
    assert with_x.regime == without.regime == regime
    assert with_x.theoretical_flops == 12 * ndh(with_x)
    assert without.theoretical_flops == 10 * ndh(without)
    # x̄ by itself computes a and h̄ once more
    assert with_x.executed_flops == (18 if regime == "stream" else 14) * ndh(with_x)
    assert without.executed_flops == 12 * ndh(without)


@pytest.mark.parametrize(("d", "padded"), [(384, 384), (320, 320), (96, 96), (130, 144), (100, 128), (200, 256)])
def test_padding_counts_as_executed_work(d: int, padded: int) -> None:
    with settings.override(regime="stream"):
        p = plan(4096, d, 4096, dtype=BF16, device="cuda", recompute=True)
    assert p.regime == "stream"
    assert p.theoretical_flops == 12 * ndh(p)
    assert p.executed_flops == 18 * 4096 * padded * 4096


@pytest.fixture
def specialized_forward(tmp_path: Path) -> Iterator[None]:
    """A user's config whose forward tile is warp-specialised at every d."""
    config = {"status": "measured", "tiles": {"forward": {"2": {"256": [128, 64, 4, 2, True]}}}}
    (tmp_path / "sm90.json").write_text(json.dumps(config))
    with settings.override(config_dir=str(tmp_path)):
        yield


def test_warp_specialized_where_tma_can_read_the_rows(specialized_forward: None) -> None:
    def forward(n: int, d: int, stats: bool = False) -> Pass:
        with settings.override(regime="stream"):
            return plan(n, d, 4096, dtype=BF16, device="cuda", stats=stats).forward.passes[0]

    assert forward(1 << 17, 256).tile == Tile(128, 64, 4, 2, warp_specialize=True)
    odd = forward(1 << 17, 250)
    assert odd.tile == Tile(128, 64, 8, 2)
    assert "not warp-specialised" in odd.tile_source
    assert forward(256, 256).split > 1
    assert forward(256, 256).tile == Tile(128, 64, 8, 2)
    assert forward(1 << 17, 256, stats=True).tile == Tile(128, 64, 8, 2)


def test_atomics_only_where_asked_for_and_allowed() -> None:
    arguments = dict(n=4096, d=64, h=4096, dtype=BF16, device="cuda", recompute=True)
    with settings.override(atomics=True, regime="stream"):
        p = plan(**arguments)
        assert [one.kernel for one in p.passes] == ["forward", "weight_grad_atomic"]
        assert not p.deterministic
        assert p.executed_flops == 14 * ndh(p)
        torch.use_deterministic_algorithms(True)
        try:
            assert plan(**arguments).deterministic
        finally:
            torch.use_deterministic_algorithms(False)
    assert plan(**arguments).deterministic


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float64}, "bfloat16, float16 and float32, not float64"),
        ({"capability": 75}, "compute capability 7.5 is below 8.0"),
        ({"device": "mps"}, "need a CUDA device, the tensors are on mps"),
        ({"n": 0}, "no rows"),
    ],
)
def test_what_triton_does_not_take_falls_back_and_says_why(change: dict, why: str) -> None:
    p = plan(**{"n": 100, "d": 64, "h": 500, "dtype": BF16, "device": "cuda", **change})
    assert p.backend == "tiled"
    for regime in ("stream", "chunked"):
        assert why in dict(p.alternatives)[regime]


@pytest.mark.parametrize(
    ("change", "regime", "why"),
    [
        ({"d": 513}, "stream", "d 513 is above 512"),
        ({"recompute": False}, "stream", "its kernels recompute the latent"),
        ({"recompute": False, "activation": "gelu"}, "chunked", "the gradient of gelu is not read off h"),
    ],
)
def test_what_one_regime_does_not_take_goes_to_another(change: dict, regime: str, why: str) -> None:
    with settings.override(regime=regime):
        p = plan(**{"n": 100, "d": 64, "h": 500, "dtype": BF16, "device": "cuda", **change})
    assert p.regime == "tiled"
    assert why in dict(p.alternatives)[regime]


@pytest.mark.parametrize("regime", ["stream", "chunked", "tiled"])
def test_setting_the_regime(regime: str) -> None:
    with settings.override(regime=regime):
        p = plan(100, 64, 500, device="cuda")
        assert p.regime == regime
        others = {name for name, why in p.alternatives if why == f"TIEDFUSED_REGIME is {regime}"}
        assert others == set(REGIMES) - {regime, "tiled"}


def test_the_fastest_is_taken_and_the_others_are_named() -> None:
    p = plan(16384, 256, 16384, dtype=BF16, device="cuda", grad=False)
    assert p.regime == "stream"
    (chunked,) = (plan_of for plan_of in [regime_plan(p, "chunked")] if plan_of.regime == "chunked")
    assert p.predicted_ms < chunked.predicted_ms
    assert dict(p.alternatives)["chunked"] == f"forward {chunked.predicted_ms:.3g} ms predicted"


def regime_plan(p: Plan, regime: str) -> Plan:
    with settings.override(regime=regime):
        return plan(p.n, p.d, p.h, dtype=p.dtype, device=p.device, grad=p.request.grad)


@pytest.mark.parametrize("shape", [(4096, 784, 64), (2048, 17768, 512), (1, 8, 8)])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_a_latent_no_wider_than_x_is_one_tile(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Nothing is summed over tiles, and the buffers hold no more than x does."""
    n, d, h = shape
    p = plan(*shape, dtype=dtype)
    for one in p.passes:
        assert isinstance(one.tile, TorchTile)
        assert (one.tile.block_n, one.tile.block_h) == (n, h)
        assert one.workspace_bytes <= (4 * n * h + h * d) * dtype.itemsize
    (wider,) = plan(4096, 64, 128, dtype=dtype, grad=False).passes
    (larger,) = plan(1 << 20, 784, 64, dtype=dtype, grad=False).passes
    assert wider.tile.block_n == 4096 and larger.tile.block_n < 1 << 20


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("shape", [(16384, 784, 64), (128, 17768, 512), (1000, 100_000, 200)])
def test_a_small_latent_stays_on_chip(shape: tuple[int, int, int], capability: int) -> None:
    p = plan(*shape, dtype=BF16, device="cuda", capability=capability, grad=False)
    assert p.regime == "bottleneck"
    assert_fits(p)
    assert p.executed_flops == 4 * ndh(p)


def test_bottleneck_counts() -> None:
    n, d, h = 4096, 784, 64
    with settings.override(regime="bottleneck"):
        p = plan(n, d, h, dtype=BF16, device="cuda", recompute=True)
        without_x = plan(n, d, h, dtype=BF16, device="cuda", recompute=True, grad_x=False)
    assert [one.kernel for one in p.passes] == [
        "bottleneck_forward",
        "bottleneck_latent_grad",
        "bottleneck_weight_grad",
        "bottleneck_decode",
    ]
    fused, latent, weight, x = p.passes
    assert [one.flops for one in p.passes] == [times * ndh(p) for times in (4, 4, 4, 2)]
    assert without_x.passes == p.passes[:3]
    assert not p.save_latent
    # forward: x, W, y; nothing of size N·H
    assert (fused.bytes_moved, fused.workspace_bytes) == (2 * (2 * n * d + h * d), 0)
    # backward: ā and h are handed from pass to pass, and the parts of W̄ are summed up in fp32
    assert latent.bytes_moved == 2 * (2 * n * d + h * d + 2 * n * h)
    assert weight.split > 1
    parts = 4 * weight.split * h * d
    assert weight.bytes_moved == 2 * (2 * n * d + 2 * n * h + h * d) + 2 * parts
    assert weight.workspace_bytes == 2 * 2 * n * h + parts
    assert x.bytes_moved == 2 * (n * d + n * h + h * d)


@pytest.mark.parametrize(
    ("regime", "shape", "what"),
    [
        ("stream", (1 << 16, 64, 4096), lambda n, h, one: 8 * n + 6 * h * math.ceil(n / one.tile.block_n)),
        ("stream", (256, 256, 4096), lambda n, h, one: 8 * n * one.split + 6 * h * math.ceil(n / one.tile.block_n)),
        ("few_rows", (4, 768, 24576), lambda n, h, one: 8 * n * one.split + 6 * h),
        ("bottleneck", (1 << 16, 784, 64), lambda n, h, one: 8 * n + 6 * h * math.ceil(n / one.tile.block_n)),
        ("chunked", (4096, 784, 64), lambda n, h, one: 8 * n + 6 * h * math.ceil(n / one.tile.block_m)),
    ],
)
def test_the_statistics_parts_are_counted(regime: str, shape: tuple[int, int, int], what) -> None:
    """Written and read once; where launches share the room for them, the workspace is of one launch."""
    with settings.override(regime=regime):
        arguments = {"dtype": BF16, "device": "cuda", "grad": False}
        plain, counted = (plan(*shape, stats=stats, **arguments).forward for stats in (False, True))
    assert counted.regime == regime
    first, of_all = counted.passes[0], what(shape[0], shape[2], counted.passes[0])
    assert first.split == plain.passes[0].split
    rows = shape[0] if counted.chunk is None else counted.chunk[0]
    assert first.workspace_bytes - plain.passes[0].workspace_bytes == what(rows, shape[2], first)
    if regime != "chunked":  # whose parts stay in the L2 cache
        assert first.bytes_moved - plain.passes[0].bytes_moved == 2 * of_all
    # two small launches, and the parts' traffic
    least = max(plain.predicted_ms, 3 * 4e-3) + 1e3 * 2 * of_all / (2 * 3.35e12)
    assert counted.predicted_ms >= least * 0.999


def test_statistics_of_a_latent_in_memory_are_counted() -> None:
    n, d, h = 128, 17768, 512
    arguments = {"dtype": BF16, "device": "cuda", "grad": False}
    plain, counted = (plan(n, d, h, stats=stats, **arguments) for stats in (False, True))
    assert [one.kernel for one in counted.passes] == ["bottleneck_latent", "bottleneck_decode"]
    assert [one.split for one in counted.passes] == [one.split for one in plain.passes]
    # h is read three times; a byte an element is written once, and read twice
    assert counted.bytes_moved - plain.bytes_moved == 3 * n * h * (2 + 1)
    # five launches more; reading takes a little longer than the first kernel's own, which they no longer hide
    assert counted.predicted_ms > plain.predicted_ms + (5 - 1) * 4e-3


@pytest.mark.parametrize(("n", "in_cache"), [(13_000, True), (14_000, False)])
def test_a_buffer_of_half_the_cache_is_read_back_from_it(n: int, in_cache: bool) -> None:
    """The latent in bf16 and a byte for each, 20 and 21.5 MB of an A100's 40: however often they are read."""
    d, h = 4096, 512
    arguments = {"dtype": BF16, "device": "cuda", "capability": 80, "grad": False}
    with settings.override(regime="bottleneck"):
        plain, counted = (plan(n, d, h, stats=stats, **arguments).passes[0] for stats in (False, True))
    assert plain.kernel == counted.kernel == "bottleneck_latent" and counted.split == 1
    seconds = 3 * n * h * (2 + 1) / devices.GPUS[80].cached_bandwidth(in_cache)
    assert counted.predicted_ms - plain.predicted_ms == pytest.approx(1e3 * seconds)


@pytest.mark.parametrize("grad", [True, False])
def test_every_triton_regime_serves_statistics(grad: bool) -> None:
    for shape in ((4, 384, 8192), (4096, 784, 64), (128, 17768, 512)):
        p = plan(*shape, dtype=BF16, device="cuda", stats=True, grad=grad, recompute=True)
        refused = {name for name, why in p.alternatives if "statistics" in why}
        assert refused <= {"native"}


def test_launches_with_statistics_fill_the_gpu_or_take_what_there_is_room_for() -> None:
    """An H100 has 132 multiprocessors; a tile of rows takes 6 bytes a latent of half of the workspace."""
    for h, tiles_at_once in ((4096, 264), (1 << 17, 132), (1 << 19, 42)):
        with settings.override(regime="stream"):
            part = plan(1 << 17, 64, h, dtype=BF16, device="cuda", grad=False, stats=True).forward
        one = part.passes[0]
        assert isinstance(one.tile, Tile) and part.chunk is not None
        assert part.chunk[0] == tiles_at_once * one.tile.block_n
        assert one.workspace_bytes <= settings.current().workspace_bytes // 2


def test_a_small_batch_is_encoded_over_parts_of_d() -> None:
    latent, decode = plan(128, 17768, 512, dtype=BF16, device="cuda", grad=False).passes
    assert latent.split > 1
    assert latent.workspace_bytes == 128 * 512 * (2 + 4 * latent.split)
    assert latent.flops + decode.flops == 4 * 128 * 17768 * 512
    one_launch = plan(1 << 14, 784, 64, dtype=BF16, device="cuda", grad=False)
    assert [one.kernel for one in one_launch.passes] == ["bottleneck_forward"]


@pytest.mark.parametrize("n", [1, 4, 16, 32])
@pytest.mark.parametrize("d", [512, 768])
def test_few_rows_read_the_weight_once(n: int, d: int) -> None:
    with settings.override(regime="few_rows"):
        p = plan(n, d, 65536, dtype=BF16, device="cuda", grad=False)
    assert p.regime == "few_rows"
    assert_fits(p)
    (one,) = p.passes
    assert isinstance(one.tile, Tile)
    assert one.tile.block_n == max(16, n)
    assert 100 < one.split <= 132
    tiles_each = math.ceil(65536 / one.tile.block_h / one.split)
    assert (one.split - 1) * tiles_each * one.tile.block_h < 65536, "a part without rows of W"
    assert one.workspace_bytes == one.split * n * d * 4
    assert one.bytes_moved == 2 * (2 * n * d + 65536 * d) + 2 * one.workspace_bytes


def test_few_rows_of_a_large_weight_are_served_as_such() -> None:
    for shape in ((1, 768, 24576), (16, 768, 24576), (4, 512, 65536), (16, 2048, 65536)):
        assert plan(*shape, dtype=BF16, device="cuda", grad=False).regime == "few_rows", shape


@pytest.mark.parametrize(
    ("change", "regime", "why"),
    [
        ({"h": 513}, "bottleneck", "H 513 is above 512"),
        ({"recompute": False}, "bottleneck", "its kernels recompute the latent"),
        ({"n": 1 << 21}, "bottleneck", "bytes of workspace, above the limit"),
        ({"n": 65}, "few_rows", "N 65 is above 64"),
        ({"n": 3, "d": 2049}, "few_rows", "d 2049 is above 2048"),
        ({"n": 3, "d": 2048, "dtype": torch.float32}, "few_rows", "bytes of shared memory"),
        ({"n": 3}, "few_rows", "it has a forward only"),
    ],
)
def test_why_not_a_regime_of_small_sizes(change: dict, regime: str, why: str) -> None:
    p = plan(**{"n": 100, "d": 64, "h": 500, "dtype": BF16, "device": "cuda", "recompute": True, **change})
    assert why in dict(p.alternatives)[regime]


def test_wide_rows_run_as_chunks_of_the_latent() -> None:
    p = plan(16384, 256, 65536, dtype=BF16, device="cuda", recompute=True)
    assert p.forward.regime == "stream"
    assert p.backward is not None
    assert p.backward.regime == "chunked"
    rows, latents = p.backward.chunk or (0, 0)
    assert rows * latents < p.n * p.h / 4
    assert f"{rows} × {latents} of the latent at a time" in str(p)
    assert_fits(p)


def test_a_kept_latent_may_be_read_by_another_regime() -> None:
    arguments = dict(n=64, d=4096, h=4096, dtype=BF16, device="cuda", capability=80, recompute=False)
    mixed = plan(**arguments)
    assert (mixed.regime, mixed.save_latent) == ("tiled + chunked", True)
    for regime in ("tiled", "chunked"):
        with settings.override(regime=regime):
            assert mixed.predicted_ms < plan(**arguments).predicted_ms


def test_sum_of_the_input_gradient_that_does_not_fit_is_made_in_rows() -> None:
    arguments = dict(n=1 << 17, d=4096, h=1 << 15, dtype=BF16, device="cuda", recompute=True)
    for regime in ("chunked", "tiled"):
        with settings.override(regime=regime):
            p = plan(**arguments)
        assert p.regime == regime
        assert_fits(p)
        assert p.executed_flops == 18 * ndh(p)


def test_activation_without_triton_functions_is_served_by_tiles(custom_activation: str) -> None:
    p = plan(100, 64, 500, device="cuda", activation=custom_activation)
    assert p.backend == "tiled"
    assert custom_activation in dict(p.alternatives)["stream"]


def test_workspace_budget_decides_what_is_kept() -> None:
    assert plan(4096, 768, 6144).save_latent
    assert plan(4096, 768, 6144).saved_bytes == 4096 * 6144 * 4
    assert not plan(4096, 128, 6144).save_latent, "recomputing is cheaper at small d"
    assert not plan(40960, 768, 6144).save_latent, "over the budget"
    assert "exceeds the workspace budget of 256.0 MiB" in plan(40960, 768, 6144).forward.reason
    with settings.override(workspace_bytes=MIB):
        assert not plan(4096, 768, 6144).save_latent
    with settings.override(recompute=True):
        assert not plan(4096, 768, 6144).save_latent
        assert plan(4096, 768, 6144, recompute=False).save_latent
    assert not plan(4096, 768, 6144, recompute=True).save_latent
    assert plan(40960, 768, 6144, recompute=False).save_latent
    assert not plan(4096, 768, 6144, grad=False).save_latent


@pytest.mark.parametrize("shape", [(8192, 64, 4096), (8192, 128, 8192), (4096, 256, 8192), (4096, 768, 6144)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_low_memory_mode_stays_low(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert plan(*shape, dtype=dtype, recompute=True).workspace_bytes <= 64 * MIB


def test_workspace_does_not_grow_with_the_latent() -> None:
    small, large = (plan(n, 64, h, recompute=True).workspace_bytes for n, h in ((8192, 8192), (8192, 1 << 20)))
    assert large == small


def test_split_fills_a_large_gpu_with_a_small_grid() -> None:
    with settings.override(regime="stream"):
        few_rows = plan(128, 64, 65536, dtype=BF16, device="cuda", recompute=True).passes[0]
        assert few_rows.split > 1
        assert few_rows.workspace_bytes == few_rows.split * 128 * 64 * 4
        assert plan(1 << 17, 64, 65536, dtype=BF16, device="cuda").passes[0].split == 1
        few_atoms = plan(1 << 17, 64, 64, dtype=BF16, device="cuda", recompute=True).passes[1]
        assert few_atoms.split > 1
        assert plan(1, 1, 1, device="cuda", recompute=True).passes[0].split == 1


def test_roofline() -> None:
    p = plan(16384, 128, 32768, dtype=BF16, device="cuda", capability=90, grad=False)
    assert p.regime == "stream"
    assert p.roofline_ms == pytest.approx(4 * 16384 * 128 * 32768 / 989e12 * 1e3)
    bound_by_memory = plan(1, 512, 65536, dtype=BF16, device="cuda", capability=90, grad=False)
    assert bound_by_memory.roofline_ms == pytest.approx(bound_by_memory.bytes_moved / 3.35e12 * 1e3)


def test_precision_of_float32_follows_pytorch() -> None:
    assert plan(8, 8, 8, device="cuda").precision == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert plan(8, 8, 8, device="cuda").precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert plan(8, 8, 8, device="cuda").precision == "ieee"


def test_precision_set_on_the_backend_alone() -> None:
    # PyTorch's older call raises from then on, so this needs a process of its own
    program = """
import torch, tiedfused
torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.mkldnn.matmul.fp32_precision = "ieee"
tiedfused.TiedLinear(8, 16)(torch.randn(3, 8)).sum().backward()
print(tiedfused.plan(8, 8, 8, device="cuda").precision)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "tf32"), done.stderr


@pytest.mark.parametrize(("capability", "slower"), [(80, True), (90, True), (100, False)])
def test_tf32_costs_more_where_the_stream_kernels_do_not_copy_ahead(
    monkeypatch: pytest.MonkeyPatch, capability: int, slower: bool
) -> None:
    with settings.override(regime="stream"):
        request = plan(16384, 128, 16384, device="cuda", capability=capability, grad=False).request
    request = dataclasses.replace(request, precision="tf32")
    predicted = make_plan.__wrapped__(request).predicted_ms
    monkeypatch.setattr(stream, "UNPIPELINED", 1.0)
    assert (predicted > make_plan.__wrapped__(request).predicted_ms) == slower


def test_atomics_that_do_not_fit_leave_two_passes() -> None:
    with settings.override(atomics=True, regime="stream"):
        p = plan(4096, 512, 4096, device="cuda", capability=80, recompute=True)
    assert [one.kernel for one in p.passes] == ["forward", "weight_grad", "input_grad"]
    assert p.deterministic


def test_a_new_number_of_rows_is_planned_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of ever different sizes are planned each; what is known of a GPU is asked for once, not 11,000 times."""
    asked: list[int | None] = []
    known = devices.known_capability

    def counted(capability: int | None) -> int:
        asked.append(capability)
        return known(capability)

    monkeypatch.setattr(devices, "known_capability", counted)
    plan(4321, 768, 24576, dtype=BF16, device="cuda", capability=90)
    assert len(asked) <= 20


def test_roofline_is_the_devices_own() -> None:
    slow, fast = (plan(4096, 768, 8192, dtype=BF16, device="cuda", capability=c).roofline_ms for c in (80, 100))
    assert slow > 3 * fast


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_size_has_a_plan_that_fits(device: str, dtype: torch.dtype) -> None:
    sizes = [1, 7, 64, 129, 1000, 1 << 17]
    for n in (0, *sizes):
        for d in sizes:
            for h in sizes:
                for capability in (80, 86, 90) if device == "cuda" else (None,):
                    assert_fits(plan(n, d, h, dtype=dtype, device=device, capability=capability))


def test_tile_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"forward.*block_n=1024") as caught:
        check_tile("forward", Tile(1024, 128, 4, 3), (512,), 2, 90)
    assert "\n" not in str(caught.value)


def test_text_names_everything_a_user_asks_for() -> None:
    text = str(plan(4096, 256, 8192, dtype=BF16, device="cuda"))
    for label in ("forward", "backward", "latent", "workspace", "FLOPs", "roofline", "reason", "not tiled"):
        assert any(line.startswith(label) for line in text.splitlines()), label
    assert "ms predicted" in text


def test_backends() -> None:
    found = {status.name: status.why_not for status in tiedfused.backends()}
    assert found["tiled"] is None
    if not torch.cuda.is_available() and not devices.interpreting():
        assert "CUDA" in str(found["triton"])


def test_where_triton_finds_no_compiler_tiles_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("triton.runtime").driver

    class Driver:
        @property
        def utils(self) -> None:
            raise RuntimeError("Failed to find C compiler.\nPlease specify")

    r = plan(4096, 128, 8192, dtype=BF16, device="cuda", capability=90).request
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    devices.launcher_missing.cache_clear()
    try:
        assert why_not_triton(r) is None, "for a GPU that is not here"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert why_not_triton(r) == "Triton cannot launch kernels here: Failed to find C compiler."
        monkeypatch.setattr(driver, "_active", SimpleNamespace(utils=None))
        devices.launcher_missing.cache_clear()
        assert why_not_triton(r) is None
    finally:
        devices.launcher_missing.cache_clear()


def test_onednn_serves_large_float32_and_bfloat16_products_only() -> None:
    def products(*shape: int, dtype: torch.dtype = torch.float32) -> str:
        tile = plan(*shape, dtype=dtype).passes[0].tile
        assert isinstance(tile, TorchTile)
        return tile.products

    large = "blas" if devices.onednn_missing() else "onednn"
    assert products(8192, 128, 8192) == large
    assert products(8192, 128, 8192, dtype=BF16) == large
    assert products(8192, 128, 8192, dtype=torch.float64) == "blas"
    assert products(4, 8, 16) == "blas"


def test_many_chunks_take_the_host_their_launches() -> None:
    with settings.override(regime="chunked", workspace_bytes=4 * MIB):
        p = plan(16384, 64, 16384, dtype=BF16, device="cuda", recompute=True)
    for part in p.parts:
        assert part.chunk is not None
        chunks = math.ceil(16384 / part.chunk[0]) * math.ceil(16384 / part.chunk[1])
        assert chunks > 1
        assert part.predicted_ms >= 1e3 * chunks * len(part.passes) * chunked.CHUNK_LAUNCH_SECONDS
