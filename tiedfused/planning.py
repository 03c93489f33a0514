"""Which regime serves a problem, with which tiles and workspace, what it costs, and why.

`plan` answers for any problem, on a device that is present or not; the op asks the same function before it runs.
Forward and backward are chosen apart, by the cost model of `tiedfused.regimes`, and with the latent kept or not.
"""

from __future__ import annotations

import dataclasses
import functools
from numbers import Integral

import torch

from tiedfused import devices, settings
from tiedfused.activations import IDENTITY, Activation, get_activation
from tiedfused.regimes import REGIMES
from tiedfused.regimes.common import Part, Pass, Request, measured_efficiency

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will run for one problem. `str` gives it as text, the command line as a table.

    Args:
        request: the problem.
        forward: how the forward pass runs.
        backward: how the backward pass runs; None in inference.
        save_latent: whether forward keeps the latent for backward; it is recomputed otherwise.
        alternatives: what was not taken: its name, and why or what it would take.
    """

    request: Request
    forward: Part
    backward: Part | None
    save_latent: bool
    alternatives: tuple[tuple[str, str], ...]

    # read for every call, and so not properties
    device: str = dataclasses.field(init=False)
    activation: Activation = dataclasses.field(init=False)
    output_activation: Activation = dataclasses.field(init=False)
    stats: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        r = self.request
        fields = {"device": r.device_type, "activation": r.f, "output_activation": r.g, "stats": r.stats}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def n(self) -> int:
        """Rows N."""
        return self.request.n

    @property
    def d(self) -> int:
        """``in_features``."""
        return self.request.d

    @property
    def h(self) -> int:
        """``out_features`` H."""
        return self.request.h

    @property
    def dtype(self) -> torch.dtype:
        """Of every operand."""
        return self.request.dtype

    @property
    def precision(self) -> str:
        """Of fp32 products in the Triton kernels, ``"ieee"`` or ``"tf32"``."""
        return self.request.precision

    @property
    def parts(self) -> tuple[Part, ...]:
        """Forward and, in training, backward."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The kernels of both directions."""
        return tuple(p for part in self.parts for p in part.passes)

    @property
    def regime(self) -> str:
        """Forward's, and backward's where it is another: ``"stream"``, ``"stream + chunked"``."""
        return " + ".join(dict.fromkeys(part.regime for part in self.parts))

    @property
    def backend(self) -> str:
        """Likewise: ``"triton"``, ``"tiled"``, …"""
        return " + ".join(dict.fromkeys(part.backend for part in self.parts))

    @property
    def deterministic(self) -> bool:
        """Whether results are bitwise reproducible."""
        return all(part.deterministic for part in self.parts)

    @property
    def saved_bytes(self) -> int:
        """Kept from forward to backward besides the inputs and the output."""
        return self.request.latent_bytes if self.save_latent else 0

    @property
    def theoretical_flops(self) -> int:
        """4NdH forward; backward 6NdH for W̄ and 2NdH more for x̄: what throughput is quoted on."""
        backward = 6 + 2 * self.request.grad_x if self.request.grad else 0
        return (4 + backward) * self.request.ndh

    @property
    def executed_flops(self) -> int:
        """Theoretical FLOPs and what is recomputed."""
        return sum(p.flops for p in self.passes)

    @property
    def bytes_moved(self) -> int:
        """To and from memory, of all passes."""
        return sum(p.bytes_moved for p in self.passes)

    @property
    def workspace_bytes(self) -> int:
        """The largest workspace of a pass, and what is kept between them."""
        return max(part.workspace_bytes for part in self.parts) + self.saved_bytes

    @property
    def roofline_ms(self) -> float:
        """The sum over the passes of max(flops / peak, bytes / bandwidth); no kernel is faster."""
        r, device = self.request, self.request.device
        rate = device.rate(r.dtype, r.precision)
        return 1e3 * sum(max(p.flops / rate, p.bytes_moved / device.bandwidth) for p in self.passes)

    @property
    def predicted_ms(self) -> float:
        """What the cost model expects; it decides between regimes."""
        return sum(part.predicted_ms for part in self.parts)

    def rows(self) -> list[tuple[str, str]]:
        """The plan as (label, value) pairs, for tables and text."""
        r = self.request
        shape = f"N {r.n}, d {r.d}, H {r.h}, {r.dtype_name} on {r.device_type}"
        stats = "; with the latent's statistics" if r.stats else ""
        rows = [("problem", f"{shape}; f {r.f.name}, g inside {r.g.name}{stats}")]
        for direction, part in zip(("forward", "backward"), self.parts, strict=False):
            chunk = f", {part.chunk[0]} × {part.chunk[1]} of the latent at a time" if part.chunk else ""
            rows.append((direction, f"{part.regime} ({part.backend}){chunk}; {part.predicted_ms:.3g} ms predicted"))
            for p in part.passes:
                sizes = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(p.tile).items() if v is not False)
                split = f", split {p.split}" if p.split > 1 else ""
                measured = measured_efficiency(r, p.kernel) if part.backend == "triton" else None
                peak = "" if measured is None else f"; {100 * measured[0]:.0f}% of the peak measured ({measured[1]})"
                rows.append((f"  {p.kernel}", f"{sizes}{split} ({p.tile_source}){peak}"))
        return [
            *rows,
            ("latent", f"kept, {_mib(self.saved_bytes)}" if self.save_latent else "never stored"),
            ("workspace", _mib(self.workspace_bytes)),
            ("FLOPs", f"{self.theoretical_flops:.3e} theoretical, {self.executed_flops:.3e} executed"),
            ("bytes moved", f"{self.bytes_moved:.3e}"),
            ("roofline", f"{self.roofline_ms:.3g} ms"),
            ("deterministic", "yes" if self.deterministic else "no"),
            *(("reason", reason) for reason in dict.fromkeys(part.reason for part in self.parts)),
            *((f"not {name}", why) for name, why in self.alternatives),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / settings.MIB:.1f} MiB"


def plan(
    n: int,
    d: int,
    h: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    activation: str = "relu",
    output_activation: str = "identity",
    grad: bool = True,
    grad_x: bool = True,
    recompute: bool | None = None,
    stats: bool = False,
    capability: int | None = None,
) -> Plan:
    """Which kernels, tiles and workspace a problem gets, its cost, and why.

    Args:
        n: rows N, 0 or more.
        d: ``in_features``, 1 or more.
        h: ``out_features`` H, 1 or more.
        dtype: of every operand.
        device: need not be present: ``"cuda"`` without a GPU stands for one of compute capability 9.0.
        activation: f, a name of `tiedfused.activation_names`.
        output_activation: g, likewise.
        grad: plan a training step; False plans inference.
        grad_x: whether x needs a gradient too.
        recompute: True never keeps the latent, False always does, None lets the plan choose within
            ``TIEDFUSED_WORKSPACE_MIB``.
        stats: plan a call with ``return_stats=True``.
        capability: plan for this compute capability (80, 90, 100, …) instead of the device's own.

    Raises:
        ValueError: a size, dtype, activation or capability that makes no sense.
        TypeError: `recompute` is neither None nor a bool.

    Example:
        >>> import tiedfused, torch
        >>> p = tiedfused.plan(8192, 128, 8192, dtype=torch.float32)
        >>> p.regime, p.save_latent
        ('tiled', False)
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; expected {', '.join(map(str, DTYPES))}")
    if recompute is not None and not isinstance(recompute, bool):
        raise TypeError(f"recompute: expected None, True or False, got {recompute!r}")
    for name, value, least in (("n", n, 0), ("d", d, 1), ("h", h, 1)):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name}: got {value!r}; expected an integer of {least} or more")
    n, d, h = int(n), int(d), int(h)
    if capability is not None and (not isinstance(capability, int) or capability < 10):
        raise ValueError(f"capability: got {capability!r}; expected an integer such as 90, for 9.0")
    device = torch.device(device)
    f = get_activation(activation)
    g = fused_output(get_activation(output_activation, "output_activation"), grad)
    return make_plan(request(n, d, h, dtype, device, f, g, grad, grad_x, recompute, stats, capability))


def fused_output(g: Activation, grad: bool) -> Activation:
    """What the op applies to the pre-output: g in inference, if the kernels have it; else the identity, g following."""
    return IDENTITY if grad or g.triton is None else g


def request(
    n: int,
    d: int,
    h: int,
    dtype: torch.dtype,
    device: torch.device,
    f: Activation,
    g: Activation,
    grad: bool,
    grad_x: bool,
    recompute: bool | None,
    stats: bool = False,
    capability: int | None = None,
) -> Request:
    """The problem, and the settings that its plan depends on: the present ones."""
    if capability is None and device.type == "cuda":
        capability = devices.cuda_capability(device.index)
    in_force = settings.current()
    return Request(
        n=n,
        d=d,
        h=h,
        dtype=dtype,
        device_type=device.type,
        device_index=device.index,
        capability=capability,
        f=f,
        g=g,
        grad=grad,
        grad_x=grad_x,
        recompute=recompute,
        stats=stats,
        precision=devices.fp32_precision(device.type),
        threads=torch.get_num_threads(),
        atomics=in_force.atomics and not torch.are_deterministic_algorithms_enabled(),
        in_force=in_force,
    )


@functools.lru_cache(maxsize=4096)
def make_plan(r: Request) -> Plan:
    """The plan of a request: with the latent kept or not, whichever the cost model expects to be faster.

    A regime that was asked for comes first: some apply only with the latent kept, or only without.
    """
    plans = [_with_latent(r, keep) for keep in _ways_to_keep(r)]
    asked_for = r.in_force.regime
    return min(plans, key=lambda p: (all(part.regime != asked_for for part in p.parts), p.predicted_ms))


def _ways_to_keep(r: Request) -> tuple[bool, ...]:
    """Whether to keep the latent, as far as it is decided before the regimes are compared."""
    if not r.grad:
        return (False,)
    if r.asked_recompute is not None:
        return (not r.asked_recompute,)
    if r.device_type == "cpu":
        limit = r.in_force.workspace_bytes
        return (not devices.interpreting() and REGIMES["tiled"].keeps_latent(r.n, r.h, r.d, r.dtype, limit),)
    return (False, True) if 0 < r.latent_bytes <= r.in_force.workspace_bytes else (False,)


def _with_latent(r: Request, keep: bool) -> Plan:
    forward, others = _best(r, "forward", _offers(r, "forward", keep))
    backward = None
    if r.grad:
        backward, backward_others = _best(r, "backward", _offers(r, "backward", keep))
        others += backward_others
    return Plan(r, forward, backward, keep, _by_name(others))


_Others = list[tuple[str, str]]


def _offers(r: Request, direction: str, keep: bool) -> dict[str, Part | str]:
    """What each regime offers, or why it does not apply."""
    wanted = r.in_force.regime
    return {
        name: getattr(regime, direction)(r, keep)
        if wanted in ("auto", name) or name == "tiled"
        else f"TIEDFUSED_REGIME is {wanted}"
        for name, regime in REGIMES.items()
    }


def _best(r: Request, what: str, offers: dict[str, Part | str]) -> tuple[Part, _Others]:
    """The part with the least predicted time, and why each other regime is not taken; tiled always applies."""
    asked_for = offers.get(r.in_force.regime)
    parts = [part for part in offers.values() if isinstance(part, Part)]
    chosen = asked_for if isinstance(asked_for, Part) else min(parts, key=lambda part: part.predicted_ms)
    others = [
        (name, f"{what} {offer.predicted_ms:.3g} ms predicted" if isinstance(offer, Part) else offer)
        for name, offer in offers.items()
        if offer is not chosen
    ]
    return chosen, others


def _by_name(others: _Others) -> tuple[tuple[str, str], ...]:
    """Both directions' reasons under one name, each once."""
    names = dict.fromkeys(name for name, _ in others)
    return tuple((name, "; ".join(dict.fromkeys(why for n, why in others if n == name))) for name in names)
