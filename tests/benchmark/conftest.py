"""What the tests of the measuring side share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiedfused.benchmark import bench, device, report


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own rates take no time to measure."""
    monkeypatch.setitem(device.GEMM_SIZE, "cpu", 64)
    monkeypatch.setitem(device.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setattr(device, "_flush_buffer", lambda _: torch.zeros(16))
    monkeypatch.setattr(bench, "SPREAD", float("inf"))  # so short, times say nothing
    monkeypatch.setattr(bench, "STEADY", 0.0)


def cell(shape: tuple[int, int, int], which: str = "fwd", dtype: str = "float32", **ms: float) -> dict[str, Any]:
    """A measured cell whose percentiles are 1% around the medians."""
    spread = {peer.replace("_", " "): [t, 0.99 * t, 1.01 * t] for peer, t in ms.items()}
    return {
        "shape": list(shape), "dtype": dtype, "pass": which, "ms": spread, "error": {}, "skipped": {},
        "bytes": {"eager": 8 << 20, "tiedfused": 1 << 20}, "rounds": 3, "clocks": {"mhz": [1, 2, 3]},
        "warm_ms": spread if shape[0] <= 64 else {},
        "rates": {"gemm": 4e11, "memory": 2e10}, "plan": {"regime": "tiled", "backend": "tiled", "keeps_latent": False},
    }  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    """A results file as `bench` writes it."""
    widths = [
        (d, which, dtype) for dtype in ("float32", "bfloat16") for d in (64, 128, 256) for which in ("fwd", "step")
    ]
    cells = [
        cell((4096, d, 8192), which, dtype, eager=0.4 * d, compile=0.3 * d, checkpoint=0.5 * d, tiedfused=0.2 * d)
        for d, which, dtype in widths
    ]
    cells.append(cell((4, 64, 8192), eager=2.0, tiedfused=2.5))
    return {
        "schema": report.SCHEMA,
        "command": "tiedfused bench",
        "commit": "0123456",
        "date": "2026-01-02",
        "part": "1/1",
        "device": {"name": "A CPU, 2 threads", "type": "cpu", "cpu": "A CPU", "threads": 2},
        "versions": {"tiedfused": "0.1.0", "torch": "2.13.0"},
        "gemm": {"float32": "oneDNN", "bfloat16": "torch.mm"},
        "problems": ["peers: got 'nope'"],
        "cells": cells,
        "memory": [
            {"shape": [64, 8, h], "dtype": "float32", "bytes": {"eager": 999 * h, "tiedfused": 1 << 20}}
            for h in (1024, 2048)
        ],
    }
