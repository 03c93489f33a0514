"""Where a tile comes from: the user's config, the GPU's, the architecture's, a heuristic; in this order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tiedfused import settings, tiles
from tiedfused.benchmark.kernels import REGIMES
from tiedfused.cli import app
from tiedfused.planning import Plan, make_plan, plan
from tiedfused.tiles import AnyTile, GemmTile, LatentTile, Tile, lookup

GPU = "nvidia-h100-80gb-hbm3"
TILES = [Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(32, 32, 4, 2)]


def config(file: Path, tile: Tile | None, **changes: Any) -> Path:
    entry = [tile.block_n, tile.block_h, tile.num_warps, tile.num_stages] if tile else "nonsense"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"status": "measured", "tiles": {"forward": {"2": {"128": entry}}}, **changes}))
    return file


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """The user's folder and the packaged one, both empty, on a machine with an H100."""
    user, packaged = tmp_path / "user", tmp_path / "packaged"
    monkeypatch.setattr(tiles, "_CONFIGS", packaged)
    monkeypatch.setattr(tiles, "_gpu", lambda capability: GPU if capability == 90 else None)
    with settings.override(config_dir=str(user)):
        yield user, packaged
    lookup.cache_clear()


def found(capability: int = 90, d: int = 100) -> tuple[Tile, str]:
    lookup.cache_clear()
    tiles._config.cache_clear()
    return lookup("forward", d, "bfloat16", capability, settings.current().config_dir)


def test_order(folders: tuple[Path, Path]) -> None:
    user, packaged = folders
    heuristic = found()
    assert heuristic[1] == "heuristic"
    files = [packaged / "sm90.json", packaged / f"{GPU}.json", user / "sm90.json", user / f"{GPU}.json"]
    names = ["configs/sm90.json", f"configs/{GPU}.json", f"user config {files[2]}", f"user config {files[3]}"]
    for file, name, tile in zip(files, names, TILES, strict=True):
        config(file, tile)
        assert found() == (tile, name)
    assert found(capability=80) == heuristic
    assert found(d=200)[1] == "heuristic"


def test_an_entry_for_wider_rows_serves_where_no_config_has_the_width(folders: tuple[Path, Path]) -> None:
    user, packaged = folders
    wider, exact = (
        {"forward": {"2": {key: list(astuple(tile))}}} for key, tile in (("256", TILES[0]), ("64", TILES[1]))
    )
    config(user / "sm90.json", None, tiles=wider)
    config(packaged / "sm90.json", None, tiles=exact)
    assert found(d=64) == (TILES[1], "configs/sm90.json")
    assert found(d=100) == (TILES[0], f"user config {user / 'sm90.json'}, block_d 256")
    assert found(d=512)[1] == "heuristic"


@pytest.mark.parametrize(
    ("tile", "changes", "says"),
    [
        (TILES[0], {"status": "interpreter, not measured"}, "its status is 'interpreter, not measured'"),
        (TILES[0], {"tiles": 7}, "tiles not used"),
        (TILES[0], {"status": None}, "tiles not used"),
        (Tile(1024, 1024, 8, 3), {}, "shared memory"),
        (Tile(48, 64, 8, 3), {}, "power of two"),
        (None, {}, "forward, itemsize 2, size 128: not used"),
    ],
)
def test_what_cannot_be_used_is_told_and_left_out(
    folders: tuple[Path, Path], tile: Tile | None, changes: dict[str, Any], says: str
) -> None:
    user, packaged = folders
    config(packaged / "sm90.json", TILES[1])
    config(user / "sm90.json", tile, **changes)
    with pytest.warns(UserWarning, match=says):
        assert found() == (TILES[1], "configs/sm90.json")


def test_a_file_that_is_not_json(folders: tuple[Path, Path]) -> None:
    config(folders[0] / "sm90.json", TILES[0]).write_text("{")
    with pytest.warns(UserWarning, match=r"sm90.json: tiles not used: JSONDecodeError"):
        assert found()[1] == "heuristic"


def test_explain_shows_it(tmp_path: Path) -> None:
    file = config(tmp_path / "configs" / "sm90.json", TILES[3])
    with settings.override(config_dir=str(file.parent)):
        arguments = ["explain", "4096", "128", "4096", "--dtype", "bfloat16", "--device", "cuda", "--capability", "90"]
        output = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1"}).invoke(app, arguments).output
    assert f"block_n 32, block_h 32, num_warps 4, num_stages 2 (user config {file})" in output
    assert "(configs/sm90.json)" in output, "the other kernels keep theirs"


def test_every_class_of_tile(folders: tuple[Path, Path]) -> None:
    """A kernel of each regime is looked up by its own key and given its own kind of tile."""
    wanted = {
        ("few_rows_16", 768, "768"): Tile(16, 32, 4, 2),
        ("chunk_decode", 768, "any"): GemmTile(64, 64, 32, 4, 2),
        ("bottleneck_forward", 100, "128"): LatentTile(32, 128, 32, 4, 2),
        ("bottleneck_decode", 100, "128"): GemmTile(64, 64, 32, 4, 3),
    }
    entries = {kernel: {"2": {key: list(astuple(tile))}} for (kernel, _, key), tile in wanted.items()}
    file = config(folders[0] / "sm90.json", None, tiles=entries)
    lookup.cache_clear()
    tiles._config.cache_clear()
    for (kernel, size, _), tile in wanted.items():
        assert lookup(kernel, size, "bfloat16", 90, str(file.parent)) == (tile, f"user config {file}")


@pytest.mark.parametrize(
    ("kernel", "n", "key", "tile"),
    [
        ("forward", 4096, "128", TILES[0]),
        ("few_rows_16", 16, "128", Tile(16, 32, 4, 2)),
        ("chunk_decode", 4096, "any", GemmTile(64, 64, 32, 4, 2)),
        ("bottleneck_forward", 4096, "256", LatentTile(32, 256, 32, 4, 2)),
    ],
)
def test_another_threads_folder_is_not_looked_into(
    tmp_path: Path, fresh_plans: None, kernel: str, n: int, key: str, tile: AnyTile
) -> None:
    """A plan is kept under its request: if the settings change while it is made, it is still that request's."""
    file = config(tmp_path / "sm90.json", None, tiles={kernel: {"2": {key: list(astuple(tile))}}})
    problem: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda", "capability": 90, "grad": False}
    with settings.override(regime=REGIMES[kernel]):
        with settings.override(config_dir=str(tmp_path)):
            request = plan(n, 128, 256, **problem).request
        make_plan.cache_clear()
        made, without = make_plan(request), plan(n, 128, 256, **problem)
    assert {one.kernel: one.tile_source for one in made.passes}[kernel] == f"user config {file}"
    assert not any("user config" in one.tile_source for one in without.passes)


def test_a_measured_efficiency_replaces_the_assumed_one(folders: tuple[Path, Path]) -> None:
    """It scales what arithmetic takes, may change the regime that is chosen, and `explain` shows where it is from."""
    problem: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda", "capability": 90, "grad": False}

    def planned(**efficiency: float) -> Plan:
        for cached in (lookup, tiles._config, tiles.measured_efficiency, make_plan):
            cached.cache_clear()
        table = {kernel: {"2": {"any" if "chunk" in kernel else "256": e}} for kernel, e in efficiency.items()}
        config(folders[0] / "sm90.json", None, tiles={}, efficiency=table)
        found = plan(16384, 256, 16384, **problem)
        texts.append(str(found))
        return found

    texts: list[str] = []
    assumed, measured = planned(), planned(forward=0.25)
    assert (assumed.regime, measured.regime) == ("stream", "chunked")
    assert "measured (" not in texts[0]
    with settings.override(regime="stream"):
        slow, slower = planned(forward=0.25), planned(forward=0.125)
    assert slow.predicted_ms == pytest.approx(2 * assumed.predicted_ms), "0.50 is assumed"
    assert slower.predicted_ms == pytest.approx(2 * slow.predicted_ms)
    assert f"; 12% of the peak measured (user config {folders[0] / 'sm90.json'})" in texts[-1]
    with pytest.warns(UserWarning, match="forward: efficiency not used: got -1; expected a fraction"):
        assert planned(forward=-1).predicted_ms == assumed.predicted_ms
    make_plan.cache_clear()
    tiles.measured_efficiency.cache_clear()


@pytest.mark.parametrize("file", sorted(tiles._CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_what_is_packaged_claims_no_measurement_that_was_not_made(file: Path) -> None:
    shipped = json.loads(file.read_text())
    if "not measured" in shipped["status"]:
        assert not shipped.keys() & {"efficiency", "measured"}
    else:
        assert shipped["status"] == "measured"
        assert {"gpu", "versions", "commit", "command", "measured"} <= shipped.keys()


def test_the_folder() -> None:
    of = settings.Settings.from_environment
    assert of({"TIEDFUSED_CONFIG_DIR": "/a"}).config_dir == "/a"
    assert of({"TIEDFUSED_CONFIG_DIR": ""}).config_dir == ""
    assert of({"XDG_CONFIG_HOME": "/b"}).config_dir == "/b/tiedfused"
    assert of({}).config_dir.endswith("/.config/tiedfused")
