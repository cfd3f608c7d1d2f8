# SPDX-License-Identifier: Apache-2.0
"""One graph of a whole scene whose rows several processes choose: each part once, and the bytes of one process."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import drseg_core as drseg
from drseg_core.cli.main import main
from drseg_core.errors import ConfigError
from drseg_core.nn.label_propagation import choose_neighbours
from drseg_core.scenes import cluster, graph_rows, zero_shot_plan
from drseg_core.scenes.block_store import BlockStore
from drseg_core.scenes.graph_rows import row_parts
from drseg_core.scenes.many import Shard
from drseg_core.scenes.predict import Mapper
from drseg_core.scenes.synthetic import write_synthetic_scene
from tests.forks import in_ranks
from tests.scenes.test_many import Team, content, mapped

pytest.importorskip("rasterio")
torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
GRID = 42, 8
"""Cells of the scene of these tests."""
FEW = 60
"""Nodes of a part here, so that the scene has six."""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_synthetic_scene(folder / "scene.tif", width=GRID[1] * 8, height=GRID[0] * 8)
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_rows, "PART_NODES", FEW)
    # graphs that are timed are of no scene
    monkeypatch.setattr(zero_shot_plan, "_graph_seconds", lambda *arguments: 0.0)


def words(**options: Any) -> Mapper:
    # a power and a decay whose results may have other bits at other places of a tensor
    return drseg.zero_shot("tiny", gamma=2.5, **options).mapper("roof; road; tree")


@pytest.fixture(scope="module")
def expected(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a process writes that keeps nothing, and chooses all neighbours at once."""
    out = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_shot_plan, "_graph_seconds", lambda *arguments: 0.0)
        words().write(scenes / "scene.tif", out / "scene.tif", polygons=out / "scene.geojson", progress=False)
    found = content(out)
    assert len(found) == 7
    return found


class Made:
    """Notes which thread chose which rows."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        self.by: dict[int, list[tuple[int, int]]] = {}
        self._before = before

    def __call__(self, *arguments: Any, rows: tuple[int, int], **options: Any) -> Any:
        self._before()
        self.by.setdefault(threading.get_ident(), []).append(rows)
        index, score = choose_neighbours(*arguments, rows=rows, **options)
        # no more than these are in memory
        assert len(index) == len(score) == rows[1] - rows[0]
        return index, score

    @property
    def all(self) -> list[tuple[int, int]]:
        return sorted(rows for some in self.by.values() for rows in some)


def watched(monkeypatch: pytest.MonkeyPatch, before: Callable[[], object] = lambda: None) -> Made:
    made = Made(before)
    monkeypatch.setattr(graph_rows, "choose_neighbours", made)
    return made


@pytest.mark.parametrize("grid", [GRID, (1, 1), (1, 900), (900, 1), (7, 30), (64, 64), (33, 35)], ids=str)
def test_parts_are_whole_bands_that_cover_the_grid(grid: tuple[int, int]) -> None:
    parts = row_parts(grid)
    assert [first for first, _ in parts] == [0, *(end for _, end in parts[:-1])] and parts[-1][1] == grid[0] * grid[1]
    assert all(first % (8 * grid[1]) == 0 and end > first for first, end in parts)
    assert all(end - first <= FEW + 8 * grid[1] for first, end in parts)


@pytest.mark.parametrize("kept", [False, True])
def test_every_node_is_counted_once_whether_its_part_is_made_or_read(tmp_path, kept):
    prior = torch.randn(GRID[0] * GRID[1], 3, generator=torch.Generator().manual_seed(0))
    store = BlockStore(tmp_path, {}) if kept else None
    for _ in range(2):
        counted: list[int] = []
        parts = graph_rows.choose_parts(prior, GRID, {"k": 2}, range(6), store=store, chosen=counted.append)
        assert [len(part.neighbour) for part in parts] == counted == [end - first for first, end in row_parts(GRID)]


@pytest.mark.promise("C45")
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_rows_of_one_graph(scenes, expected, tmp_path, monkeypatch, world_size):
    made, mapper = watched(monkeypatch), words()
    found = Team(world_size).run(lambda member: mapped(mapper, scenes, tmp_path / "maps", processes=member))
    assert [outcome.state for outcome in found[0]] == ["mapped"]
    assert content(tmp_path / "maps") == expected
    # each made its share, and no part was made twice
    assert made.all == row_parts(GRID) and len(made.all) == 6
    assert [len(some) for some in made.by.values()] == [6 // world_size] * world_size


@pytest.mark.promise("C45")
def test_workers_of_a_cluster_share_the_rows(scenes, expected, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="the extra cluster is not installed")
    both, seen = threading.Barrier(2), threading.local()

    def wait_for_the_other() -> None:
        if not hasattr(seen, "once"):
            seen.once = True
            both.wait(120)

    made = watched(monkeypatch, wait_for_the_other)
    with distributed.Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        mapped(words(), scenes, tmp_path / "maps", cluster=cluster.Cluster(client, words))
    assert content(tmp_path / "maps") == expected
    assert made.all == row_parts(GRID) and len(made.by) == 2


@pytest.mark.promise("C45")
def test_a_shard_refuses_what_the_last_call_would_and_a_raised_limit_keeps_its_work(scenes, tmp_path, monkeypatch):
    out = tmp_path / "maps"
    with pytest.raises(ConfigError, match="too many cells for one graph"):
        mapped(words(max_cells=100), scenes, out, shard=Shard(0, 2))
    assert not list(out.glob("*.work/*.block"))
    mapped(words(), scenes, out, shard=Shard(0, 2))
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.work/cells-*.block")}
    mapped(words(max_cells=2 * 10**6), scenes, out, shard=Shard(1, 2))
    assert kept and all(path.stat().st_mtime_ns == made for path, made in kept.items())


@pytest.mark.promise("C45")
def test_shards_leave_the_rows_to_the_last_call(scenes, expected, tmp_path, monkeypatch):
    made, mapper = watched(monkeypatch), words()
    for number in range(2):
        mapped(mapper, scenes, tmp_path / "maps", shard=Shard(number, 2))
    assert made.all == [] and len(list((tmp_path / "maps").glob("*.work/cells-*.block"))) > 1
    mapped(mapper, scenes, tmp_path / "maps")
    assert made.all == row_parts(GRID) and content(tmp_path / "maps") == expected


@pytest.mark.promise("C45")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_while_it_chooses(scenes, expected, tmp_path, monkeypatch, world_size):
    """After three of six parts, one of which is damaged later; the next call makes the other four."""
    mapper, out = words(), tmp_path / "maps"

    def die() -> None:
        if len(list(out.glob("*.work/rows-*.block"))) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        watched(patch, die)
        process = os.fork()
        if process == 0:
            try:
                mapped(mapper, scenes, out)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    kept = sorted(path.name for path in out.glob("*.work/rows-*.block"))
    assert kept == [f"rows-{number}.block" for number in range(3)]
    damaged = out / "scene.tif.work" / kept[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    made = watched(monkeypatch)
    Team(world_size).run(lambda member: mapped(mapper, scenes, out, processes=member))
    assert made.all == [row_parts(GRID)[number] for number in (1, 3, 4, 5)]
    assert content(out) == expected


def test_rows_of_another_graph_are_never_taken(scenes, tmp_path, monkeypatch, caplog):
    """Those of other options, though the features are the same."""
    out = tmp_path / "maps"

    def stop(self: BlockStore, name: str, arrays: Any) -> None:
        if name == "spread":
            raise KeyboardInterrupt
        save(self, name, arrays)

    save = BlockStore.save
    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            mapped(words(), scenes, out)
    assert len(list(out.glob("*.work/rows-*.block"))) == 6
    made = watched(monkeypatch)
    mapped(words(k=5), scenes, out)
    assert "started again" in caplog.text and made.all == row_parts(GRID)


def test_a_scene_without_data_has_no_rows(tmp_path, monkeypatch):
    rasterio = pytest.importorskip("rasterio")
    folder = tmp_path / "scenes"
    folder.mkdir()
    write_synthetic_scene(folder / "scene.tif", width=120, height=160)
    with rasterio.open(folder / "scene.tif", "r+") as file:
        file.write(file.read() * 0)
        file.nodata = 0
    made, mapper = watched(monkeypatch), words()
    found = Team(2).run(lambda member: mapped(mapper, folder, tmp_path / "maps", processes=member))
    assert [outcome.state for outcome in found[0]] == ["mapped"] and made.all == []


@pytest.mark.promise("C45")
def test_two_processes_of_torchrun_share_the_rows(scenes, tmp_path, monkeypatch):
    """With the variables of torchrun; ``tests/cli/test_many.py`` has torchrun itself."""
    made, own = [], graph_rows.choose_neighbours

    def noted(*arguments: Any, rows: range, **options: Any) -> Any:
        made.append(rows)
        (tmp_path / f"made-{os.environ['RANK']}.json").write_text(json.dumps([list(part) for part in made]))
        return own(*arguments, rows=rows, **options)

    classes, out = "roof; road; tree", tmp_path / "two" / "scene.tif"
    given = ["predict", "zero-shot:tiny", str(scenes / "scene.tif"), "--classes", classes, "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(graph_rows, "choose_neighbours", noted)
        found = in_ranks(lambda: main([*given, "--device", "cpu"]), tmp_path)
    assert [code for code, _, _ in found] == [0, 0], found
    one = drseg.zero_shot("tiny", device="cpu")
    one.write(scenes / "scene.tif", classes, tmp_path / "one" / "scene.tif", progress=False)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    parts = [list(rows) for rows in row_parts(GRID)]
    made = [json.loads((tmp_path / f"made-{rank}.json").read_text()) for rank in range(2)]
    assert made == [parts[:3], parts[3:]]
