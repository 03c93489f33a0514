"""The plan: what it chooses, why, and that it always fits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import tiedfused
from tiedfused import planning, settings
from tiedfused.planning import TorchTile, plan
from tiedfused.settings import MIB
from tiedfused.tiles import ARCHITECTURES, Tile, block_d, check_tile

BF16 = torch.bfloat16


def test_cpu_is_served_by_tiles() -> None:
    p = plan(8192, 128, 8192)
    assert (p.backend, p.regime, p.save_latent, p.deterministic) == ("tiled", "tiled", False, True)
    assert [one.kernel for one in p.passes] == ["forward", "backward"]
    assert ("triton", "its kernels need a CUDA device, the tensors are on cpu") in p.not_taken


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [1, 16, 32, 64, 96, 100, 128, 200, 256, 384, 512])
def test_cuda_streams_the_weight(d: int, dtype: torch.dtype, capability: int) -> None:
    p = plan(16384, d, 16384, dtype=dtype, device="cuda", capability=capability)
    if dtype == torch.float32 and d > 256 and ARCHITECTURES[capability].shared_bytes < 120_000:
        assert p.backend == "tiled"
        assert "bytes of shared memory" in dict(p.not_taken)["triton"]
        return
    assert (p.backend, p.regime, p.save_latent, p.deterministic) == ("triton", "stream-H", False, True)
    assert [one.kernel for one in p.passes] == ["forward", "weight_grad", "input_grad"]
    for one in p.passes:
        assert isinstance(one.tile, Tile)
        check_tile(one.kernel, one.tile, block_d(d), dtype.itemsize, capability)


def test_x_without_gradient_is_not_given_one() -> None:
    with_x = plan(4096, 64, 4096, dtype=BF16, device="cuda")
    without = plan(4096, 64, 4096, dtype=BF16, device="cuda", grad_x=False)
    assert [one.kernel for one in without.passes] == ["forward", "weight_grad"]
    ndh = 4096 * 64 * 4096
    assert (with_x.theoretical_flops, with_x.executed_flops) == (12 * ndh, 18 * ndh)
    assert (without.theoretical_flops, without.executed_flops) == (10 * ndh, 12 * ndh)


def test_atomics_only_where_asked_for_and_allowed() -> None:
    arguments = dict(n=4096, d=64, h=4096, dtype=BF16, device="cuda")
    with settings.override(atomics=True):
        p = plan(**arguments)
        assert [one.kernel for one in p.passes] == ["forward", "weight_grad_atomic"]
        assert not p.deterministic
        assert p.executed_flops == 14 * 4096 * 64 * 4096
        torch.use_deterministic_algorithms(True)
        try:
            assert plan(**arguments).deterministic
        finally:
            torch.use_deterministic_algorithms(False)
    assert plan(**arguments).deterministic


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"d": 513}, "d 513 is above 512"),
        ({"dtype": torch.float64}, "bfloat16, float16 and float32, not float64"),
        ({"capability": 75}, "compute capability 7.5 is below 8.0"),
        ({"device": "mps"}, "need a CUDA device, the tensors are on mps"),
        ({"recompute": False}, "recompute=False asks to keep it"),
        ({"n": 0}, "no rows"),
    ],
)
def test_what_triton_does_not_take_falls_back_and_says_why(change: dict, why: str) -> None:
    p = plan(**{"n": 100, "d": 64, "h": 500, "dtype": BF16, "device": "cuda", **change})
    assert p.backend == "tiled"
    assert why in dict(p.not_taken)["triton"]


def test_setting_the_backend() -> None:
    with settings.override(backend="tiled"):
        p = plan(100, 64, 500, device="cuda")
        assert p.backend == "tiled"
        assert dict(p.not_taken)["triton"] == "TIEDFUSED_BACKEND is tiled"


def test_activation_without_triton_functions_is_served_by_tiles(custom_activation: str) -> None:
    p = plan(100, 64, 500, device="cuda", activation=custom_activation)
    assert p.backend == "tiled"
    assert custom_activation in dict(p.not_taken)["triton"]


def test_workspace_budget_decides_what_is_kept() -> None:
    assert plan(4096, 768, 6144).save_latent
    assert plan(4096, 768, 6144).saved_bytes == 4096 * 6144 * 4
    assert not plan(4096, 128, 6144).save_latent, "recomputing is cheaper at small d"
    assert not plan(40960, 768, 6144).save_latent, "over the budget"
    assert "exceeds the workspace budget of 256.0 MiB" in plan(40960, 768, 6144).reason
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
    few_rows = plan(128, 64, 65536, dtype=BF16, device="cuda").passes[0]
    assert few_rows.split > 1
    assert few_rows.workspace_bytes == few_rows.split * 128 * 64 * 4
    assert plan(1 << 17, 64, 65536, dtype=BF16, device="cuda").passes[0].split == 1
    few_atoms = plan(1 << 17, 64, 64, dtype=BF16, device="cuda").passes[1]
    assert few_atoms.split > 1
    assert plan(1, 1, 1, device="cuda").passes[0].split == 1


def test_roofline() -> None:
    p = plan(16384, 128, 32768, dtype=BF16, device="cuda", capability=90, grad=False)
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


def test_atomics_that_do_not_fit_leave_two_passes() -> None:
    with settings.override(atomics=True):
        p = plan(4096, 512, 4096, device="cuda", capability=80)
    assert [one.kernel for one in p.passes] == ["forward", "weight_grad", "input_grad"]
    assert p.deterministic


def test_tiled_roofline_is_the_devices_own() -> None:
    slow, fast = (plan(4096, 768, 8192, dtype=BF16, device="cuda", capability=c).roofline_ms for c in (80, 100))
    assert slow > 3 * fast


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_size_has_a_plan_that_fits(device: str, dtype: torch.dtype) -> None:
    sizes = [1, 2, 7, 64, 129, 1000, 4096, 1 << 17]
    for n in (0, *sizes):
        for d in sizes:
            for h in sizes:
                for capability in (80, 86, 90) if device == "cuda" else (None,):
                    p = plan(n, d, h, dtype=dtype, device=device, capability=capability)
                    assert p.saved_bytes <= settings.current().workspace_bytes
                    for one in p.passes:
                        if isinstance(one.tile, Tile):
                            check_tile(one.kernel, one.tile, block_d(d), dtype.itemsize, capability or 90)


def test_tile_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"forward.*block_n=1024") as caught:
        check_tile("forward", Tile(1024, 128, 4, 3), 512, 2, 90)
    assert "\n" not in str(caught.value)


def test_text_names_everything_a_user_asks_for() -> None:
    text = str(plan(4096, 256, 8192, dtype=BF16, device="cuda"))
    for label in (
        "regime",
        "backend",
        "forward",
        "weight_grad",
        "input_grad",
        "workspace",
        "FLOPs",
        "roofline",
        "reason",
    ):
        assert any(line.startswith(label) for line in text.splitlines()), label


def test_backends() -> None:
    found = {status.name: status.why_not for status in tiedfused.backends()}
    assert found["tiled"] is None
    if not torch.cuda.is_available() and not planning.interpreting():
        assert "CUDA" in str(found["triton"])


def test_onednn_serves_large_float32_and_bfloat16_products_only() -> None:
    def products(*shape: int, dtype: torch.dtype = torch.float32) -> str:
        tile = plan(*shape, dtype=dtype).passes[0].tile
        assert isinstance(tile, TorchTile)
        return tile.products

    large = "blas" if planning.onednn_missing() else "onednn"
    assert products(8192, 128, 8192) == large
    assert products(8192, 128, 8192, dtype=BF16) == large
    assert products(8192, 128, 8192, dtype=torch.float64) == "blas"
    assert products(4, 8, 16) == "blas"
