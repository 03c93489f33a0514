"""The problems that are measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FEW_ROWS = 64  # up to here a call is bound by reading W: cold and warm cache differ, and inference is what counts


class Shape(NamedTuple):
    """Rows of x, ``in_features``, ``out_features``."""

    n: int
    d: int
    h: int

    def __str__(self) -> str:
        return f"{self.n}, {self.d}, {self.h}"

    @property
    def few_rows(self) -> bool:
        """Whether reading W is most of the work."""
        return self.n <= FEW_ROWS

    def flops(self, which: str) -> int:
        """Theoretical floating-point operations of a pass, x̄ included: 4, 8 or 12 NdH."""
        return {"fwd": 4, "bwd": 8, "step": 12}[which] * self.n * self.d * self.h

    def bytes(self, which: str, itemsize: int) -> int:
        """Least traffic of a pass: x, W and y once forward; x, W, ȳ, x̄ and W̄ once backward."""
        x, w = self.n * self.d * itemsize, self.h * self.d * itemsize
        forward, backward = 2 * x + w, 3 * x + 2 * w
        return {"fwd": forward, "bwd": backward, "step": forward + backward}[which]


_ROWS = (1, 4, 16, 64)
_GPU = (
    Shape(16384, 64, 16384),
    Shape(16384, 128, 32768),
    Shape(16384, 256, 16384),
    Shape(8192, 384, 12288),
    Shape(8192, 512, 16384),
    Shape(4096, 768, 24576),
    Shape(4096, 2304, 65536),
    Shape(8192, 4096, 32768),
    Shape(8192, 1024, 131072),
)
_GPU_BOTTLENECK = (Shape(4096, 784, 64), Shape(128, 17768, 512))
_GPU_ROWS = tuple(Shape(n, d, h) for d, h in ((4096, 131072), (768, 24576)) for n in _ROWS)
# a problem for each number of rows that has a tile, and one whose latent is narrow in either way of the forward pass
_TUNE_SMALL = (*(Shape(n, 768, 24576) for n in (16, 32, 64)), _GPU_BOTTLENECK[0], _GPU_BOTTLENECK[1])
_CPU = (Shape(4096, 64, 4096), Shape(4096, 128, 8192), Shape(2048, 256, 8192), Shape(2048, 768, 6144))
_CPU_BOTTLENECK = (Shape(4096, 784, 64),)
_CPU_ROWS = tuple(Shape(n, 2304, 16384) for n in (1, 4, 16))
_FEW_ROWS = tuple(Shape(n, d, h) for d, h in ((768, 24576), (2304, 16384), (4096, 32768)) for n in (1, 4, 8, 16, 64))

LISTS: dict[str, tuple[Shape, ...]] = {
    "gpu": _GPU + _GPU_BOTTLENECK + _GPU_ROWS,
    "gpu-stream": _GPU,
    "gpu-bottleneck": _GPU_BOTTLENECK,
    "gpu-rows": _GPU_ROWS,
    "gpu-quick": (_GPU[0], _GPU[1], _GPU[4], _GPU[5], _GPU_BOTTLENECK[0], _GPU_ROWS[4], _GPU_ROWS[6]),
    "headline": (_GPU[1], _GPU[2], _GPU[5]),
    "tune": (_GPU[0], _GPU[1], _GPU[2], _GPU[4], *_TUNE_SMALL),
    "cpu": _CPU + _CPU_BOTTLENECK + _CPU_ROWS,
    "cpu-stream": _CPU,
    "cpu-bottleneck": _CPU_BOTTLENECK,
    "cpu-rows": _CPU_ROWS,
    "few-rows": _FEW_ROWS,
    "cpu-quick": (*_CPU, _CPU_BOTTLENECK[0], _CPU_ROWS[0], _CPU_ROWS[2]),
    "tiny": (Shape(256, 32, 256), Shape(4, 64, 512)),
}
"""Named lists of problems; "tiny" is for trying the tools out."""

# the longest H of each is where plain PyTorch stores a latent of 512 MiB in fp32 and of 4 GiB in bf16
MEMORY_SWEEP = {
    "cpu": [Shape(2048, 64, 1 << k) for k in range(10, 17)],
    "cuda": [Shape(16384, 128, 1 << k) for k in range(10, 18)],
}


def default_list(device_type: str, quick: bool) -> str:
    """The name of the list that is measured where none is asked for."""
    return ("gpu" if device_type == "cuda" else "cpu") + ("-quick" if quick else "")


def parse(text: str) -> tuple[Shape, ...]:
    """The problems that a user's `text` names: a list of `LISTS`, or ``N,d,H``.

    Raises:
        ValueError: it is neither.

    Example:
        >>> parse("8192,64,4096")
        (Shape(n=8192, d=64, h=4096),)
        >>> parse("cpu-bottleneck")
        (Shape(n=4096, d=784, h=64),)
    """
    if text in LISTS:
        return LISTS[text]
    parts = text.split(",")
    if len(parts) == 3 and all(part.strip().isdigit() for part in parts):
        shape = Shape(*map(int, parts))
        if min(shape) > 0:
            return (shape,)
    raise ValueError(f"shapes: got {text!r}; expected N,d,H, each at least 1, or one of {', '.join(LISTS)}")


def parse_all(texts: Sequence[str], problems: list[str]) -> list[Shape]:
    """`parse` of each, without repeats; what cannot be read is told in a line appended to `problems`."""
    found: dict[Shape, None] = {}
    for text in texts:
        try:
            found.update(dict.fromkeys(parse(text)))
        except ValueError as error:
            problems.append(str(error))
    return list(found)
