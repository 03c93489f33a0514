"""DDP, FSDP2 and weights that are DTensors give the gradients of one process on the whole batch."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tiedfused import LatentStats, TiedLinear, losses

WORLD = 2


class _Penalised(TiedLinear):
    """With its statistics, which DDP and FSDP then see among the outputs."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, LatentStats]:  # type: ignore[override]
        return super().forward(x, return_stats=True)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), _Penalised(12, 32, bias=True, activation="relu"))


def _gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y, stats = model(x)
    (y.square().mean() + 0.1 * losses.l1(stats) + stats.mean.sum()).backward()
    return [p.grad for p in model.parameters()]


def _run(rank: int, store: str, kind: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    model = _model()
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    expected = _gradients(copy.deepcopy(model), x)
    share = x.chunk(WORLD)[rank]
    if kind == "ddp":
        found = _gradients(nn.parallel.DistributedDataParallel(model), share)
    elif kind == "dtensor":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

        def shard(_: str, layer: nn.Module, mesh: Any) -> None:
            for name, p in list(layer.named_parameters(recurse=False)):
                layer.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))

        mesh = init_device_mesh("cpu", (WORLD,))
        distribute_module(model, mesh, shard)
        found = [grad.full_tensor() for grad in _gradients(model, distribute_tensor(x, mesh))]
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (WORLD,))
        fully_shard(model[1], mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = [grad.full_tensor() for grad in _gradients(model, share)]
    torch.testing.assert_close(found, expected)
    dist.barrier()
    # one exit in ten aborts in gloo's tear-down of the mesh ("terminate called without an active exception")
    os._exit(0)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "dtensor"])
def test_gradients(kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, args=(os.path.join(folder, "store"), kind), nprocs=WORLD)
