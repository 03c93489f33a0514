"""`tiedfused profile`: what is counted, what is concluded, and the whole command on a CPU."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from typer.testing import CliRunner

from tiedfused import plan, settings
from tiedfused.benchmark import profile as profiler
from tiedfused.benchmark.profile import Kernel, Launch, bound, columns_and_rows, kernels, ncu_command, operator_cost
from tiedfused.cli import app

RUN = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1"})
RATES = {"gemm": 600e12, "memory": 3e12}
H100 = SimpleNamespace(
    regs_per_multiprocessor=65536,
    shared_memory_per_multiprocessor=233472,
    max_threads_per_multi_processor=2048,
    multi_processor_count=132,
)


@pytest.mark.parametrize(
    ("name", "shapes", "cost"),
    [
        ("aten::mm", [[4, 8], [8, 2]], (128, 4 * (32 + 16 + 8))),
        ("aten::addmm", [[2], [4, 8], [8, 2], [], []], (128, 4 * (32 + 16 + 8))),
        ("aten::addmm_", [[4, 2], [4, 8], [8, 2], [], []], (128, 4 * (32 + 16 + 16))),
        ("mkldnn::_linear_pointwise", [[4, 8], [2, 8], [2], [], [], []], (128, 4 * (32 + 16 + 8))),
        ("aten::copy_", [[4, 8], [4, 8], []], (None, 4 * 64)),
        ("aten::add_", [[4, 8], [4, 8], []], (None, 4 * 96)),
        ("aten::sum", [[4, 8], [], []], (None, 4 * 32)),
        ("aten::t", [[4, 8]], (None, None)),
        ("someone::elses", [], (None, None)),
    ],
)
def test_cost_of_an_operator(name: str, shapes: list[list[int]], cost: tuple[int | None, int | None]) -> None:
    assert operator_cost(name, shapes, 4) == cost


@pytest.mark.parametrize(
    ("registers", "shared", "resident"),
    [(255, 0, 1), (168, 66 * 1024, 1), (128, 66 * 1024, 2), (64, 20 * 1024, 4), (32, 100 * 1024, 2), (16, 0, 8)],
)
def test_blocks_that_a_multiprocessor_holds(registers: int, shared: int, resident: int) -> None:
    launch = Launch(blocks=264, threads=256, registers=registers, shared_bytes=shared, spills=0)
    assert launch.resident(H100) == resident
    assert launch.occupancy(H100) == resident * 256 / 2048
    assert launch.waves(H100) == 264 / (132 * resident)


def event(name: str, us: float, device_type: Any = DeviceType.CUDA, **more: Any) -> SimpleNamespace:
    span = SimpleNamespace(elapsed_us=lambda: us)
    defaults = {"kernels": [], "input_shapes": [], "self_cpu_time_total": us}
    return SimpleNamespace(name=name, time_range=span, device_type=device_type, **{**defaults, **more})


def test_kernels_of_a_gpu() -> None:
    used = plan(1024, 64, 2048, dtype=torch.bfloat16, device="cuda", grad=False)
    launches = {"forward_kernel": Launch(64, 256, 128, 66 * 1024, 0)}
    longest = SimpleNamespace(name="gemm_kernel", duration=30.0)
    once = [
        event("forward_kernel", 100.0),
        event("gemm_kernel", 30.0),
        event("splitk_reduce", 5.0),
        event("tiedfused", 150.0),  # the range around the call, mirrored on the GPU's time line
        event("aten::mm", 9.0, DeviceType.CPU, kernels=[longest, SimpleNamespace(name="splitk_reduce", duration=5.0)],
              input_shapes=[[4, 8], [8, 2]]),
    ]  # fmt: skip
    found = kernels(once * 2, "cuda", 2, used, launches, steps=2)
    assert [(k.name, k.count, k.ms) for k in found] == [
        ("forward_kernel", 1, 0.1),
        ("gemm_kernel", 1, 0.03),
        ("splitk_reduce", 1, 0.005),
    ]
    assert (found[0].flops, found[0].bytes) == (used.passes[0].flops, used.passes[0].bytes_moved)
    assert (found[1].flops, found[1].bytes) == (128, 2 * (32 + 16 + 8))
    assert (found[2].flops, found[2].bytes) == (None, None)
    columns, rows = columns_and_rows(found, RATES, H100)
    first = dict(zip(columns, rows[0], strict=True))
    assert first["registers"] == "128"
    assert first["shared KiB"] == "66"
    assert (first["occupancy"], first["waves"], first["last wave"]) == ("25%", "0.24", "24% full")
    assert rows[1][-6:] == ["—"] * 6


def test_a_function_that_serves_several_passes_has_their_work() -> None:
    with settings.override(regime="chunked", recompute=True):
        used = plan(8192, 512, 16384, dtype=torch.bfloat16, device="cuda", capability=90)
    names = ("chunk_latent_kernel", "chunk_decode_kernel", "chunk_weight_grad_kernel")
    launches = {name: Launch(64, 256, 128, 66 * 1024, 0) for name in names}
    events = [event(name, 100.0) for name in names for _ in range(4)]
    found = {k.name: k for k in kernels(events, "cuda", 2, used, launches, steps=2)}
    product = 2 * 8192 * 512 * 16384
    assert [found[name].flops for name in names] == [3 * product, 2 * product, 2 * product]
    assert sum(k.bytes or 0 for k in found.values()) == used.bytes_moved


def test_many_kernels_are_added_up() -> None:
    found = [Kernel(f"k{i}", 1, 1.0) for i in range(20)]
    _, rows = columns_and_rows(found, RATES)
    assert len(rows) == 13
    assert rows[-1][:4] == ["8 others", "8", "8", "40.0"]


@pytest.mark.parametrize(
    ("kernel", "wall_ms", "says"),
    [
        (
            Kernel("k", 1, 1.0, int(400e9), int(0.1e9)),
            1.05,
            "Bound by arithmetic: k, 100% of the kernels' time, reaches 67%",
        ),
        (Kernel("k", 1, 1.0, int(40e9), int(2.4e9)), 1.05, "Bound by memory: k, 100% of the kernels' time, reaches 7%"),
        (Kernel("k", 1, 1.0, int(400e9), None), 2.0, "Bound by the host: kernels fill 50% of the 2 ms"),
        (
            Kernel("k", 1, 1.0, int(60e9), None, Launch(999, 256, 255, 0, 40)),
            1.0,
            "look at 40 spilled registers a thread",
        ),
        (
            Kernel("k", 1, 1.0, int(60e9), None, Launch(66, 256, 255, 0, 0)),
            1.0,
            "look at a grid that fills 50% of the GPU",
        ),
        (Kernel("k", 1, 1.0, int(60e9), None, Launch(999, 256, 255, 0, 0)), 1.0, "look at latency"),
        (Kernel("k", 1, 1.0), 1.0, "Bound by what is not counted here: k, 100%"),
    ],
)
def test_sentence(kernel: Kernel, wall_ms: float, says: str) -> None:
    sentence = bound(kernel, kernel.ms, wall_ms, RATES, H100)
    assert says in sentence
    assert sentence.endswith(".")


def test_the_host_s_time_counts_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer hides it, so it is measured beside."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    assert 2 <= profiler._host_ms(lambda: time.sleep(0.002), torch.device("cuda", 0)) < 50
    assert profiler._host_ms(lambda: time.sleep(0.002), torch.device("cpu")) == 0


@pytest.mark.usefixtures("small_machine")
def test_a_profiler_that_sees_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "kernels", lambda *_: [])
    result = RUN.invoke(app, ["profile", "8", "16", "32", "--device", "cpu", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "the profiler saw no kernel" in result.output


def test_nsight_command() -> None:
    command = ncu_command("forward_kernel", ["8", "16", "32", "--device", "cuda:0"], Path("a folder"))
    assert command == (
        "ncu --set full --nvtx --nvtx-include tiedfused/ --kernel-name forward_kernel --launch-count 1 "
        "--force-overwrite --export 'a folder/forward-kernel.ncu-rep' tiedfused profile 8 16 32 "
        "--device cuda:0 --only-run"
    )


@pytest.mark.usefixtures("small_machine")
def test_on_a_cpu(tmp_path: Path) -> None:
    result = RUN.invoke(app, ["profile", "96", "16", "128", "--device", "cpu", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for text in ("aten::mm", "% GEMM", "roofline: ", "Bound by", "trace: "):
        assert text in result.stdout
    (trace,) = tmp_path.glob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(one.get("name") == "tiedfused" and one.get("cat") == "user_annotation" for one in events) == 5
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_only_run(tmp_path: Path) -> None:
    result = RUN.invoke(app, ["profile", "8", "16", "32", "--device", "cpu", "--only-run", "--out", str(tmp_path)])
    assert (result.exit_code, result.stdout, list(tmp_path.iterdir())) == (0, "", [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0", "8", "8"], "Invalid value for 'N'"),
        (["8", "8", "8", "--device", "abacus"], "device: got 'abacus'; expected cpu"),
        (["8", "8", "8", "--pass", "sideways"], "sideways"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    result = RUN.invoke(app, ["profile", *arguments])
    assert result.exit_code == 2
    assert message in result.output
