"""One cell of the table: is the result right, how long does it take beside its peers, and in how much memory.

The truth is the layer in float64. On all of a large problem that would take longer than everything else, so it is
evaluated where it is exact and cheap: y and x̄ for some rows, W̄ and b̄_enc for some latents, b̄_dec entirely. Eager
PyTorch's own error there sets the bound for everybody, and the whole of each result is then compared with eager's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tiedfused import settings
from tiedfused.benchmark import device as devices
from tiedfused.benchmark.device import Ceilings, interleaved
from tiedfused.benchmark.peers import OURS, Call, Operands
from tiedfused.benchmark.shapes import Shape
from tiedfused.planning import plan
from tiedfused.profile import peak_memory
from tiedfused.settings import MIB, REGIME_NAMES

NAMES = ("y", "grad_x", "grad_weight", "grad_bias_enc", "grad_bias_dec")
SAMPLE = 64
# relative errors below these are rounding of the result itself, whoever computes it
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Where eager cannot run there is nothing to calibrate with; over the CPU's list its error is below half of this.
UNCALIBRATED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# A row's error scatters around the whole result's.
ROW_MARGIN = 4
# Rounding that moves a pre-activation across relu's kink flips its derivative in one of two computations: an error of
# the problem, not of the code. Rows and latents whose pre-activations come closer than this to 0 have no truth; in 16
# bits all of them do, and eager's own flips are in the bound.
KINK = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.0, torch.bfloat16: 0.0}
# One flip changes a sum over K terms by about 1/√K of it, a tile of 128 terms left out by 11/√K: this is in between.
FLIPS = 4
FEWEST_ROUNDS, MOST_ROUNDS = 3, 25

OutOfMemory = torch.OutOfMemoryError


def _picked(size: int, device: torch.device) -> Tensor:
    """Up to `SAMPLE` indices below `size`, first and last among them."""
    return torch.linspace(0, size - 1, min(SAMPLE, size), dtype=torch.float64).round().long().unique().to(device)


def truth(p: Operands, which: str) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Name → (the rows it holds for, or None for all; the values there in float64)."""
    x, weight, bias_enc, bias_dec = (t.detach().double() for t in p.leaves)
    grad_y = p.grad_y.double()
    kink = KINK[p.x.dtype]

    def off_kink(picked: Tensor, a: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        safe = (a.abs() >= kink).all(1 - dim)
        return (picked[safe], a[safe] if dim == 0 else a[:, safe]) if safe.any() else (picked, a)

    rows = _picked(x.shape[0], x.device)
    rows, a = off_kink(rows, x[rows] @ weight.t() + bias_enc, 0)
    found: dict[str, tuple[Tensor | None, Tensor]] = {"y": (rows, a.relu() @ weight + bias_dec)}
    if which == "fwd":
        return found
    found["grad_x"] = rows, (grad_y[rows] @ weight.t() * (a > 0)) @ weight
    latents = _picked(weight.shape[0], x.device)
    latents, a = off_kink(latents, x @ weight[latents].t() + bias_enc[latents], 1)
    grad_a = grad_y @ weight[latents].t() * (a > 0)
    found["grad_weight"] = latents, grad_a.t() @ x + a.relu().t() @ grad_y
    found["grad_bias_enc"] = latents, grad_a.sum(0)
    found["grad_bias_dec"] = None, grad_y.sum(0)
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; infinite where found is not finite."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def _worst_row(found: Tensor, expected: Tensor) -> float:
    """The largest norm of a row of the difference, over the root mean square norm of the rows of `expected`."""
    rows = (1, -1) if found.dim() == 1 else found.shape
    difference = (found.float() - expected.float()).view(rows).norm(dim=1)
    error = float(difference.max() / expected.float().view(rows).norm(dim=1).square().mean().sqrt().clamp_min(1e-30))
    return error if error == error else float("inf")


class Judge:
    """Whether results are right, for one problem, dtype and pass."""

    def __init__(self, operands: Operands, which: str) -> None:
        self._dtype = operands.x.dtype
        self._truth = truth(operands, which)
        self._eager: dict[str, Tensor] = {}
        self._bounds = dict.fromkeys(self._truth, UNCALIBRATED[self._dtype])
        n, h = operands.x.shape[0], operands.weight.shape[0]
        self._flips = {"grad_x": FLIPS / h**0.5, "grad_weight": FLIPS / n**0.5, "grad_bias_enc": FLIPS / n**0.5}

    def _errors(self, results: Sequence[Tensor]) -> dict[str, float]:
        by_name = dict(zip(NAMES, results, strict=False))
        return {
            name: relative_error(by_name[name] if rows is None else by_name[name][rows], expected)
            for name, (rows, expected) in self._truth.items()
        }

    def calibrate(self, results: Sequence[Tensor]) -> float:
        """Let eager's results set the bounds; returns its largest error."""
        errors = self._errors(results)
        self._bounds = {name: 2 * error + FLOOR[self._dtype] for name, error in errors.items()}
        self._eager = dict(zip(NAMES, results, strict=False))
        return max(errors.values())

    def error(self, results: Sequence[Tensor]) -> tuple[float, str | None]:
        """The largest relative error, and what is wrong with the results, None if nothing is."""
        errors = self._errors(results)
        for name, error in errors.items():
            if not error <= self._bounds[name]:
                return error, f"{name} is wrong: error {error:.2g}, bound {self._bounds[name]:.2g}"
        for name, result in zip(NAMES, results, strict=False):
            # each is off the truth by at most its bound, and eager's is the smaller one
            bound = max(1.5 * ROW_MARGIN * self._bounds[name], self._flips.get(name, 0.0))
            if name in self._eager and not (row := _worst_row(result, self._eager[name])) <= bound:
                return row, f"{name} is wrong: a row differs from eager's by {row:.2g}, bound {bound:.2g}"
        return max(errors.values()), None


def same_plan(shape: Shape, dtype: torch.dtype, which: str, device: torch.device) -> bool:
    """Whether low-memory mode is what the default does anyway."""
    default, low = (plan(*shape, dtype=dtype, device=device, grad=which != "fwd", recompute=r) for r in (None, True))
    return (default.backend, default.passes, default.save_latent) == (low.backend, low.passes, low.save_latent)


def applies(peer: str, shape: Shape, dtype: torch.dtype, which: str, device: torch.device) -> bool:
    """Whether `peer` differs from eager in this pass, low-memory mode from the default; whether a regime serves it."""
    if peer == "checkpoint":
        return which != "fwd"
    if peer in REGIME_NAMES:
        with settings.override(regime=peer):
            return plan(*shape, dtype=dtype, device=device, grad=which != "fwd").regime == peer
    return peer != "low memory" or not same_plan(shape, dtype, which, device)


def _too_large(peer: str, shape: Shape, dtype: torch.dtype, which: str, device: torch.device) -> str | None:
    """Why `peer` does not fit into memory, None if it should."""
    latents = 0 if peer in (*OURS, *REGIME_NAMES) else 2 if which == "fwd" or peer == "checkpoint" else 3
    needed, free = latents * shape.n * shape.h * dtype.itemsize, devices.free_memory(device)
    if needed <= free:
        return None
    return f"not enough memory: {latents} latents are {needed / MIB:.0f} MiB, {free / MIB:.0f} MiB are free"


def measure_cell(
    shape: Shape,
    dtype: torch.dtype,
    which: str,
    peers: Sequence[str],
    device: torch.device,
    reference: Ceilings,
    budget: float,
) -> dict[str, Any]:
    """One problem, dtype and pass, as the results file holds it (`report.SCHEMA`).

    Args:
        shape: the problem.
        dtype: of every operand.
        which: ``"fwd"``, ``"bwd"`` or ``"step"``.
        peers: names of `peers.PEERS`, and regimes; tiedfused itself is always measured.
        device: where.
        reference: the device's own rates, measured in the same rounds.
        budget: seconds that decide the number of rounds, between 3 and 25; compilation counts.

    Raises:
        torch.OutOfMemoryError: not even the operands and results fit.
        RuntimeError: a peer made the GPU fail; which one it was comes first.
    """
    begin = time.perf_counter()
    # operands, results of two peers, and the operands again in float64
    needed, free = shape.bytes(which, 2 * dtype.itemsize + 8), devices.free_memory(device)
    if needed > free:
        raise OutOfMemory(f"about {needed / MIB:.0f} MiB are needed, {free / MIB:.0f} MiB are free")
    operands = Operands.random(shape, dtype, device)
    judge = Judge(operands, which)
    cell: dict[str, Any] = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "pass": which}
    cell |= {"ms": {}, "warm_ms": {}, "bytes": {}, "error": {}, "skipped": {}}
    calls: dict[str, Call] = {}
    torch.compiler.reset()
    for peer in ("eager", *(p for p in peers if p != "eager"), *OURS):
        if not applies(peer, shape, dtype, which, device):
            continue
        why = _too_large(peer, shape, dtype, which, device)
        try:
            if why is None:
                call = operands.named(peer, which)
                results = call()
                if peer == "eager":
                    cell["error"][peer] = judge.calibrate(results)
                else:
                    cell["error"][peer], why = judge.error(results)
                kept = sum(t.nbytes for t in results)
                del results
        except OutOfMemory as error:
            why = f"not enough memory: {str(error).splitlines()[0]}"
            torch.cuda.empty_cache()
        except Exception as error:  # one peer that does not run must not cost the others' results
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if devices.has_failed(device):
                raise RuntimeError(f"{peer}: {why}") from error
        if why is not None:
            cell["skipped"][peer] = why
            continue
        if peer in (*peers, *OURS):
            calls[peer] = call
            if which != "bwd":  # the memory of a step is forward's and backward's together
                cell["bytes"][peer] = max(0, peak_memory(call, device) - kept)

    used = plan(*shape, dtype=dtype, device=device, grad=which != "fwd")
    cell["plan"] = {"regime": used.regime, "backend": used.backend, "keeps_latent": used.save_latent}
    judge = None  # type: ignore[assignment]  # eager's results are not needed any more
    timed = {**reference.calls, **calls}
    one_round = time.perf_counter()
    for call in timed.values():  # warm-up: each has run before, but not in this company
        devices.milliseconds(call, device)
    one_round = (time.perf_counter() - one_round) * (3 if shape.few_rows else 1)
    rounds = int((budget - (time.perf_counter() - begin)) / max(one_round, 1e-6))
    rounds = min(max(rounds, FEWEST_ROUNDS), MOST_ROUNDS)
    times = interleaved(timed, device, rounds)
    cell["rounds"] = rounds
    cell["rates"] = reference.rates(times)
    cell["ms"] = {peer: [times[peer].median, times[peer].p20, times[peer].p80] for peer in calls}
    if shape.few_rows:
        warm = interleaved(calls, device, rounds, warm=True)
        cell["warm_ms"] = {peer: [t.median, t.p20, t.p80] for peer, t in warm.items()}
    return cell


def memory_sweep(
    shapes: Sequence[Shape], dtype: torch.dtype, peers: Sequence[str], device: torch.device
) -> list[dict[str, Any]]:
    """Peak memory of a training step above operands, y and gradients, for problems that differ in H."""
    found: list[dict[str, Any]] = []
    for shape in shapes:
        entry: dict[str, Any] = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "bytes": {}}
        operands = Operands.random(shape, dtype, device)
        for peer in (*(p for p in peers if p in ("eager", "checkpoint", "epilogue")), "tiedfused"):
            if _too_large(peer, shape, dtype, "step", device) is None:
                call = operands.named(peer, "step")
                kept = sum(t.nbytes for t in call())
                entry["bytes"][peer] = max(0, peak_memory(call, device) - kept)
        found.append(entry)
    return found
