"""What the device is, and how a call on it is timed."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tiedfused.benchmark import device
from tiedfused.benchmark.device import Timing, interleaved, milliseconds
from tiedfused.benchmark.peers import Call

CPU = torch.device("cpu")


@pytest.mark.parametrize("text", ["abacus", "cuda:99", "mps", "meta"])
def test_unknown_device(text: str) -> None:
    with pytest.raises(ValueError, match=f"device: .*{text}.* expected cpu") as caught:
        device.resolve(text)
    assert "\n" not in str(caught.value)


def test_description() -> None:
    found = device.describe(device.resolve("cpu"))
    assert found["threads"] == torch.get_num_threads()
    assert str(found["threads"]) in found["name"]
    assert {"tiedfused", "torch", "python"} <= set(device.versions())


@pytest.mark.usefixtures("small_machine")
def test_preparation_is_not_timed() -> None:
    slow = Call(lambda: time.sleep(0.002), prepare=lambda: time.sleep(0.05))
    assert 2 <= milliseconds(slow, CPU) < 50
    assert 2 <= milliseconds(slow, CPU, warm=True) < 50


@pytest.mark.usefixtures("small_machine")
def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: Call(lambda name=name: order.append(name)) for name in "ab"}
    assert set(interleaved(calls, CPU, 3)) == {"a", "b"}
    assert order == list("ababab")


def test_caches_are_flushed_by_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, read, total = torch.zeros(16), [], torch.Tensor.sum
    monkeypatch.setattr(device, "_flush_buffer", lambda _: buffer)
    monkeypatch.setattr(torch.Tensor, "sum", lambda t: read.append(t) or total(t))
    device.flush(CPU)
    assert [t is buffer for t in read] == [True]
    assert buffer._version == 0


def test_percentiles() -> None:
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0]) == Timing(3.5, 2.0, 5.0)


@pytest.mark.usefixtures("small_machine")
def test_rates() -> None:
    made = device.ceilings(CPU, torch.float32)
    rates = made.rates({"gemm": Timing(2, 2, 2), "copy": Timing(1, 1, 1), "read": Timing(0.25, 0.25, 0.25)})
    read = (1 << 16) / 0.25e-3
    assert rates == {"gemm": 2 * 64**3 / 2e-3, "read": read, "memory": read}


@pytest.mark.usefixtures("small_machine")
def test_float16_product_on_a_cpu_is_one_that_ends() -> None:
    assert device.ceilings(CPU, torch.float16).amounts["gemm"] == 2 * 16**3


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA error: an illegal memory access was encountered")])
def test_a_gpu_that_has_failed(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(_: torch.device) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert device.has_failed(torch.device("cuda", 0)) == (error is not None)
    assert not device.has_failed(CPU)


def test_clocks_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\necho "1980, 2619, 300.5, 41"\necho "[N/A], 1"\necho "1700, 2619, 690.0, 60"\nsleep 20\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2"))
    with device.Clocks(torch.device("cuda", 0)) as clocks:
        seen: dict[str, list[float]] = {}
        for _ in range(100):
            seen = seen or clocks.seen()
            time.sleep(0.02)
        smi = clocks._smi
    assert seen["sm_mhz"] == [1700, 1840, 1980]
    assert seen["power_w"] == [300.5, 495.25, 690]
    assert smi is not None
    assert smi.returncode is not None, "it ends with the measurement"


def test_clocks_where_there_is_no_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2"))
    with device.Clocks(torch.device("cuda", 0)) as clocks:
        assert clocks.seen() == {}


@pytest.mark.parametrize("warm", [True, False])
def test_a_gpu_is_busy_while_the_host_launches(warm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what is timed of a small problem is Python."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("synchronize")

        def elapsed_time(self, stop: Event) -> float:
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("busy"))
    monkeypatch.setattr(device, "flush", lambda _: done.append("flush"))
    assert milliseconds(Call(lambda: done.append("call")), torch.device("cuda", 0), warm=warm) == 1.5
    assert done == ["call" if warm else "flush", "busy", "record", "call", "record", "synchronize"]
