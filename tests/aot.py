"""Compile the Triton kernels for GPUs that are not present, exactly as their launchers would.

A launcher runs on meta tensors with its kernels' launches intercepted: arguments, and with them divisibility, constants
and options, are the ones a real launch specialises on. As a program it prints what every packaged tile compiles to:

    PYTHONPATH=. python tests/aot.py > docs/kernels.md
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from tiedfused import LatentStats
from tiedfused._backends.triton.bottleneck_forward import bottleneck_forward
from tiedfused._backends.triton.bottleneck_latent import bottleneck_latent
from tiedfused._backends.triton.chunk_decode import chunk_decode
from tiedfused._backends.triton.chunk_latent import chunk_latent
from tiedfused._backends.triton.chunk_weight_grad import chunk_weight_grad
from tiedfused._backends.triton.forward import forward
from tiedfused._backends.triton.input_grad import input_grad
from tiedfused._backends.triton.stats import partial_stats
from tiedfused._backends.triton.weight_grad import weight_grad
from tiedfused.activations import get_activation
from tiedfused.regimes.stream import PRODUCTS
from tiedfused.tiles import BOTTLENECK_KERNELS, STREAM_KERNELS, AnyTile, GemmTile, LatentTile, Packaged, Tile, packaged

DTYPES = {2: torch.bfloat16, 4: torch.float32}
# the others of the table are made of the same parts
ACTIVATIONS = ("relu", "identity", "elu", "gelu", "silu", "sigmoid", "tanh")
# kernels that apply f
ACTIVATED = (*STREAM_KERNELS, "chunk_encode", "chunk_latent", *BOTTLENECK_KERNELS[:3])
# the bottleneck regime's last two products are kernels of the chunked regime
_LAUNCHERS = {"bottleneck_weight_grad": "chunk_weight_grad", "bottleneck_decode": "chunk_decode"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What ptxas and the Triton compiler report for one kernel.

    Args:
        name: the kernel's function name.
        registers: per thread.
        stack_bytes: per thread; spilled registers live there.
        shared_bytes: per block.
        wgmma, mma, tcgen05: how many tensor-core instructions of each family the PTX holds.
        tma: how many TMA copies the PTX holds.
        products: how many groups of wgmma instructions the PTX holds, of a product each.
        specialized: whether groups of warps run different code.
        warps: of a block.
        ttgir: the kernel after layout assignment and pipelining.
        cubin: the machine code.
    """

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int
    tcgen05: int
    tma: int
    products: int
    specialized: bool
    warps: int
    ttgir: str
    cubin: bytes = dataclasses.field(repr=False)

    @functools.cached_property
    def _sass(self) -> str:
        # instructions alone, without an analysis of their branches: cuobjdump --dump-sass takes 1.4 times as long
        return _dump(self.cubin, "nvdisasm", "--print-code", "--no-dataflow")

    @property
    def loop_spills(self) -> int:
        """How many instructions inside loops move registers to and from the stack."""
        return len(_in_loops(self._sass, r"\b(STL|LDL)\b")) if self.stack_bytes else 0

    @property
    def serialized(self) -> bool:
        """Whether the wgmma instructions of a product wait for each other, which ptxas has them do where ordinary
        instructions write their accumulator meanwhile. Else they are one group, which the last of them ends.
        """
        return self.wgmma > 0 and len(re.findall(r"HGMMA.*gsb0", self._sass)) > self.products

    @property
    def loads_in_loops(self) -> bool:
        """Whether loops load tiles into registers, where they would else copy them to shared memory ahead."""
        loops = re.finditer(r"^( *)(?:%\S+ = )?scf\.for .*?^\1\}", self.ttgir, re.MULTILINE | re.DOTALL)
        return any(re.search(r"tt\.load [^\n]*tensor<\d+x\d+x", loop[0]) for loop in loops)

    @property
    def step_flops(self) -> int:
        """Of the tensor-core instructions that a program executes in its loops, each taken once: HGMMA.64xNxK of four
        warps; HMMA.16816 and HMMA.1688 of one.
        """
        wgmma = (m.groups() for m in _in_loops(self._sass, r"HGMMA\.64x(\d+)x(\d+)"))
        mma = (m[1] for m in _in_loops(self._sass, r"HMMA\.168(16|8)\b"))
        flops = sum(2 * 64 * int(n) * int(k) // 4 for n, k in wgmma) + sum(2 * 16 * 8 * int(k) for k in mma)
        return self.warps * flops


@contextlib.contextmanager
def _record_launches() -> Iterator[list[tuple[JITFunction, dict[str, Any]]]]:
    launches: list[tuple[JITFunction, dict[str, Any]]] = []

    def record(kernel: JITFunction, *, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> None:
        launches.append((kernel, arguments))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def _compile(kernel: JITFunction, arguments: dict[str, Any], capability: int) -> Compiled:
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    arguments = {**arguments, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    options, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialization, options)
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=target, options=options.__dict__
    )
    usage = _dump(compiled.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    ptx = compiled.asm["ptx"]
    return Compiled(
        name=kernel.__name__,
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        tcgen05=ptx.count("tcgen05.mma"),
        tma=ptx.count("cp.async.bulk.tensor"),
        products=ptx.count("wgmma.commit_group"),
        specialized="ttg.warp_specialize(" in compiled.asm["ttgir"] and "setmaxnreg" in ptx,
        warps=arguments["num_warps"],
        ttgir=compiled.asm["ttgir"],
        cubin=compiled.asm["cubin"],
    )


def _dump(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / tool, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _in_loops(sass: str, pattern: str) -> list[re.Match[str]]:
    """Instructions that match, in any loop: what lies between a branch backwards and its target."""
    code: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for label, instruction in re.findall(r"^(\.L_\w+):|/\*[0-9a-f]{4,}\*/ +(.*?);", sass, re.MULTILINE):
        if label:
            labels[label] = len(code)
            continue
        if (to := re.search(r"\bBRA\b.*\((\.L_\w+)\)", instruction)) and labels.get(to[1], len(code)) < len(code):
            loops.append((labels[to[1]], len(code)))
        code.append(instruction)
    inside = (text for at, text in enumerate(code) if any(first <= at <= last for first, last in loops))
    return [match for text in inside if (match := re.search(pattern, text))]


@functools.cache
def compile_kernel(
    kernel: str,
    tile: AnyTile,
    d: int,
    dtype: torch.dtype,
    capability: int,
    *,
    activation: str = "relu",
    output_activation: str = "identity",
    split: int = 1,
    precision: str = "tf32",
    rows: int = 4096,
    latents: int = 4096,
    bias: bool = True,
    stats: bool = False,
    first: bool = False,
) -> list[Compiled]:
    """Every kernel that the launcher of `kernel` launches, in launch order.

    The chunked regime's decoder adds to the sum of an earlier chunk, or is the `first` of several.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight = empty(rows, d), empty(latents, d)
    bias_enc, bias_dec = (empty(latents), empty(d)) if bias else (None, None)
    fp32 = torch.float32
    per_row = (empty(rows, dtype=fp32), empty(rows, dtype=torch.int64))
    per_latent = (empty(latents, dtype=fp32), empty(latents, dtype=torch.int64))
    penalties = (per_row[0], per_latent[0]) if stats else ()
    latent_stats = LatentStats(*per_row, *per_latent) if stats else None
    common: dict[str, Any] = {
        "activation": get_activation(activation),
        "tile": tile,
        "split": split,
        "precision": precision,
    }
    launch: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(
            x,
            weight,
            bias_enc,
            bias_dec,
            output_activation=get_activation(output_activation),
            stats=latent_stats,
            rows_at_once=rows,
            **common,
        ),
        "input_grad": lambda: input_grad(x, x, weight, bias_enc, *penalties, **common),
        "weight_grad": lambda: weight_grad(x, x, weight, bias_enc, *penalties, **common),
        "weight_grad_atomic": lambda: weight_grad(
            x, x, weight, bias_enc, *penalties, grad_x=empty(rows, d, dtype=fp32), **common
        ),
    }
    if isinstance(tile, GemmTile):
        latent, gemm = empty(rows, latents), {"tile": tile, "precision": precision}
        partial = empty(split, rows, d, dtype=torch.float32) if split > 1 else empty(rows, d)
        partial_weight = empty(split, latents, d, dtype=torch.float32) if split > 1 else empty(latents, d)

        def launch_chunk_latent() -> None:
            f = get_activation(activation)
            sums = empty(-(-rows // tile.block_m), latents, dtype=fp32)
            chunk_latent(
                x,
                x,
                weight,
                bias_enc,
                *penalties,
                h=latent,
                grad_a=latent,
                grad_bias_enc=sums,
                activation=f,
                **gemm,
            )

        def launch_chunk_encode() -> None:
            parts = partial_stats(rows, latents, 8, 8, x.device) if stats else None
            chunk_latent(
                x, None, weight, bias_enc, h=latent, stats=parts, activation=get_activation(activation), **gemm
            )

        launch = {
            "chunk_encode": launch_chunk_encode,
            "chunk_latent": launch_chunk_latent,
            "chunk_decode": lambda: chunk_decode(
                latent,
                weight,
                bias_dec,
                earlier=None if first else partial if split > 1 else empty(rows, d, dtype=torch.float32),
                out=empty(rows, d, dtype=torch.float32) if first and split == 1 else partial,
                output_activation=get_activation(output_activation),
                split=split,
                **gemm,
            ),
            "chunk_weight_grad": lambda: chunk_weight_grad(
                latent, latent, x, x, earlier=None, out=partial_weight, split=split, **gemm
            ),
        }
    if isinstance(tile, LatentTile):
        launch = {
            "bottleneck_forward": lambda: bottleneck_forward(
                x,
                weight,
                bias_enc,
                bias_dec,
                activation=get_activation(activation),
                output_activation=get_activation(output_activation),
                tile=tile,
                precision=precision,
                stats=latent_stats,
            ),
            "bottleneck_latent": lambda: bottleneck_latent(x, None, weight, bias_enc, **common),
            "bottleneck_latent_grad": lambda: bottleneck_latent(x, x, weight, bias_enc, *penalties, **common),
        }
    with _record_launches() as launches:
        launch[_LAUNCHERS.get(kernel, kernel)]()
    return [_compile(function, arguments, capability) for function, arguments in launches]


def shared_copies(ttgir: str, rows: int, columns: int) -> int:
    """How many shared-memory allocations hold [rows, columns] tiles, or their transpose; a ring of buffers is one."""
    shapes = re.findall(r"ttg\.local_alloc[^\n]*-> !ttg\.memdesc<(?:\d+x)??(\d+)x(\d+)x[a-z]", ttgir)
    return sum(sorted(map(int, shape)) == sorted((rows, columns)) for shape in shapes)


def dtype_name(entry: Packaged) -> str:
    """What its kernel is compiled for, as `tiedfused.tiles.lookup` takes it."""
    return {"2": "bfloat16", "4": "float32"}.get(entry.operands, entry.operands)


def key(entry: Packaged) -> str:
    """The cells that name a packaged tile in the table of its architecture."""
    tile = entry.tile
    fields = dataclasses.asdict(tile)
    blocks = " × ".join(str(size) for name, size in fields.items() if name.startswith("block_"))
    specialized = ", warp-specialised" * fields.get("warp_specialize", False)
    cells = [entry.kernel, entry.width, dtype_name(entry), blocks]
    cells += [str(tile.num_warps), str(tile.num_stages), ("candidate" if entry.candidate else "in use") + specialized]
    return " | ".join(cells)


def precision_of(entry: Packaged) -> str:
    """Of fp32 products: tf32, except of tiles that are not for it, since others are."""
    own = (entry.kernel, entry.capability, "tf32") in {other[:3] for other in packaged()}
    return "ieee" if entry.operands == "4" and own else "tf32"


def executed(entry: Packaged, compiled: Compiled) -> float | None:
    """What the tensor cores execute in the loops over what the tiles need.

    None without tensor cores, or by tcgen05, which no warp executes.
    """
    if compiled.tcgen05 or precision_of(entry) == "ieee":
        return None
    tile, kernel = entry.tile, entry.kernel
    if isinstance(tile, Tile):
        return compiled.step_flops / (2 * sum(PRODUCTS[kernel]) * tile.block_n * tile.block_h * int(entry.width))
    products = 2 if kernel in ("chunk_latent", "chunk_weight_grad", "bottleneck_weight_grad") else 1
    if isinstance(tile, GemmTile):
        return compiled.step_flops / (2 * products * tile.block_m * tile.block_n * tile.block_k)
    products = 1 if kernel == "bottleneck_latent" else 2
    return compiled.step_flops / (2 * products * tile.block_n * tile.block_h * tile.block_d)


def compile_packaged(entry: Packaged, activation: str = "relu") -> Compiled:
    """A packaged tile, for what the page says it is compiled for."""
    d = int(entry.width) if entry.kernel in STREAM_KERNELS else 768
    latents = int(entry.width) if entry.kernel in BOTTLENECK_KERNELS else 4096
    dtype = DTYPES[entry.itemsize]
    (compiled,) = compile_kernel(
        entry.kernel,
        entry.tile,
        d,
        dtype,
        entry.capability,
        activation=activation,
        latents=latents,
        precision=precision_of(entry),
    )
    return compiled


def numbers(entry: Packaged) -> str:
    """The cells of what a packaged tile compiles to."""
    c = compile_packaged(entry)
    by_activation = {f: compile_packaged(entry, f) for f in ACTIVATIONS} if entry.kernel in ACTIVATED else {"": c}
    worst = max(by_activation, key=lambda f: by_activation[f].stack_bytes)
    spilled = by_activation[worst].stack_bytes
    in_loops = max(of.loop_spills for of in by_activation.values())
    times = executed(entry, c)
    cells = [c.registers, f"{spilled} ({worst})" if worst and spilled else spilled, in_loops]
    cells.append("" if times is None else f"{times:.2f}")
    cells.append(f"{c.shared_bytes / 1024:.0f}")
    return " | ".join(map(str, [*cells, c.wgmma, c.tcgen05, c.mma, c.tma]))


def _markdown() -> Iterator[str]:
    yield "# What every kernel compiles to"
    yield ""
    yield "Generated by `PYTHONPATH=. python tests/aot.py > docs/kernels.md`, without a GPU: nothing here was measured."
    yield f"Triton {triton.__version__}, f relu, biases, N and H multiples of every block; float32 with tf32 products,"
    yield "except where the table has tiles for tf32 as well."
    yield f"Spills in bytes a thread, and instructions in loops that move them: the most of f {', '.join(ACTIVATIONS)}."
    yield "Executed: FLOPs of the tensor instructions in loops over those that the tile needs, where warps issue them:"
    yield "Triton gives warps to the rows of a product that feeds another one, 16 each; fewer, and warps repeat others."
    yield "In no kernel of the page do the wgmma instructions of a product wait for each other; the tests assert it."
    yield "Shared memory in KiB a block; wgmma, tcgen05, mma, TMA: instructions in the PTX."
    yield "A block: rows of x × of W (bottleneck: × columns of both), or of a product rows × columns × step of its sum."
    yield "The size is d, or H in the bottleneck regime, whose kernels, like the chunked ones, are compiled for d 768."
    yield "A candidate is not in use: tuning may measure it beside the tile that is."
    with ProcessPoolExecutor() as pool:
        entries = packaged()
        rows = [f"| {key(entry)} | {cells} |" for entry, cells in zip(entries, pool.map(numbers, entries), strict=True)]
    for capability in sorted({entry.capability for entry in entries}):
        yield ""
        yield f"## Compute capability {capability / 10}"
        yield ""
        yield (
            "| kernel | size | dtype | block | warps | stages | status "
            "| registers | spills | in loops | executed | shared | wgmma | tcgen05 | mma | TMA |"
        )
        yield "|---|--:|---|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
        yield from (row for entry, row in zip(entries, rows, strict=True) if entry.capability == capability)


if __name__ == "__main__":
    for line in _markdown():
        print(line, flush=True)
