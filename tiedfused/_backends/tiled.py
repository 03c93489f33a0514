"""The layer as tiles of plain PyTorch: every device, every dtype, every size.

A tile of the latent, [block_n, block_h], is computed, used for everything it is needed for while it is still in
cache, and dropped. Sums over tiles are kept in fp32 for bf16 and fp16, and run in a fixed order, so results are
bitwise reproducible for a given number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiedfused.activations import IDENTITY, Activation
from tiedfused.planning import Plan
from tiedfused.reference import LatentStats, stats_dtype, zero_stats
from tiedfused.regimes.common import TorchTile


def _blas_linear(a: Tensor, b: Tensor, bias: Tensor | None, f: Activation) -> Tensor:
    return f.forward(F.linear(a, b, bias))


def _blas_outer(a: Tensor, b: Tensor) -> Tensor:
    return a.t() @ b


def _blas_linear_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, f: Activation) -> None:
    if bias is None:
        torch.mm(a, b.t(), out=out)
    else:
        torch.addmm(bias, a, b.t(), out=out)
    if f is not IDENTITY:
        out.copy_((f.in_place or f.forward)(out))


def _blas_add_outer(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return total.addmm_(a.t(), b)


def _onednn_linear(a: Tensor, b: Tensor, bias: Tensor | None, f: Activation) -> Tensor:
    linear = torch.ops.mkldnn._linear_pointwise.default
    # of a second operand with gaps between its rows, as a part of a wider matrix has, oneDNN takes a reference path:
    # 5000 instead of 2.8 ms for the transpose of [512, 1024] of a latent [512, 6144], times [512, 768]
    b = b.contiguous() if b.stride(1) == 1 else b.t().contiguous().t()
    if f.onednn is None:
        return (f.in_place or f.forward)(linear(a, b, bias, "none", [], ""))
    name, scalars, algorithm = f.onednn
    return linear(a, b, bias, name, list(scalars), algorithm)


def _onednn_outer(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.bfloat16:  # PyTorch's own product is oneDNN's here, and takes transposes as they are
        return a.t() @ b
    # only the second operand may be a transposed view; copying the first is 5 to 20% faster than leaving that to oneDNN
    if a.shape[1] <= b.shape[1]:
        return _onednn_linear(a.t().contiguous(), b.t(), None, IDENTITY)
    return _onednn_linear(b.t().contiguous(), a.t(), None, IDENTITY).t()


def _onednn_linear_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, f: Activation) -> None:
    if a.dtype == torch.bfloat16:
        _blas_linear_into(out, a, b, bias, f)
    else:
        out.copy_(_onednn_linear(a, b, bias, f))


def _onednn_add_outer(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.bfloat16:
        return _blas_add_outer(total, a, b)
    return total.add_(_onednn_outer(a, b))


class _Products(NamedTuple):
    """The products of the layer, by one library.

    Args:
        linear: ``(a [M, K], b [N, K], bias [N] | None, f) -> f(a bᵀ + bias) [M, N]``.
        linear_into: ``(out [M, N], a, b, bias, f)``, the same into `out`.
        outer: ``(a [K, M], b [K, N]) -> aᵀ b [M, N]``.
        add_outer: ``(total [M, N], a [K, M], b [K, N]) -> total + aᵀ b``, in place.
    """

    linear: Callable[[Tensor, Tensor, Tensor | None, Activation], Tensor]
    linear_into: Callable[[Tensor, Tensor, Tensor, Tensor | None, Activation], None]
    outer: Callable[[Tensor, Tensor], Tensor]
    add_outer: Callable[[Tensor, Tensor, Tensor], Tensor]


_PRODUCTS = {
    "blas": _Products(_blas_linear, _blas_linear_into, _blas_outer, _blas_add_outer),
    "onednn": _Products(_onednn_linear, _onednn_linear_into, _onednn_outer, _onednn_add_outer),
}


def _encode(
    products: _Products, x: Tensor, weight: Tensor, bias: Tensor | None, f: Activation
) -> tuple[Tensor, Tensor]:
    """The latent h, and what f's gradient reads: h itself or the pre-activation."""
    if f.from_output:
        h = products.linear(x, weight, bias, f)
        return h, h
    a = products.linear(x, weight, bias, IDENTITY)
    return f.forward(a), a


def _rows(t: Tensor, size: int) -> Sequence[Tensor]:
    return t.split(size) if t.shape[0] > size else (t,)


def _tile_of(latent: Tensor | None, tile: TorchTile, i: int, j: int) -> Tensor | None:
    """Tile (i, j) of the kept latent ``[N, H]``, if there is one."""
    if latent is None:
        return None
    return latent[i * tile.block_n : (i + 1) * tile.block_n, j * tile.block_h : (j + 1) * tile.block_h]


@functools.cache
def _keep_freed_tiles() -> None:
    """Let the C library keep the memory of freed tiles for the next ones.

    glibc hands freed blocks above a threshold back to the system, whose pages then fault in again with the next tile:
    56 instead of 25 ms for a forward of (8192, 64, 4096) in fp32. Freeing one larger block, which nothing ever
    touches, raises that threshold for good.
    """
    torch.empty(16 << 20, dtype=torch.uint8)


def _sum_for(out: Tensor) -> Tensor:
    """Where to add up the tiles of `out`: `out` itself, or a buffer if its dtype is too narrow."""
    wide = stats_dtype(out.dtype)
    return out if wide == out.dtype else torch.empty(out.shape, dtype=wide, device=out.device)


def _add(total: Tensor, part: Tensor, first: bool) -> None:
    if first:
        total.copy_(part)
    else:
        total.add_(part)


def _stats(h: Tensor) -> LatentStats:
    """The statistics of one tile, its sums in the place of means."""
    h = h.to(stats_dtype(h.dtype))
    # as floating-point numbers, exact up to 2²⁴: comparing to a tile of booleans takes 5 times as long
    active = torch.ne(h, 0, out=torch.empty_like(h))
    l0, fired = active.sum(1).long(), active.sum(0).long()
    return LatentStats(torch.abs(h, out=active).sum(1), l0, h.sum(0), fired)


def forward(
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    bias_dec: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor | None, LatentStats | None]:
    """y ``[N, d]``, the latent ``[N, H]`` if the plan keeps it, and its statistics if the plan has them."""
    f, g, n, h = plan.activation, plan.output_activation, plan.n, plan.h
    tile: TorchTile = plan.forward.passes[0].tile  # type: ignore[assignment]
    products = _PRODUCTS[tile.products]
    if n <= tile.block_n and h <= tile.block_h:
        latent, saved = _encode(products, x, weight, bias_enc, f)
        stats = _stats(latent) if plan.stats else None
        kept = saved.contiguous() if plan.save_latent else None
        return products.linear(latent, weight.t(), bias_dec, g), kept, stats

    _keep_freed_tiles()
    kept = x.new_empty(n, h) if plan.save_latent else None
    weights = _rows(weight, tile.block_h)
    biases = _rows(bias_enc, tile.block_h) if bias_enc is not None else [None] * len(weights)
    y = x.new_empty(n, plan.d)
    stats = zero_stats(x, weight) if plan.stats else None
    for i, (x_i, y_i) in enumerate(zip(_rows(x, tile.block_n), _rows(y, tile.block_n), strict=True)):
        sum_y = None if len(weights) == 1 else _sum_for(y_i)
        for j, (w_j, b_j) in enumerate(zip(weights, biases, strict=True)):
            tile_stats = _tile_stats(stats, tile, i, j) if stats is not None else None
            latent = _latent_tile(products, f, x_i, w_j, b_j, _tile_of(kept, tile, i, j), tile_stats)
            if sum_y is None:
                products.linear_into(y_i, latent, w_j.t(), bias_dec, g)
            else:
                _add(sum_y, products.linear(latent, w_j.t(), bias_dec if j == 0 else None, IDENTITY), j == 0)
            del latent  # before the next tile is made
        if sum_y is not None:
            y_i.copy_(g.forward(sum_y))
    return y, kept, stats


def _tile_stats(stats: LatentStats, tile: TorchTile, i: int, j: int) -> LatentStats:
    """The statistics' parts that tile (i, j) adds to."""
    rows = slice(i * tile.block_n, (i + 1) * tile.block_n)
    latents = slice(j * tile.block_h, (j + 1) * tile.block_h)
    return LatentStats(stats.l1[rows], stats.l0[rows], stats.mean[latents], stats.fired[latents])


def _latent_tile(
    products: _Products,
    f: Activation,
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    block: Tensor | None,
    stats: LatentStats | None,
) -> Tensor:
    """One tile of h, kept in `block` and counted in `stats`."""
    h, saved = _encode(products, x, weight, bias_enc, f)
    if block is not None:
        block.copy_(saved)
    if stats is not None:
        for total, part in zip(stats, _stats(h), strict=True):
            total.add_(part)
    return h


def backward(
    grad_z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    latent: Tensor | None,
    plan: Plan,
    needs: tuple[bool, bool, bool],
    grad_l1: Tensor | None = None,
    grad_total: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """x̄ ``[N, d]``, W̄ ``[H, d]``, b̄_enc ``[H]`` in x's dtype, each None unless `needs` asks for it.

    Tiles of H are the outer loop: W̄'s rows are complete, from both of its terms, before the next tile starts. The
    tile of h is read from `latent` where the forward kept it and recomputed where it did not.
    """
    f = plan.activation
    assert plan.backward is not None
    tile: TorchTile = plan.backward.passes[0].tile  # type: ignore[assignment]
    products = _PRODUCTS[tile.products]
    need_x, need_weight, need_bias = needs
    if plan.stats:
        grad_l1, grad_total = (None if t is None else t.to(x.dtype) for t in (grad_l1, grad_total))
    n, h = x.shape[0], plan.h
    if n <= tile.block_n and h <= tile.block_h:
        return _one_tile_backward(products, grad_z, x, weight, bias_enc, latent, f, needs, grad_l1, grad_total)

    if need_x and n > tile.block_n and len(plan.backward.passes) == 2:  # x̄ apart: only a tile's rows of it are summed
        kept = [None] * n if latent is None else latent.split(tile.block_n)
        penalty = [None] * n if grad_l1 is None else grad_l1.split(tile.block_n)
        parts = zip(_rows(grad_z, tile.block_n), _rows(x, tile.block_n), kept, penalty, strict=False)
        grads = [
            backward(grad_i, x_i, weight, bias_enc, kept_i, plan, (True, False, False), grad_l1_i, grad_total)[0]
            for grad_i, x_i, kept_i, grad_l1_i in parts
        ]
        only = (False, need_weight, need_bias)
        others = backward(grad_z, x, weight, bias_enc, latent, plan, only, grad_l1, grad_total)
        return torch.cat(grads), *others[1:]  # type: ignore[arg-type]

    weights = _rows(weight, tile.block_h)
    biases = _rows(bias_enc, tile.block_h) if bias_enc is not None else [None] * len(weights)
    grad_x = x.new_empty(x.shape) if need_x else None
    grad_weight = weight.new_empty(weight.shape) if need_weight else None
    grad_bias = weight.new_empty(h) if need_bias else None
    sum_x = grad_x if grad_x is None or len(weights) == 1 else _sum_for(grad_x)
    sums_x = _rows(sum_x, tile.block_n) if sum_x is not None else None
    for j, (w_j, b_j) in enumerate(zip(weights, biases, strict=True)):
        h_j = slice(j * tile.block_h, (j + 1) * tile.block_h)
        sum_weight = None
        sum_bias = _sum_for(grad_bias[h_j]) if grad_bias is not None else None
        for i, (x_i, grad_i) in enumerate(zip(_rows(x, tile.block_n), _rows(grad_z, tile.block_n), strict=True)):
            sum_weight = _backward_tile(
                products,
                f,
                x_i,
                grad_i,
                w_j,
                b_j,
                _tile_of(latent, tile, i, j),
                grad_l1[i * tile.block_n : (i + 1) * tile.block_n] if grad_l1 is not None else None,
                grad_total[h_j] if grad_total is not None else None,
                sums_x[i] if sums_x is not None else None,
                sum_bias,
                sum_weight,
                need_weight=need_weight,
                first_rows=i == 0,
                all_rows=n <= tile.block_n,
                first_latents=j == 0,
            )
        if grad_weight is not None and sum_weight is not None:
            grad_weight[h_j] = sum_weight
        if grad_bias is not None and sum_bias is not None:
            grad_bias[h_j] = sum_bias
    if grad_x is not None and sum_x is not None and sum_x is not grad_x:
        grad_x.copy_(sum_x)
    return grad_x, grad_weight, grad_bias


def _latent_gradient(
    products: _Products,
    f: Activation,
    grad_z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    block: Tensor | None,
    grad_l1: Tensor | None,
    grad_total: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """h and ā of one tile, from what forward kept of it, `block`, or anew."""
    if block is None:
        h, saved = _encode(products, x, weight, bias_enc, f)
    else:
        saved = block
        h = saved if f.from_output else f.forward(saved)
    grad_h = products.linear(grad_z, weight, grad_total, IDENTITY)
    if grad_l1 is not None:
        grad_h.addcmul_(h.sgn(), grad_l1[:, None])
    return h, f.backward(grad_h, saved)


def _backward_tile(
    products: _Products,
    f: Activation,
    x: Tensor,
    grad_z: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    block: Tensor | None,
    grad_l1: Tensor | None,
    grad_total: Tensor | None,
    sum_x: Tensor | None,
    sum_bias: Tensor | None,
    sum_weight: Tensor | None,
    *,
    need_weight: bool,
    first_rows: bool,
    all_rows: bool,
    first_latents: bool,
) -> Tensor | None:
    """Add one tile's part to each sum there is; W̄'s starts with its first part, in the layout it comes in."""
    h, grad_a = _latent_gradient(products, f, grad_z, x, weight, bias_enc, block, grad_l1, grad_total)
    if sum_bias is not None:
        _add(sum_bias, grad_a.sum(0), first_rows)
    if sum_x is not None and first_latents and sum_x.dtype == grad_a.dtype:
        products.linear_into(sum_x, grad_a, weight.t(), None, IDENTITY)
    elif sum_x is not None:
        _add(sum_x, products.linear(grad_a, weight.t(), None, IDENTITY), first_latents)
    if not need_weight:
        return None
    part = products.outer(grad_a, x)
    if all_rows:  # one sum: in fp32 beside it, a step of (16, 768, 6144) in bf16 takes 5.8 instead of 3.9 ms
        return products.add_outer(part, h, grad_z)
    sum_weight = part.to(stats_dtype(part.dtype)) if sum_weight is None else sum_weight.add_(part)
    del part
    return sum_weight.add_(products.outer(h, grad_z))


def _one_tile_backward(
    products: _Products,
    grad_z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_enc: Tensor | None,
    latent: Tensor | None,
    f: Activation,
    needs: tuple[bool, bool, bool],
    grad_l1: Tensor | None,
    grad_total: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`backward` without its loops and accumulators, whose host time is more than a small problem's arithmetic."""
    need_x, need_weight, need_bias = needs
    h, grad_a = _latent_gradient(products, f, grad_z, x, weight, bias_enc, latent, grad_l1, grad_total)
    return (
        products.linear(grad_a, weight.t(), None, IDENTITY) if need_x else None,
        products.add_outer(products.outer(grad_a, x), h, grad_z).contiguous() if need_weight else None,
        grad_a.sum(0) if need_bias else None,
    )
