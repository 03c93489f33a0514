"""The chunked regime (`tiedfused.regimes.chunked`): three matrix-product kernels, launched for chunk after chunk of the
latent. A chunk's buffers are used again for the next, so that they stay in the L2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiedfused._backends.triton.chunk_decode import chunk_decode
from tiedfused._backends.triton.chunk_latent import chunk_latent
from tiedfused._backends.triton.chunk_weight_grad import chunk_weight_grad
from tiedfused._backends.triton.combine import combine
from tiedfused._backends.triton.grid import cdiv
from tiedfused._backends.triton.launch import Repeats
from tiedfused._backends.triton.stats import add_partial_stats, partial_stats
from tiedfused.activations import IDENTITY, Activation
from tiedfused.planning import Plan
from tiedfused.reference import LatentStats, zero_stats
from tiedfused.regimes.common import Part, Pass


class _Sum:
    """A result [rows, columns] to which chunks add up in fp32.

    The sums are the result itself where one chunk completes it, or where it is fp32 and no launch is split; a split
    launch keeps a sum for each of its parts, which `finish` combines.
    """

    def __init__(self, out: Tensor, steps: int, split: int) -> None:
        self.out, self.split = out, split
        own = split > 1 or (steps > 1 and out.dtype != torch.float32)
        shape = (split, *out.shape) if split > 1 else out.shape
        self.sums = torch.empty(shape, dtype=torch.float32, device=out.device) if own else out

    def step(self, rows: slice, first: bool, last: bool) -> dict[str, Any]:
        """What a launch that adds to `rows` reads and writes."""
        sums = self.sums[..., rows, :]
        completes = last and self.split == 1
        return {"earlier": None if first else sums, "out": self.out[rows] if completes else sums, "split": self.split}

    def finish(self, repeats: Repeats | None, bias: Tensor | None = None, activation: Activation = IDENTITY) -> None:
        """Combine the parts, if there are parts."""
        if self.split > 1:
            combine(self.sums, self.out, bias, activation=activation, repeats=repeats)


def _slices(size: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]


def _repeats(part: Part, n: int, h: int) -> Repeats | None:
    """For the launches of one call; None where one chunk is all there is."""
    assert part.chunk is not None
    return {} if n > part.chunk[0] or h > part.chunk[1] else None


def options(one: Pass, plan: Plan) -> dict[str, Any]:
    """What every launch of a pass takes."""
    return {"tile": one.tile, "precision": plan.precision}


def forward(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    bias_dec: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor | None, LatentStats | None]:
    """y ``[N, d]``, h ``[N, H]`` if the plan keeps it, and its statistics."""
    part, (N, D), H = plan.forward, x.shape, weight.shape[0]
    assert part.chunk is not None
    encode, decode = part.passes
    y = torch.empty((N, D), dtype=x.dtype, device=x.device)
    kept = torch.empty((N, H), dtype=x.dtype, device=x.device) if plan.save_latent else None
    buffer = torch.empty(part.chunk if kept is None else (0, 0), dtype=x.dtype, device=x.device)
    stats = zero_stats(x, weight) if plan.stats else None
    all_latents = _slices(H, part.chunk[1])
    repeats = _repeats(part, N, H)
    for rows in _slices(N, part.chunk[0]):
        size = rows.stop - rows.start
        x_rows = x[rows]
        sum_y = _Sum(y[rows], len(all_latents), decode.split)
        for latents in all_latents:
            width = latents.stop - latents.start
            h = buffer[:size, :width] if kept is None else kept[rows, latents]
            w = weight[latents]
            bias = None if bias_enc is None else bias_enc[latents]
            parts = _partial_stats(size, width, encode.tile, x.device) if stats is not None else None
            chunk_latent(
                x_rows,
                None,
                w,
                bias,
                h=h,
                stats=parts,
                activation=plan.activation,
                repeats=repeats,
                **options(encode, plan),
            )
            if stats is not None and parts is not None:
                add_partial_stats(parts, stats, rows, latents, repeats)
            completes = latents.stop == H and decode.split == 1
            chunk_decode(
                h,
                w,
                bias_dec if completes else None,
                output_activation=plan.output_activation if completes else IDENTITY,
                repeats=repeats,
                **sum_y.step(slice(0, size), latents.start == 0, latents.stop == H),
                **options(decode, plan),
            )
        sum_y.finish(repeats, bias_dec, plan.output_activation)
    return y, kept, stats


def _partial_stats(n: int, h: int, tile: Any, device: torch.device) -> LatentStats:
    """What `chunk_latent` writes for a chunk: a sum of each row for every block of latents, and the other way round."""
    return partial_stats(n, h, cdiv(h, tile.block_n), cdiv(n, tile.block_m), device)


def backward(
    grad_z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    latent: Tensor | None,
    plan: Plan,
    needs: tuple[bool, bool, bool],
    grad_l1: Tensor | None,
    grad_total: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """x̄ ``[N, d]``, W̄ ``[H, d]``, b̄_enc ``[H]`` (fp32), None where `needs` does not ask."""
    part = plan.backward
    assert part is not None and part.chunk is not None
    repeats = _repeats(part, x.shape[0], weight.shape[0])
    together = [one.kernel for one in part.passes].count("chunk_latent") == 1
    if together or not needs[0]:
        return _sweep(grad_z, x, weight, bias_enc, grad_l1, grad_total, latent, plan, needs, repeats)

    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows in _slices(x.shape[0], part.chunk[0]):
        kept_rows, grad_l1_rows = (None if t is None else t[rows] for t in (latent, grad_l1))
        operands = (grad_z[rows], x[rows], weight, bias_enc, grad_l1_rows, grad_total)
        _sweep(*operands, kept_rows, plan, (True, False, False), repeats, grad_x[rows])
    operands = (grad_z, x, weight, bias_enc, grad_l1, grad_total)
    _, grad_weight, grad_bias = _sweep(*operands, latent, plan, (False, *needs[1:]), repeats)
    return grad_x, grad_weight, grad_bias


def _sweep(
    grad_z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    grad_l1: Tensor | None,
    grad_total: Tensor | None,
    kept: Tensor | None,
    plan: Plan,
    needs: tuple[bool, bool, bool],
    repeats: Repeats | None,
    grad_x: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """All chunks once; latents are the outer loop, so that W̄'s rows are complete one chunk after another."""
    need_x, need_weight, need_bias = needs
    if not any(needs):
        return None, None, None
    part, (N, D), H = plan.backward, x.shape, weight.shape[0]
    assert part is not None and part.chunk is not None
    passes = {one.kernel: one for one in part.passes}
    latent_pass, weight_pass, decode_pass = (
        passes.get(kernel) for kernel in ("chunk_latent", "chunk_weight_grad", "chunk_decode")
    )
    assert latent_pass is not None
    block_rows = latent_pass.tile.block_m  # type: ignore[union-attr]
    like_x: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    all_rows, all_latents = _slices(N, part.chunk[0]), _slices(H, part.chunk[1])
    blocks = [cdiv(rows.stop - rows.start, block_rows) for rows in all_rows]  # a sum of b̄_enc's each

    grad_a_buffer = torch.empty(part.chunk, **like_x)
    h_buffer = torch.empty(part.chunk, **like_x) if need_weight and kept is None else None
    if need_x and grad_x is None:
        grad_x = torch.empty((N, D), **like_x)
    grad_weight = torch.empty((H, D), **like_x) if need_weight else None
    grad_bias = torch.empty(H, dtype=torch.float32, device=x.device) if need_bias else None
    sum_x = _Sum(grad_x, len(all_latents), decode_pass.split) if need_x and grad_x is not None and decode_pass else None
    for latents in all_latents:
        width = latents.stop - latents.start
        w = weight[latents]
        bias = None if bias_enc is None else bias_enc[latents]
        sum_weight = None
        if grad_weight is not None and weight_pass is not None:
            sum_weight = _Sum(grad_weight[latents], len(all_rows), weight_pass.split)
        sum_bias = None
        if need_bias:
            sum_bias = torch.empty((sum(blocks), width), dtype=torch.float32, device=x.device)
        for i, rows in enumerate(all_rows):
            size = rows.stop - rows.start
            x_rows, grad_rows, grad_a = x[rows], grad_z[rows], grad_a_buffer[:size, :width]
            h = None
            if kept is not None:
                h = kept[rows, latents]
            elif h_buffer is not None:
                h = h_buffer[:size, :width]
            chunk_latent(
                x_rows,
                grad_rows,
                w,
                bias,
                None if grad_l1 is None else grad_l1[rows],
                None if grad_total is None else grad_total[latents],
                h=h,
                kept=kept is not None,
                grad_a=grad_a,
                grad_bias_enc=None if sum_bias is None else sum_bias[i * blocks[0] : (i + 1) * blocks[0]],
                activation=plan.activation,
                repeats=repeats,
                **options(latent_pass, plan),
            )
            if sum_weight is not None and weight_pass is not None and h is not None:
                step = sum_weight.step(slice(0, width), rows.start == 0, rows.stop == N)
                chunk_weight_grad(grad_a, h, x_rows, grad_rows, repeats=repeats, **step, **options(weight_pass, plan))
            if sum_x is not None and decode_pass is not None:
                step = sum_x.step(rows, latents.start == 0, latents.stop == H)
                chunk_decode(grad_a, w, None, repeats=repeats, **step, **options(decode_pass, plan))
        if sum_weight is not None:
            sum_weight.finish(repeats)
        if sum_bias is not None and grad_bias is not None:
            combine(sum_bias, grad_bias[latents], None, activation=IDENTITY, repeats=repeats)
    if sum_x is not None:
        sum_x.finish(repeats)
    return grad_x, grad_weight, grad_bias
