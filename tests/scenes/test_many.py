# SPDX-License-Identifier: Apache-2.0
"""Many scenes, killed and resumed, shared by processes: always the bytes of one process that nobody disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import drseg_core as drseg
from drseg_core.cli.failures import failure
from drseg_core.errors import ConfigError, RasterError, ResourceError
from drseg_core.evaluation import inference
from drseg_core.evaluation.inference import Predictor
from drseg_core.scenes import zero_shot_plan
from drseg_core.scenes.block_store import BlockStore, work_folder
from drseg_core.scenes.many import Outcome, Shard, map_scenes
from drseg_core.scenes.mosaic import Grid
from drseg_core.scenes.predict import Mapper, Work, predict_scene
from drseg_core.scenes.reader import open_scene
from drseg_core.scenes.sources import Scene, list_scenes, with_outputs
from drseg_core.scenes.synthetic import write_synthetic_scene
from tests.evaluation.fake import COLORS, ColorModel, color_image
from tests.scenes.test_predict import NORTH_UP, truth, write

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
torch.set_num_threads(1)
NAMES = list(COLORS)
SIZES = ((150, 130), (40, 30), (90, 70), (20, 200), (64, 64))
OPTIONS: dict[str, Any] = {"scores": True, "probabilities": True, "threshold": 0.6}


@pytest.fixture(autouse=True)
def narrow_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several strips in a small scene."""
    monkeypatch.setattr(inference, "SUMS_BYTES", 1)
    monkeypatch.setattr(inference, "STRIP_STEP", 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five scenes of noise, some with a hole."""
    place = tmp_path_factory.mktemp("scenes")
    for number, size in enumerate(SIZES):
        image = color_image(truth(*size)).numpy() // 2 + number
        image[:, 10:60, 5:90] = 0
        write(place / f"{number}.tif", image, crs="EPSG:32632", transform=NORTH_UP, nodata=0)
    return place


def color_mapper(model: ColorModel | None = None, **options: Any) -> Mapper:
    tiles = {"mode": "tile", "tile_size": 32, "overlap": 20, "batch_size": 3}
    predictor = Predictor(model or ColorModel(), NAMES, **tiles)  # type: ignore[arg-type]

    def made(image: Any, out: Any, **how: Any) -> Any:
        return predict_scene(predictor, image, out, **{**OPTIONS, **options}, **how)

    def grid(image: Any) -> Grid:
        with open_scene(image) as scene:
            return Grid(scene.crs, scene.transform, scene.height, scene.width)

    return Mapper(made, {"model": "color"}, grid, {}, lambda scene: predictor)


def explain(error: BaseException) -> tuple[str, int]:
    return failure(error, "predict")


def mapped(mapper: Mapper, folder: Path, out: Path, **how: Any) -> list[Outcome]:
    scenes = with_outputs(list_scenes([str(folder)]), f"{out}/{{name}}.tif", f"{out}/{{name}}.geojson")
    return map_scenes(mapper, scenes, explain=explain, progress=False, **how)


def content(folder: Path) -> dict[str, bytes]:
    """Every file, with hidden ones and those that were not removed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a process writes that keeps no blocks at all."""
    out = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "SUMS_BYTES", 1)
        patch.setattr(inference, "STRIP_STEP", 48)
        for path in sorted(folder.iterdir()):
            polygons = out / f"{path.stem}.geojson"
            color_mapper().write(path, out / path.name, polygons=polygons, progress=False)
    found = content(out)
    assert len(found) == 9 * len(SIZES)
    return found


@pytest.mark.promise("C45")
@pytest.mark.parametrize("moments", [(3, 0), (1, 4), (5, 2, 0)], ids=str)
def test_killed_again_while_outputs_are_put_in_place(folder, expected, tmp_path, monkeypatch, moments):
    """What one killed call put in its place is known to all that follow, though its marks are of other files."""

    class Killed(BaseException):
        pass

    scene, out, own = folder / "1.tif", tmp_path / "1.tif", os.replace

    def call(after: int | None) -> None:
        left = after

        def replace(source: Any, target: Any, **how: Any) -> None:
            nonlocal left
            if left is not None and Path(target).parent == tmp_path and not Path(target).name.startswith("."):
                if left == 0:
                    raise Killed
                left -= 1
            own(source, target, **how)

        monkeypatch.setattr(os, "replace", replace)
        places = with_outputs(list_scenes([str(scene)]), str(out), str(tmp_path / "1.geojson"))
        map_scenes(color_mapper(), places, explain=explain, progress=False)

    for moment in moments:
        with pytest.raises(Killed):
            call(moment)
    call(None)
    assert content(tmp_path) == {
        name: data for name, data in expected.items() if name.split("_")[0].split(".")[0] == "1"
    }


@pytest.mark.promise("C45")
def test_maps_beside_their_scenes_are_resumed(folder, tmp_path):
    for number in (1, 4):
        (tmp_path / f"{number}.tif").write_bytes((folder / f"{number}.tif").read_bytes())

    def call(words: list[str], **how: Any) -> list[Outcome]:
        scenes = with_outputs(list_scenes(words), "{folder}/{name}_map.tif")
        return map_scenes(color_mapper(), scenes, explain=explain, progress=False, **how)

    call([str(tmp_path / "1.tif")])
    made = (tmp_path / "1_map.tif").stat().st_mtime_ns
    for words in ([str(tmp_path)], [f"{tmp_path}/*.tif"]):
        found = call(words, overwrite=True)
        assert [Path(outcome.image).name for outcome in found] == ["1.tif", "4.tif"]
    assert (tmp_path / "1_map.tif").stat().st_mtime_ns > made
    # a scene that has the name of a map, and is none, is never replaced
    (tmp_path / "1_map.tif").write_bytes((folder / "0.tif").read_bytes())
    with pytest.raises(ConfigError, match="1_map.tif, an output for .*1.tif, is one of the scenes"):
        call([str(tmp_path)], overwrite=True)


@pytest.mark.promise("C45")
def test_blocks_that_are_kept_change_nothing(folder, expected, tmp_path):
    outcomes = mapped(color_mapper(), folder, tmp_path / "maps", report=tmp_path / "report.json")
    assert content(tmp_path / "maps") == expected
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["counts"] == {"mapped": 5, "shared": 0, "failed": 0, "not reached": 0}
    assert [Path(scene["image"]).name for scene in report["scenes"]] == [f"{n}.tif" for n in range(5)]
    assert all(len(found.files) == 9 and found.seconds > 0 for found in outcomes)


def killed(work: Callable[[], object], delay: float) -> bool:
    """Whether a process that does this was killed before its end."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    end = time.monotonic() + delay
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    # it may have ended in between
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


@pytest.mark.promise("C45")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_at_random_moments(folder, expected, tmp_path):
    """Each call is killed at any moment of its time and begun again, until one reaches its end; then the next. Twenty
    times in the deep run, else eight."""
    least = 20 if os.environ.get("DRSEG_DEEP") else 8
    begin = time.perf_counter()
    assert not killed(lambda: mapped(color_mapper(), folder, tmp_path / "timed"), 60)
    whole = time.perf_counter() - begin
    draw, kills, number, resumed = random.Random(0), 0, 0, 0

    def call() -> None:
        try:
            mapped(color_mapper(), folder, out)
        except ConfigError as error:
            # it was complete when it was killed
            assert "exists; expected a new path" in str(error) and content(out) == expected

    # most of them have something to go on with, on a machine of any speed
    while kills < least or resumed < least // 2:
        assert kills < 5 * least
        out = tmp_path / f"maps{number}"
        number += 1
        while killed(call, draw.uniform(0.02, 0.8) * whole):
            kills += 1
            resumed += any(out.glob("*.work/*.block"))
        assert content(out) == expected


@pytest.mark.promise("C45")
@pytest.mark.parametrize("gone", (0, 3, 4))
def test_killed_while_it_tidies(folder, expected, tmp_path, monkeypatch, gone):
    """After any number of folders of a complete call."""
    removed, own = 0, BlockStore.remove

    def stopping(self: BlockStore) -> None:
        nonlocal removed
        if removed == gone:
            raise Stop
        removed += 1
        own(self)

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "remove", stopping)
        with pytest.raises(Stop):
            mapped(color_mapper(), folder, tmp_path)
        assert len(list(tmp_path.glob("*.work"))) == 5 - gone
        # with other options it is another map
        with pytest.raises(ConfigError, match="0.tif exists"):
            mapped(color_mapper(threshold=0.7), folder, tmp_path)
    mapped(color_mapper(), folder, tmp_path)
    assert content(tmp_path) == expected


@pytest.mark.promise("C45")
def test_what_is_finished_is_not_made_again(folder, expected, tmp_path):
    class Stops(ColorModel):
        """Fails after some passes."""

        left = 10**9

        def forward(self, image: torch.Tensor, text: torch.Tensor) -> Any:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().forward(image, text)

    whole = ColorModel()
    mapped(color_mapper(whole), folder, tmp_path / "whole")
    total, out = len(whole.batches), tmp_path / "maps"
    # in the third scene
    first = Stops()
    first.left = int(total * 0.8)
    with pytest.raises(KeyboardInterrupt):
        mapped(color_mapper(first), folder, out)
    assert sorted(path.name for path in out.glob("[0-9].tif")) == ["0.tif", "1.tif"]
    before = (out / "0.tif").stat().st_mtime_ns
    second = ColorModel()
    mapped(color_mapper(second), folder, out)
    # the tiles above the first missing block are computed again, and no others
    assert total <= len(first.batches) + len(second.batches) <= total + 4
    assert (out / "0.tif").stat().st_mtime_ns == before and content(out) == expected


@pytest.mark.promise("C45")
@pytest.mark.parametrize("change", ["options", "scene", "model", "threads"])
def test_blocks_of_another_map_are_never_taken(folder, tmp_path, change, monkeypatch, caplog):
    scene, out = tmp_path / "scene.tif", tmp_path / "map.tif"
    scene.write_bytes((folder / "0.tif").read_bytes())
    work = Work({"model": 1}, "blocks", 0, 2)
    color_mapper().write(scene, out, work=work, progress=False)
    assert len(list(work_folder(out).glob("*.block"))) == 16
    options = {}
    if change == "options":
        options = {"threshold": 0.7}
    elif change == "scene":
        with rasterio.open(scene, "r+") as file:
            file.write(file.read() // 2)
    elif change == "model":
        work = work._replace(facts={"model": 2})
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    mapper = color_mapper(**options)
    # where other processes may be at it nothing is removed
    with pytest.raises(ConfigError, match="map.tif.work is of another model, scene, device or other options; expected"):
        mapper.write(scene, out, work=work._replace(alone=False), progress=False)
    assert len(list(work_folder(out).glob("*.block"))) == 16
    mapper.write(scene, out, work=Work(work.facts), progress=False)
    assert "it is started again" in caplog.text
    plain = mapper.write(scene, tmp_path / "plain.tif", progress=False)
    assert out.read_bytes() == plain.classes.read_bytes()


@pytest.mark.promise("C45")
@pytest.mark.parametrize("fault", ["flipped", "empty", "swapped"])
def test_damaged_blocks_are_made_again(folder, expected, tmp_path, fault, caplog):
    out = tmp_path / "maps" / "0.tif"
    mapper = color_mapper()
    for part in range(2):
        work = Work({"model": "color"}, "blocks", part, 2)
        mapper.write(folder / "0.tif", out, polygons=out.with_suffix(".geojson"), work=work, progress=False)
    blocks = sorted(work_folder(out).glob("*.block"))
    content_of = blocks[7].read_bytes()
    damaged = {
        "flipped": content_of[:900] + bytes([content_of[900] ^ 1]) + content_of[901:],
        "empty": b"",
        # sound, but of another place
        "swapped": blocks[8].read_bytes(),
    }[fault]
    blocks[7].write_bytes(damaged)
    mapped(mapper, folder, tmp_path / "maps")
    assert content(tmp_path / "maps") == expected
    assert "damaged" in caplog.text


@pytest.mark.promise("C45")
def test_a_block_is_of_one_map_and_one_name(tmp_path):
    """A sound block that somebody copied or renamed is none."""
    one, other = BlockStore(tmp_path / "one.work", {"model": 1}), BlockStore(tmp_path / "other.work", {"model": 2})
    for store in (one, other):
        store.open()
        store.save("block-0", {"label": np.full((2, 3), 7, np.uint8)})
    assert one.load("block-0")["label"].tolist() == [[7] * 3] * 2 and one.load("block-1") is None
    for target in (other.folder / "block-0.block", one.folder / "block-1.block"):
        target.write_bytes((one.folder / "block-0.block").read_bytes())
    assert other.load("block-0") is None and one.load("block-1") is None and one.load("block-0") is not None


@pytest.mark.promise("C48")
def test_files_of_others_are_not_replaced(folder, tmp_path):
    """Blocks beside an output give no leave to replace what somebody else put there."""
    out = tmp_path / "map.tif"
    mapper = color_mapper()
    mapper.write(folder / "1.tif", out, work=Work({}, "blocks"), progress=False)
    out.write_text("mine")
    with pytest.raises(ConfigError, match="map.tif exists; expected a new path, or overwrite"):
        mapper.write(folder / "1.tif", out, work=Work({}), progress=False)
    assert out.read_text() == "mine"
    mapper.write(folder / "1.tif", out, work=Work({}), overwrite=True, progress=False)
    assert out.read_bytes() != b"mine"
    # complete: nothing is left to do, and a map that was changed since is somebody's own
    before = out.stat().st_mtime_ns
    mapper.write(folder / "1.tif", out, work=Work({}), progress=False)
    assert out.stat().st_mtime_ns == before
    out.write_text("mine")
    with pytest.raises(ConfigError, match="map.tif exists"):
        mapper.write(folder / "1.tif", out, work=Work({}), progress=False)


@pytest.mark.promise("C35")
def test_one_bad_scene(folder, expected, tmp_path):
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for path in folder.iterdir():
        (scenes / path.name).write_bytes(path.read_bytes())
    good = (scenes / "1.tif").read_bytes()
    (scenes / "1.tif").write_bytes(good[:900])
    (scenes / "3.tif").write_text("no image")
    with pytest.raises(RasterError, match="1.tif"):
        mapped(color_mapper(), scenes, tmp_path / "stops", report=tmp_path / "stops.json")
    report = json.loads((tmp_path / "stops.json").read_text())
    assert [scene["state"] for scene in report["scenes"]] == ["mapped", "failed", *["not reached"] * 3]
    out = tmp_path / "maps"
    said: list[Outcome] = []
    outcomes = mapped(color_mapper(), scenes, out, keep_going=True, report=tmp_path / "r.json", done=said.append)
    assert [found.state for found in outcomes] == [
        "mapped",
        "failed",
        "mapped",
        "failed",
        "mapped",
    ] and said == outcomes
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["counts"] == {"mapped": 3, "shared": 0, "failed": 2, "not reached": 0}
    bad = report["scenes"][3]
    assert bad["exit_code"] == 3 and "3.tif is not an image that GDAL reads" in bad["error"] and bad["files"] == []
    kept = {name: data for name, data in content(out).items() if ".work" not in name}
    assert kept == {name: data for name, data in expected.items() if name[0] in "024"}
    # the same call again maps what is left
    (scenes / "1.tif").write_bytes(good)
    (scenes / "3.tif").write_bytes((folder / "3.tif").read_bytes())
    before = (out / "0.tif").stat().st_mtime_ns
    mapped(color_mapper(), scenes, out, keep_going=True)
    assert content(out) == expected and (out / "0.tif").stat().st_mtime_ns == before


@pytest.mark.parametrize("keep_going", [False, True])
def test_outputs_that_go_while_the_call_goes_on(folder, expected, tmp_path, keep_going):
    out, report = tmp_path / "maps", tmp_path / "report.json"
    said: list[Outcome] = []

    def done(outcome: Outcome) -> None:
        said.append(outcome)
        if len(said) == 2:
            out.rename(tmp_path / "away")

    def call() -> list[Outcome]:
        return mapped(color_mapper(), folder, out, keep_going=keep_going, report=report, done=done)

    if keep_going:
        assert [found.state for found in call()] == ["failed", "failed", "mapped", "mapped", "mapped"]
    else:
        with pytest.raises(ResourceError, match="0.tif was written and is gone; expected it to stay"):
            call()
    bad = json.loads(report.read_text())["scenes"][0]
    assert bad["state"] == "failed" and bad["exit_code"] == 7 and bad["files"] == []
    # the same call again maps what is missing
    mapped(color_mapper(), folder, out)
    assert content(out) == expected


class Team:
    """Threads in the place of processes."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.values: list[Any] = [None] * world_size
        self.barrier = threading.Barrier(world_size)

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        found: list[Any] = [None] * self.world_size

        def one(rank: int) -> None:
            try:
                found[rank] = work(Member(self, rank))
            except BaseException as error:
                found[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        return found


class Member:
    def __init__(self, team: Team, rank: int) -> None:
        self.team, self.rank, self.world_size = team, rank, team.world_size

    def gather(self, value: Any) -> list[Any]:
        self.team.values[self.rank] = list(value)
        self.team.barrier.wait(60)
        found = list(self.team.values)
        self.team.barrier.wait(60)
        return found


@pytest.mark.promise("C45")
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_every_scene(folder, expected, tmp_path, world_size):
    models = [ColorModel() for _ in range(world_size)]
    alone = ColorModel()
    mapped(color_mapper(alone), folder, tmp_path / "alone")
    found = Team(world_size).run(
        lambda member: mapped(color_mapper(models[member.rank]), folder, tmp_path / "maps", processes=member)
    )
    assert content(tmp_path / "maps") == expected
    assert all(outcome.state == "mapped" for outcome in found[0])
    passes = [len(model.batches) for model in models]
    # shared, with little done twice
    assert min(passes) > 0.5 * max(passes) and sum(passes) < 1.6 * len(alone.batches)
    # every forward pass is one of those of one process
    assert {shape for model in models for shape in model.batches} <= set(alone.batches)


def test_a_bad_scene_among_processes(folder, tmp_path):
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for path in folder.iterdir():
        (scenes / path.name).write_bytes(path.read_bytes())
    (scenes / "2.tif").write_text("no image")

    def work(member: Any) -> Any:
        return mapped(color_mapper(), scenes, tmp_path / "maps", processes=member, keep_going=True)

    found = Team(2).run(work)
    assert [outcome.state for outcome in found[0]] == ["mapped", "mapped", "failed", "mapped", "mapped"]
    assert not (tmp_path / "maps" / "2.tif").exists() and (tmp_path / "maps" / "4.tif").exists()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_make_blocks_and_a_last_call_the_maps(folder, expected, tmp_path, order):
    out = tmp_path / "maps"
    for number in order:
        outcomes = mapped(color_mapper(), folder, out, shard=Shard(number, 3))
        assert {outcome.state for outcome in outcomes} == {"shared"}
        assert not list(out.glob("*.tif"))
    last = ColorModel()
    mapped(color_mapper(last), folder, out)
    assert content(out) == expected and last.batches == []


def test_what_a_shard_is_called():
    assert Shard.of("1/1") == (0, 1) and Shard.of("20/20") == (19, 20)
    for wrong in ("0/3", "4/3", "1", "a/b", "-1/3", "1/3/5", "", "1/" + "9" * 5000):
        with pytest.raises(ConfigError, match="--shard has a wrong value; expected i/n with i from 1 to n, got"):
            Shard.of(wrong)


class Stop(Exception):
    pass


def interrupted(mapper: Any, method: str, after: int) -> Any:
    """Stops a method of the store after some calls."""
    own, count = getattr(BlockStore, method), 0

    def stopping(self: BlockStore, *arguments: Any) -> Any:
        nonlocal count
        if count == after:
            raise Stop
        count += 1
        return own(self, *arguments)

    return stopping


def test_maps_from_words_are_resumed_and_shared(tmp_path, monkeypatch):
    """Cells, the graph of the whole scene and blocks: stopped after some numbers of finished pieces, and by two."""
    # what is said of the time that it takes takes time
    monkeypatch.setattr(zero_shot_plan, "_graph_seconds", lambda *arguments: 0.0)
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for number, (width, height) in enumerate(((90, 70), (40, 60))):
        write_synthetic_scene(scenes / f"{number}.tif", width=width, height=height, seed=number)
    mapper = drseg.zero_shot("tiny", refine=True)
    words = mapper.mapper("roof; road; tree", scores=True)
    mapped(words, scenes, tmp_path / "plain")
    expected = content(tmp_path / "plain")
    assert len(expected) == 16 and not any(".work" in name for name in expected)
    seen = 0
    for after in (1, 5, 8, 9, 30):
        out = tmp_path / f"stopped{after}"
        with monkeypatch.context() as patch:
            patch.setattr(BlockStore, "save", interrupted(mapper, "save", after))
            try:
                mapped(words, scenes, out)
                break
            except Stop:
                seen += 1
        mapped(words, scenes, out)
        assert content(out) == expected
    # rows of windows, the spread logits, and the block, of two scenes
    assert seen == 4

    def work(member: Any) -> Any:
        return mapped(words, scenes, tmp_path / "shared", processes=member)

    found = Team(2).run(work)
    assert [outcome.state for outcome in found[0]] == ["mapped", "mapped"]
    assert content(tmp_path / "shared") == expected
    for number in range(2):
        mapped(words, scenes, tmp_path / "shards", shard=Shard(number, 2))
    assert any((tmp_path / "shards").glob("*.work/cells-*.block"))
    mapped(words, scenes, tmp_path / "shards")
    assert content(tmp_path / "shards") == expected


def test_super_tiles_are_shared(tmp_path):
    write_synthetic_scene(tmp_path / "scene.tif", width=200, height=120)
    options = {"steps": 1, "radius": 1.0, "super_tile": 150}
    words = drseg.zero_shot("tiny", **options).mapper("roof; road; tree")
    expected = words.write(tmp_path / "scene.tif", tmp_path / "plain.tif", progress=False).classes.read_bytes()
    made: list[int] = []
    for step in ("cells", "graph", "blocks"):
        for part in range(2):
            work = Work(words.facts, step, part, 2, alone=False)
            words.write(tmp_path / "scene.tif", tmp_path / "map.tif", work=work, progress=False)
            made.append(len(list((tmp_path / "map.tif.work").glob("graph-*"))))
    # each made a part of them
    assert made[:2] == [0, 0] and 0 < made[2] < made[3]
    last = Work(words.facts, alone=False)
    assert (
        words.write(tmp_path / "scene.tif", tmp_path / "map.tif", work=last, progress=False).classes.read_bytes()
        == expected
    )


@pytest.mark.promise("C45")
@pytest.mark.parametrize("overlap", [0, 8, 20, 28])
def test_any_blocks_have_the_same_bits(overlap):
    image = torch.randint(0, 256, (3, 150, 130), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    predictor = Predictor(ColorModel(), NAMES, mode="tile", tile_size=32, overlap=overlap, batch_size=3)
    blocks, asked = predictor.blocks(150, 130), []

    def read(*box: int) -> Any:
        asked.append(box)
        top, bottom, left, right = box
        return image[:, top:bottom, left:right], None

    def found(wanted: Sequence[int] | None) -> dict[Any, list[torch.Tensor]]:
        pieces = predictor.pieces(read, 150, 130, wanted=wanted)
        return {(p.top, p.left): [*(part.clone() for part in p.prediction), p.score_of(1).clone()] for p in pieces}

    whole = found(None)
    assert [(block.top, block.left) for block in blocks] == list(whole)
    count = np.zeros((150, 130), int)
    for block in blocks:
        count[block.top : block.bottom, block.left : block.right] += 1
    assert (count == 1).all()
    draw = random.Random(0)
    for _ in range(5):
        wanted = sorted(draw.sample(range(len(blocks)), len(blocks) // 3))
        asked.clear()
        some = found(wanted)
        assert [(blocks[n].top, blocks[n].left) for n in wanted] == list(some)
        assert all(torch.equal(a, b) for place in some for a, b in zip(some[place], whole[place], strict=True))
        assert asked == [tuple(box) for box in predictor.reads(150, 130, wanted=wanted)]


def quiet(mapper: Mapper, scenes: Sequence[Scene], **how: Any) -> list[Outcome]:
    return map_scenes(mapper, scenes, explain=explain, progress=False, **how)


def test_a_map_is_of_one_call_at_a_time(folder: Path, tmp_path: Path) -> None:
    mapper, scenes = color_mapper(), with_outputs(list_scenes([str(folder)]), f"{tmp_path}/")
    busy, line = work_folder(str(scenes[2].out)), "2.tif is being written by another call; expected one at a time"
    with BlockStore(busy, {}).claim(alone=True):
        kept = busy / "block-0.block"
        kept.write_text("of the other call")
        outcomes = quiet(mapper, scenes, keep_going=True)
        assert [found.state for found in outcomes] == ["mapped", "mapped", "failed", "mapped", "mapped"]
        assert outcomes[2].error is not None and line in outcomes[2].error and outcomes[2].exit_code == 2
        # nothing of it is touched, and blocks are not made for it either
        assert kept.read_text() == "of the other call" and not Path(str(scenes[2].out)).exists()
        with pytest.raises(ConfigError, match=line):
            quiet(mapper, scenes, shard=Shard(0, 2))
    # those that make blocks are at it together, and nobody writes the map meanwhile
    with BlockStore(busy, {}).claim(alone=False):
        kept.unlink()
        quiet(mapper, scenes, shard=Shard(0, 1))
        with pytest.raises(ConfigError, match=line):
            quiet(mapper, scenes)
    assert all(found.state == "mapped" for found in quiet(mapper, scenes))
    assert not list(tmp_path.glob("*.work"))


def test_a_claim_goes_on_in_a_folder_that_is_begun_anew(tmp_path: Path) -> None:
    place = tmp_path / "map.tif.work"
    old = BlockStore(place, {"model": 1})
    old.open()
    old.save("block-0", {"label": np.zeros(1)})
    store, other = BlockStore(place, {"model": 2}), BlockStore(place, {"model": 2})
    with store.claim(alone=True):
        store.open()
        assert not list(place.glob("*.block"))
        with pytest.raises(ConfigError, match="map.tif is being written by another call"), other.claim(alone=False):
            pass
    with other.claim(alone=False), store.claim(alone=False):
        pass


def test_a_call_that_ends_leaves_what_another_has_begun(folder: Path, tmp_path: Path) -> None:
    scenes = with_outputs(list_scenes([str(folder)]), f"{tmp_path}/")
    with contextlib.ExitStack() as other:

        def done(outcome: Outcome) -> None:
            if outcome.image.endswith("4.tif"):
                other.enter_context(BlockStore(work_folder(str(scenes[1].out)), {}).claim(alone=True))

        quiet(color_mapper(), scenes, done=done)
        assert [path.name for path in tmp_path.glob("*.work")] == ["1.tif.work"]
