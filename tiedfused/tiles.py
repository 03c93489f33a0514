"""Tiles of the Triton kernels: what they need on chip, whether that fits a GPU, and which one to use.

Pure Python: it answers for GPUs that are not present. The kernels keep one tile on chip (*stationary*) and stream the
other operand past it in `Tile.num_stages` stages; the model below counts those two, and the latent between them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

STREAM_KERNELS = ("forward", "input_grad", "weight_grad", "weight_grad_atomic")
CHUNK_KERNELS = ("chunk_encode", "chunk_latent", "chunk_decode", "chunk_weight_grad")
# the stream regime's forward, with tiles for at most that many rows
FEW_ROWS_KERNELS = ("few_rows_16", "few_rows_32", "few_rows_64")
# of these, the latent's two are one kernel, for h alone and for h and ā; the last two are the chunked regime's
BOTTLENECK_KERNELS = (
    "bottleneck_forward",
    "bottleneck_latent",
    "bottleneck_latent_grad",
    "bottleneck_weight_grad",
    "bottleneck_decode",
)
KERNELS = STREAM_KERNELS + FEW_ROWS_KERNELS + CHUNK_KERNELS + BOTTLENECK_KERNELS

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "tf32": 4}
# What tiles are listed under; for float32 multiplied as tf32, on tensor cores, those of float32 where it has none.
_OPERANDS = {"bfloat16": ("2",), "float16": ("2",), "float32": ("4",), "tf32": ("4", "tf32")}
_MAX_BLOCK_D = 512
_MAX_BLOCK_D_FEW_ROWS = 2048
_MIN_BLOCK = 16
_MIN_BLOCK_LATENT = 64  # the rows of a wgmma or tcgen05 instruction
_ADDRESSING_REGISTERS = 24
_BARRIER_BYTES = 1024
_CONFIGS = Path(__file__).with_name("configs")
NOT_MEASURED = "interpreter"  # how the status of a config starts that must not be used: its times are no GPU's
# kernel → compute capabilities of its warp-specialised form; for the others Triton 3.6 has none, or fails to compile it
_WARP_SPECIALIZED = {"forward": (90, 100), "weight_grad": (90,)}


@dataclasses.dataclass(frozen=True)
class Tile:
    """Launch shape of a kernel.

    Args:
        block_n: rows of x and ō held at a time; a power of two, at least 16.
        block_h: rows of W (latents) held at a time; a power of two, at least 16.
        num_warps: warps of 32 threads in a block.
        num_stages: depth of the pipeline of the streamed operand; 1 is no pipeline.
        warp_specialize: one group of warps copies through TMA while `num_warps` and as many again multiply.
    """

    block_n: int
    block_h: int
    num_warps: int
    num_stages: int
    warp_specialize: bool = False

    def plain(self) -> Tile:
        """The same blocks without warp specialisation, and with as many warps that multiply."""
        if not self.warp_specialize:
            return self
        return dataclasses.replace(self, num_warps=2 * self.num_warps, warp_specialize=False)


@dataclasses.dataclass(frozen=True)
class GemmTile:
    """Launch shape of a matrix product of the chunked regime.

    Args:
        block_m: rows of the result a program makes; a power of two, at least 16.
        block_n: columns of it, likewise.
        block_k: how far a step goes along the summed dimension, likewise.
        num_warps: warps of 32 threads in a block.
        num_stages: depth of the pipeline of both operands.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class LatentTile:
    """Launch shape of a kernel of the bottleneck regime, past which d streams.

    Args:
        block_n: rows of x, and of ō, held at a time; a power of two, at least 16.
        block_h: rows of W (latents) held at a time, likewise.
        block_d: columns of both held at a time, likewise.
        num_warps: warps of 32 threads in a block.
        num_stages: depth of the pipeline of the operands.
    """

    block_n: int
    block_h: int
    block_d: int
    num_warps: int
    num_stages: int


AnyTile = Tile | GemmTile | LatentTile
_TILES: dict[str, type[AnyTile]] = {
    **dict.fromkeys(STREAM_KERNELS + FEW_ROWS_KERNELS, Tile),
    **dict.fromkeys((*CHUNK_KERNELS, "bottleneck_weight_grad", "bottleneck_decode"), GemmTile),
    **dict.fromkeys(("bottleneck_forward", "bottleneck_latent", "bottleneck_latent_grad"), LatentTile),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Limits of one compute capability.

    Args:
        shared_bytes: largest shared memory of a block, in bytes, after opting in.
        registers_per_thread: most registers a thread can address.
        registers_per_sm: registers of a multiprocessor.
    """

    shared_bytes: int
    registers_per_thread: int = 255
    registers_per_sm: int = 65536


ARCHITECTURES = {
    80: Architecture(shared_bytes=166912),
    86: Architecture(shared_bytes=101376),
    89: Architecture(shared_bytes=101376),
    90: Architecture(shared_bytes=232448),
    100: Architecture(shared_bytes=232448),
    120: Architecture(shared_bytes=101376),
}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a tile needs.

    Args:
        shared_bytes: shared memory of a block, in bytes.
        registers_per_thread: the least that is live at once; a tile above the limit spills.
    """

    shared_bytes: int
    registers_per_thread: int


def block_d(d: int) -> tuple[int, ...]:
    """The widths, in elements, of the tiles that hold rows of `d` elements side by side; powers of two, at least 16.

    One tile, the next power of two, unless two hold the rows in less: then padding to one would add at least a third
    to the work.

    Example:
        >>> block_d(128), block_d(200), block_d(384)
        ((128,), (256,), (256, 128))
    """
    whole = max(_MIN_BLOCK, 1 << (d - 1).bit_length())
    half = whole // 2
    rest = max(_MIN_BLOCK, 1 << (d - half - 1).bit_length()) if d > half else half
    return (half, rest) if half >= _MIN_BLOCK and half + rest < whole else (whole,)


def block_h(h: int) -> int:
    """The height, in latents, of the tile that holds all `h` of them: the next power of two, at least 64."""
    return max(_MIN_BLOCK_LATENT, 1 << (h - 1).bit_length())


def padded(kernel: str, size: int) -> tuple[int, ...]:
    """The tiles that hold what `kernel` holds whole, of `size` elements: d, or H in the bottleneck regime."""
    return (block_h(size),) if kernel in BOTTLENECK_KERNELS else block_d(size)


def config_key(kernel: str, size: int) -> str:
    """Under which key configs hold what `kernel` takes for a size: that is padded, or "any" in the chunked regime."""
    return "any" if kernel in CHUNK_KERNELS else str(sum(padded(kernel, size)))


def _rows(kernel: str, tile: Tile) -> int:
    """Rows of the accumulator, and of the first product."""
    return tile.block_h if kernel.startswith("weight_grad") else tile.block_n


def _tensor_core(capability: int, itemsize: int, rows: int) -> str:
    """The instruction family of the first product, which has `rows` rows: "mma", "wgmma" or "tcgen05"."""
    if rows >= 64 and capability // 10 == 9 and itemsize == 2:
        return "wgmma"
    if rows >= 64 and capability // 10 == 10:
        return "tcgen05"
    return "mma"


def resources(kernel: str, tile: AnyTile, block_d: tuple[int, ...], itemsize: int, capability: int) -> Resources:
    """What `kernel` needs with `tile`.

    Args:
        kernel: one of `KERNELS`.
        tile: its tile.
        block_d: widths of the tiles that hold a row, see the function `block_d`.
        itemsize: bytes of an element of x and W: 2 or 4. With 4 the larger of ieee and tf32 is returned.
        capability: compute capability, e.g. 90.
    """
    if isinstance(tile, GemmTile):
        return _gemm_resources(kernel, tile, itemsize, capability)
    if isinstance(tile, LatentTile):
        return _latent_resources(kernel, tile, itemsize, capability)
    consumers = tile.plain().num_warps
    weight_stationary = kernel.startswith("weight_grad")
    atomic = kernel == "weight_grad_atomic"
    rows = _rows(kernel, tile)
    if kernel in FEW_ROWS_KERNELS:
        kernel = "forward"
    stationary, streamed = {
        "forward": (tile.block_n, tile.block_h),
        "input_grad": (2 * tile.block_n, tile.block_h),
        "weight_grad": (tile.block_h, 2 * tile.block_n),
        "weight_grad_atomic": (tile.block_h, 2 * tile.block_n),
    }[kernel]
    width = sum(block_d)
    row_bytes = width * itemsize
    latent = tile.block_n * tile.block_h
    latent_tiles = 2 if weight_stationary else 1
    tensor_core = _tensor_core(capability, itemsize, rows)
    # of rows in two tiles tcgen05 keeps the first, whose product is waited for before the second's, a stage longer
    longer = streamed * (width - block_d[-1]) * itemsize if tensor_core == "tcgen05" else 0

    if tile.warp_specialize:  # the result leaves through shared memory
        scratch = rows * max(block_d) * itemsize if tensor_core == "wgmma" else 0
        shared = (stationary + tile.num_stages * streamed) * row_bytes + scratch + _BARRIER_BYTES
    elif itemsize == 4:
        # tf32 reads the streamed tile in two layouts through registers, unpipelined; ieee pipelines it, and stages the
        # latent
        copies = tile.num_stages + 1 if tensor_core == "tcgen05" else 2
        tf32 = ((2 if atomic else 1) * stationary + copies * streamed) * row_bytes + longer
        pipeline = max(1, tile.num_stages - 1) * streamed
        ieee = (stationary + pipeline) * row_bytes + (latent_tiles + atomic) * latent * itemsize
        shared = max(tf32, ieee)
    else:
        scratch = latent_tiles * latent * itemsize if tensor_core == "mma" and (rows < 128 or width > 128) else 0
        if atomic:
            # ā is kept for the second tile of x̄ while the first leaves
            kept, leaving = latent * itemsize, tile.block_n * max(block_d) * 4
            scratch = max(scratch, kept + leaving if len(block_d) > 1 else max(kept, leaving))
            if _tensor_core(capability, itemsize, tile.block_n) != tensor_core:
                scratch += stationary * row_bytes  # the product for x̄ reads W in another layout
        if tile.num_stages == 1:
            scratch = max(0, scratch - streamed * row_bytes)  # unpipelined, the streamed tile is dead by then
        if tensor_core == "tcgen05":
            scratch += _BARRIER_BYTES
        buffers = {"mma": max(1, tile.num_stages - 1), "wgmma": tile.num_stages, "tcgen05": tile.num_stages + 1}
        shared = (stationary + buffers[tensor_core] * streamed) * row_bytes + longer + scratch

    if not weight_stationary:  # tiles of b_enc are copied with those of W
        shared += tile.num_stages * tile.block_h * 4

    accumulator = rows * width / (32 * consumers)
    # warps beyond one for every 16 rows repeat the latent of others
    latent_registers = latent / (32 * min(consumers, rows // 16)) * (1 if kernel == "forward" else 2)
    if tensor_core == "tcgen05":  # accumulates in tensor memory, and moves one operand at a time into registers
        live = max(accumulator, latent_registers)
    else:
        live = accumulator + latent_registers
    return Resources(shared_bytes=shared, registers_per_thread=math.ceil(_ADDRESSING_REGISTERS + live))


def repeats(kernel: str, tile: Tile, block_d: tuple[int, ...], operands: str, capability: int) -> tuple[float, float]:
    """How many warps compute the same of the encoder's products, and of those that add to the result.

    Triton gives the warps to the rows of a product that another one reads, 16 rows a warp, be they fewer or not; or,
    where mma instructions make more columns than rows of the result, to columns, 8 a warp. `operands` is the dtype of
    `lookup`; products of "float32" do not use tensor cores.
    """
    rows, warps = _rows(kernel, tile), tile.plain().num_warps
    # tf32 is multiplied by wgmma as well, where there are rows enough
    family = _tensor_core(capability, 2 if operands == "tf32" and capability // 10 == 9 else ITEMSIZE[operands], rows)
    if operands == "float32" or family == "tcgen05":
        return 1.0, 1.0
    by_rows = max(1.0, 16 * warps / rows)
    if family == "wgmma":
        return by_rows, 1.0
    if rows >= min(block_d):
        return by_rows, by_rows
    latents = 2 * tile.block_n if kernel.startswith("weight_grad") else tile.block_h
    return max(1.0, 8 * warps / latents), 1.0


def pipelined(kernel: str, tile: Tile, operands: str, capability: int) -> bool:
    """Whether the streamed operand is copied to shared memory ahead of the step that multiplies it.

    As tf32, Triton 3.6 has it copied ahead for tcgen05 instructions alone. For wgmma and mma ones each step loads it
    into registers, and stores it to shared memory from there. `operands` is the dtype of `lookup`.
    """
    copied = operands != "tf32" or _tensor_core(capability, ITEMSIZE[operands], _rows(kernel, tile)) == "tcgen05"
    return copied and tile.num_stages > 1


def _gemm_resources(kernel: str, tile: GemmTile, itemsize: int, capability: int) -> Resources:
    """The operands of a step are staged, of `chunk_latent` those of two products: it makes a and h̄, where its other
    entry, `chunk_encode`, makes a alone.
    """
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    operands, results = {
        "chunk_encode": (m + n, 1),
        "chunk_latent": (2 * m + n, 2),
        "chunk_decode": (m + n, 1),
        "chunk_weight_grad": (m + n, 1),
        "bottleneck_decode": (m + n, 1),
        "bottleneck_weight_grad": (m + n, 1),
    }[kernel]
    buffers = tile.num_stages if capability // 10 in (9, 10) else max(1, tile.num_stages - 1)
    shared = buffers * operands * k * itemsize
    if _tensor_core(capability, itemsize, m) == "tcgen05":
        shared += _BARRIER_BYTES
    registers = math.ceil(_ADDRESSING_REGISTERS + results * m * n / (32 * tile.num_warps))
    return Resources(shared_bytes=shared, registers_per_thread=registers)


def _latent_resources(kernel: str, tile: LatentTile, itemsize: int, capability: int) -> Resources:
    """W and x (for ā, x and ō) are staged; `bottleneck_forward` then stages W again, beside h and a tile of y."""
    n, h, d, threads = tile.block_n, tile.block_h, tile.block_d, 32 * tile.num_warps
    streamed_rows = 2 * n if kernel == "bottleneck_latent_grad" else n

    def buffers(rows: int) -> int:
        unpipelined = itemsize == 2 and _tensor_core(capability, itemsize, rows) == "mma"
        return max(1, tile.num_stages - unpipelined)

    shared = buffers(h) * (h + streamed_rows) * d
    accumulator = h * streamed_rows
    if kernel == "bottleneck_forward":
        shared = max(shared, h * n + buffers(n) * h * d + n * d)
        accumulator = max(accumulator, n * d)
    barrier = _BARRIER_BYTES if capability // 10 == 10 else 0
    registers = math.ceil(_ADDRESSING_REGISTERS + accumulator / threads)
    return Resources(shared_bytes=shared * itemsize + barrier, registers_per_thread=registers)


def check_tile(kernel: str, tile: AnyTile, block_d: tuple[int, ...], itemsize: int, capability: int) -> None:
    """Refuse a tile that cannot run.

    Args:
        kernel: one of `KERNELS`.
        tile: the tile to check.
        block_d: widths of the tiles that hold a row.
        itemsize: bytes of an element of x and W: 2 or 4.
        capability: compute capability, one of `ARCHITECTURES`.

    Raises:
        ValueError: the kernel or the architecture is unknown, a block is not a power of two of at least 16, there is no
            warp-specialised form, or the tile needs more shared memory or registers than there are.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel: {kernel!r} is none of {', '.join(KERNELS)}")
    if capability not in ARCHITECTURES:
        known = ", ".join(f"sm_{known}" for known in ARCHITECTURES)
        raise ValueError(f"capability: sm_{capability} is none of {known}")
    blocks = [(name, size) for name, size in vars(tile).items() if name.startswith("block_")]
    if isinstance(tile, Tile):
        blocks += [("block_d", width) for width in block_d]
    for name, block in blocks:
        if block < _MIN_BLOCK or block & (block - 1):
            raise ValueError(f"{kernel}: {name} must be a power of two of at least {_MIN_BLOCK}, got {block}")
    if tile.num_warps not in (1, 2, 4, 8, 16):
        raise ValueError(f"{kernel}: num_warps must be 1, 2, 4, 8 or 16, got {tile.num_warps}")
    if isinstance(tile, Tile) and tile.warp_specialize:
        if capability not in _WARP_SPECIALIZED.get(kernel, ()) or itemsize != 2:
            raise ValueError(f"{kernel}: no warp-specialised form on sm_{capability} with itemsize={itemsize}")
        if _rows(kernel, tile) < 128 or tile.num_warps != 4:
            raise ValueError(f"{kernel}: warp specialisation takes 4 warps and 128 rows or more at a time, got {tile}")
    if isinstance(tile, GemmTile):
        rows = tile.block_m
    else:
        rows = tile.block_h if isinstance(tile, LatentTile) else _rows(kernel, tile)
    # unpipelined, the streamed tile is kept in two layouts, except where wgmma reads both from one
    fewest_stages = 1 if _tensor_core(capability, itemsize, rows) == "wgmma" else 2
    if tile.num_stages < fewest_stages:
        raise ValueError(f"{kernel}: num_stages must be at least {fewest_stages} for {tile} on sm_{capability}")
    width = sum(block_d)
    most = _MAX_BLOCK_D_FEW_ROWS if kernel in FEW_ROWS_KERNELS else _MAX_BLOCK_D
    if isinstance(tile, Tile) and width > most:
        raise ValueError(f"{kernel}: rows of more than {most} elements do not fit on chip, got {width}")

    limits = ARCHITECTURES[capability]
    needs = resources(kernel, tile, block_d, itemsize, capability)
    registers = min(limits.registers_per_thread, limits.registers_per_sm // (32 * tile.num_warps))
    if needs.shared_bytes > limits.shared_bytes:
        raise ValueError(
            f"{kernel}: {tile} needs {needs.shared_bytes} bytes of shared memory at block_d={width}, "
            f"itemsize={itemsize}; sm_{capability} has {limits.shared_bytes}"
        )
    if needs.registers_per_thread > registers:
        raise ValueError(
            f"{kernel}: {tile} needs at least {needs.registers_per_thread} registers a thread at block_d={width}, "
            f"itemsize={itemsize}; sm_{capability} has {registers}"
        )


@functools.cache
def _config(file: Path) -> dict[str, Any] | None:
    """A config file: "tiles", "candidates" and "efficiency", kernel → operands → `config_key` → a tile, several, or a
    fraction. None where there is none, or none that may be used, which a warning says.
    """
    if not file.is_file():
        return None
    try:
        config: dict[str, Any] = json.loads(file.read_text())
        if config["status"].startswith(NOT_MEASURED):
            raise ValueError(f"its status is {config['status']!r}")
        for table in (config["tiles"], config.get("efficiency", {})):
            for by_operands in table.values():
                for by_key in by_operands.values():
                    by_key.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{file}: tiles not used: {type(error).__name__}: {error}", stacklevel=2)
        return None
    return config


class Packaged(NamedTuple):
    """A tile of a packaged file, for a padded `width` of d, in the bottleneck regime of H, or for ``"any"``.

    Its operands are of 2 or 4 bytes an element, or ``"tf32"``: float32 that is multiplied as tf32.

    A `candidate` is not in use: it is for tuning to measure beside the tile that is.
    """

    kernel: str
    capability: int
    operands: str
    width: str
    tile: AnyTile
    candidate: bool

    @property
    def itemsize(self) -> int:
        """Bytes of an element of x and W."""
        return 2 if self.operands == "2" else 4


def packaged() -> list[Packaged]:
    """Every tile of every packaged file."""
    found = []
    for capability in ARCHITECTURES:
        config = _config(_CONFIGS / f"sm{capability}.json") or {}
        for section in ("tiles", "candidates"):
            for kernel, by_operands in config.get(section, {}).items():
                for operands, by_width in by_operands.items():
                    for width, entry in by_width.items():
                        for fields in entry if section == "candidates" else [entry]:
                            key = (kernel, capability, operands, width)
                            found.append(Packaged(*key, _TILES[kernel](*fields), section == "candidates"))
    return found


@functools.cache
def _gpu(capability: int) -> str | None:
    """How the present GPU's config file is called, if there is a GPU and it is planned for as `capability`."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    known = max((c for c in ARCHITECTURES if c <= 10 * major + minor), default=None)
    return config_name(torch.cuda.get_device_name()) if known == capability else None


def operands(dtype: str, precision: str) -> str:
    """The `dtype` of `lookup` for tensors of a dtype: fp32 products in `precision`, "ieee" or "tf32"."""
    return "tf32" if (dtype, precision) == ("float32", "tf32") else dtype


def listed(dtype: str) -> str:
    """What a config lists tiles of the `dtype` of `lookup` under."""
    return _OPERANDS[dtype][-1]


def config_name(gpu: str) -> str:
    """The file name, without its suffix, of the tiles of a GPU.

    Example:
        >>> config_name("NVIDIA H100 80GB HBM3")
        'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def _tables(
    table: str, kernel: str, dtype: str, capability: int, user_dir: str
) -> Iterator[tuple[dict[str, Any], str]]:
    """key → entry of every config that has a `table` for the kernel and dtype, and which config: the user's first, for
    the exact GPU and for the architecture, then the packaged ones likewise.
    """
    names = [name for name in (_gpu(capability), f"sm{capability}") if name is not None]
    users = [Path(user_dir, f"{name}.json") for name in names] if user_dir else []
    sources = [(f"user config {file}", file) for file in users]
    sources += [(f"configs/{name}.json", _CONFIGS / f"{name}.json") for name in names]
    for source, file in sources:
        by_operands = (_config(file) or {}).get(table, {}).get(kernel, {})
        yield {key: entry for name in _OPERANDS[dtype] for key, entry in by_operands.get(name, {}).items()}, source


def _entries(kernel: str, size: int, dtype: str, capability: int, user_dir: str) -> Iterator[tuple[Any, str]]:
    """The tiles that configs hold for the size; after them those for wider rows, which fit these too."""
    wanted = config_key(kernel, size)
    tables = list(_tables("tiles", kernel, dtype, capability, user_dir))
    yield from ((entries[wanted], source) for entries, source in tables if wanted in entries)
    for entries, source in tables:
        wider = (key for key in entries if wanted.isdigit() and key.isdigit() and int(key) > int(wanted))
        if (key := min(wider, key=int, default=None)) is not None:
            yield entries[key], f"{source}, block_d {key}"


def _shrunk(kernel: str, tile: AnyTile) -> AnyTile | None:
    """The next smaller tile: a shorter pipeline, then half of the larger block; what has to hold all latents does."""
    if tile.num_stages > 2:
        return dataclasses.replace(tile, num_stages=tile.num_stages - 1)
    sides = {Tile: ("block_n", "block_h"), GemmTile: ("block_m", "block_n"), LatentTile: ("block_n", "block_d")}
    larger = max(sides[type(tile)], key=lambda side: getattr(tile, side))
    if getattr(tile, larger) == _MIN_BLOCK:
        if not kernel.startswith("bottleneck_latent"):
            return None
        larger = "block_h"
    size = getattr(tile, larger)
    return None if size == _MIN_BLOCK else dataclasses.replace(tile, **{larger: size // 2})


def _guesses(kernel: str, size: int, dtype: str, capability: int) -> Iterator[AnyTile]:
    """Tiles to try, best first."""
    if kernel in FEW_ROWS_KERNELS:
        # bound by memory: as much of W as possible on its way
        most = int(kernel.rpartition("_")[2])
        for rows in (rows for rows in (64, 32, 16) if rows <= most):
            # two stages are one buffer where mma instructions read the tiles: nothing is on its way while they do
            for latents, stages in [*itertools.product((64, 32, 16), (4, 3)), (64, 2), (32, 2), (16, 2)]:
                tiles = [Tile(rows, latents, warps, stages) for warps in (8, 4, 2)]
                # with more registers of y the loops spill, the statistics' first
                most_of_y = 192 if latents == 16 and ITEMSIZE[dtype] == 2 else 64
                tiles = [t for t in tiles if t.num_warps == 8 or rows * size <= most_of_y * 32 * t.num_warps]
                yield min(tiles, key=lambda t: sum(repeats(kernel, t, padded(kernel, size), dtype, capability)))
        return
    tile: AnyTile | None = Tile(64, 128, 8, 3) if kernel.startswith("weight_grad") else Tile(128, 64, 8, 3)
    if _TILES[kernel] is GemmTile:
        tile = GemmTile(128, 128, 32, 8, 3)
    elif _TILES[kernel] is LatentTile:
        tile = LatentTile(64, sum(padded(kernel, size)), 64, 8, 3)
    if not (_CONFIGS / f"sm{capability}.json").is_file():  # these multiply with the instruction of 8.0
        tile = next((_TILES[kernel](*entry) for entry, _ in _entries(kernel, size, dtype, 80, "")), tile)
    while tile is not None:
        if isinstance(tile, Tile) and sum(repeats(kernel, tile, padded(kernel, size), dtype, capability)) > 2:
            yield dataclasses.replace(tile, num_warps=max(2, _rows(kernel, tile) // 16))
        yield tile
        tile = _shrunk(kernel, tile)


@functools.cache
def lookup(kernel: str, size: int, dtype: str, capability: int, user_dir: str = "") -> tuple[AnyTile, str]:
    """The tile to launch `kernel` with.

    Args:
        kernel: one of `KERNELS`.
        size: what the kernel holds whole: d, or H in the bottleneck regime; the chunked regime's kernels have one tile
            for every size.
        dtype: of x and W: "bfloat16", "float16" or "float32"; "tf32" for float32 that is multiplied as tf32.
        capability: compute capability, one of `ARCHITECTURES`.
        user_dir: `Settings.config_dir` of the settings that count; empty for none.

    Returns:
        The tile, and where it comes from, the first of: a user's config in `user_dir`, the packaged config
        of the present GPU by its name, the packaged config of the architecture; where none has the width, an entry for
        wider rows, then named, in the same order; a heuristic that starts from a large tile, for an architecture
        without a packaged config from the tile of 8.0, and shrinks it until it fits. A file is read once in a process.

    Raises:
        ValueError: the dtype is another one, or no tile fits the architecture.
    """
    if dtype not in ITEMSIZE:
        raise ValueError(f"dtype: expected one of {', '.join(ITEMSIZE)}, got {dtype}")
    itemsize, widths = ITEMSIZE[dtype], padded(kernel, size)
    for entry, source in _entries(kernel, size, dtype, capability, user_dir):
        try:
            tile: AnyTile = _TILES[kernel](*entry)
            if isinstance(tile, Tile) and tile.warp_specialize and size * itemsize % 16:
                tile, source = tile.plain(), f"{source}, not warp-specialised: TMA reads rows of a multiple of 16 bytes"
            check_tile(kernel, tile, widths, itemsize, capability)
            return tile, source
        except (TypeError, ValueError) as error:
            warnings.warn(
                f"{source}: {kernel}, itemsize {itemsize}, size {sum(widths)}: not used: {error}", stacklevel=3
            )

    refusal: ValueError | None = None
    for tile in _guesses(kernel, size, dtype, capability):
        try:
            check_tile(kernel, tile, widths, itemsize, capability)
            return tile, "heuristic"
        except ValueError as error:
            refusal = error
    assert refusal is not None
    raise refusal


@functools.cache
def measured_efficiency(kernel: str, size: int, dtype: str, capability: int, user_dir: str) -> tuple[float, str] | None:
    """The fraction of the device's peak that a config says `kernel` reached, and where it says so; `tiedfused tune`
    writes it. Arguments and the order of the configs are those of `lookup`.
    """
    key = config_key(kernel, size)
    for entries, source in _tables("efficiency", kernel, dtype, capability, user_dir):
        entry = entries.get(key)
        if entry is None:
            continue
        if isinstance(entry, float) and entry > 0:
            return entry, source
        warnings.warn(f"{source}: {kernel}: efficiency not used: got {entry!r}; expected a fraction", stacklevel=3)
    return None
