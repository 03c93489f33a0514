"""What a user may set for a whole process. Each is read once from the environment, when the package is imported.

| variable                  | values              | meaning                                                          |
|---------------------------|---------------------|------------------------------------------------------------------|
| `TIEDFUSED_REGIME`        | auto, or a regime   | use this regime where it applies, else tiled (auto: the plan)    |
| `TIEDFUSED_RECOMPUTE`     | auto, 0, 1          | the default of ``recompute=`` (auto: None, the plan chooses)     |
| `TIEDFUSED_WORKSPACE_MIB` | a number, 256       | the most that is kept of the latent, and that buffers may take   |
| `TIEDFUSED_ATOMICS`       | 0, 1                | 1 allows the one-pass backward with atomics: not reproducible    |
| `TIEDFUSED_CONFIG_DIR`    | a folder            | where `tiedfused tune` writes tiles and the kernels look first   |

Where the last is not set, it is `tiedfused` in `XDG_CONFIG_HOME`, or in `~/.config`.

`override` changes them for the length of a ``with`` block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MIB = 1 << 20
REGIME_NAMES = ("stream", "few_rows", "bottleneck", "chunked", "native", "tiled")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings in force; `current` returns them.

    Args:
        regime: ``"auto"`` lets the plan choose; a name of `REGIME_NAMES` is used wherever it applies, and ``"tiled"``
            where it does not.
        recompute: what ``recompute=None`` of a call stands for: None lets the plan choose.
        workspace_bytes: the most bytes of latent that a training step may keep where the plan chooses, and the most
            that the buffers of a pass may take.
        atomics: whether the backward pass may add x̄ with atomics (faster in places, not bitwise reproducible).
        config_dir: where a user's tiles are, see `tiedfused.tiles`; an empty text for nowhere.
    """

    regime: str = "auto"
    recompute: bool | None = None
    workspace_bytes: int = 256 * MIB
    atomics: bool = False
    config_dir: str = ""

    def __post_init__(self) -> None:
        if self.regime not in ("auto", *REGIME_NAMES):
            raise ValueError(f"TIEDFUSED_REGIME: got {self.regime!r}; expected auto, {', '.join(REGIME_NAMES)}")
        if self.recompute is not None and not isinstance(self.recompute, bool):
            raise ValueError(f"TIEDFUSED_RECOMPUTE: got {self.recompute!r}; expected None, True or False")
        if type(self.workspace_bytes) is not int:  # torch.compile crashes where a float among them changes
            raise ValueError(f"workspace_bytes: got {self.workspace_bytes!r}; expected an int")
        if self.workspace_bytes < 0:
            raise ValueError(f"TIEDFUSED_WORKSPACE_MIB: got {self.workspace_bytes / MIB:g}; expected 0 or more")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """The settings that the environment variables above describe.

        Raises:
            ValueError: a variable holds none of its values; the message names it, what it holds and what it may.
        """

        def choice(variable: str, values: dict[str, Any], default: str) -> Any:
            text = environment.get(variable, default).lower()
            if text not in values:
                raise ValueError(f"{variable}: got {text!r}; expected {', '.join(values)}")
            return values[text]

        mib = environment.get("TIEDFUSED_WORKSPACE_MIB", "256")
        try:
            workspace_bytes = int(float(mib) * MIB)
        except (ValueError, OverflowError):
            raise ValueError(f"TIEDFUSED_WORKSPACE_MIB: got {mib!r}; expected a number of MiB") from None
        return cls(
            regime=environment.get("TIEDFUSED_REGIME", "auto").lower(),
            recompute=choice("TIEDFUSED_RECOMPUTE", {"auto": None, "0": False, "1": True}, "auto"),
            workspace_bytes=workspace_bytes,
            atomics=choice("TIEDFUSED_ATOMICS", {"0": False, "1": True}, "0"),
            config_dir=environment.get("TIEDFUSED_CONFIG_DIR", _user_configs(environment)),
        )


def _user_configs(environment: Mapping[str, str]) -> str:
    home = environment.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return str(Path(home) / "tiedfused")


_numbers: dict[Settings, int] = {}
_unused_numbers = itertools.count()


def number_of(some: Settings) -> int:
    """A number of these settings and no others: quicker to hash, in a key of what depends on them."""
    return _numbers.setdefault(some, next(_unused_numbers))  # drawn anew for each: two threads never get the same


_current = Settings.from_environment()
number = number_of(_current)  # of those in force


def current() -> Settings:
    """The settings in force."""
    return _current


@contextlib.contextmanager
def override(**changes: Any) -> Iterator[Settings]:
    """Change settings for the length of a ``with`` block (of the whole process, all threads).

    When a call's backward runs, they need not be those of its forward. Only `torch.utils.checkpoint`, which calls
    forward again, raises where one of its calls keeps the latent and the other does not.

    Example:
        >>> import tiedfused
        >>> with tiedfused.settings.override(recompute=True) as settings:
        ...     settings.recompute
        True
    """
    global _current, number
    before = _current, number
    changed = dataclasses.replace(_current, **changes)
    _current, number = changed, number_of(changed)
    try:
        yield changed
    finally:
        _current, number = before
