"""The shared object built from csrc/, if there is one: it registers the native ops when this module is imported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

BUILD_NOTE = "_native_build.txt"  # setup.py writes it
OPS = ("few_rows", "few_rows_stats", "few_rows_parts", "few_rows_workspace", "native_info")
MAX_ROWS = 64  # kMaxRows in csrc/cpu/few_rows.h


@dataclasses.dataclass(frozen=True)
class Extension:
    """What was built and loaded.

    Args:
        why_not: why there are no native ops, or None if there are.
        cpu: the instruction set of the CPU op's kernel that runs here.
        cuda: what the CUDA op was built for, such as "80" and "90a"; empty if it was not built.
        activations: the names of the activations that the ops have.
        note: what the build says of itself.
    """

    why_not: str | None
    cpu: str = ""
    cuda: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    note: str = ""


def load(folder: Path) -> Extension:
    """Load the shared object in `folder`; whatever is wrong with it becomes the reason why there is none."""
    note_file = folder / BUILD_NOTE
    note = note_file.read_text().strip() if note_file.exists() else ""
    libraries = [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]
    if not libraries:
        why = note or "pip install --no-build-isolation builds them"
        return Extension(f"the native ops were not built: {why}", note=note)
    try:
        torch.ops.load_library(libraries[0])
        for op in OPS:
            getattr(torch.ops.tiedfused, op)
        info = dict(line.split(": ", 1) for line in torch.ops.tiedfused.native_info().splitlines())
        cuda = tuple(filter(None, info["cuda"].split(",")))
        return Extension(None, info["cpu"], cuda, tuple(info["activations"].split()), note)
    # built for another torch, or left over from another source
    except (OSError, RuntimeError, AttributeError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Extension(f"{libraries[0].name} does not load: {reason}", note=note)


EXTENSION = load(Path(__file__).parent)


def _fake(x, weight, bias_enc, bias_dec, *_):  # type: ignore[no-untyped-def]
    for name, t in (("weight", weight), ("bias_enc", bias_enc), ("bias_dec", bias_dec)):
        if t is not None and t.device != x.device:  # one operand on meta is enough to be sent here
            raise RuntimeError(f"{name}: expected on {x.device}, as x, got {t.device}")
    return x.new_empty(x.shape)


def _fake_stats(x, weight, *others):  # type: ignore[no-untyped-def]
    y, (n, _), (h, _) = _fake(x, weight, *others), x.shape, weight.shape
    sums, counts = {"dtype": torch.float32}, {"dtype": torch.int64}
    return y, x.new_empty(n, **sums), x.new_empty(n, **counts), x.new_empty(h, **sums), x.new_empty(h, **counts)


def _backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError("few_rows, few_rows_stats: the native ops have no backward; tied_encode_decode has one")


if EXTENSION.why_not is None:
    torch.library.register_fake("tiedfused::few_rows", _fake)
    torch.library.register_fake("tiedfused::few_rows_stats", _fake_stats)
    torch.library.register_autograd("tiedfused::few_rows", _backward)
    torch.library.register_autograd("tiedfused::few_rows_stats", _backward)
