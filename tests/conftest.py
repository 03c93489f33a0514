"""Which tests can run here, and the fixtures that several files share."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ["TIEDFUSED_CONFIG_DIR"] = ""  # what a developer has tuned is not what is tested

from tiedfused import activations, devices, functional, planning
from tiedfused.regimes import native, tiled

# The problems are small: a second thread makes them slower, and on a busy machine 15 times slower. Reproducibility is
# per number of threads, so one is as good as two.
torch.set_num_threads(1)

# A graph that inductor compiled for an earlier version of the ops is not what is tested.
_graphs = tempfile.TemporaryDirectory(prefix="tiedfused-inductor-", ignore_cleanup_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _graphs.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the hardware cannot run, with the reason."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


_gpu_failed_in: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A kernel's illegal access makes every later call of the process fail, and says nothing of the tests after it."""
    report = yield
    if report.failed and item.get_closest_marker("gpu") and _gpu_is_lost():
        if "PYTEST_XDIST_WORKER" in os.environ:  # the process in this one's place begins anew
            print(item.nodeid, report.longreprtext, sep="\n", file=sys.__stderr__, flush=True)
            os._exit(1)
        _gpu_failed_in.append(item.nodeid)
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _gpu_failed_in and item.get_closest_marker("gpu"):
        pytest.skip(f"the GPU has failed in {_gpu_failed_in[0]}: later tests need a process of their own")


def _gpu_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.fixture(autouse=True)
def _errors_of_the_gpu_belong_to_their_test(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.node.get_closest_marker("gpu"):
        torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def gpu_alone() -> Iterator[None]:
    """GiBs of the GPU's memory are for one test at a time, whichever process that runs in."""
    import fcntl

    with Path(tempfile.gettempdir(), "tiedfused-whole-gpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """No plan made before the test, or by it, is seen outside it."""

    def clear() -> None:
        functional._plans.clear()
        planning.make_plan.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture(params=["onednn", "blas"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fresh_plans: None) -> str:
    """CPU tiles of 16 × 16 (fp32), so that small problems have many, of both product libraries; returns the library.

    The native ops, which would serve inference with few rows, stay out of it.
    """
    monkeypatch.setattr(native, "why_not", lambda r: "the test is of tiles")
    if request.param == "onednn":
        if (why := devices.onednn_missing()) is not None:
            pytest.skip(why)
        monkeypatch.setattr(tiled, "ONEDNN_MIN_WORK", 0)
    else:
        monkeypatch.setattr(tiled, "ONEDNN_MIN_WORK", 1 << 62)
    monkeypatch.setattr(tiled, "CPU_TILE_H", 16)
    monkeypatch.setattr(tiled, "CPU_TILE_BYTES", 16 * 16 * 4)
    return request.param


@pytest.fixture
def custom_activation() -> Iterator[str]:
    """The name of an activation that a user registered: PyTorch functions only."""
    activations.register_activation("sine", torch.sin, torch.cos)
    yield "sine"
    del activations._TABLE["sine"]
