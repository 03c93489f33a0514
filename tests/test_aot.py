"""Every kernel with every packaged tile compiles, fits, and stays as fused as it is meant to be; no GPU needed."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler; run without it", allow_module_level=True)

import triton
from aot import (
    ACTIVATED,
    DTYPES,
    Compiled,
    compile_kernel,
    compile_packaged,
    dtype_name,
    executed,
    key,
    precision_of,
    shared_copies,
)

from tiedfused import tiles
from tiedfused.activations import activation_names
from tiedfused.regimes.stream import PRODUCTS
from tiedfused.tiles import (
    ARCHITECTURES,
    BOTTLENECK_KERNELS,
    CHUNK_KERNELS,
    FEW_ROWS_KERNELS,
    KERNELS,
    STREAM_KERNELS,
    AnyTile,
    GemmTile,
    LatentTile,
    Packaged,
    Tile,
    block_d,
    check_tile,
    lookup,
    packaged,
    repeats,
    resources,
)

pytestmark = pytest.mark.aot

PACKAGED = (80, 90, 100)
WIDTHS = (16, 32, 64, 128, 192, 256, 384, 512)
# the most that a packaged tile may spill, in bytes a thread, in epilogues that is (64 numbers of a and of h̄ in
# chunk_latent with gelu), and the most instructions of its loops that move them
SPILLED_BYTES, LOOP_SPILLS = 352, 10
SMALL = Tile(block_n=32, block_h=64, num_warps=4, num_stages=2)
PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"


def is_headline(kernel: str, itemsize: int, width: int) -> bool:
    return itemsize == 2 and 64 <= width <= 256


def assert_fits(compiled: Compiled, kernel: str, tile: AnyTile, d: int, itemsize: int, capability: int) -> None:
    modelled = resources(kernel, tile, block_d(d), itemsize, capability)
    assert compiled.shared_bytes <= ARCHITECTURES[capability].shared_bytes
    assert compiled.shared_bytes <= 1.03 * modelled.shared_bytes


@pytest.mark.parametrize(
    "entry",
    [entry for entry in packaged() if entry.kernel in STREAM_KERNELS],
    ids=lambda e: f"{e.kernel}-{e.capability}-{e.operands}-{e.width}",
)
def test_packaged_tile(entry: Packaged) -> None:
    kernel, capability, _, _, tile, candidate = entry
    assert isinstance(tile, Tile)
    width, itemsize, dtype = int(entry.width), entry.itemsize, DTYPES[entry.itemsize]
    check_tile(kernel, tile, block_d(width), itemsize, capability)
    if not candidate:
        found = lookup(kernel, width, dtype_name(entry), capability)
        assert found == (tile, f"configs/sm{capability}.json")
    (compiled,) = compile_kernel(kernel, tile, width, dtype, capability, precision=precision_of(entry))
    assert_fits(compiled, kernel, tile, width, itemsize, capability)
    assert (compiled.mma + compiled.wgmma + compiled.tcgen05 > 0) == (precision_of(entry) == "tf32")
    assert not compiled.serialized
    assert_repeats_as_modelled(entry, compiled)
    assert compiled.specialized == tile.warp_specialize
    assert (compiled.tma > 0) == tile.warp_specialize
    operands = tiles.operands(dtype_name(entry), precision_of(entry))
    assert compiled.loads_in_loops == (not tiles.pipelined(kernel, tile, operands, capability))
    if itemsize == 2:
        modelled = resources(kernel, tile, block_d(width), itemsize, capability)
        assert modelled.shared_bytes <= 1.35 * compiled.shared_bytes + 8 * 1024  # where no latent passes through it
        assert_one_copy_of_weight(compiled, kernel, tile, width)
    assert_page_says(entry, compiled)
    if is_headline(kernel, itemsize, width):
        assert compiled.stack_bytes <= (48 if capability == 80 else 16)
        if capability == 90:
            assert compiled.wgmma > 0
            assert compiled.mma == 0


def assert_repeats_as_modelled(entry: Packaged, compiled: Compiled) -> None:
    """What the plan counts, and nothing where d is small enough for every warp to have rows of its own."""
    found = executed(entry, compiled)
    if found is None or entry.kernel == "weight_grad_atomic":  # its product for x̄ has other rows
        return
    width, operands = int(entry.width), tiles.operands(dtype_name(entry), precision_of(entry))
    times = repeats(entry.kernel, entry.tile, block_d(width), operands, entry.capability)  # type: ignore[arg-type]
    products = PRODUCTS[entry.kernel]
    assert found * sum(products) == pytest.approx(sum(count * by for count, by in zip(products, times, strict=True)))
    if width <= 256:
        assert found == 1


@functools.cache
def page() -> dict[tuple[str, str], list[str]]:
    """(capability, `key` of a tile) → the other cells of its row, in the order of the page."""
    sections = re.split(r"^## Compute capability ([\d.]+)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    rows = [
        (capability, row.strip("| ").split(" | "))
        for capability, table in zip(sections[::2], sections[1::2], strict=True)
        for row in table.strip().splitlines()[2:]
    ]
    return {(capability, " | ".join(cells[:7])): cells[7:] for capability, cells in rows}


def assert_page_says(entry: Packaged, compiled: Compiled) -> None:
    """Of the Triton that made it: another one's registers differ."""
    if f"Triton {triton.__version__}," in PAGE.read_text():
        registers, spilled, _, _, shared, *instructions = page()[str(entry.capability / 10), key(entry)]
        assert (int(registers), shared) == (compiled.registers, f"{compiled.shared_bytes / 1024:.0f}")
        assert list(map(int, instructions)) == [compiled.wgmma, compiled.tcgen05, compiled.mma, compiled.tma]
        assert int(spilled.split()[0]) >= compiled.stack_bytes


def test_page_lists_every_packaged_tile() -> None:
    """Whoever changes a config or adds a kernel regenerates the page."""
    assert list(page()) == [(str(e.capability / 10), key(e)) for e in sorted(packaged(), key=lambda e: e.capability)]


def test_no_packaged_tile_spills() -> None:
    """With any f, as the page has it."""
    for tile, (_, spilled, in_loops, *_) in page().items():
        assert int(spilled.split()[0]) <= SPILLED_BYTES, tile
        assert int(in_loops) <= LOOP_SPILLS, tile


@pytest.mark.parametrize(
    "entry",
    [e for e in packaged() if e.itemsize == 2 and e.kernel in ACTIVATED],
    ids=lambda e: f"{e.kernel}-{e.capability}-{e.width}",
)
def test_packaged_tile_with_gelu(entry: Packaged) -> None:
    """Of all activations the one that takes the most registers."""
    compiled = compile_packaged(entry, "gelu")
    assert compiled.loop_spills <= LOOP_SPILLS
    assert compiled.stack_bytes <= SPILLED_BYTES


@pytest.mark.parametrize("kernel", CHUNK_KERNELS)
@pytest.mark.parametrize("capability", [*PACKAGED, 89])
@pytest.mark.parametrize("operands", ["bfloat16", "tf32"])
@pytest.mark.parametrize("half", [False, True], ids=["whole", "half"])
def test_chunk_kernel(kernel: str, capability: int, operands: str, half: bool) -> None:
    """Also with half of the columns, as the plan may take it."""
    tile, source = lookup(kernel, 768, operands, capability)
    assert isinstance(tile, GemmTile)
    assert source == ("heuristic" if capability == 89 else f"configs/sm{capability}.json")
    if half:
        tile = dataclasses.replace(tile, block_n=tile.block_n // 2)
    dtype = torch.float32 if operands == "tf32" else torch.bfloat16
    (compiled,) = compile_kernel(kernel, tile, 768, dtype, capability, first=half)
    modelled = resources(kernel, tile, block_d(768), dtype.itemsize, capability)
    assert compiled.shared_bytes <= min(ARCHITECTURES[capability].shared_bytes, 1.03 * modelled.shared_bytes)
    assert compiled.mma + compiled.wgmma + compiled.tcgen05 > 0
    assert compiled.loop_spills == 0
    assert compiled.stack_bytes <= SPILLED_BYTES
    assert not compiled.serialized
    if capability == 90:
        assert compiled.wgmma > 0
        assert compiled.mma == 0


@pytest.mark.parametrize("kernel", ["chunk_encode", "chunk_latent"])
@pytest.mark.parametrize("activation", ["gelu", "tanh", "softplus"])
def test_chunk_kernels_of_any_activation_do_not_spill_in_their_loops(kernel: str, activation: str) -> None:
    tile, _ = lookup(kernel, 768, "bfloat16", 90)
    (compiled,) = compile_kernel(kernel, tile, 768, torch.bfloat16, 90, activation=activation)
    assert compiled.loop_spills == 0
    assert compiled.stack_bytes <= SPILLED_BYTES


@pytest.mark.parametrize("kernel", CHUNK_KERNELS)
def test_chunk_kernel_of_odd_sizes_split_and_ieee(kernel: str) -> None:
    """Where d is odd the plan takes half of the columns."""
    tile, _ = lookup(kernel, 1, "bfloat16", 90)
    assert isinstance(tile, GemmTile)
    half = dataclasses.replace(tile, block_n=tile.block_n // 2)
    odd = {"rows": 1001, "latents": 777, "bias": False, "split": 3}
    (compiled,) = compile_kernel(kernel, half, 333, torch.bfloat16, 90, **odd)
    assert compiled.shared_bytes <= ARCHITECTURES[90].shared_bytes
    assert compiled.loop_spills <= LOOP_SPILLS
    assert not compiled.serialized
    tile, _ = lookup(kernel, 1, "float32", 90)
    (compiled,) = compile_kernel(kernel, tile, 768, torch.float32, 90, precision="ieee")
    assert compiled.shared_bytes <= ARCHITECTURES[90].shared_bytes
    assert compiled.wgmma == 0


@pytest.mark.parametrize("kernel", BOTTLENECK_KERNELS)
@pytest.mark.parametrize("capability", PACKAGED)
@pytest.mark.parametrize("itemsize", DTYPES)
@pytest.mark.parametrize("h", [64, 128, 256, 512])
def test_bottleneck_kernel(kernel: str, capability: int, itemsize: int, h: int) -> None:
    """At d = 784, which is no multiple of a tile."""
    dtype = DTYPES[itemsize]
    tile, source = lookup(kernel, h, str(dtype).removeprefix("torch."), capability)
    assert source == f"configs/sm{capability}.json"
    (compiled,) = compile_kernel(kernel, tile, 784, dtype, capability, latents=h)
    assert_fits(compiled, kernel, tile, 16, itemsize, capability)
    assert compiled.stack_bytes == 0
    assert not compiled.serialized
    assert compiled.mma + compiled.wgmma + compiled.tcgen05 > 0
    if itemsize == 2:
        assert resources(kernel, tile, block_d(16), 2, capability).shared_bytes <= 1.05 * compiled.shared_bytes
        assert "async_copy_global_to_local" in compiled.ttgir, "operands are not pipelined"
        if capability == 90:
            assert compiled.wgmma > 0
            assert compiled.mma == 0


@pytest.mark.parametrize("kernel", [*BOTTLENECK_KERNELS, *CHUNK_KERNELS])
def test_rows_of_a_multiple_of_8_are_copied_asynchronously(kernel: str) -> None:
    """As of 17768 numbers: of multiples of 16 Triton knows by itself."""
    tile, _ = lookup(kernel, 512, "bfloat16", 90)
    (compiled,) = compile_kernel(kernel, tile, 17768, torch.bfloat16, 90, latents=512)
    modelled = resources(kernel, tile, block_d(16), 2, 90).shared_bytes
    assert 0.95 * modelled <= compiled.shared_bytes <= 1.03 * modelled, "not all operands are pipelined"
    assert compiled.loop_spills == 0


@pytest.mark.parametrize("kernel", ["chunk_decode", "chunk_weight_grad"])
@pytest.mark.parametrize("capability", [80, 90])
def test_a_latent_of_a_multiple_of_8_is_copied_asynchronously(kernel: str, capability: int) -> None:
    tile, _ = lookup(kernel, 768, "bfloat16", capability)
    copies = []
    for latents in (1024, 1000):
        (compiled,) = compile_kernel(kernel, tile, 768, torch.bfloat16, capability, latents=latents)
        copies.append(compiled.ttgir.count("async_copy_global_to_local"))
        assert compiled.loop_spills == 0
    assert copies[1] == copies[0] > 0


@pytest.mark.parametrize("kernel", ["forward", "input_grad", "weight_grad"])
@pytest.mark.parametrize("capability", PACKAGED)
def test_rows_of_a_multiple_of_8_are_loaded_as_those_that_fill_their_tile(kernel: str, capability: int) -> None:
    """Number by number, they would be neither pipelined nor without spills."""
    tile, _ = lookup(kernel, 200, "bfloat16", capability)
    (partly,) = compile_kernel(kernel, tile, 200, torch.bfloat16, capability)
    (filled,) = compile_kernel(kernel, tile, 256, torch.bfloat16, capability)
    assert partly.shared_bytes == filled.shared_bytes
    assert max(partly.loop_spills, filled.loop_spills) <= LOOP_SPILLS


@pytest.mark.parametrize("kernel", ["bottleneck_forward", "bottleneck_latent", "bottleneck_latent_grad"])
@pytest.mark.parametrize(("h", "d"), [(64, 784), (512, 333)])
def test_bottleneck_of_few_rows_odd_sizes_split_and_ieee(kernel: str, h: int, d: int) -> None:
    """The plan takes the packaged tile with fewer rows for small batches."""
    for dtype, precision in ((torch.bfloat16, "tf32"), (torch.float32, "ieee")):
        tile, _ = lookup(kernel, h, str(dtype).removeprefix("torch."), 90)
        assert isinstance(tile, LatentTile)
        tile = dataclasses.replace(tile, block_n=16)
        split = 1 if kernel == "bottleneck_forward" else 3
        first, *combine = compile_kernel(
            kernel, tile, d, dtype, 90, rows=1001, latents=h - 3, bias=False, split=split, precision=precision
        )
        assert [launch.name for launch in combine] == ["combine_latent_kernel"] * (split > 1)
        assert_fits(first, kernel, tile, 16, dtype.itemsize, 90)


@pytest.mark.parametrize(
    ("kernel", "width"),
    [
        ("few_rows_16", 128),
        ("few_rows_16", 512),
        ("few_rows_16", 768),
        ("few_rows_16", 2048),
        ("few_rows_32", 1024),
        ("few_rows_64", 512),
        ("few_rows_64", 1024),
    ],
)
@pytest.mark.parametrize("capability", PACKAGED)
def test_few_rows(kernel: str, capability: int, width: int) -> None:
    tile, _ = lookup(kernel, width, "bfloat16", capability)
    assert isinstance(tile, Tile)
    assert tile.block_n * width <= 32768, "the accumulator is half of all registers at most"
    (compiled,) = compile_kernel("forward", tile, width, torch.bfloat16, capability, rows=tile.block_n, latents=1 << 17)
    assert_fits(compiled, kernel, tile, width, 2, capability)
    assert compiled.stack_bytes == 0
    if width < 2048 or capability != 80:  # at 2048 on an A100 two tiles of W do not fit
        assert "async_copy_global_to_local" in compiled.ttgir, "W is not pipelined"
    if tile.block_n < 64:
        # each warp multiplies its own rows of W, instead of all of them with 16 rows of x
        assert f"warpsPerCTA = [1, {tile.num_warps}]" in compiled.ttgir


@pytest.mark.parametrize("kernel", FEW_ROWS_KERNELS)
@pytest.mark.parametrize("capability", PACKAGED)
@pytest.mark.parametrize("width", [128, 256, 768, 1024])
def test_few_rows_in_float32(width: int, capability: int, kernel: str) -> None:
    """Of which no config has tiles; ieee, the default, pipelines W, and takes more than tf32."""
    if (width, capability) == (1024, 80):
        with pytest.raises(ValueError, match="bytes of shared memory"):
            lookup(kernel, width, "float32", capability)
        return
    tile, source = lookup(kernel, width, "float32", capability)
    assert source == "heuristic"
    assert isinstance(tile, Tile)
    for rows in (tile.block_n, tile.block_n - 3):
        (compiled,) = compile_kernel("forward", tile, width, torch.float32, capability, rows=rows, precision="ieee")
        assert_fits(compiled, kernel, tile, width, 4, capability)


@pytest.mark.parametrize("kernel", [*BOTTLENECK_KERNELS, *FEW_ROWS_KERNELS])
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lookup_of_small_sizes_fits_everywhere(kernel: str, capability: int, dtype: str) -> None:
    for size in (1, 17, 100, 512):
        tile, _ = lookup(kernel, size, dtype, capability)
        check_tile(kernel, tile, block_d(size), {"bfloat16": 2, "float32": 4}[dtype], capability)
        if kernel == "bottleneck_forward":
            assert isinstance(tile, LatentTile)
            assert tile.block_h >= size


def assert_one_copy_of_weight(compiled: Compiled, kernel: str, tile: Tile, width: int) -> None:
    """Each tile of W is in shared memory once, besides what happens to be of the same shape."""
    n, h, widths = tile.block_n, tile.block_h, block_d(width)
    if tile.warp_specialize:  # each group of warps has 64 stationary rows of its own; the streamed rows are shared
        streamed = {"forward": [h], "weight_grad": [n, n]}[kernel]
        stationary = [128] if compiled.tcgen05 else [64, 64]
        expected = Counter((rows, w) for rows in streamed + stationary for w in widths)
        assert {shape: shared_copies(compiled.ttgir, *shape) for shape in expected} == expected
        return
    others = {
        "forward": [*((n, w) for w in widths), (n, h)],
        "input_grad": [*((n, w) for w in 2 * widths), (n, h)],
        "weight_grad": [*((2 * n, w) for w in widths), (h, 2 * n)],
        "weight_grad_atomic": [*((2 * n, w) for w in widths), (h, 2 * n), (h, n), (h, n)],
    }[kernel]
    for w in widths:
        same_shape = sum(sorted(other) == sorted((h, w)) for other in others)
        assert 1 <= shared_copies(compiled.ttgir, h, w) <= 1 + same_shape


@pytest.mark.parametrize(
    ("kernel", "tile"),
    [("forward", Tile(128, 128, 4, 2, True)), ("weight_grad", Tile(64, 128, 4, 3, True))],
    ids=["forward", "weight_grad"],
)
def test_warp_specialized(kernel: str, tile: Tile) -> None:
    """Without a bias, with sizes that are no multiples of a tile, in fp16, with a heavier activation."""
    (odd,) = compile_kernel(kernel, tile, 120, torch.bfloat16, 90, rows=1001, latents=777, bias=False)
    (heavy,) = compile_kernel(kernel, tile, 128, torch.float16, 90, activation="gelu")
    assert odd.specialized and odd.wgmma > 0
    assert heavy.specialized and heavy.wgmma > 0 and heavy.stack_bytes == 0


@pytest.mark.parametrize("kernel", STREAM_KERNELS)
@pytest.mark.parametrize("capability", PACKAGED)
def test_ieee(kernel: str, capability: int) -> None:
    tile, _ = lookup(kernel, 128, "float32", capability)
    (compiled,) = compile_kernel(kernel, tile, 128, torch.float32, capability, precision="ieee")
    assert_fits(compiled, kernel, tile, 128, 4, capability)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("rows", "d", "latents"), [(1, 17, 33), (33, 1, 33), (33, 17, 1), (1, 1, 1)], ids=["N", "d", "H", "all"]
)
def test_sizes_of_one(kernel: str, rows: int, d: int, latents: int) -> None:
    """Triton compiles an argument that is 1, a row stride of d = 1 too, into the kernel as a constant."""
    tile: AnyTile = Tile(16, 16, 4, 2)
    if kernel.startswith("bottleneck_") and not kernel.endswith(("decode", "weight_grad")):
        tile = LatentTile(16, 64, 16, 4, 2)
    elif kernel in CHUNK_KERNELS + BOTTLENECK_KERNELS:
        tile = GemmTile(16, 16, 16, 4, 2)
    one = (rows, d, latents) == (1, 1, 1)
    streamed = STREAM_KERNELS + FEW_ROWS_KERNELS
    compile_kernel(
        "forward" if kernel in FEW_ROWS_KERNELS else kernel,
        tile,
        d,
        torch.float16,
        90,
        rows=rows,
        latents=latents,
        # the stream kernels take as many parts as there are tiles, or fewer
        split=1 if one or kernel == "bottleneck_forward" or (kernel in streamed and 1 in (rows, latents)) else 2,
        bias=one,
        stats=one and kernel not in BOTTLENECK_KERNELS,
        output_activation="sigmoid",
    )


@pytest.mark.parametrize("kernel", STREAM_KERNELS)
def test_fp16(kernel: str) -> None:
    tile, _ = lookup(kernel, 128, "float16", 90)
    (compiled,) = compile_kernel(kernel, tile, 128, torch.float16, 90)
    assert_fits(compiled, kernel, tile, 128, 2, 90)
    assert compiled.wgmma > 0
    assert compiled.stack_bytes == 0


@pytest.mark.parametrize("kernel", STREAM_KERNELS)
@pytest.mark.parametrize(
    ("capability", "dtype", "d"),
    [(86, torch.bfloat16, 256), (89, torch.float32, 256), (120, torch.bfloat16, 256), (120, torch.float32, 136)],
)
def test_heuristic_tile(kernel: str, capability: int, dtype: torch.dtype, d: int) -> None:
    tile, source = lookup(kernel, d, str(dtype).removeprefix("torch."), capability)
    assert source == "heuristic"
    (compiled,) = compile_kernel(kernel, tile, d, dtype, capability)
    assert_fits(compiled, kernel, tile, d, dtype.itemsize, capability)
    assert compiled.stack_bytes <= SPILLED_BYTES


@pytest.mark.parametrize("kernel", STREAM_KERNELS)
@pytest.mark.parametrize("capability", PACKAGED)
@pytest.mark.parametrize("d", [33, 511])
def test_odd_sizes_without_bias(kernel: str, d: int, capability: int) -> None:
    """Rows that cp.async cannot load take another path than the one the tiles were chosen on."""
    tile, _ = lookup(kernel, d, "bfloat16", capability)
    (compiled,) = compile_kernel(kernel, tile, d, torch.bfloat16, capability, rows=1001, latents=777, bias=False)
    assert compiled.shared_bytes <= ARCHITECTURES[capability].shared_bytes


@pytest.mark.parametrize("kernel", STREAM_KERNELS)
def test_split(kernel: str) -> None:
    compiled = compile_kernel(kernel, SMALL, 64, torch.bfloat16, 90, split=4, output_activation="sigmoid")
    combines = 2 if kernel.startswith("weight_grad") else 1
    assert [launch.name for launch in compiled[1:]] == ["combine_kernel"] * combines
    assert all(launch.stack_bytes == 0 for launch in compiled)


@pytest.mark.parametrize("kernel", ["forward", "input_grad", "weight_grad"])
@pytest.mark.parametrize(("capability", "width"), [(90, 128), (90, 256), (80, 128), (100, 128), (100, 512)])
def test_statistics_and_penalties(kernel: str, width: int, capability: int) -> None:
    tile, _ = lookup(kernel, width, "bfloat16", capability)
    compiled, *after = compile_kernel(kernel, tile, width, torch.bfloat16, capability, stats=True)
    assert [launch.name for launch in after] == ["add_parts_kernel"] * (2 if kernel == "forward" else 0)
    assert all(launch.stack_bytes == 0 for launch in after)
    assert compiled.shared_bytes <= ARCHITECTURES[capability].shared_bytes
    assert compiled.loop_spills <= (LOOP_SPILLS if capability != 80 else 2 * LOOP_SPILLS)
    assert compiled.wgmma > 0 or capability != 90
    assert not compiled.serialized


@pytest.mark.parametrize("kernel", ["chunk_encode", "chunk_latent"])
@pytest.mark.parametrize("capability", PACKAGED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_statistics_and_penalties_in_chunks(kernel: str, capability: int, dtype: torch.dtype) -> None:
    tile, _ = lookup(kernel, 768, str(dtype).removeprefix("torch."), capability)
    (compiled,) = compile_kernel(kernel, tile, 768, dtype, capability, stats=True)
    assert compiled.shared_bytes <= ARCHITECTURES[capability].shared_bytes
    assert compiled.loop_spills == 0
    assert compiled.stack_bytes <= SPILLED_BYTES


@pytest.mark.parametrize("kernel", ["bottleneck_forward", "bottleneck_latent_grad"])
@pytest.mark.parametrize("capability", PACKAGED)
@pytest.mark.parametrize("itemsize", DTYPES)
@pytest.mark.parametrize("h", [64, 512])
def test_statistics_and_penalties_of_a_small_latent(kernel: str, capability: int, itemsize: int, h: int) -> None:
    dtype = DTYPES[itemsize]
    tile, _ = lookup(kernel, h, str(dtype).removeprefix("torch."), capability)
    compiled, *after = compile_kernel(kernel, tile, 784, dtype, capability, latents=h, stats=True)
    assert [launch.name for launch in after] == ["add_parts_kernel"] * (2 if kernel == "bottleneck_forward" else 0)
    assert_fits(compiled, kernel, tile, 16, itemsize, capability)
    assert compiled.stack_bytes <= (24 if (capability, h) == (100, 512) else 0)  # once a program, outside its loops
    assert compiled.wgmma > 0 or capability != 90 or itemsize == 4


def test_penalties_where_parts_of_d_are_combined() -> None:
    tile, _ = lookup("bottleneck_latent_grad", 512, "bfloat16", 90)
    launched = compile_kernel("bottleneck_latent_grad", tile, 784, torch.bfloat16, 90, latents=509, split=3, stats=True)
    assert [launch.name for launch in launched] == ["bottleneck_latent_kernel", "combine_latent_kernel"]
    assert all(launch.stack_bytes == 0 for launch in launched)


@pytest.mark.parametrize(("kernel", "width"), [("few_rows_16", 768), ("few_rows_32", 1024), ("few_rows_64", 512)])
@pytest.mark.parametrize("capability", PACKAGED)
def test_statistics_of_few_rows(kernel: str, capability: int, width: int) -> None:
    tile, _ = lookup(kernel, width, "bfloat16", capability)
    options = {"rows": tile.block_n, "latents": 1 << 17, "split": 132, "stats": True}  # type: ignore[union-attr]
    compiled, *after = compile_kernel("forward", tile, width, torch.bfloat16, capability, **options)
    assert [launch.name for launch in after] == ["combine_kernel"] + ["add_parts_kernel"] * 2
    assert_fits(compiled, kernel, tile, width, 2, capability)
    assert compiled.loop_spills <= 30  # of more than a thousand instructions, which memory bounds


@pytest.mark.parametrize("activation", activation_names())
@pytest.mark.parametrize("kernel", ["forward", "weight_grad"])
def test_activation(kernel: str, activation: str) -> None:
    (compiled,) = compile_kernel(
        kernel, SMALL, 64, torch.bfloat16, 90, activation=activation, output_activation=activation
    )
    assert compiled.stack_bytes == 0
    assert "f64" not in compiled.ttgir
    assert "minnum" not in compiled.ttgir and "maxnum" not in compiled.ttgir, "these turn a NaN into a number"


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("kernel", STREAM_KERNELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("d", [1, 17, 33, 65, 96, 130, 160, 260, 288, 320, *WIDTHS])
def test_lookup_fits_or_refuses(kernel: str, d: int, dtype: str, capability: int) -> None:
    itemsize = {"bfloat16": 2, "float32": 4}[dtype]
    smallest = resources(kernel, Tile(16, 16, 8, 2), block_d(d), itemsize, capability)
    if smallest.shared_bytes > ARCHITECTURES[capability].shared_bytes:
        assert sum(block_d(d)) > 256 and itemsize == 4
        with pytest.raises(ValueError, match=rf"{kernel}: Tile\(.* bytes of shared memory"):
            lookup(kernel, d, dtype, capability)
    else:
        tile, _ = lookup(kernel, d, dtype, capability)
        check_tile(kernel, tile, block_d(d), itemsize, capability)


@pytest.mark.parametrize(
    ("kernel", "tile", "width", "capability", "message"),
    [
        ("backward", Tile(64, 64, 4, 2), 64, 90, "kernel: 'backward' is none of"),
        ("forward", Tile(64, 64, 4, 2), 64, 75, "capability: sm_75 is none of"),
        ("forward", Tile(48, 64, 4, 2), 64, 90, "block_n must be a power of two"),
        ("forward", Tile(64, 64, 3, 2), 64, 90, "num_warps must be"),
        ("forward", Tile(64, 64, 4, 1), 64, 80, "num_stages must be at least 2"),
        ("forward", Tile(64, 64, 4, 2), 1024, 90, "rows of more than 512 elements"),
        ("forward", Tile(128, 128, 8, 3), 256, 90, r"needs \d+ bytes of shared memory .* sm_90 has 232448"),
        ("input_grad", Tile(128, 64, 4, 2, True), 64, 90, "no warp-specialised form"),
        ("weight_grad", Tile(64, 128, 4, 2, True), 64, 100, "no warp-specialised form"),
        ("forward", Tile(128, 64, 4, 2, True), 64, 80, "no warp-specialised form"),
        ("forward", Tile(64, 64, 4, 2, True), 64, 90, "takes 4 warps and 128 rows"),
        ("forward", Tile(128, 64, 8, 2, True), 64, 90, "takes 4 warps and 128 rows"),
        ("weight_grad", Tile(16, 128, 4, 2), 256, 90, r"needs at least \d+ registers .* sm_90 has 255"),
    ],
)
def test_refused_tile(kernel: str, tile: Tile, width: int, capability: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tile(kernel, tile, block_d(width), 2, capability)
