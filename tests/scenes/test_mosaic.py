# SPDX-License-Identifier: Apache-2.0
"""Maps of scenes that overlap agree there, to the last bit, whoever makes them and however often they are stopped."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import drseg_core as drseg
from drseg_core.data.ground import projected
from drseg_core.evaluation import inference
from drseg_core.scenes import mosaic as mosaics
from drseg_core.scenes import zero_shot_plan
from drseg_core.scenes.block_store import BlockStore
from drseg_core.scenes.many import Shard
from drseg_core.scenes.mosaic import Grid, neighbours
from drseg_core.scenes.synthetic import write_synthetic_scene
from tests.scenes.test_many import Stop, Team, color_mapper, content, interrupted, mapped, narrow_strips
from tests.scenes.test_predict import NORTH_UP, write

__all__ = ["narrow_strips"]
rasterio = pytest.importorskip("rasterio")
from rasterio.transform import Affine  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
torch.set_num_threads(1)
# row and column of the first pixel, and size, on one grid: three overlap in one place, the last lies apart
PLACES = {"a": (0, 0, 70, 90), "b": (30, 60, 80, 70), "c": (40, -20, 60, 100), "d": (500, 500, 40, 40)}
OPTIONS: dict[str, Any] = {"scores": False, "threshold": None}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise that has nothing to do with that of another scene: alone, each says something else."""
    place = tmp_path_factory.mktemp("mosaic")
    generator = np.random.default_rng(0)
    for name, (top, left, height, width) in PLACES.items():
        image = generator.integers(1, 256, (3, height, width)).astype(np.uint8)
        image[:, 45:60, 70:85] = 0
        transform = NORTH_UP @ Affine.translation(left, top)
        write(place / f"{name}.tif", image, crs="EPSG:32632", transform=transform, nodata=0)
    return place


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


@pytest.fixture(scope="module")
def maps(scenes, tmp_path_factory) -> Path:
    """Those that agree, and those left apart."""
    out = tmp_path_factory.mktemp("maps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "SUMS_BYTES", 1)
        patch.setattr(inference, "STRIP_STEP", 48)
        for name in ("blended", "apart"):
            mapped(color_mapper(**OPTIONS), scenes, out / name, mosaic=name == "blended")
    return out


@pytest.fixture
def blended(maps) -> Path:
    return maps / "blended"


def on_one_grid(folder: Path, name: str, end: str) -> np.ndarray:
    """A map on a grid that holds all but the last scene, 255 elsewhere."""
    top, left, height, width = PLACES[name]
    value = read(folder / f"{name}{end}")
    found = np.full((len(value), 120, 160), 255, np.uint8)
    found[:, top : top + height, left + 20 : left + 20 + width] = value
    return found


def test_maps_agree_where_they_overlap(maps, blended):
    for end, least in ((".tif", 0.2), ("_probabilities.tif", 0.2)):
        differ = []
        for folder in (blended, maps / "apart"):
            a, b, c = (on_one_grid(folder, name, end) for name in "abc")
            pairs = [(a, b), (a, c), (b, c)]
            both = [(one != 255) & (other != 255) for one, other in pairs]
            assert all(some.any() for some in both)
            differ.append([((one != other) & some).sum() for (one, other), some in zip(pairs, both, strict=True)])
        assert differ[0] == [0, 0, 0]
        # apart they do not
        assert all(n > least * some.sum() for n, some in zip(differ[1], both, strict=True))
    # what has no neighbour is what it was, and where a scene is alone it is what it said
    alone = {name: data for name, data in content(maps / "apart").items() if name[0] == "d"}
    assert alone == {name: data for name, data in content(blended).items() if name[0] == "d"} and len(alone) == 8
    assert not list(blended.glob("*.work"))
    levels = {name: on_one_grid(maps / "apart", name, "_probabilities.tif") for name in "abc"}
    known = np.stack([level[0] != 255 for level in levels.values()])
    single = known.sum(0) == 1
    for name in "abc":
        own = single & (levels[name][0] != 255)
        assert own.any()
        assert np.array_equal(on_one_grid(blended, name, "_probabilities.tif")[:, own], levels[name][:, own])


@pytest.mark.promise("C36")
def test_the_blend_is_the_weighted_mean(maps, blended):
    """By the formula, from what each scene says alone; in steps of 0.004."""
    total, weights, count = np.zeros((4, 120, 160)), np.zeros((120, 160)), np.zeros((120, 160), int)
    for name in "abc":
        top, left, height, width = PLACES[name]
        level = on_one_grid(maps / "apart", name, "_probabilities.tif").astype(float)
        row, column = np.arange(120)[:, None] - top, np.arange(160) - left - 20
        edge = 1.0 + np.minimum(np.minimum(row, height - 1 - row), np.minimum(column, width - 1 - column))
        weight = np.where(level[0] != 255, edge, 0)
        total += weight * level
        weights += weight
        count += weight > 0
    assert count.max() == 3
    expected = total / weights.clip(1)
    for name in "abc":
        found = on_one_grid(blended, name, "_probabilities.tif").astype(float)
        here = (found[0] != 255) & (count > 1)
        assert here.sum() > 500 and np.abs(found - expected)[:, here].max() <= 1.01
        best = expected.max(0) - np.sort(expected, 0)[-2] > 2.1
        label = on_one_grid(blended, name, ".tif")[0]
        assert np.array_equal(label[here & best], expected.argmax(0)[here & best])


@pytest.mark.promise("C45")
def test_shared_and_stopped_mosaics_have_the_same_bytes(scenes, blended, tmp_path, monkeypatch):
    expected = content(blended)
    Team(2).run(lambda team: mapped(color_mapper(**OPTIONS), scenes, tmp_path / "two", mosaic=True, processes=team))
    assert content(tmp_path / "two") == expected
    for number in range(2):
        mapped(color_mapper(**OPTIONS), scenes, tmp_path / "shards", mosaic=True, shard=Shard(number, 2))
    mapped(color_mapper(**OPTIONS), scenes, tmp_path / "shards", mosaic=True)
    assert content(tmp_path / "shards") == expected
    for method, after in (("save", 9), ("finishing", 2)):
        out = tmp_path / f"{method}{after}"
        with monkeypatch.context() as patch:
            patch.setattr(BlockStore, method, interrupted(None, method, after))
            with pytest.raises(Stop):
                mapped(color_mapper(**OPTIONS), scenes, out, mosaic=True)
        mapped(color_mapper(**OPTIONS), scenes, out, mosaic=True)
        assert content(out) == expected


def test_a_neighbour_that_fails_is_blended_later(scenes, blended, tmp_path):
    place, out = tmp_path / "scenes", tmp_path / "maps"
    place.mkdir()
    for path in scenes.iterdir():
        (place / path.name).write_bytes(path.read_bytes())

    mapper = color_mapper(**OPTIONS)

    def write_but_b(image: Any, to: Any, **how: Any) -> Any:
        if Path(image).stem == "b" and how["work"].step == "blocks":
            raise RuntimeError("planted")
        return mapper.write(image, to, **how)

    outcomes = mapped(mapper._replace(write=write_but_b), place, out, mosaic=True, keep_going=True)
    assert [found.state for found in outcomes] == ["mapped", "failed", "mapped", "mapped"]
    before = (out / "a.tif").read_bytes()
    assert before != (blended / "a.tif").read_bytes()
    mapped(mapper, place, out, mosaic=True, keep_going=True)
    assert content(out) == content(blended)


def test_who_is_a_neighbour(caplog):
    def grid(left: float, top: float, side: float = 1.0, crs: str = "EPSG:32632") -> Grid:
        return Grid(rasterio.crs.CRS.from_string(crs), Affine(side, 0, left, 0, -side, -top), 100, 200)

    grids = [grid(0, 0), grid(150, 20), None, grid(200, 0), grid(50, 10, crs="EPSG:32633"), grid(0, 100)]
    found = neighbours(grids, [Path(f"{n}.tif.work") for n in range(6)])
    # what only touches shares nothing
    assert [[(Path(n.folder).name[0], *n[1:3]) for n in some] for some in found] == [
        [("1", 20, 150)],
        [("0", -20, -150), ("3", -20, 50), ("5", 80, -150)],
        [],
        [("1", 20, -50)],
        [],
        [("1", -80, 150)],
    ]
    with caplog.at_level(logging.WARNING):
        shifted, finer = grid(50.5, 0), grid(20, 0, side=0.5)
        assert neighbours([grids[0], shifted, finer], [Path(f"{n}.tif.work") for n in range(3)]) == [(), (), ()]
    assert "0.tif and 1.tif (and 2 more pairs) overlap on different grids, so their maps are left apart" in caplog.text


def test_one_ground_stored_the_other_way_is_another_grid(caplog):
    """All corners of a square lie on those of its transposed copy, the first and the last even on themselves."""

    def grid(transform: Affine) -> Grid:
        return Grid(rasterio.crs.CRS.from_epsg(32632), NORTH_UP @ transform, 80, 80)

    upright = grid(Affine.identity())
    others = {
        "transposed": Affine(0, 1, 0, 1, 0, 0),
        "turned": Affine(0, -1, 80, 1, 0, 0),
        "half a turn": Affine(-1, 0, 80, 0, -1, 80),
        # the first corner and the last lie one above the other
        "on its corner": Affine.translation(40, 0) @ Affine.rotation(45),
        "sheared": Affine(1, 0.01, 0, 0, 1, 0),
    }
    folders = [Path("one.tif.work"), Path("other.tif.work")]
    for name, transform in others.items():
        caplog.clear()
        for pair in ([upright, grid(transform)], [grid(transform), upright]):
            assert neighbours(pair, folders) == [(), ()], name
        assert caplog.text.count("overlap on different grids") == 2, name
    # turned alike they are on one grid
    turn = Affine.rotation(30)
    one, other = neighbours([grid(turn), grid(turn @ Affine.translation(50, -20))], folders)
    assert [found[1:3] for found in (*one, *other)] == [(-20, 50), (20, -50)]
    # boxes that meet while what lies in them does not
    caplog.clear()
    away = grid(Affine.translation(110, 110) @ Affine.rotation(45) @ Affine.translation(-40, -40))
    assert neighbours([upright, away], folders) == [(), ()] and caplog.text == ""


def placed(crs: str | None, left: float, top: float, side: float = 10.0, size: int = 100) -> Grid:
    system = None if crs is None else rasterio.crs.CRS.from_string(crs)
    return Grid(system, Affine(side, 0, left, 0, -side, top), size, size)


TWIN = placed("EPSG:32632", 400_000, 5_600_000)


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        # one ground in two zones: 12 degrees east at 50 degrees north
        (placed("EPSG:32632", 714_500, 5_543_500), placed("EPSG:32633", 284_500, 5_543_500), "have different CRSs"),
        (TWIN, placed("EPSG:25832", 400_500, 5_599_700), "have different CRSs"),
        (TWIN, placed("EPSG:4326", -180, 90, 1.0, 400), "have different CRSs"),
        # a strip across
        (TWIN, Grid(placed("EPSG:25832", 0, 0).crs, Affine(50, 0, 390_000, 0, -2, 5_599_700), 100, 600), "CRSs"),
        # over the date line, and around a pole
        (placed("EPSG:32660", 714_500, 5_543_500), placed("EPSG:32601", 284_500, 5_543_500), "have different CRSs"),
        (placed("EPSG:3031", -500, 500), placed("EPSG:32761", 1_999_500, 2_000_500), "have different CRSs"),
        # what only touches, lies apart, or has no place
        (TWIN, placed("EPSG:25832", 401_000, 5_600_000), None),
        (TWIN, placed("EPSG:25832", 401_000, 5_599_000), None),
        (TWIN, placed("EPSG:32633", 400_000, 5_600_000), None),
        # one coordinate, of which one does not say where
        (TWIN, placed(None, 400_500, 5_599_900), "only one of them has a CRS"),
        (TWIN, placed(None, 401_000, 5_600_000), None),
        (Grid(None, Affine.identity(), 9, 9), placed("EPSG:32632", -5, 5), None),
        (Grid(TWIN.crs, Affine.identity(), 9, 9), placed(None, -5, 5), None),
        (TWIN, placed('LOCAL_CS["site",UNIT["metre",1]]', 400_000, 5_600_000), None),
        (placed(None, 0, 0), placed(None, 500, 0), "have no CRS"),
        (placed(None, 0, 0), placed(None, 1000, 0), None),
        (Grid(None, Affine.identity(), 9, 9), Grid(None, Affine.identity(), 9, 9), None),
    ],
)
def test_scenes_that_share_ground_in_different_systems(caplog, one, other, said):
    for pair in ([one, other], [other, one]):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert neighbours(pair, [Path("one.tif.work"), Path("other.tif.work")]) == [(), ()]
        assert [record.getMessage().startswith("one.tif and other.tif overlap ") for record in caplog.records] == (
            [] if said is None else [True]
        )
        assert said is None or said in caplog.text


def test_systems_that_are_spelled_otherwise_are_one(caplog):
    spelled = rasterio.crs.CRS.from_wkt(TWIN.crs.to_wkt(version="WKT1_ESRI"))
    found = neighbours([TWIN, Grid(spelled, *TWIN[1:])], [Path("one.tif.work"), Path("other.tif.work")])
    assert [len(some) for some in found] == [1, 1] and caplog.text == ""


def test_thousands_of_tiles_in_two_systems(caplog, monkeypatch):
    """Points are brought from one system to another by few calls, and one line says it all."""
    calls = []
    monkeypatch.setattr(mosaics, "projected", lambda *words: calls.append(1) or projected(*words))
    tiles = [placed(crs, 400_000 + 1000 * (n % 30), 5_600_000 - 1000 * (n // 30)) for n in range(900)
             for crs in ("EPSG:32632", "EPSG:25832")]  # fmt: skip
    neighbours(tiles, [Path(f"{n}.tif.work") for n in range(len(tiles))])
    assert len(calls) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "0.tif and 1.tif (and 899 more pairs) overlap and have different CRSs, so their maps are left apart; "
        "gdalwarp -t_srs -tap makes one grid"
    ]


def test_one_line_says_all_pairs_of_a_kind(caplog):
    """Their number grows with the square of that of the scenes."""
    shifted = [placed("EPSG:32632", 400_000 + 0.5 * n, 5_600_000) for n in range(8)]
    nowhere = [placed(None, 400_000 + n, 5_600_000) for n in range(3)]
    neighbours([*shifted, *nowhere], [Path(f"{n}.tif.work") for n in range(11)])
    assert [record.getMessage().partition(", so ")[0] for record in caplog.records] == [
        "0.tif and 1.tif (and 27 more pairs) overlap on different grids",
        "8.tif and 9.tif (and 2 more pairs) overlap and have no CRS",
        "0.tif and 8.tif (and 23 more pairs) overlap and only one of them has a CRS",
    ]


def test_neighbours_of_thousands_of_tiles():
    """Pairs that lie apart are not looked at: of 3000 tiles there are 4.5 million."""

    class System:
        compared = 0

        def __eq__(self, other: object) -> bool:
            System.compared += 1
            assert System.compared < 4 * 3000
            return isinstance(other, System)

        __hash__ = None  # type: ignore[assignment]

    grids = [Grid(System(), Affine(1, 0, 50 * (n % 60), 0, -1, -50 * (n // 60)), 55, 55) for n in range(3000)]
    found = neighbours(grids, [Path(f"{n}.tif.work") for n in range(3000)])
    assert {len(some) for some in found} == {3, 5, 8}
    assert [Path(some.folder).name for some in found[0]] == ["1.tif.work", "60.tif.work", "61.tif.work"]
    assert System.compared > 0


def test_maps_from_words_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(zero_shot_plan, "_graph_seconds", lambda *arguments: 0.0)
    scenes, places = tmp_path / "scenes", {"a": (0, 60), "b": (40, 100)}
    scenes.mkdir()
    write_synthetic_scene(tmp_path / "whole.tif", width=100, height=60)
    with rasterio.open(tmp_path / "whole.tif") as whole:
        for name, (left, right) in places.items():
            part = whole.read()[:, :, left:right]
            transform = whole.transform @ Affine.translation(left, 0)
            write(scenes / f"{name}.tif", part, crs=whole.crs, transform=transform)
    mapper = drseg.zero_shot("tiny").mapper("roof; road; tree", probabilities=True)
    for mosaic in (True, False):
        mapped(mapper, scenes, tmp_path / "maps", mosaic=mosaic, overwrite=True)
        one, other = (read(tmp_path / "maps" / f"{name}_probabilities.tif") for name in places)
        assert np.array_equal(one[:, :, 40:], other[:, :, :20]) == mosaic
