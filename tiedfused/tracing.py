"""What is decided while a graph is traced. Only a call that is traced, or seen by a mode, imports this module: its
decorator imports torch._dynamo, which takes several times as long as everything else in the package.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value, statically_known_true

from tiedfused import planning, settings
from tiedfused.activations import IDENTITY, Activation, get_activation
from tiedfused.regimes import tiled


def keeps_latent_for(x: Tensor, weight: Tensor, f: Activation, recompute: bool | None, stats: bool) -> bool:
    """Whether a training step on x ``[N, d]`` keeps the latent.

    While a graph is traced, sizes may be symbolic. Then a rule of thumb that holds for all devices stands for the plan:
    what is not known of the sizes for certain counts as too large, since to ask would bind the graph to the answer.
    """
    (n, d), h = x.shape, weight.shape[0]
    in_force = settings.current()
    asked = in_force.recompute if recompute is None else recompute
    if asked is not None:
        return not asked
    if not all(has_static_value(size) for size in (n, d, h)):
        return tiled.keeps_latent(n, h, d, x.dtype, in_force.workspace_bytes, statically_known_true)
    problem = (int(n), int(d), int(h), x.dtype, x.device, f.name, x.requires_grad, stats)
    others = (in_force.regime, in_force.workspace_bytes, in_force.atomics, in_force.config_dir)
    return _plan_keeps_latent(*problem, *others)


@torch.compiler.assume_constant_result
def _plan_keeps_latent(
    n: int,
    d: int,
    h: int,
    dtype: torch.dtype,
    device: torch.device,
    activation: str,
    grad_x: bool,
    stats: bool,
    *_: str | int,
) -> bool:
    """The plan's choice, which a traced graph takes as a constant. The settings that it also depends on are arguments
    so that the graph is guarded by them: others trace it anew.
    """
    f = get_activation(activation)
    request = planning.request(n, d, h, dtype, device, f, IDENTITY, True, grad_x, None, stats)
    return planning.make_plan(request).save_latent
